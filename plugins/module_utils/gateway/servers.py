# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a gateway reaches the servers of an inventory. Pure."""

from __future__ import annotations

from typing import Any, Dict, Mapping

LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVERYWHERE = ("0.0.0.0", "::")


class Unreachable(Exception):
    """Servers that no gateway reaches; the text names all of them."""


def servers_of(hosts: Mapping[str, Mapping[str, Any]], here: str) -> Dict[str, str]:
    """`host:port` of each server, as the host `here` reaches it.

    Of each host: `address` (how the controller reaches it), `listens` (address the server listens on) and `port`.
    Raises Unreachable when a server of another host listens on loopback only.
    """
    found, hidden = {}, []
    for name, host in hosts.items():
        listens = str(host["listens"])
        if name == here and listens in (*LOOPBACK, *EVERYWHERE):
            address = "127.0.0.1" if listens != "::1" else "::1"
        elif listens in LOOPBACK:
            hidden.append(name)
            continue
        else:
            address = str(host["address"]) if listens in EVERYWHERE else listens
        found[name] = f"[{address}]:{host['port']}" if ":" in address else f"{address}:{host['port']}"
    if hidden:
        raise Unreachable(
            f"The gateway on {here} does not reach {', '.join(hidden)}: the server listens on loopback there. Set "
            "xinference_host of these hosts to an address in the network between the gateway and them, or put a "
            "gateway on each."
        )
    return found
