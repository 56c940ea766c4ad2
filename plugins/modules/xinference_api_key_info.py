#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_api_key_info; the keys are told by module_utils/server/keys.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_api_key_info
short_description: List the API keys of an Xinference server
version_added: "0.1.0"
author: airgap.xinference engineers (@airgap)
description:
  - Returns the keys of clients by name, never their values.
  - Needs a server that makes keys itself (Xinference 3.0 and later), and O(username) and O(password) of an
    administrator.
options:
  name:
    description:
      - Return only the key of this name; RV(keys) is empty when there is none.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes.info
  - airgap.xinference.server
attributes: {}
seealso:
  - module: airgap.xinference.xinference_api_key
"""

EXAMPLES = r"""
- name: Which clients have keys?
  airgap.xinference.xinference_api_key_info:
    username: admin
    password: "{{ xinference_password }}"
  register: found
"""

RETURN = r"""
keys:
  description: The keys, in the order of their names.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the key.
      type: str
      sample: rag
    key_prefix:
      description: First characters of the key, by which a client's key can be known.
      type: str
      sample: xf-Q3kR
    owner_username:
      description: Account that the key belongs to.
      type: str
      sample: admin
    enabled:
      description: Whether it is accepted.
      type: bool
      sample: true
    expires_at:
      description: When it ends; null for never.
      type: str
      sample: null
    created_at:
      description: When it was made, in UTC.
      type: str
      sample: "2026-11-20 20:15:11"
requests:
  description: How many requests were sent to the server.
  returned: success
  type: int
  sample: 4
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.keys import KeyProblem, check, same, shown


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={**SERVER_OPTIONS, "name": {"type": "str"}},
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    client, name = client_from(module), module.params["name"]
    with talking(module, ServerError, KeyProblem):
        check(client)
        found = [shown(key) for key in client.api_keys() if not name or same(key.get("name"), name)]
    keys = sorted(found, key=lambda key: str(key["name"]))
    module.exit_json(changed=False, keys=keys, requests=client.requests_made)


if __name__ == "__main__":
    main()
