# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs where, in one table; and taking it down: not without a yes, and with what was shipped kept unless told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from conftest import run_playbook
from expected import MODELS, SITES, VERSION

testinfra_hosts = ["local://"]
ROOT = "/opt/xinference"
LAST = max(SITES)
YES = ("-e", "xinference_teardown_confirm=yes", "--limit", LAST)
EVERYTHING = ("-e", json.dumps({"xinference_teardown_keep": []}))


def containers(host: Any) -> list[str]:
    return host.docker("ps", "--all", "--quiet").split()


def test_status_tells_what_runs_where_and_since_when(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    run = run_playbook("status", "-e", f"xinference_status_report={path}")
    assert run.status == 0 and f"{len(SITES)} of {len(SITES)} servers run" in run.output, run.output
    told = json.loads(path.read_text())["hosts"]
    for name in SITES:
        server = told[name]["server"]
        assert (server["runs"], server["version"]) == (f"testbed/xinference:{VERSION}-cpu", VERSION)
        assert (server["state"], len(server["gpus"]), server["problem"]) == ("running", 2, "") and server["release"]
        models = {model["model_uid"]: model for model in told[name]["models"]}
        assert {uid: model["state"] for uid, model in models.items()} == dict.fromkeys(MODELS, "ready")
        assert all(model["since"] >= server["since"] > 1.7e9 for model in models.values())
    line = next(line for line in run.output.splitlines() if line.startswith(LAST) and " minilm " in line)
    age = r"\(\d+ (s|min|h)\)"
    assert re.search(rf" yes +ready +\d{{4}}-\d\d-\d\d \d\d:\d\d {age} +(Ansible|keeper) +\d+ +yes {age}$", line), line
    assert all(told[name]["keeper"]["state"] == "running" and not told[name]["keeper"]["problem"] for name in SITES)


def test_nothing_is_taken_down_without_a_yes(bed: dict[str, Any]) -> None:
    before = containers(bed[LAST])
    run = run_playbook("teardown", "--limit", LAST)
    assert run.status != 0 and "Nothing was changed" in run.output
    assert containers(bed[LAST]) == before != []


def test_what_was_shipped_stays_so_that_the_next_time_nothing_travels(bed: dict[str, Any]) -> None:
    host = bed[LAST]
    run = run_playbook("teardown", *YES)
    assert run.status == 0, run.output[-4000:]
    left = host.exec("ls", ROOT).split()
    assert containers(host) == [] and left == ["blobs", "home", "state"] and host.docker("image", "ls", "--quiet")
    run = run_playbook("status", "--limit", LAST)
    assert "absent" in run.output and "0 of 1 servers run" in run.output
    run = run_playbook("ship", "--limit", LAST)
    assert run.status == 0 and " 0 B sent" in run.output.replace("(", " "), run.output[-3000:]


def test_everything_goes_where_that_is_told(bed: dict[str, Any]) -> None:
    host = bed[LAST]
    run = run_playbook("teardown", *YES, *EVERYTHING)
    assert run.status == 0, run.output[-4000:]
    assert host.exec("sh", "-c", f"ls -d {ROOT} 2>/dev/null || true") == "" == host.docker("image", "ls", "--quiet")
    again = run_playbook("teardown", *YES, *EVERYTHING)
    assert again.status == 0 and again.recap(LAST)["changed"] == 0, again.output[-4000:]
