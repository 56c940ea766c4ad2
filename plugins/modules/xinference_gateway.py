#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_gateway; the work is done by module_utils/gateway/."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_gateway
short_description: Run a gateway before Xinference
version_added: "0.1.0"
description:
  - Runs nginx with TLS before one or more servers, in a container or as the nginx of the host.
  - Only what clients ask of a model goes through. Everything else is administration, and closed to all but
    O(admin_from).
  - nginx judges a new configuration before anything is replaced, and reads it without dropping a connection.
  - Without O(certificate) everything else is judged, and nothing is done.
options:
  root:
    description: Root directory of the collection on the host. The gateway lies in C(gateway) below it.
    type: path
    default: /opt/xinference
  state:
    description: Whether there shall be a gateway.
    type: str
    choices: [present, absent]
    default: present
  backend:
    description: What runs nginx.
    type: str
    choices: [docker, native]
    default: native
  service:
    description: Name of the container or of the systemd unit.
    type: str
    default: xinference-gateway
  host:
    description: Address the gateway listens on.
    type: str
    default: 0.0.0.0
  port:
    description: Port it listens on.
    type: int
    default: 443
  names:
    description: Names and addresses under which clients ask. Any other is refused.
    type: list
    elements: str
    default: []
  servers:
    description: The servers behind it, C(host:port) by the name of their host.
    type: dict
    default: {}
  models:
    description: The model uids that each host serves, by the same names.
    type: dict
    default: {}
  admin_from:
    description: Addresses and networks that may administer the servers through the gateway.
    type: list
    elements: str
    default: []
  metrics_from:
    description: Addresses and networks that may read C(/metrics).
    type: list
    elements: str
    default: []
  keys:
    description: Keys of clients, for servers that do not ask themselves.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the client, for the log.
        type: str
        required: true
      key:
        description: The key, 16 characters or more.
        type: str
        required: true
  client_paths:
    description: More paths for clients, as C(METHOD /path).
    type: list
    elements: str
    default: []
  body_size:
    description: Largest body of a request.
    type: str
    default: 512m
  rate:
    description: Requests a second of one client; 0 for no limit.
    type: int
    default: 200
  timeout:
    description: Seconds a server may be silent while it answers.
    type: int
    default: 3600
  server_auth:
    description: Whether the servers ask for keys themselves (Xinference 3.0 and later).
    type: bool
    default: false
  allow_open:
    description: Lets everybody who reaches the port ask the models.
    type: bool
    default: false
  certificate:
    description: The certificate, as text.
    type: str
  certificate_key:
    description: Its key, as text.
    type: str
  image:
    description: Image with nginx, by its name in the host's engine. Needed with O(backend=docker).
    type: str
  nginx:
    description: The host's nginx; by default the one on PATH.
    type: str
    default: ""
  manager:
    description: What starts a native nginx; V(auto) is systemd for root where it runs the host, else nginx itself.
    type: str
    choices: [auto, systemd, none]
    default: auto
  log_max_size:
    description: Size at which the log of the container is rotated.
    type: str
    default: 100m
  log_max_files:
    description: How many files of it are kept.
    type: int
    default: 10
  wait_timeout:
    description: Seconds until the gateway has to answer.
    type: float
    default: 30
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Nothing is written, so nginx cannot judge the new configuration.
  diff_mode:
    support: full
    details:
      - Keys are left out.
  idempotent:
    support: full
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Run a gateway before two hosts
  airgap.xinference.xinference_gateway:
    backend: docker
    image: nginx:1.28
    names: [models.bank.example]
    servers: {gpu-1: "10.0.0.11:9997", gpu-2: "10.0.0.12:9997"}
    models: {gpu-1: [embed], gpu-2: [embed]}
    server_auth: true
    certificate: "{{ lookup('file', 'gateway.crt') }}"
    certificate_key: "{{ lookup('file', 'gateway.key') }}"
"""

RETURN = r"""
action:
  description: What was done, or would be in check mode.
  returned: success
  type: str
  choices: [none, judge, start, reload, remove]
  sample: reload
release:
  description: The configuration in force, named after its content.
  returned: when there is one
  type: str
  sample: 4f1c09a828f1
endpoints:
  description: Base URLs for clients; of several models each has its own.
  returned: when there is one
  type: list
  elements: str
  sample: [https://models.bank.example/v1]
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import DiscreetModule, failing
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.container import Container
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import (
    endpoints,
    faults,
    gateway_of,
    key_faults,
    shape_faults,
)
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.native import Native
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import (
    PLACE,
    GatewayError,
    converge,
    files,
    remove,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Docker, DockerError
from ansible_collections.airgap.xinference.plugins.module_utils.host.release import ReleaseError


def main() -> None:
    strings = {"type": "list", "elements": "str", "default": []}
    keys = {"name": {"type": "str", "required": True}, "key": {"type": "str", "required": True, "no_log": True}}
    module = DiscreetModule(
        argument_spec={
            "root": {"type": "path", "default": "/opt/xinference"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "backend": {"type": "str", "choices": ["docker", "native"], "default": "native"},
            "service": {"type": "str", "default": "xinference-gateway"},
            "host": {"type": "str", "default": "0.0.0.0"},
            "port": {"type": "int", "default": 443},
            "names": dict(strings),
            "servers": {"type": "dict", "default": {}},
            "models": {"type": "dict", "default": {}},
            "admin_from": dict(strings),
            "metrics_from": dict(strings),
            "keys": {"type": "list", "elements": "dict", "default": [], "no_log": False, "options": keys},
            "client_paths": dict(strings),
            "body_size": {"type": "str", "default": "512m"},
            "rate": {"type": "int", "default": 200},
            "timeout": {"type": "int", "default": 3600},
            "server_auth": {"type": "bool", "default": False},
            "allow_open": {"type": "bool", "default": False},
            "certificate": {"type": "str"},
            "certificate_key": {"type": "str", "no_log": True},
            "image": {"type": "str"},
            "nginx": {"type": "str", "default": ""},
            "manager": {"type": "str", "choices": ["auto", "systemd", "none"], "default": "auto"},
            "log_max_size": {"type": "str", "default": "100m"},
            "log_max_files": {"type": "int", "default": 10},
            "wait_timeout": {"type": "float", "default": 30},
            "docker_host": {"type": "str"},
        },
        required_together=[("certificate", "certificate_key")],
        supports_check_mode=True,
    )
    with failing(module, GatewayError, ReleaseError, DockerError, OSError):
        if module.params["state"] == "absent":
            changed = remove(_place(module), _runner(module), module.check_mode)
            module.exit_json(changed=changed, action="remove" if changed else "none")
        module.exit_json(**_present(module))


def _present(module: AnsibleModule) -> dict:
    """Judge everything at once, then make it so."""
    misshapen, shaped = shape_faults(module.params["servers"], module.params["models"])
    gateway = gateway_of({**module.params, **shaped})
    problems = misshapen + key_faults(module.params["keys"]) + faults(gateway, routed=not misshapen)
    if problems:
        raise GatewayError("The gateway was not changed:\n" + "\n".join(f"- {problem}" for problem in problems))
    runner = _runner(module)
    if not module.params["certificate"]:
        return {"changed": False, "action": "judge"}
    wanted = files(gateway, runner, _text(module, "certificate"), _text(module, "certificate_key"))
    done = converge(_place(module), runner, gateway, wanted, module.params["wait_timeout"], module.check_mode)
    return {
        "changed": done.changed,
        "action": done.action,
        "release": done.release,
        "endpoints": endpoints(gateway),
        "diff": done.diff,
    }


def _text(module: AnsibleModule, name: str) -> str:
    return str(module.params[name]).strip() + "\n"


def _place(module: AnsibleModule) -> Path:
    return Path(module.params["root"]) / PLACE


def _runner(module: AnsibleModule) -> Any:
    options = module.params
    absent = options["state"] == "absent"
    if options["backend"] == "native":
        return Native(_place(module), options["service"], options["nginx"], options["manager"], needed=not absent)
    docker = Docker(options["docker_host"])
    image = "" if absent else docker.image_id([options["image"]] if options["image"] else [])
    if image is None:
        named = options["image"] or "(xinference_gateway_image is empty)"
        raise GatewayError(
            f"The Docker Engine has no image {named}. Name an image with nginx in xinference_gateway_image, build the "
            "bundle and ship it."
        )
    logs = (options["log_max_size"], options["log_max_files"])
    return Container(_place(module), options["service"], image, docker, *logs)


if __name__ == "__main__":
    main()
