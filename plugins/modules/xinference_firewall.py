#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let named addresses alone reach ports of a host, by a table of nftables."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_firewall
short_description: Let named addresses alone reach ports of a host
version_added: "0.1.0"
description:
  - Loads a table of its own into nftables, C(inet airgap_xinference), which looks at the ports of O(services) and at
    nothing else. Whatever other rules there are stay, and what they refuse stays refused.
  - Ports that Docker publishes are covered, because the table comes before Docker changes the address.
  - The rules are checked by C(nft) first, replace those before in one step, and are loaded again at every boot where
    systemd runs the host. Rules that somebody changed or removed are put back.
requirements:
  - nftables 0.9 or later on the host, and root.
options:
  services:
    description: The ports, and who may reach them. Required with O(state=present).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the service, for people who read the rules.
        type: str
        required: true
      port:
        description: The TCP port. It cannot be one of SSH, see O(ssh_port).
        type: int
        required: true
      clients:
        description:
          - Addresses and networks that may reach it, of IPv4 and IPv6. The host itself always may; without any, nobody
            else may.
        type: list
        elements: str
        default: []
  ssh_port:
    description:
      - The port through which the host is managed, which no service may have, because the rules would lock people out.
        Port 22 and that of the SSH session that the module runs in cannot be a service's either.
    type: int
    default: 22
  state:
    description: Whether the table is to be there.
    type: str
    choices: [present, absent]
    default: present
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Let the application servers alone reach Xinference
  airgap.xinference.xinference_firewall:
    services:
      - name: server
        port: 9997
        clients: [10.1.0.0/16, "fd00:1::/64"]

- name: Leave the ports to somebody else
  airgap.xinference.xinference_firewall:
    state: absent
"""

RETURN = r"""
rules:
  description: The rules as C(nft) reads them; empty without any.
  returned: success
  type: str
"""

import platform
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.host import firewall, ssh_session
from ansible_collections.airgap.xinference.plugins.module_utils.host.firewall_table import (
    FirewallError,
    Table,
    never_loaded,
)

SERVICE = {
    "name": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "clients": {"type": "list", "elements": "str", "default": []},
}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "services": {"type": "list", "elements": "dict", "default": [], "options": SERVICE},
            "ssh_port": {"type": "int", "default": 22},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    services = module.params["services"]
    wanted = module.params["state"] == "present" and bool(services)
    with failing(module, FirewallError, OSError):
        managed = {module.params["ssh_port"], *ssh_session.ports()}
        refused = firewall.faults(services, managed, platform.node()) if wanted else []
        if refused:
            raise FirewallError(f"Nothing was changed. xinference_firewall: {'; '.join(refused)}.")
        rules = firewall.rules(services) if wanted else ""
        if not rules and never_loaded():
            module.exit_json(changed=False, rules="")
        table = Table()
        if rules:
            table.check(rules)
        before, changed = table.before(), table.differs(rules)
        if changed and not module.check_mode:
            if rules:
                table.load(rules)
            else:
                table.remove()
    result: Dict[str, Any] = {"rules": rules}
    if module._diff and changed:
        heads = {"before_header": "firewall.nft", "after_header": "firewall.nft"}
        result["diff"] = [{**heads, "before": before, "after": rules}]
    module.exit_json(changed=changed, **result)


if __name__ == "__main__":
    main()
