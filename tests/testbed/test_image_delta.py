# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real Xinference images on a real air-gapped host: a small change of a large image is a small shipment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from .conftest import IMAGES, Carried
from .engine import docker
from .hosts import Host, Testbed
from .site import Site
from .spec import HostSpec

NAME = f"delta-{os.getpid()}"
FIRST, _OLD, SECOND = IMAGES
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


@pytest.fixture
def site(carried: Carried, tmp_path: Path) -> Iterator[Site]:
    bed = Testbed(NAME)
    try:
        host = bed.up([HostSpec("gpu-1", gpus=0, login="deploy")])["gpu-1"]
        yield Site(host, tmp_path, {**carried.variables, "xinference_backend": "docker"})
    finally:
        bed.down()


def ship(site: Site, references: List[str]) -> Dict[str, Any]:
    """Ship to a host that wants these images; returns what the role found and did."""
    playbook, result = site.place / "ship.json", site.place / "result.json"
    playbook.write_text(json.dumps(SHIP))
    wanted = [{"name": reference} for reference in references]
    site.play(str(playbook), xinference_images=wanted, result=str(result))
    return json.loads(result.read_text())


def image_id(host: Host, reference: str) -> str:
    return host.docker("image", "inspect", "--format", "{{.Id}}", reference).strip()


def test_a_small_layer_more_ships_less_than_a_hundredth(site: Site) -> None:
    host = site.host
    whole = ship(site, [FIRST])
    assert [row["action"] for row in whole["images"]] == ["load"]
    assert image_id(host, FIRST) == docker("image", "inspect", "--format", "{{.Id}}", FIRST).strip()

    more = ship(site, [FIRST, SECOND])
    row = more["images"][1]
    assert (row["action"], row["layers"]) == ("load", 1)
    assert image_id(host, SECOND) == docker("image", "inspect", "--format", "{{.Id}}", SECOND).strip()
    print(f"{whole['sent_bytes']} bytes, then {more['sent_bytes']}; load {row['seconds']} s")
    assert more["sent_bytes"] < whole["sent_bytes"] / 100
    assert host.docker("run", "--rm", SECOND, "xinference", "--version").strip().endswith("4.1.0")

    again = ship(site, [FIRST, SECOND])
    assert (again["changed"], again["sent_bytes"], again["hashed_bytes"]) == (False, 0, 0)
