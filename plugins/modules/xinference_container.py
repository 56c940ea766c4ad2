#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait for the server's container, and look from inside for its GPUs."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_container
short_description: Wait for the server's container and look from inside for its GPUs
version_added: "0.1.0"
description:
  - Waits until the container of the release in force is healthy and its server answers on the host.
  - When it ends, is started again by the engine, becomes unhealthy or does not answer in time, the module fails with
    the end of its log, and with the cause and the cure where they are known.
  - Then looks from inside for the GPUs that the container was given. A running container can lose them, for example by
    C(systemctl daemon-reload), and nothing else shows it until a model fails.
  - Changes nothing.
options:
  root:
    description: Root directory of the collection on the host, with a release in force that runs in a container.
    type: path
    required: true
  wait_timeout:
    description: Seconds the server may take until it answers.
    type: int
    default: 180
  said:
    description:
      - What Compose said when it could not bring the container up. The module then does not wait, and fails with it,
        with the end of the container's log if there is one, and with the cause and the cure where they are known.
    type: str
  gpus_required:
    description: Fail when GPUs are lost or the server cannot use them. Otherwise only RV(lost) says so.
    type: bool
    default: true
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.attributes.info
attributes: {}
seealso:
  - module: airgap.xinference.xinference_release
  - module: community.docker.docker_compose_v2
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Wait for the server
  airgap.xinference.xinference_container:
    root: /opt/xinference
    gpus_required: false
  register: server

- name: Give it back the GPUs that it lost
  community.docker.docker_compose_v2:
    project_src: /opt/xinference/current
    project_name: xinference
    recreate: always
  when: server.lost | length > 0
"""

RETURN = r"""
container:
  description: Name of the container.
  returned: success
  type: str
  sample: xinference-server-1
id:
  description: Its id.
  returned: success
  type: str
image:
  description: Id of its image.
  returned: success
  type: str
health:
  description: What the engine says of it.
  returned: success
  type: str
  sample: healthy
started:
  description: When it was started.
  returned: success
  type: str
  sample: "2026-11-20T06:41:02.118Z"
endpoint:
  description: Where the host itself reaches the server.
  returned: success
  type: str
  sample: http://127.0.0.1:9997
gpus:
  description:
    - The GPUs it was given, by their names in the inventory; the UUIDs C(seen) inside (V(null) when the image cannot
      tell) and the number C(counted) by the server (V(null) when it does not tell).
  returned: success
  type: dict
  sample: {given: ["0", "1"], seen: [GPU-6b8d…, GPU-91fc…], counted: 2}
lost:
  description: GPUs that it was given and does not have.
  returned: success
  type: list
  elements: str
  sample: []
problem:
  description: What is wrong with its GPUs; empty when nothing is.
  returned: success
  type: str
duration:
  description: Seconds it took.
  returned: success
  type: float
  sample: 14.2
log:
  description: End of the container's log.
  returned: when the server did not come up
  type: str
diagnosis:
  description: What the log means, as C(cause) and C(cure).
  returned: when the server did not come up and its log says something known
  type: dict
"""

import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.host import container
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Docker, DockerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.diagnose import diagnose


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "wait_timeout": {"type": "int", "default": 180},
            "said": {"type": "str"},
            "gpus_required": {"type": "bool", "default": True},
            "docker_host": {"type": "str"},
        },
        supports_check_mode=True,
    )
    began = time.monotonic()
    with failing(module, DockerError, OSError):
        docker = Docker(module.params["docker_host"])
        view = container.load_view(Path(module.params["root"]))
        if module.params["said"]:
            fail_with_log(module, container.failed_start(docker, view, module.params["said"]))
        try:
            seen = container.wait(docker, view, module.params["wait_timeout"])
        except container.NotHealthy as error:
            fail_with_log(module, error)
        gpus = container.gpus(docker, view, seen["Id"])
    if gpus.problem and module.params["gpus_required"]:
        module.fail_json(msg=gpus.problem, lost=gpus.lost)
    module.exit_json(
        changed=False,
        container=container.name(seen),
        id=seen["Id"],
        image=seen["Image"],
        health=container.health(seen),
        started=seen["State"]["StartedAt"],
        endpoint=view["endpoint"],
        gpus={"given": gpus.given, "seen": gpus.seen, "counted": gpus.counted},
        lost=gpus.lost,
        problem=gpus.problem,
        duration=round(time.monotonic() - began, 1),
    )


def fail_with_log(module: AnsibleModule, error: container.NotHealthy) -> None:
    """Fail with the end of the container's log, and with what it means where that is known."""
    known = diagnose(str(error))
    if known:
        message = f"{error}\nCause: {known.cause}\nCure: {known.cure}"
        module.fail_json(msg=message, log=error.log, diagnosis={"cause": known.cause, "cure": known.cure})
    module.fail_json(msg=str(error), log=error.log)


if __name__ == "__main__":
    main()
