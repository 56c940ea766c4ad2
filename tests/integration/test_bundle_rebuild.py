# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bundle through its modules and its playbook: built, built again, built elsewhere, damaged, read by skopeo."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator

import plays
import pytest
from ad_hoc import run_module
from hub import Hub, Repo

WEIGHTS = random.Random(2).randbytes(5_000_000)
COMMIT = "a" * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with a few megabytes of weights."""
    directory = tmp_path / "model"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "1_Pooling" / "config.json").write_text("[]")
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    return directory


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory on another file system than the model, where no hard link can lead."""
    base = Path("/dev/shm")
    if not base.is_dir() or not os.access(str(base), os.W_OK):
        pytest.skip("there is no second file system to write to")
    directory = base / f"airgap-xinference-{os.getpid()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(str(directory))


def build(bundle: Path, model: Path, check: bool = False) -> Dict[str, Any]:
    """Put the model into a bundle."""
    wanted = {"name": "tiny", "path": str(model), "revision": "r1", "source": "modelscope:org/tiny"}
    files = {"kind": "tools", "name": "pooling", "path": str(model / "1_Pooling"), "annotations": {"a.b": "c"}}
    return run_module("xinference_bundle", {"path": str(bundle), "models": [wanted], "files": [files]}, check=check)


def digests(result: Dict[str, Any]) -> Dict[str, str]:
    """Digest by artifact."""
    return {f"{item['kind']}/{item['name']}": item["digest"] for item in result["artifacts"]}


def test_building_again_hashes_nothing_and_building_anew_gives_the_same(tmp_path: Path, model: Path) -> None:
    size = len(WEIGHTS) + 10
    first = build(tmp_path / "bundle", model)
    assert first["changed"] and first["hashed_bytes"] == first["linked_bytes"] == size
    second = build(tmp_path / "bundle", model)
    assert not second["changed"]
    assert {key: second[key] for key in ("hashed_bytes", "linked_bytes", "copied_bytes", "dropped_bytes")} == {
        "hashed_bytes": 0,
        "linked_bytes": 0,
        "copied_bytes": 0,
        "dropped_bytes": 0,
    }
    assert not build(tmp_path / "bundle", model, check=True)["changed"]
    copied = tmp_path / "other-machine" / "model"
    shutil.copytree(str(model), str(copied))
    anew = build(tmp_path / "other-machine" / "bundle", copied)
    assert digests(first) == digests(second) == digests(anew)
    index = "index.json"
    assert (tmp_path / "bundle" / index).read_bytes() == (tmp_path / "other-machine/bundle" / index).read_bytes()


def test_on_another_file_system_files_are_copied_once(elsewhere: Path, tmp_path: Path, model: Path) -> None:
    first = build(elsewhere / "bundle", model)
    assert first["copied_bytes"] == first["hashed_bytes"] == len(WEIGHTS) + 10 and first["linked_bytes"] == 0
    assert build(elsewhere / "bundle", model)["hashed_bytes"] == 0
    assert digests(first) == digests(build(tmp_path / "bundle", model))


def test_damage_is_named_and_repaired(tmp_path: Path, model: Path) -> None:
    bundle = tmp_path / "bundle"
    build(bundle, model)
    sound = run_module("xinference_bundle_info", {"path": str(bundle), "verify": True})
    assert not sound["failed"] and sound["hashed_bytes"] == 0
    assert [item["name"] for item in sound["artifacts"]] == ["tiny", "pooling"]
    largest = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[2_000_000] ^= 1
    largest.unlink()
    largest.write_bytes(content)
    damaged = run_module("xinference_bundle_info", {"path": str(bundle), "verify": True})
    assert damaged["failed"] and largest.name in damaged["msg"] and "models/tiny: model.safetensors" in damaged["msg"]
    assert build(bundle, model)["changed"]
    assert not run_module("xinference_bundle_info", {"path": str(bundle), "verify": True})["failed"]


def test_skopeo_reads_and_verifies_the_bundle(tmp_path: Path, model: Path) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    build(tmp_path / "bundle", model)
    for name in ("models/tiny", "tools/pooling"):
        subprocess.run(
            [skopeo, "copy", "--quiet", "--insecure-policy", f"oci:{tmp_path}/bundle:{name}", f"dir:{tmp_path}/out"],
            check=True,
            timeout=60,
        )
        assert json.loads((tmp_path / "out" / "manifest.json").read_text())["layers"]


def play(
    tmp_path: Path, inventory: Dict[str, Any], *options: str, **variables: Any
) -> subprocess.CompletedProcess[str]:
    """Run the playbook on an inventory, with wheels that cost a second instead of a minute."""
    (tmp_path / "hosts.json").write_text(json.dumps(inventory))
    small = {
        "xinference_bundle_dir": str(tmp_path / "bundle"),
        "xinference_bundle_native_python": sys.executable,
        "xinference_bundle_native_requirements": ["idna==3.10", "certifi"],
        "xinference_bundle_native_exclude": ["certifi"],
        "xinference_bundle_host_requirements": ["idna==3.10"],
        **variables,
    }
    words = ["-i", str(tmp_path / "hosts.json"), "-e", json.dumps(small), "playbooks/bundle.yml", *options]
    return plays.run(*words, environment={"MODELSCOPE_HOME": str(tmp_path / "modelscope-home")})


def test_the_playbook_takes_the_models_of_all_hosts_and_changes_nothing_twice(tmp_path: Path, model: Path) -> None:
    local = {"model_uid": "a", "source": {"path": str(model), "name": "tiny"}}
    with Hub() as hub:
        hub.repos["org/remote"] = Repo({COMMIT: {"config.json": b"{}", "model.gguf": WEIGHTS}}, {"master": COMMIT})
        remote = {"model_uid": "b", "source": {"modelscope": "org/remote"}}
        inventory = {
            "xinference": {
                "hosts": {
                    "gpu1": {"ansible_host": "192.0.2.1", "xinference_models": [local, remote]},
                    "gpu2": {"ansible_host": "192.0.2.2", "xinference_models": [local], "ansible_become": True},
                    "gpu3": {"ansible_host": "192.0.2.3"},
                }
            }
        }
        first = play(tmp_path, inventory, xinference_bundle_modelscope_endpoint=hub.endpoint)
        assert first.returncode == 0, first.stdout
        for words in ("models/remote", COMMIT, "models/tiny", "wheels/host", "wheels/server", "4.8 MiB"):
            assert words in first.stdout
        assert "org/remote" in first.stdout and "4.8 MiB of 4.8 MiB, 2 of 2 files" in first.stdout
        hub.forget()
        second = play(tmp_path, inventory, xinference_bundle_modelscope_endpoint=hub.endpoint)
        assert second.returncode == 0 and "changed=0" in second.stdout, second.stdout
        assert "0 B new, 0 B hashed" in second.stdout and hub.served == []
    info = run_module("xinference_bundle_info", {"path": str(tmp_path / "bundle"), "verify": True})
    assert info["hashed_bytes"] == 0
    names = {f"{item['kind']}/{item['name']}": item["files"] for item in info["artifacts"]}
    assert names == {"models/remote": 2, "models/tiny": 3, "wheels/host": 1, "wheels/server": 3}


def test_the_playbook_leaves_the_server_wheels_out_where_no_host_is_native(tmp_path: Path, model: Path) -> None:
    host = {"xinference_backend": "docker", "xinference_models": [{"model_uid": "a", "source": {"path": str(model)}}]}
    inventory = {"xinference": {"hosts": {"gpu1": host}}}
    foretold = play(tmp_path, inventory, "--check")
    assert foretold.returncode == 0 and "changed=1" in foretold.stdout, foretold.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hosts.json", "model"]
    ended = play(tmp_path, inventory)
    assert ended.returncode == 0 and "wheels/server" not in ended.stdout, ended.stdout
    assert "models/model" in ended.stdout
    assert "changed=0" in play(tmp_path, inventory, "--check").stdout


def test_the_playbook_says_so_when_there_is_no_host(tmp_path: Path) -> None:
    ended = play(tmp_path, {"other": {"hosts": {"gpu1": {}}}})
    assert ended.returncode != 0 and "no host in the group xinference" in ended.stdout


def test_the_playbook_refuses_conflicting_sources_all_at_once_and_writes_nothing(tmp_path: Path) -> None:
    inventory = {
        "xinference": {
            "hosts": {
                "gpu1": {"xinference_models": [{"model_uid": "a", "source": {"path": "/one/m"}}]},
                "gpu2": {"xinference_models": [{"model_uid": "a", "source": {"modelscope": "org/m"}}, {"source": 3}]},
            }
        }
    }
    ended = play(tmp_path, inventory)
    assert ended.returncode != 0 and not (tmp_path / "bundle").exists() and not (tmp_path / "bundle.cache").exists()
    for words in ("the name 'm' means", "source is not a mapping", "/one/m does not exist"):
        assert words in ended.stdout
