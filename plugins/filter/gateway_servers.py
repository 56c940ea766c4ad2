# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter that tells where a gateway reaches the servers of an inventory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: gateway_servers
short_description: Tell where a gateway reaches the servers of an inventory
version_added: "0.1.0"
description:
  - Takes the hosts that serve and returns C(host:port) of each server, as the host of the gateway reaches it.
  - Fails when a server of another host listens on loopback, where no gateway reaches it.
positional: _input, here
options:
  _input:
    description: By name of each host, C(address) (its ansible_host), C(listens) (xinference_host) and C(port).
    type: dict
    required: true
  here:
    description: The host of the gateway.
    type: str
    required: true
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Where the gateway on gpu-1 reaches both servers
  ansible.builtin.debug:
    msg: "{{ hosts | airgap.xinference.gateway_servers('gpu-1') }}"
  vars:
    hosts:
      gpu-1: {address: gpu-1.bank.example, listens: 127.0.0.1, port: 9997}
      gpu-2: {address: gpu-2.bank.example, listens: 10.0.0.12, port: 9997}
"""

RETURN = r"""
_value:
  description: C(host:port) by name of the host.
  type: dict
"""

from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.servers import Unreachable, servers_of


def gateway_servers(hosts: dict[str, dict[str, Any]], here: str) -> dict[str, str]:
    """`servers_of`, with its failure as Ansible's."""
    try:
        return servers_of(hosts, here)
    except Unreachable as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Names and functions."""
        return {"gateway_servers": gateway_servers}
