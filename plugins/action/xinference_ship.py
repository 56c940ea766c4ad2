# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ship what a host needs from the bundle on the controller (documentation: plugins/modules/xinference_ship.py)."""

from __future__ import annotations

import time
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle, BundleError
from ansible_collections.airgap.xinference.plugins.plugin_utils.bundles import (
    ALWAYS,
    bundle_path,
    select,
    verified,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.shipping import (
    Answer,
    ShippingError,
    describe,
    ship,
    summary,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.transport import PutFile, Transport, choose

display = Display()

ARGUMENTS = {
    "bundle": {"type": "str", "required": True},
    "root": {"type": "str", "required": True},
    "models": {"type": "list", "elements": "dict", "default": []},
    "backend": {"type": "str", "choices": sorted(ALWAYS), "default": "native"},
    "cache_dir": {"type": "str"},
}


class ActionModule(ActionBase):
    """Runs on the controller; the host is asked through the module xinference_store."""

    _supports_check_mode = True
    _supports_diff = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ship, and return what was sent."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, options = self.validate_argument_spec(argument_spec=ARGUMENTS)
        host = task_vars.get("inventory_hostname", "host")
        began = time.monotonic()

        def say(line: str) -> None:
            display.display(f"{host}: {line}" if not line.startswith(host) else line)

        try:
            bundle = Bundle.open(bundle_path(options["bundle"]))
            chosen = select(bundle, options["models"], options["backend"])
            if chosen.absent:
                raise ShippingError(
                    f"The bundle {bundle.root} does not have what {host} needs: {', '.join(chosen.absent)}. "
                    "Build it with the same inventory (playbooks/bundle.yml)."
                )
            damaged, read = verified(bundle, chosen.artifacts, options["cache_dir"], say)
            if damaged:
                raise BundleError(
                    f"The bundle {bundle.root} is damaged; nothing was sent to {host}. Copy it again:",
                    [str(blob) for blob in damaged],
                )
            result.update(self._ship(bundle, chosen.artifacts, options["root"], host, task_vars, say, began))
        except (BundleError, ShippingError, OSError) as error:
            raise AnsibleActionFail(f"{host}: {error}", result=getattr(error, "details", {})) from error
        result["hashed_bytes"] += read
        return result

    def _ship(
        self, bundle: Bundle, artifacts: Any, root: str, host: str, task_vars: dict[str, Any], say: Any, began: float
    ) -> dict[str, Any]:
        total = sum(Bundle(bundle.root, artifacts).blobs.values())
        owner = None if self._task.check_mode else self._uploader()
        arguments = {
            "root": root,
            "artifacts": [
                {"kind": entry.kind, "name": entry.name, "digest": entry.digest, "size": _manifest_size(entry)}
                for entry in artifacts
            ],
            "owner": owner,
        }

        def ask() -> Answer:
            answer = self._execute_module("airgap.xinference.xinference_store", arguments, task_vars=task_vars)
            if answer.get("failed") or "missing" not in answer:
                raise ShippingError(str(answer.get("msg") or answer.get("module_stdout") or answer))
            return answer

        def connect(answer: Answer) -> list[Transport]:
            path = answer["receive"]["path"]
            if owner is not None:
                self._refuse_closed_area(path)
            best = choose(self._connection, bundle, answer["receive"], C.DEFAULT_LOCAL_TMP)
            plain = PutFile(self._connection, bundle, path, C.DEFAULT_LOCAL_TMP)
            return [best] if isinstance(best, PutFile) else [best, plain]

        if self._task.check_mode:
            answer = ask()
            return {
                **_numbers(answer["changed"], 0, answer["hashed_bytes"], total, 0, began),
                "diff": describe(bundle, artifacts, answer, root),
                "artifacts": answer["artifacts"],
            }
        shipment = ship(artifacts, ask, connect, host, say)
        seconds = time.monotonic() - began
        result = {
            **_numbers(shipment.changed, shipment.sent_bytes, shipment.hashed_bytes, total, shipment.blobs, began),
            "transports": shipment.transports,
            "artifacts": shipment.answer["artifacts"],
            "msg": summary(shipment, total, seconds),
        }
        if shipment.changed:
            say(result["msg"])
        if self._task.diff:
            result["diff"] = describe(bundle, artifacts, shipment.first, root)
        return result

    def _uploader(self) -> int | None:
        """The numeric user that uploads when the store belongs to another one (become), else None."""
        if not self._connection.become:
            return None
        answer = self._low_level_execute_command("id -u", sudoable=False)
        lines = answer.get("stdout", "").split()
        if answer.get("rc") or not lines or not lines[-1].isdigit():
            raise ShippingError(f"cannot tell who uploads: `id -u` said {answer.get('stdout', '')!r}")
        return int(lines[-1])

    def _refuse_closed_area(self, path: str) -> None:
        """The uploading user must be able to reach the receiving area inside a root directory that is not its own."""
        quoted = self._connection._shell.quote(path)
        if self._low_level_execute_command(f"test -w {quoted}", sudoable=False).get("rc"):
            raise ShippingError(
                f"The user who logs in cannot write to {path}, which was made for it: a directory above is closed. "
                "Allow passing through (chmod o+x) on each directory above, or log in as the user you become."
            )


def _manifest_size(artifact: Any) -> int:
    """Bytes of an artifact's manifest."""
    return next(blob.size for blob in artifact.blobs if blob.digest == artifact.digest)


def _numbers(changed: bool, sent: int, hashed: int, total: int, blobs: int, began: float) -> dict[str, Any]:
    return {
        "changed": changed,
        "sent_bytes": sent,
        "hashed_bytes": hashed,
        "skipped_bytes": max(0, total - sent),
        "blobs": blobs,
        "seconds": round(time.monotonic() - began, 2),
    }
