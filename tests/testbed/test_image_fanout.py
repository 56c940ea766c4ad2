# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An image for several air-gapped hosts: its layers leave the controller once, though they leave each store at once."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator

import plays
import pytest

from . import engine
from .engine import docker
from .hosts import Testbed
from .spec import HostSpec

NAME = f"layers-{os.getpid()}"
IMAGE = f"testbed/{NAME}:1"
LAYER = 6 * 1024 * 1024
HOSTS = ["gpu-1", "gpu-2", "gpu-3"]
SHIP = [
    {
        "hosts": "xinference",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.include_role": {"name": "airgap.xinference.xinference_ship"}},
            {
                "ansible.builtin.copy": {
                    "content": "{{ __xinference_ship_result | to_json }}",
                    "dest": "{{ results }}/{{ inventory_hostname }}.json",
                    "mode": "0600",
                },
                "delegate_to": "localhost",
                "vars": {"ansible_connection": "local", "ansible_become": False},
            },
        ],
    }
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image of two layers that do not compress, in the engine of this machine."""
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    engine.ensure()
    place = tmp_path_factory.mktemp("image")
    chance = random.Random(5)
    with tarfile.open(place / "base.tar", "w") as archive:
        entry = tarfile.TarInfo("base.bin")
        entry.size = LAYER
        archive.addfile(entry, io.BytesIO(chance.randbytes(LAYER)))
    docker("import", str(place / "base.tar"), f"testbed/{NAME}:0")
    (place / "more.bin").write_bytes(chance.randbytes(LAYER))
    (place / "Dockerfile").write_text(f"FROM testbed/{NAME}:0\nCOPY more.bin /\n")
    (place / ".dockerignore").write_text("base.tar\n")
    docker("build", "--quiet", "--tag", IMAGE, str(place))
    yield IMAGE
    docker("rmi", IMAGE, f"testbed/{NAME}:0", check=False)


@pytest.fixture
def bed(image: str) -> Iterator[Testbed]:
    made = Testbed(NAME)
    made.up([HostSpec(name, gpus=0, login="deploy") for name in HOSTS])
    yield made
    made.down()


def play(bed: Testbed, name: str, place: Path, *options: str) -> str:
    variables = {
        "xinference_backend": "docker",
        "xinference_bundle_dir": str(place / "bundle"),
        "xinference_images": [{"name": IMAGE}],
        "results": str(place),
    }
    return plays.play([name], [bed.inventory], variables, place, options)


@pytest.mark.parametrize("forks", [1, 3])
def test_layers_leave_the_controller_once(bed: Testbed, tmp_path: Path, forks: int) -> None:
    play(bed, "bundle", tmp_path)
    (tmp_path / "ship.json").write_text(json.dumps(SHIP))
    said = play(bed, str(tmp_path / "ship.json"), tmp_path, "--forks", str(forks))
    results: Dict[str, Dict[str, Any]] = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in HOSTS}
    for name, host in bed.load().items():
        assert [row["action"] for row in results[name]["images"]] == ["load"]
        assert host.docker("image", "inspect", "--format", "{{.Id}}", IMAGE).strip()
        # Neither a layer nor a server stays behind.
        assert not host.exec("find", "/opt/xinference/blobs", "-size", f"+{LAYER // 2}c")
        assert not host.exec("sh", "-c", "ls /opt/xinference/state/peer-* 2>/dev/null || true")
        assert "xinference-peer" not in host.exec("ps", "-eo", "comm")
    sent = sum(result["sent_bytes"] for result in results.values())
    got = sum(result["from_peers_bytes"] for result in results.values())
    # The layers, and small things of some hundred KiB for each host.
    assert 2 * LAYER <= sent < 3 * LAYER and got >= 4 * LAYER, said
    assert all(result["refused"] == [] for result in results.values()), said
    again = play(bed, str(tmp_path / "ship.json"), tmp_path)
    assert "Ship the bundle, from host to host" not in again
