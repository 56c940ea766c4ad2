# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may reach which port of a host, as rules of nftables. Pure: data in, text out.

The rules are a table of our own that looks at our ports and at nothing else, so nobody is locked out of a host by them,
and what other tables refuse stays refused. They come before Docker turns the address of a published port into that of a
container (priority dstnat is -100, https://wiki.nftables.org/wiki-nftables/index.php/Netfilter_hooks), so they hold for
containers and native servers alike.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Collection, Dict, Iterator, List, Mapping, Sequence

TABLE = "airgap_xinference"
PRIORITY = -110
HEADER = "# Written by airgap.xinference; change the inventory and run playbooks/firewall.yml instead.\n"


def faults(services: Sequence[Mapping[str, Any]], ssh: Collection[int] = (), host: str = "this host") -> List[str]:
    """What of the inventory is no port or no address, or would lock people out of the host.

    A service is `name`, `port` and `clients`. `ssh` are ports through which `host` is managed, besides 22.
    """
    found = []
    ports: Dict[int, str] = {}
    for service in services:
        name, port = str(service["name"]), int(service["port"])
        if not name.replace("-", "").replace("_", "").isalnum():
            found.append(f"the service {name!r} must be named with letters, digits, - and _")
        if not 0 < port < 65536:
            found.append(f"the port of {name} is {port} and must be from 1 to 65535")
        elif port in (22, *ssh):
            found.append(
                f"the port of {name} is {port}, and that is the one of SSH, through which {host} is managed: whoever "
                f"is no client of {name} would be locked out. Give {name} another port"
            )
        elif port in ports:
            found.append(f"{name} and {ports[port]} have the same port, {port}")
        ports[port] = name
        found += [
            f"{client!r} of {name} is no address or network, such as 10.1.2.3 or 10.1.0.0/16"
            for client in service["clients"]
            if not _is_network(str(client))
        ]
    return found


def rules(services: Sequence[Mapping[str, Any]]) -> str:
    """The file for `nft -f`: replaces the table in one step, also where there is none yet.

    A port without clients is closed to everybody but the host itself.
    """
    lines = [line for service in services for line in _of_service(service)]
    body = "".join(f"    {line}\n" for line in lines)
    return f"""{HEADER}table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
  chain arriving {{
    type filter hook prerouting priority {PRIORITY}; policy accept;
    iif "lo" accept
    ct direction reply accept
    fib daddr type != local accept
{body}  }}
}}
"""


def removal() -> str:
    """The input of `nft -f` that takes the table away, also where there is none."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def _of_service(service: Mapping[str, Any]) -> Iterator[str]:
    port, name = int(service["port"]), service["name"]
    for version, family in ((4, "ip"), (6, "ip6")):
        networks = [network for network in _networks(service["clients"]) if network.version == version]
        if networks:
            listed = ", ".join(str(network) for network in ipaddress.collapse_addresses(networks))
            yield f'tcp dport {port} {family} saddr {{ {listed} }} accept comment "{name}"'
    yield f'tcp dport {port} counter drop comment "{name}"'


def _networks(clients: Sequence[Any]) -> List[Any]:
    return [ipaddress.ip_network(str(client), strict=False) for client in clients]


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    # Python takes anything for a zone (`fe80::1%eth0`), and the rules have none.
    return "%" not in text
