# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Show what verification found on all hosts (documentation: plugins/modules/xinference_report.py)."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.airgap.xinference.plugins.plugin_utils import report

display = Display()

ARGUMENTS = {
    "results": {"type": "dict", "required": True},
    "path": {"type": "str"},
}


class ActionModule(ActionBase):
    """Runs on the controller and talks to no host."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Show the table and the settings, write the file, and fail when something did not prove that it works."""
        result = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(argument_spec=ARGUMENTS)
        results = {host: health or {} for host, health in options["results"].items()}
        rows = [row for host, health in results.items() for row in report.rows_of(host, health)]
        asks_for_key = {health.get("endpoint"): bool(health.get("auth")) for health in results.values()}
        found = report.Report(rows)
        content = found.as_dict()
        lines = report.table(rows)
        for settings in content["clients"]:
            lines += ["", *report.client_lines(settings, asks_for_key[settings["endpoint"]])]
        if options["path"] and not self._task.check_mode:
            write(Path(options["path"]), content)
            lines += ["", f"The same as JSON: {options['path']}"]
        display.display("\n".join(lines))
        result.update(changed=False, report=content)
        if found.problems:
            result.update(failed=True, msg="\n".join(found.problems))
        return result


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file at once; its directory is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
    Path(new).chmod(0o644)
    Path(new).replace(path)
