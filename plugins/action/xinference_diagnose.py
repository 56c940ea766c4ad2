# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judge on the controller what the module of the same name sees of a host (documentation: in the module)."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.plugin_utils.diagnosis import judge
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import unusable


class ActionModule(ActionBase):
    """Runs the module on the host and returns findings, also for a host that cannot be reached."""

    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `findings` and `facts`; never fails because of the host."""
        result = super().run(tmp, task_vars)
        name = "airgap.xinference.xinference_diagnose"
        try:
            told = self._execute_module(name, self._task.args, task_vars=task_vars)
        except AnsibleError as error:
            told = {"unreachable": isinstance(error, AnsibleConnectionFailure), "msg": str(error)}
        facts = told.get("facts")
        if facts is None and "msg" in told and "invocation" in told:
            # The module ran and refused its options: a mistake of whoever wrote the task.
            result.update(told)
            return result
        allowed = str(self._task.args.get("open_allowed", False)).lower() in ("true", "yes", "1", "on")
        found = judge(facts, allowed) if facts is not None else [unusable(told)]
        result.update(changed=False, findings=[one.row() for one in found])
        if facts is not None:
            result["facts"] = facts
        return result
