# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Give the module what only the controller knows: the key pair of the run, and who else takes part."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.airgap.xinference.plugins.plugin_utils.credential import Run
from ansible_collections.airgap.xinference.plugins.plugin_utils.notes import Notes

display = Display()

OTHERS = 3
"""Hosts that are named to a host, for it to find its own address by."""
ASKED = 500
"""Blobs a host is asked about at most, the largest: a list of all could be longer than what it saves."""


class ActionModule(ActionBase):
    """Runs on the controller (documentation: plugins/modules/xinference_peer.py)."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start or stop the server, and note down where it listens."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        host = str(task_vars.get("inventory_hostname", "host"))
        run = Run()
        arguments = {**self._task.args, "run": run.name}
        if arguments.get("state", "started") == "stopped":
            result.update(self._execute_module("airgap.xinference.xinference_peer", arguments, task_vars=task_vars))
            if not self._task.check_mode:
                run.close()
            return result
        notes = Notes(run)
        play = [str(name) for name in task_vars.get("ansible_play_batch", [])]
        if "others" not in arguments:
            arguments["others"] = _others(host, play, task_vars)
        if "wanted" not in arguments:
            arguments["wanted"] = _wanted(host, play, notes)
        if "keep" not in arguments:
            arguments["keep"] = sorted(notes.passing(play))
        if not self._task.check_mode:
            arguments["credential"] = run.credential()
        answer = self._execute_module("airgap.xinference.xinference_peer", arguments, task_vars=task_vars)
        if not answer.get("failed") and not answer.get("address"):
            # Names that only the controller knows; sudo may have hidden from the module how it was reached.
            arguments["session"] = self._low_level_execute_command("echo $SSH_CONNECTION", sudoable=False)["stdout"]
            if arguments["session"].strip():
                answer = self._execute_module("airgap.xinference.xinference_peer", arguments, task_vars=task_vars)
        result.update(answer)
        if answer.get("port") and not self._task.check_mode:
            notes.peer(host, answer["address"], answer["port"], answer["has"])
        elif answer.get("msg"):
            display.warning(f"{host} does not pass blobs on: {answer['msg']}")
        return result


def _others(host: str, play: list[str], task_vars: dict[str, Any]) -> list[str]:
    """Addresses of some other hosts of the play."""
    names = [name for name in play if name != host]
    everyone = task_vars.get("hostvars", {})
    return [str(everyone[name].get("ansible_host") or name) for name in names[: OTHERS - 1] + names[OTHERS - 1 :][-1:]]


def _wanted(host: str, play: list[str], notes: Notes) -> list[str]:
    """What other hosts lack, as far as this one may have it."""
    own = notes.wanted([host])
    wanted = {digest: size for digest, size in notes.wanted(play).items() if digest not in own}
    return sorted(wanted, key=lambda digest: (-wanted[digest], digest))[:ASKED]
