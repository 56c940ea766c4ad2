# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventories that sites start from: they parse, their models can be launched, and a dry run on hosts goes through.

The hosts are real and cut off; the bundle has the right names and next to nothing in it, because nothing is sent.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import plays
import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.images import ArchiveFile, ImageRequest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from engines import tar_of
from sites import REPOSITORY, make_model, make_wheel

sys.path.insert(0, str(REPOSITORY / "tests"))
from testbed.hosts import Testbed
from testbed.spec import HostSpec

INVENTORIES = REPOSITORY / "inventories"
UIDS = {
    "four-models": {
        "gpu-1": ["bce-embedding-base_v1", "bce-reranker-base_v1", "CosyVoice-300M", "SenseVoiceSmall"],
    },
    "rag": {"gpu-1": ["bge-m3", "reranker", "qwen3-4b-chat"]},
    "fleet": {
        "gpu-1": ["bge-m3", "bge-reranker-v2-m3"],
        "gpu-2": ["bge-m3"],
        "gpu-3": ["qwen3-30b-chat"],
        "cpu-1": ["bge-m3"],
    },
}
"""What each host of an inventory serves; what is switched off is not there."""
PLACES = {
    "four-models": {"gpu-1": [(0,), (0,), (0,), (1,)]},
    "rag": {"gpu-1": [(0,), (0,), (0,)]},
    # The only GPU of gpu-2's server is the host's second one, named by its UUID.
    "fleet": {"gpu-1": [(0,), (0,)], "gpu-2": [(0,)], "gpu-3": [(0, 1)], "cpu-1": [()]},
}
"""The GPUs of these models, as the server numbers them."""
ALTERNATIVES = {"rag": {"reranker": ["bge-reranker-base on sentence_transformers"]}}
"""What is launched instead of a model of an inventory that cannot be."""
NAMES = ("models", "gpus", "image", "backend", "port")


def play(place: Path, tasks: List[Dict[str, Any]]) -> Path:
    """A playbook with these tasks for every host, that talks to none of them."""
    path = place / "play.json"
    content = {"hosts": "xinference", "gather_facts": False, "connection": "local", "tasks": tasks}
    path.write_text(json.dumps([content]))
    return path


def variables(name: str, place: Path) -> Dict[str, Dict[str, Any]]:
    """What Ansible makes of an inventory, by host."""
    shown = ", ".join(f"'{each}': xinference_{each} | default(none)" for each in NAMES)
    keep = {
        "content": "{{ {" + shown + "} | to_json }}",
        "dest": str(place / "{{ inventory_hostname }}.json"),
        "mode": "0600",
    }
    tasks = [{"ansible.builtin.copy": keep, "become": False, "vars": {"ansible_python_interpreter": sys.executable}}]
    done = plays.run("-i", str(INVENTORIES / name), str(play(place, tasks)), cwd=place)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    return {path.stem: json.loads(path.read_text()) for path in place.glob("*.json") if path.name != "play.json"}


@pytest.mark.parametrize("name", sorted(UIDS))
def test_its_models_can_be_launched_where_it_says(name: str, tmp_path: Path) -> None:
    hosts = variables(name, tmp_path)
    specs = {host: parse(told["models"], told["gpus"]) for host, told in hosts.items()}
    assert {host: [spec.uid for spec in found] for host, found in specs.items()} == UIDS[name]
    assert {host: [spec.gpu_idx for spec in found] for host, found in specs.items()} == PLACES[name]
    alternatives = {spec.uid: [one.words for one in spec.fallbacks] for found in specs.values() for spec in found}
    assert {uid: words for uid, words in alternatives.items() if words} == ALTERNATIVES.get(name, {})
    sources, problems = gather({host: told["models"] for host, told in hosts.items()})
    assert problems == [] and all("modelscope" in source.content or "url" in source.content for source in sources)


def make_image(path: Path, reference: str) -> ImageRequest:
    """An image of one tiny layer under some name."""
    layer = tar_of({"program": b"x" * 100})
    digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest]},
            "author": reference,
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]}]
    path.write_bytes(tar_of({name: config, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()}))
    return ImageRequest(reference, ArchiveFile(path))


def make_bundle(name: str, place: Path) -> Path:
    """A bundle with everything an inventory names, and nothing in it."""
    hosts = variables(name, place)
    sources, _problems = gather({host: told["models"] for host, told in hosts.items()})
    requests = [Request("models", one.name, str(make_model(place / one.name, {"weights": 100}))) for one in sources]
    requests.append(Request("wheels", "host", str(make_wheel(place / "wheels", "kindly").parent)))
    names = sorted({told["image"] for told in hosts.values()})
    images = [make_image(place / f"image-{number}.tar", each) for number, each in enumerate(names)]
    write_bundle(place / "bundle", requests, images=images)
    return place / "bundle"


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    """Hosts by the names of the inventories. The second GPU of gpu-2 has the UUID that its inventory names."""
    made = Testbed("inventories")
    hosts = [HostSpec(name, gpus=2) for name in ("gpu-1", "gpu-2", "gpu-3")]
    try:
        made.up([*hosts, HostSpec("cpu-1", gpus=0, nvidia=False)])
        yield made
    finally:
        made.down()


@pytest.mark.parametrize("name", sorted(UIDS))
def test_a_dry_run_on_hosts_goes_through(name: str, bed: Testbed, tmp_path: Path) -> None:
    bundle = make_bundle(name, tmp_path)
    reach = ["-i", str(INVENTORIES / name), "-i", str(bed.inventory), "-l", ",".join(UIDS[name])]
    done = plays.run(
        *reach, "--check", "-e", f"xinference_bundle_dir={bundle}", str(REPOSITORY / "playbooks/site.yml"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:]
    count = len(UIDS[name])
    assert f"Ready: {count} of {count} host" in done.stdout
    for host, uids in UIDS[name].items():
        assert f"changed: [{host}]" in done.stdout and all(uid in done.stdout for uid in uids)
        assert bed.hosts[host].exec("sh", "-c", "ls /opt/xinference /srv/xinference /data 2>/dev/null || true") == ""


def test_a_hand_made_site_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text(
        'XINFERENCE_GPUS="0,1"\nMODELS_VOLUMES_DIRECTORY=/data/docker_models\n'
        "EMBEDDING_INSTALL_ENABLE=true\nEMBEDDING_GPU=1\nTTS_INSTALL_ENABLE=false\nTTS_GPU=0\n"
    )
    names = {"config_ini": tmp_path / "config.ini", "address": "192.0.2.5", "site": tmp_path / "site"}
    words = [word for name, value in names.items() for word in ("-e", f"{name}={value}")]
    for changed in (2, 0):
        done = plays.run("-i", "localhost,", "playbooks/import.yml", *words)
        assert done.returncode == 0 and f"changed={changed}" in done.stdout, done.stdout
    listed = subprocess.run(
        ["ansible-inventory", "-i", str(tmp_path / "site"), "--host", "gpu-1"],
        capture_output=True,
        text=True,
        check=True,
    )
    host = json.loads(listed.stdout)
    assert (host["ansible_host"], host["xinference_gpus"], host["xinference_root"]) == (
        *("192.0.2.5", [0, 1]),
        "/data/docker_models/xinference",
    )
    assert [(model["model_uid"], model["gpus"], model.get("enabled")) for model in host["xinference_models"]] == [
        ("bce-embedding-base_v1", [1], None),
        ("CosyVoice-300M", [0], False),
    ]
