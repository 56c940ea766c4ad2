# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Have a certificate for a gateway (documentation: plugins/modules/xinference_certificate.py)."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.plugin_utils.authority import (
    CRYPTOGRAPHY_ERROR,
    AuthorityError,
    ensure,
    given,
)

ARGUMENTS = {
    "name": {"type": "str", "required": True},
    "names": {"type": "list", "elements": "str", "required": True},
    "authority": {"type": "path"},
    "days": {"type": "int", "default": 397},
    "renew_before": {"type": "int", "default": 30},
    "certificate": {"type": "path"},
    "certificate_key": {"type": "path", "no_log": False},
}


class ActionModule(ActionBase):
    """Runs on the controller and talks to no host."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the paths of the certificate and its key on the controller."""
        result = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(
            argument_spec=ARGUMENTS,
            required_together=[("certificate", "certificate_key")],
            required_one_of=[("authority", "certificate")],
        )
        if CRYPTOGRAPHY_ERROR:
            raise AnsibleActionFail(f"The controller's Python lacks what ansible-core needs: {CRYPTOGRAPHY_ERROR}")
        now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
        try:
            if options["certificate"]:
                found = given(Path(options["certificate"]), Path(options["certificate_key"]), options["names"], now)
            else:
                found = ensure(
                    Path(options["authority"]),
                    options["name"],
                    options["names"],
                    options["days"],
                    options["renew_before"],
                    now,
                    self._task.check_mode,
                )
        except (AuthorityError, OSError) as error:
            raise AnsibleActionFail(str(error)) from error
        result.update(
            changed=bool(found.reason),
            certificate=str(found.certificate),
            certificate_key=str(found.key),
            expires=f"{found.expires:%Y-%m-%d}",
            msg=f"A certificate was made: {found.reason}" if found.reason else "",
        )
        return result
