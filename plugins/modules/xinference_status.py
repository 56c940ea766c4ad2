#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_status; the work is done by module_utils/host/standing.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_status
short_description: Tell what a host serves, and since when
version_added: "0.1.0"
description:
  - Tells the release in force, what runs it, the GPUs it was given, and the state of every model that runs or has to,
    with who launched it and when, how often the keeper saw it come back, its last fault and what mended it.
  - Never fails because of what it finds, and changes nothing; M(airgap.xinference.xinference_report) shows it for all
    hosts.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  endpoint:
    description: Address of the server as the host reaches it. By default what the release in force says.
    type: str
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
  api_key:
    description: API key, for a server that asks for one.
    type: str
  username:
    description: User to log in with, for a server that asks for it.
    type: str
  password:
    description: Password of that user.
    type: str
  ca_bundle:
    description: Certificates to trust, for an endpoint with TLS.
    type: path
  request_timeout:
    description: Seconds one request may take.
    type: float
    default: 10
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.attributes.info
attributes: {}
seealso:
  - module: airgap.xinference.xinference_report
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Tell what this host serves
  airgap.xinference.xinference_status:
    root: /opt/xinference
  environment:
    PYTHONPATH: /opt/xinference/lib/python
"""

RETURN = r"""
server:
  description:
    - The server. C(state) is V(running), V(stopped), V(absent) (nothing was ever served), V(unknown), or what the
      engine says of the container. C(since) is in seconds since 1970. C(problem) says what could not be found out, or
      is wrong.
  returned: success
  type: dict
  sample:
    {backend: docker, endpoint: "http://127.0.0.1:9997", gpus: ["0", "1"], problem: "", release: 5d41402abc4b,
     runs: "xprobe/xinference:v4.1.0", since: 1795156000.0, state: running, version: 4.1.0}
keeper:
  description:
    - The keeper. C(state) is V(running), V(ended) (stopped on purpose), V(silent) (it should run and wrote nothing for
      minutes), V(absent) (it never ran here) or V(off) (the release has none). C(problem) is what keeps it from its
      work, C(doing) what it does at this moment, C(server_restarts) how often it saw the server start anew.
  returned: success
  type: dict
  sample: {doing: "", policy: restore, problem: "", server_restarts: 1, since: 1795156001.0, state: running}
models:
  description:
    - Models that run or have to. C(state) is V(ready), V(starting), V(stopping), V(failed), V(lost) (said to run and
      not listed), V(missing) (in the release and not on the server), or V(unknown) (the server cannot be asked).
    - C(desired) is whether the release has it, C(by) who launched it. The rest is known from the keeper, and V(null)
      without one. C(restarts) is how often it came back, C(fault) and C(cure) are the last ones, C(verified) is its
      last probe, and C(notes) says the same and more in sentences.
  returned: success
  type: list
  elements: dict
  sample:
    - by: the keeper
      cure: {at: 1795156040.1, took_s: 21.3, what: launched again by the keeper}
      desired: true
      error: ""
      fault: {at: 1795156018.8, what: the server was started anew}
      model_uid: bge-m3
      notes: ["last fault 5 min ago: the server was started anew"]
      restarts: 1
      since: 1795156020
      state: ready
      verified: {at: 1795156041.0, detail: 1024 dimensions, latency_s: 0.02, ok: true}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._server import SERVER_TOGETHER, client_from
from ansible_collections.airgap.xinference.plugins.module_utils.host import standing
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import REQUESTS_ERROR, ServerError


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "endpoint": {"type": "str"},
            "docker_host": {"type": "str"},
            "api_key": {"type": "str", "no_log": True},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "ca_bundle": {"type": "path"},
            "request_timeout": {"type": "float", "default": 10},
        },
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    server = standing.server(root, module.params["docker_host"])
    server["endpoint"] = module.params["endpoint"] or server["endpoint"]
    server["version"] = ""
    models = standing.unknown(root) if server["release"] else []
    if server["state"] != "absent" and server["state"] != "stopped" and server["endpoint"]:
        if REQUESTS_ERROR:
            server["problem"] = "the library requests is not there; run playbooks/ship.yml, and set PYTHONPATH"
        else:
            module.params["endpoint"] = server["endpoint"]
            client = client_from(module)
            try:
                models = standing.models(root, client)
                server["version"] = standing.version(client)
            except ServerError as error:
                server["problem"] = server["problem"] or error.message
    if server["backend"] == "native" and server["version"]:
        server["runs"] = f"xinference {server['version']}"
    module.exit_json(changed=False, server=server, keeper=standing.keeper(root), models=models)


if __name__ == "__main__":
    main()
