# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep on the controller the archive that the module of the same name packs (documentation: in the module)."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_names import file_name


class ActionModule(ActionBase):
    """Runs the module on the host, and writes what it packed as a file that only its owner can read."""

    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `path`, `size` and `files`."""
        result = super().run(tmp, task_vars)
        host = str((task_vars or {}).get("inventory_hostname", "host"))
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        # A name of an inventory may have anything in it, and no path may come of it.
        name = f"{file_name(host)}-{moment}"
        arguments = {"name": name, **self._task.args}
        told = self._execute_module("airgap.xinference.xinference_collect", arguments, task_vars=task_vars)
        archive = told.pop("archive", None)
        result.update(told)
        if archive is not None and not result.get("failed"):
            path = Path(os.path.expanduser(str(self._task.args["directory"])), f"{name}.tar.gz")  # noqa: PTH111
            write(path, base64.b64decode(archive))
            result["path"] = str(path)
        return result


def write(path: Path, content: bytes) -> None:
    """Make a file that nobody but its owner can read at any moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    new.replace(path)
