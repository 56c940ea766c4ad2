#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start, restart or stop the native server of a host, and wait for it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_service
short_description: Start, restart or stop the native server of a host
version_added: "0.1.0"
description:
  - Runs the server that the release in force defines, under systemd or supervisord, and waits until it answers.
  - A server that runs is restarted only when the definition it was started from differs from the one in force, such as
    a variable, an argument or the virtual environment. The list of models is not part of it.
  - When the server dies or does not answer in time, the module fails with the end of its log, and with the cause and
    the cure where they are known.
  - The keeper of the release is started and ended with the server, and by itself when only the keeper is missing or not
    wanted any more.
options:
  root:
    description: Root directory of the collection on the host, with a release in force.
    type: path
    required: true
  state:
    description:
      - V(started) starts a server that does not run and restarts one that was started from another definition.
        It also restarts one that nothing would start again, because its manager is gone, or that has two.
      - V(restarted) restarts it in any case.
      - V(stopped) ends the server and every process that belongs to it.
    type: str
    choices: [started, restarted, stopped]
    default: started
  wait_timeout:
    description: Seconds the server may take until it answers.
    type: int
    default: 180
  redefined:
    description:
      - Whether the server is to be started from something else than the release in force, as
        M(airgap.xinference.xinference_release) returned in check mode, where the new release is not in force.
    type: bool
    default: false
  keeper:
    description:
      - Whether there is to be a keeper beside the server, as M(airgap.xinference.xinference_release) returned. Needed
        in check mode only, where the new release is not in force.
    type: bool
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
    details: All but O(state=restarted).
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Run the server as the release in force says
  airgap.xinference.xinference_service:
    root: /opt/xinference

- name: End it
  airgap.xinference.xinference_service:
    root: /opt/xinference
    state: stopped
"""

RETURN = r"""
action:
  description: What was done, V(none), V(start), V(restart) or V(stop).
  returned: success
  type: str
  sample: restart
reason:
  description: Why.
  returned: success
  type: str
  sample: environment XINFERENCE_MODEL_SRC changed
keeper:
  description: What was done to the keeper alone, V(none), V(start) or V(stop).
  returned: success
  type: str
  sample: none
active:
  description: Whether the server runs.
  returned: success
  type: bool
pid:
  description: Process id of the server.
  returned: when it runs
  type: int
  sample: 4711
release:
  description: Release the running server was started from.
  returned: when it runs
  type: str
  sample: 5d41402abc4b
manager:
  description: What looks after the server.
  returned: success
  type: str
  sample: supervisord
endpoint:
  description: Where the host itself reaches the server.
  returned: success
  type: str
  sample: http://127.0.0.1:9997
duration:
  description: Seconds it took, waiting included.
  returned: success
  type: float
  sample: 14.2
log:
  description: End of the server's log.
  returned: when the server did not come up
  type: str
diagnosis:
  description: What the log means, as C(cause) and C(cure).
  returned: when the server did not come up and its log says something known
  type: dict
"""

import contextlib
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.host import service
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import Native, ServiceError, locked
from ansible_collections.airgap.xinference.plugins.module_utils.server.diagnose import diagnose


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["started", "restarted", "stopped"], "default": "started"},
            "wait_timeout": {"type": "int", "default": 180},
            "redefined": {"type": "bool", "default": False},
            "keeper": {"type": "bool"},
        },
        supports_check_mode=True,
    )
    wanted, root = module.params["state"], Path(module.params["root"])
    started = time.monotonic()
    if not (root / "current").is_symlink() and (wanted == "stopped" or module.check_mode):
        module.exit_json(
            changed=wanted != "stopped", action="none", reason="nothing was deployed here", keeper="none", active=False
        )
    # Two plays on one host: the second waits, and finds the work done.
    alone = contextlib.nullcontext() if module.check_mode else locked(root)
    with failing(module, ServiceError, OSError), alone:
        native = Native(root)
        before = native.state()
        definition = "" if module.params["redefined"] else native.digest
        step = service.plan(native, wanted, before, definition, module.params["keeper"])
        if not module.check_mode:
            try:
                service.carry_out(native, step, module.params["wait_timeout"])
            except service.NotHealthy as error:
                fail_with_log(module, error)
        now = service.describe(native)
    result = {
        "action": step.action,
        "keeper": step.keeper,
        "reason": step.reason,
        "endpoint": service.endpoint(native.service),
        **now,
    }
    if module._diff and step.action != "none":
        after = {"stop": "stopped"}.get(step.action, "running")
        result["diff"] = {
            "before": "running\n" if before.active else "stopped\n",
            "after": f"{after} ({step.reason})\n",
        }
    elif module._diff and step.changes:
        result["diff"] = {"before": "", "after": f"keeper: {step.keeper} ({step.reason})\n"}
    module.exit_json(changed=step.changes, duration=round(time.monotonic() - started, 1), **result)


def fail_with_log(module: AnsibleModule, error: service.NotHealthy) -> None:
    """Fail with the end of the server's log, and with what it means where that is known."""
    message, known, more = str(error), diagnose(error.log), {}
    if known:
        message += f"\nCause: {known.cause}\nCure: {known.cure}"
        more = {"diagnosis": {"cause": known.cause, "cure": known.cure}}
    module.fail_json(msg=message, log=error.log, **more)


if __name__ == "__main__":
    main()
