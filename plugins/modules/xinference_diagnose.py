#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_diagnose; the facts are gathered by module_utils/host/examine.py, the action plugin judges them."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_diagnose
short_description: Find what is wrong with a host that serves, or ought to
version_added: "0.1.0"
description:
  - "Walks one thing after another, in the order in which one keeps the next from working: mounts and room, integrity of
    the release and of what was shipped, the start-up log, the port, rights of files, SELinux, GPUs, offline switches,
    authentication, the keeper, the models. Each finding has its cure."
  - Works whether the server runs or not, is installed, half installed, or was never installed. Takes seconds.
  - Changes nothing, with or without check mode, and never fails because of what it finds;
    M(airgap.xinference.xinference_report) shows it for all hosts.
  - Secrets that the host keeps for the server are taken out of all that is returned.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
  deep:
    description: Whether everything that was shipped is read again, whatever its stamps say. Takes minutes.
    type: bool
    default: false
  hash_seconds:
    description: Seconds for reading files that no stamp vouches for, 0 for as long as it takes. Not with O(deep).
    type: float
    default: 20
  open_allowed:
    description: Whether the site said in so many words that the server may be open to everyone who reaches it.
    type: bool
    default: false
  api_key:
    description: API key, for a server that asks for one before it lists its models.
    type: str
  username:
    description: User to log in with, for a server that asks for it.
    type: str
  password:
    description: Password of that user. A wrong one costs one refused request, never more.
    type: str
  ca_bundle:
    description: Certificates to trust, for an endpoint with TLS.
    type: path
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.attributes.info
attributes: {}
seealso:
  - module: airgap.xinference.xinference_report
  - module: airgap.xinference.xinference_collect
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Find what is wrong with this host
  airgap.xinference.xinference_diagnose:
    root: /opt/xinference
  environment:
    PYTHONPATH: /opt/xinference/lib/python
  register: found

- name: Show it
  airgap.xinference.xinference_report:
    diagnosis: "{{ {inventory_hostname: found} }}"
"""

RETURN = r"""
findings:
  description: What is wrong, the worst first.
  returned: success
  type: list
  elements: dict
  contains:
    check:
      description: What was looked at.
      type: str
      sample: port
    wanted:
      description: What has to be there.
      type: str
      sample: 127.0.0.1:9997 is the server's
    found:
      description: What is there.
      type: str
      sample: nginx (pid 4711, user root) listens on 0.0.0.0:9997
    cure:
      description: "What to do: a command, or a line of the inventory."
      type: str
      sample: stop that program (`ss -ltnp 'sport = :9997'` finds it), or set xinference_port to a free one
    severity:
      description: V(problem) for what is in the way or unsafe, V(warning) for what will be.
      type: str
      sample: problem
facts:
  description: What was seen, by area. For people and for support; its fields may change from version to version.
  returned: when the host was reached
  type: dict
  sample: {installed: true, root: /opt/xinference}
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._server import SERVER_TOGETHER
from ansible_collections.airgap.xinference.plugins.module_utils.host.examine import examine

CREDENTIALS = ("api_key", "username", "password", "ca_bundle")


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "docker_host": {"type": "str"},
            "deep": {"type": "bool", "default": False},
            "hash_seconds": {"type": "float", "default": 20},
            "open_allowed": {"type": "bool", "default": False},
            "api_key": {"type": "str", "no_log": True},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "ca_bundle": {"type": "path"},
        },
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    options = module.params
    facts = examine(
        Path(options["root"]),
        options["docker_host"],
        options["deep"],
        0.0 if options["deep"] else options["hash_seconds"],
        {name: options[name] for name in CREDENTIALS if options[name]},
    )
    module.exit_json(changed=False, facts=facts)


if __name__ == "__main__":
    main()
