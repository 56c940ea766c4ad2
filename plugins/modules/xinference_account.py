#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_account; the plan is made by module_utils/server/accounts.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_account
short_description: Make, change or remove an account of an Xinference server
version_added: "0.1.0"
author: airgap.xinference engineers (@airgap)
description:
  - Accounts are for people and for whoever launches models; clients of models get a key, see
    M(airgap.xinference.xinference_api_key).
  - The first administrator is made by the role P(airgap.xinference.xinference_server#role) before the server listens.
  - Refuses to remove the last administrator, or to take its rights.
  - Needs a server with accounts in a database (Xinference 3.0 and later), and an administrator's O(username) and
    O(password).
options:
  name:
    description:
      - Name of the account.
    type: str
    required: true
  state:
    description:
      - Whether the server shall have the account. Its keys go with it.
    type: str
    choices: [present, absent]
    default: present
  new_password:
    description:
      - Password for an account that is made, or with O(reset); 8 characters at least.
    type: str
  permissions:
    description:
      - What the account may do, in the server's own words. V(admin) is everything.
    type: list
    elements: str
    default: ['models:list', 'models:read']
  reset:
    description:
      - Give an account that is there O(new_password), which ends its sessions. Whether it has that password already is
        found out by one login, which a run in check mode makes as well; then nothing changes.
    type: bool
    default: false
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.server
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Passwords are left out.
  idempotent:
    support: full
seealso:
  - module: airgap.xinference.xinference_api_key
"""

EXAMPLES = r"""
- name: An account that may look at models
  airgap.xinference.xinference_account:
    name: viewer
    new_password: "{{ vault_viewer_password }}"
    username: admin
    password: "{{ xinference_password }}"
"""

RETURN = r"""
action:
  description: What was done, or would be in check mode.
  returned: success
  type: str
  choices: [keep, create, change, remove]
  sample: create
name:
  description: Name of the account.
  returned: success
  type: str
  sample: viewer
changes:
  description: What differed.
  returned: success
  type: list
  elements: str
  sample: [permissions]
requests:
  description: How many requests were sent to the server.
  returned: success
  type: int
  sample: 5
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.accounts import (
    AccountProblem,
    apply,
    other_password,
    password_problem,
    plan,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.keys import KeyProblem, check


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            **SERVER_OPTIONS,
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "new_password": {"type": "str", "no_log": True},
            "permissions": {"type": "list", "elements": "str", "default": ["models:list", "models:read"]},
            "reset": {"type": "bool", "default": False},
        },
        required_together=SERVER_TOGETHER,
        required_if=[("reset", True, ["new_password"])],
        supports_check_mode=True,
    )
    options, client = module.params, client_from(module)
    password = options["new_password"]
    if password is not None and password_problem(password):
        module.fail_json(msg=f"Nothing was changed: {password_problem(password)}.")
    with talking(module, ServerError, KeyProblem, AccountProblem):
        check(client)
        users, present = client.users(), options["state"] == "present"
        reset = present and options["reset"] and other_password(client, users, options["name"], password)
        todo = plan(users, options["name"], options["state"], options["permissions"], reset)
        if todo.action == "create" and not password:
            raise AccountProblem(f"The account {todo.name} is to be made and needs new_password.")
        if todo.changed and not module.check_mode:
            apply(client, todo, password or "")
    module.exit_json(
        changed=todo.changed,
        action=todo.action,
        name=todo.name,
        changes=list(todo.changes),
        requests=client.requests_made,
        diff=todo.diff(),
    )


if __name__ == "__main__":
    main()
