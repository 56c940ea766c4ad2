# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter that tells where a host reaches its own server."""

from __future__ import annotations

DOCUMENTATION = r"""
name: server_endpoint
short_description: Tell where a host reaches its own server
version_added: "0.1.0"
description:
  - A container's port is published on loopback, whatever else it is published on. A native server listens on the one
    address that it was given.
positional: _input, port, backend
options:
  _input:
    description: The address on which the server listens.
    type: str
    required: true
  port:
    description: Its port.
    type: int
    required: true
  backend:
    description: What runs it.
    type: str
    choices: [docker, native]
    required: true
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Ask the server of this host
  airgap.xinference.xinference_health:
    endpoint: "{{ xinference_host | airgap.xinference.server_endpoint(9997, 'native') }}"
"""

RETURN = r"""
_value:
  description: The address as a URL.
  type: str
"""

from typing import Any

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "localhost", "")


def server_endpoint(host: str, port: int, backend: str) -> str:
    """The URL at which the host itself reaches its server; `::` is everywhere of IPv6."""
    address = str(host)
    if address == "::":
        address = "::1"
    elif backend == "docker" or address in EVERYWHERE:
        address = LOOPBACK
    return f"http://{f'[{address}]' if ':' in address else address}:{port}"


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Names and functions."""
        return {"server_endpoint": server_endpoint}
