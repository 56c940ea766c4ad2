# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read an archive on the controller, refuse it there if it is damaged, and hand it to the module on the host."""

from __future__ import annotations

import json
import secrets
import shlex
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import BackupError, Damaged, unpack
from ansible_collections.airgap.xinference.plugins.plugin_utils import archives

ARGUMENTS = {
    "root": {"type": "path", "required": True},
    "home": {"type": "path"},
    "host": {"type": "str"},
    "from": {"type": "path", "default": "backups"},
    "key": {"type": "path"},
    "replace": {"type": "bool", "default": False},
    "administrator": {"type": "str", "default": ""},
}
MODULE = "airgap.xinference.xinference_restore"


class ActionModule(ActionBase):
    """Runs on the controller (documentation: plugins/modules/xinference_restore.py)."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Choose and read the archive, have the host compare, and send it only when something is to be done."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, options = self.validate_argument_spec(argument_spec=ARGUMENTS)
        host = options["host"] or str(task_vars.get("inventory_hostname", "host"))
        try:
            path = archives.chosen(Path(options["from"]).absolute(), host)
            data = archives.read(path, Path(options["key"]) if options["key"] else None)
            index, _contents = unpack(data)
        except Damaged as error:
            return {**result, "failed": True, "msg": f"{path} cannot be restored: {error}. Take another archive."}
        except (BackupError, OSError) as error:
            return {**result, "failed": True, "msg": str(error)}
        arguments = {name: options[name] for name in ("root", "home", "replace", "administrator")}
        arguments["index"] = json.dumps(json.loads(index.text()), sort_keys=True)
        arguments["time"] = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        result["path"] = str(path)
        # Without the archive the module only compares.
        answer = self._execute_module(MODULE, arguments, task_vars=task_vars)
        if not answer.get("failed") and answer.get("changed") and not self._task.check_mode:
            answer = self._hand_over(arguments, data, task_vars)
        result.update(answer)
        return result

    def _hand_over(self, arguments: dict[str, Any], data: bytes, task_vars: dict[str, Any]) -> dict[str, Any]:
        """Bring the archive to the host, on standard input so that it lies nowhere in between, and run the module."""
        if not self._connection.has_pipelining:
            message = f"The connection {self._connection.transport} cannot carry an archive; use ssh or local."
            return {"failed": True, "msg": message}
        archive = f"{arguments['root']}/state/.arriving-{secrets.token_hex(8)}"
        place = shlex.quote(archive)
        try:
            sent = self._low_level_execute_command(f"umask 077 && cat > {place}", in_data=data)
            if sent["rc"]:
                return {"failed": True, "msg": f"{archive} cannot be written: {sent['stderr'].strip()}"}
            return self._execute_module(MODULE, {**arguments, "archive": archive}, task_vars=task_vars)
        finally:
            self._low_level_execute_command(f"rm -f {place}")
