# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server on a network without a way out, as parts of a Compose project. Pure: data in, data out.

The engine publishes no port of such a network. So a little container stands in both, and passes on what comes to the
published port (`ingress.py`); it begins no connection but those to the server.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Mapping, Optional

from . import hardening, ingress

SERVICE = "ingress"
NETWORK = "inside"
OUTSIDE = "default"
PROGRAM = "bin/ingress.py"
TARGET = "/ingress.py"
# Without an address of its own in there, the host cannot be reached either, and what is sent out fails at once.
NETWORKS = {
    NETWORK: {
        "driver": "bridge",
        "internal": True,
        "driver_opts": {"com.docker.network.bridge.inhibit_ipv4": "true"},
    }
}

# A name that is nobody's in the project goes no further than this container, where nobody answers. The engine's own
# server of names would ask those of the host, older engines from an internal network too.
NO_NAMES = {"dns": ["127.0.0.1"], "dns_search": ["."], "dns_opt": ["timeout:1", "attempts:3"]}
INSIDE: Dict[str, Any] = {"networks": [NETWORK], **NO_NAMES}
"""For every service that is to have no way out."""
# All clients come from the ingress's address. Xinference (from 3.0 on) shuts out an address for an hour that shows ten
# wrong keys, and one client, or anybody, would shut out all.
ENVIRONMENT = {"XINFERENCE_RATE_LIMIT_IP_MAX_FAILURES": "1000000"}
CONFLICTS = ("network_mode", "networks", "dns", "dns_search", "dns_opt", "extra_hosts")
"""Options of the server's service that would lead out, or ask for names outside."""

START = 'exec "$(command -v python3 || command -v python)" -E -s -B "$0" "$1" "$2"'


def service(server: str, port: int) -> Dict[str, Any]:
    """What is special about the ingress to a service that listens on a port."""
    return {
        "entrypoint": ["/bin/sh", "-c", START, TARGET, f"{server}:{port}", str(port)],
        "user": hardening.NOBODY,
        "networks": [OUTSIDE, NETWORK],
        **NO_NAMES,
    }


def program() -> str:
    """The text of the ingress, wherever it was loaded from."""
    return str(ingress.__loader__.get_source(ingress.__name__))  # type: ignore[union-attr]


def faults(options: Optional[Mapping[str, Any]]) -> Iterator[str]:
    """Options of the inventory that an isolated server cannot have."""
    for name in CONFLICTS:
        if name in (options or {}):
            yield f"xinference_server_container_options.{name} and xinference_server_isolated exclude each other"
