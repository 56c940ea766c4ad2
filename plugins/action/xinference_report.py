# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Show one table over all hosts (documentation: plugins/modules/xinference_report.py)."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.airgap.xinference.plugins.plugin_utils import diagnosis, findings, report, standing

display = Display()

ARGUMENTS = {
    "results": {"type": "dict"},
    "findings": {"type": "dict"},
    "standing": {"type": "dict"},
    "diagnosis": {"type": "dict"},
    "failures": {"type": "dict", "default": {}},
    "path": {"type": "str"},
    "fail": {"type": "bool", "default": True},
}
KINDS = ("results", "findings", "standing", "diagnosis")


class ActionModule(ActionBase):
    """Runs on the controller and talks to no host."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Show the table, write the file, and fail for what was verified or diagnosed and is not as it should be."""
        result = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(
            argument_spec=ARGUMENTS, mutually_exclusive=[KINDS], required_one_of=[KINDS]
        )
        wrong: list[str] = []
        if options["findings"] is not None:
            rows = {host: findings.rows_of(found or {}) for host, found in options["findings"].items()}
            lines, content = findings.table(rows), {"findings": rows}
        elif options["standing"] is not None:
            lines, content = standing.table(options["standing"]), {"hosts": options["standing"]}
        elif options["diagnosis"] is not None:
            rows = {host: findings.rows_of(found or {}) for host, found in options["diagnosis"].items()}
            lines, content = diagnosis.blocks(rows), {"findings": rows}
            wrong = [diagnosis.summary(rows)] if any(rows.values()) else []
        else:
            lines, content, found = _verified(options["results"], options["failures"])
            wrong = found.problems
            result["problems"] = {host: found.problems_of(host) for host in options["results"]}
        if options["path"] and not self._task.check_mode:
            write(Path(options["path"]), content)
            lines += ["", f"The same as JSON: {options['path']}"]
        display.display("\n".join(lines))
        result.update(changed=False)
        if wrong and options["fail"]:
            # Without the report, which has just been shown and which Ansible would show again.
            result.update(failed=True, msg="\n".join(wrong))
        else:
            result["report"] = content
        return result


def _verified(given: dict[str, Any], failures: dict[str, Any]) -> tuple[list[str], dict[str, Any], report.Report]:
    """Lines, content and report of what verification found; `failures` tells of hosts that were left out before."""
    results = {host: health or {} for host, health in given.items()}
    rows = [row for host, health in results.items() for row in report.rows_of(host, health, failures.get(host))]
    asks_for_key = {host: bool(health.get("auth")) for host, health in results.items()}
    found = report.Report(rows)
    content = found.as_dict()
    lines = report.table(rows)
    for settings in content["clients"]:
        lines += ["", *report.client_lines(settings, asks_for_key[settings["host"]])]
    return lines, content, found


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once; its directory is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
    Path(new).chmod(0o644)
    Path(new).replace(path)
