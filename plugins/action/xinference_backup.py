# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep on the controller what the module read on the host, encrypted where that is asked for."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import BackupError, unpack
from ansible_collections.airgap.xinference.plugins.plugin_utils import archives
from ansible_collections.airgap.xinference.plugins.plugin_utils.unseen import unseen

ARGUMENTS = {
    "root": {"type": "path", "required": True},
    "home": {"type": "path"},
    "host": {"type": "str"},
    "directory": {"type": "path", "default": "backups"},
    "recipient": {"type": "path"},
    "keep": {"type": "int", "default": 0},
}


class ActionModule(ActionBase):
    """Runs on the controller (documentation: plugins/modules/xinference_backup.py)."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Have the host read, and write the archive."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, options = self.validate_argument_spec(argument_spec=ARGUMENTS)
        host = options["host"] or str(task_vars.get("inventory_hostname", "host"))
        recipient = Path(options["recipient"]) if options["recipient"] else None
        directory = archives.directory_of(Path(options["directory"]).absolute(), host)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        path = directory / archives.name_of(host, when, recipient is not None)
        try:
            faults = list(archives.faults(directory, recipient, options["keep"]))
            if faults:
                raise BackupError("\n".join(faults))
            arguments = {"root": options["root"], "home": options["home"], "host": host, "time": when}
            with unseen(self):
                answer = self._execute_module("airgap.xinference.xinference_backup", arguments, task_vars=task_vars)
                content = base64.b64decode(answer.pop("archive", ""))
            result.update(answer)
            if answer.get("failed") or self._task.check_mode:
                return {**result, **({} if answer.get("failed") else {"path": str(path), "removed": []})}
            unpack(content)
            size = archives.write(path, content, recipient)
            removed = archives.remove_old(directory, host, options["keep"])
        except (BackupError, OSError) as error:
            return {**result, "failed": True, "changed": False, "msg": str(error)}
        secrecy = "" if recipient else "; it is not encrypted, and has keys and passwords in it"
        result.update(
            changed=True,
            path=str(path),
            bytes=size,
            removed=[str(one) for one in removed],
            msg=f"{path}, {size_text(size)}: {answer['summary']}{secrecy}",
        )
        return result
