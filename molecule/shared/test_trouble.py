# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that fails does not stop the others, is named with cause and cure, and is served when it is well again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import run_playbook
from expected import MODELS, SITES

testinfra_hosts = ["local://"]
GOOD, BAD = sorted(SITES)
CURE = "systemctl start docker"


@pytest.fixture(scope="module")
def down(bed: dict[str, Any]) -> Iterator[Any]:
    """A host whose engine is down."""
    bed[BAD].exec("service", "docker", "stop", check=False)
    yield bed[BAD]
    bed[BAD].exec("service", "docker", "start", check=False)


def rows(output: str) -> dict[str, list[list[str]]]:
    """The rows of the last table, by host."""
    lines = output[output.rindex("HOST ") :].partition("\n\n")[0].splitlines()[1:]
    found: dict[str, list[list[str]]] = {GOOD: [], BAD: []}
    for line in lines:
        cells = line.split()
        if cells and cells[0] in found and not line.startswith(" "):
            found[cells[0]].append(cells[1:])
    return found


@pytest.mark.parametrize("arguments", [[], ["--skip-tags", "xinference_preflight"]], ids=["preflight", "ship"])
def test_one_host_fails_and_the_other_is_served(down: Any, arguments: list[str], request: Any) -> None:
    run = run_playbook("site", *arguments)
    step = request.node.callspec.id
    table = rows(run.output)
    assert run.status != 0 and run.recap(GOOD)["failed"] == 0 and run.recap(BAD)["failed"] == 1, run.output[-6000:]
    assert {row[0]: row[2] for row in table[GOOD]} == dict.fromkeys(MODELS, "ok")
    assert table[BAD][0][2:4] == ["failed:", step]
    shown = run.output[run.output.rindex("HOST ") :]
    assert "Docker" in shown and CURE in shown


def test_running_again_serves_the_host_that_is_well_again(bed: dict[str, Any]) -> None:
    bed[BAD].exec("service", "docker", "start", check=False)
    bed[BAD].wait()
    run = run_playbook("site")
    assert run.status == 0, run.output[-6000:]
    assert all({row[0]: row[2] for row in found} == dict.fromkeys(MODELS, "ok") for found in rows(run.output).values())
    assert run.recap(GOOD)["changed"] == 0
