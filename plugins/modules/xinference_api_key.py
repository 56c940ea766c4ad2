#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_api_key: the part on the host. The action plugin of the same name keeps the values.

The plan is made by module_utils/server/keys.py.
"""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_api_key
short_description: Make, rotate or revoke an API key of an Xinference server
version_added: "0.1.0"
author: airgap.xinference engineers (@airgap)
description:
  - Sees that a client has a key, which is known by its name. A key may list and use models, and nothing else.
  - The value is kept on the controller, in C(<directory>/<host of the inventory>/<name>) with mode 0600. It is never
    returned, and a connection that prints what it carries shows it masked.
  - A file that got lost is written again, as the server can tell the value. A key that somebody switched off is
    replaced.
  - Needs a server that makes keys itself (Xinference 3.0 and later), and O(username) and O(password) of an
    administrator.
options:
  name:
    description:
      - Name of the key; letters, digits, dots, hyphens and underscores.
    type: str
    required: true
  state:
    description:
      - Whether the server shall have the key. With V(absent) the file goes too.
    type: str
    choices: [present, absent]
    default: present
  rotate:
    description:
      - Replace the key by another of the same name. The old one is refused at once.
    type: bool
    default: false
  directory:
    description:
      - Directory on the controller for the values.
    type: str
    required: true
  mask:
    description:
      - For the action plugin of this module, which gives it.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.server
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Values of keys are left out.
  idempotent:
    support: partial
    details: With O(rotate) every run makes another key.
seealso:
  - module: airgap.xinference.xinference_api_key_info
"""

EXAMPLES = r"""
- name: A key for the RAG application, kept in keys/<host>/rag
  airgap.xinference.xinference_api_key:
    name: rag
    directory: keys
    username: admin
    password: "{{ xinference_password }}"

- name: Revoke it
  airgap.xinference.xinference_api_key:
    name: rag
    state: absent
    directory: keys
    username: admin
    password: "{{ xinference_password }}"
"""

RETURN = r"""
action:
  description: What was done, or would be in check mode. V(write) wrote only the file.
  returned: success
  type: str
  choices: [keep, create, rotate, revoke, write]
  sample: create
name:
  description: Name of the key.
  returned: success
  type: str
  sample: rag
file:
  description: File on the controller with the value.
  returned: success
  type: str
  sample: keys/gpu-1/rag
requests:
  description: How many requests were sent to the server.
  returned: success
  type: int
  sample: 5
"""

import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.keys import (
    NAME,
    KeyProblem,
    apply,
    check,
    masked,
    plan,
)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            **SERVER_OPTIONS,
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "rotate": {"type": "bool", "default": False},
            "directory": {"type": "str", "required": True},
            "mask": {"type": "str", "no_log": True},
        },
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    options, client = module.params, client_from(module)
    if not re.fullmatch(NAME, options["name"]):
        module.fail_json(msg=f"{options['name']!r} cannot name a key: use letters, digits, and . - _ between.")
    value = ""
    with talking(module, ServerError, KeyProblem):
        check(client)
        todo = plan(client.api_keys(), options["name"], options["state"], options["rotate"])
        if not (todo.changed and module.check_mode):
            value = apply(client, todo)
    module.exit_json(
        changed=todo.changed,
        action=todo.action,
        name=todo.name,
        masked=masked(value, options["mask"]) if value and options["mask"] else "",
        requests=client.requests_made,
        diff=todo.diff(),
    )


if __name__ == "__main__":
    main()
