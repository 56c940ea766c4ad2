# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the values of API keys on the controller (documentation: plugins/modules/xinference_api_key.py)."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.module_utils.server.keys import NAME, unmasked
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_names import file_name

LONGEST = 256
"""Bytes of a key's value; those of Xinference 4.1 have 51."""


class ActionModule(ActionBase):
    """Runs the module on the host, and reads or writes the file here."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The module's result without the value, and with the file."""
        result = super().run(tmp, task_vars)
        arguments, variables = dict(self._task.args), task_vars or {}
        arguments["mask"] = secrets.token_hex(LONGEST)
        path = place(arguments.get("directory"), variables.get("inventory_hostname"), arguments.get("name"))
        result.update(self._execute_module(module_args=arguments, task_vars=task_vars))
        kept = result.pop("masked", "")
        if result.get("failed") or path is None:
            return result
        result["file"] = str(path)
        if arguments.get("state", "present") == "absent":
            gone = path.exists()
            if gone and not self._task.check_mode:
                path.unlink()
            result["changed"] = result["changed"] or gone
        elif kept:
            self._keep(result, path, unmasked(kept, arguments["mask"]))
        elif result["action"] == "keep" and not path.exists():
            result.update(failed=True, msg=f"The server cannot read the key {result['name']} any more. Rotate it.")
        return result

    def _keep(self, result: dict[str, Any], path: Path, value: str) -> None:
        """Write the value unless it stands there."""
        try:
            if path.read_text().strip() == value and not path.stat().st_mode & 0o077:
                return
        except FileNotFoundError:
            pass
        if not self._task.check_mode:
            write(path, value)
        if not result["changed"]:
            result.update(changed=True, action="write")


def place(directory: Any, host: Any, name: Any) -> Path | None:
    """The file of a key; None for a name that the module refuses."""
    if not directory or not isinstance(name, str) or not re.fullmatch(NAME, name):
        return None
    # A name of an inventory may have anything in it, and no path may come of it.
    return Path(str(directory)).expanduser() / file_name(str(host)) / name


def write(path: Path, value: str) -> None:
    """Replace the file at once; nobody else can read it at any moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}-{os.getpid()}")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f"{value}\n")
    new.replace(path)
