# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real Xinference images on a real air-gapped host: a small change of a large image is a small shipment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from . import images
from .engine import docker
from .hosts import Host, Testbed
from .spec import HostSpec

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = f"delta-{os.getpid()}"
FIRST, SECOND = "testbed/xinference:4.1.0-cpu", "testbed/xinference:4.1.0-cpu-b"
SHIP: List[Dict[str, Any]] = [
    {
        "hosts": "xinference",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.include_role": {"name": "airgap.xinference.xinference_ship"}},
            {
                "ansible.builtin.copy": {
                    "content": "{{ __xinference_ship_result | to_json }}",
                    "dest": "{{ result }}",
                    "mode": "0600",
                },
                "delegate_to": "localhost",
                "vars": {"ansible_connection": "local", "ansible_become": False},
            },
        ],
    }
]


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    images.build()
    made = Testbed(NAME)
    made.up([HostSpec("gpu-1", gpus=0, login="deploy")])
    yield made
    made.down()


@pytest.fixture(scope="module")
def bundle(bed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with both images, made by the playbook from the engine of this machine."""
    place = tmp_path_factory.mktemp("delta")
    play(bed, REPOSITORY / "playbooks/bundle.yml", place, [FIRST, SECOND])
    return place


def play(bed: Testbed, playbook: Path, place: Path, references: List[str]) -> str:
    """Run a playbook for a host that wants these images."""
    variables = {
        "xinference_backend": "docker",
        "xinference_bundle_dir": str(place / "bundle"),
        "xinference_images": [{"name": reference} for reference in references],
        "result": str(place / "result.json"),
    }
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    done = subprocess.run(
        [program, "-i", str(bed.inventory), str(playbook), "--extra-vars", json.dumps(variables)],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def ship(bed: Testbed, place: Path, references: List[str]) -> Dict[str, Any]:
    (place / "ship.json").write_text(json.dumps(SHIP))
    play(bed, place / "ship.json", place, references)
    return json.loads((place / "result.json").read_text())


def image_id(host: Host, reference: str) -> str:
    return host.docker("image", "inspect", "--format", "{{.Id}}", reference).strip()


def test_a_small_layer_more_ships_less_than_a_hundredth(bed: Testbed, bundle: Path) -> None:
    host = bed.load()["gpu-1"]
    whole = ship(bed, bundle, [FIRST])
    assert [row["action"] for row in whole["images"]] == ["load"]
    assert image_id(host, FIRST) == docker("image", "inspect", "--format", "{{.Id}}", FIRST).strip()

    more = ship(bed, bundle, [FIRST, SECOND])
    row = more["images"][1]
    assert (row["action"], row["layers"]) == ("load", 1)
    assert image_id(host, SECOND) == docker("image", "inspect", "--format", "{{.Id}}", SECOND).strip()
    print(f"{whole['sent_bytes']} bytes, then {more['sent_bytes']}; load {row['seconds']} s")
    assert more["sent_bytes"] < whole["sent_bytes"] / 100 and row["seconds"] < 60
    assert host.docker("run", "--rm", SECOND, "xinference", "--version").strip().endswith("4.1.0")

    again = ship(bed, bundle, [FIRST, SECOND])
    assert (again["changed"], again["sent_bytes"], again["hashed_bytes"]) == (False, 0, 0)
