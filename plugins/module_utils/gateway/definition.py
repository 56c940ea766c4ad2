# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a gateway is: data, and what is wrong with it. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from .paths import path_fault

MODELS = "/models"
"""Below it each model uid has the hosts that serve it: `https://gateway/models/<uid>/v1`."""
HOSTS = "/hosts"
"""Below it each host can be reached alone: `https://gateway/hosts/<name>/v1`."""
KEY_LENGTH = 16
"""Characters a client's key must have at least; what is shorter can be guessed."""
SIZE = "is no size such as 512m"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_DOMAIN = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9_-]+)*\Z")
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*\Z")
_PORT = re.compile(r"[0-9]{1,5}\Z")
_SIZE = re.compile(r"[1-9][0-9]*[kKmMgG]?\Z")


@dataclass(frozen=True)
class Route:
    """Requests below `prefix` (empty: all others) and the servers they go to, each as `host:port`."""

    prefix: str
    servers: Tuple[str, ...]


@dataclass(frozen=True)
class Gateway:
    """What is to be run.

    `host` and `port` are where it listens, `names` the names and addresses it may be asked under. `admin_from` and
    `metrics_from` are addresses or networks. `keys` are the clients' keys by name, empty where the servers themselves
    ask for keys (`server_auth`); `allow_open` says that nobody shall be asked. `paths` are more paths for clients, as
    `METHOD /path`. `rate` is in requests a second for each client, 0 for no limit; `timeout` in seconds.
    """

    host: str
    port: int
    names: Sequence[str]
    routes: Sequence[Route]
    admin_from: Sequence[str] = ()
    metrics_from: Sequence[str] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[str] = ()
    body_size: str = "512m"
    rate: int = 200
    timeout: int = 3600
    server_auth: bool = False
    allow_open: bool = False


def gateway_of(options: Mapping[str, Any]) -> Gateway:
    """A gateway from the options of the module: `servers` and `models` by host, `keys` as a list, the rest as it is."""
    same = ("host", "port", "names", "admin_from", "metrics_from", "body_size", "rate", "timeout", "server_auth")
    return Gateway(
        routes=routes(options["servers"], options["models"]),
        keys={str(key["name"]): str(key["key"]) for key in options["keys"]},
        paths=options["client_paths"],
        allow_open=options["allow_open"],
        **{name: options[name] for name in same},
    )


def faults(gateway: Gateway, routed: bool = True) -> List[str]:
    """Everything that is wrong with it, each with the variable to correct; no key is ever in a message.

    Without `routed` it lacks servers or models of the wrong type, and nothing is said of those it has.
    """
    routes = _route_faults(gateway) if routed else ()
    return [*_place_faults(gateway), *routes, *_access_faults(gateway), *_limit_faults(gateway)]


def shape_faults(servers: Mapping[str, Any], models: Mapping[str, Any]) -> Tuple[List[str], Dict[str, Dict[str, Any]]]:
    """What is wrong with the types of servers and models, and those of both that are right, as options."""
    places = {host: address for host, address in servers.items() if isinstance(address, str)}
    served = {
        host: uids
        for host, uids in models.items()
        if isinstance(uids, (list, tuple)) and all(isinstance(uid, str) for uid in uids)
    }
    found = [
        f"xinference_gateway_servers: {servers[host]!r} of {host} is not host:port"
        for host in servers
        if host not in places
    ]
    found += [
        f"xinference_gateway_models: {models[host]!r} of {host} is no list of model uids"
        for host in models
        if host not in served
    ]
    return found, {"servers": places, "models": served}


def key_faults(keys: Sequence[Mapping[str, Any]]) -> List[str]:
    """What is wrong with the list of keys, before it becomes a mapping."""
    names = [str(key.get("name", "")) for key in keys]
    values = [str(key.get("key", "")) for key in keys]
    found = [
        f"xinference_gateway_keys has the name {name} twice"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if len(set(values)) < len(values):
        found.append("xinference_gateway_keys has the same key under two names, so that neither could be revoked alone")
    return found


def routes(servers: Mapping[str, str], models: Mapping[str, Sequence[str]]) -> List[Route]:
    """The ways through a gateway before several hosts.

    `servers` are addresses (`host:port`) by name of the host, `models` the model uids each host serves. Each uid leads
    to all hosts that serve it. A request that names none goes to any of the hosts when all serve the same, and nowhere
    otherwise, because only the body of a request says for which model it is, and the gateway does not read bodies.
    """
    by_uid: Dict[str, List[str]] = {}
    for host, address in servers.items():
        for uid in models.get(host, ()):
            by_uid.setdefault(uid, []).append(address)
    alike = len({frozenset(models.get(host, ())) for host in servers}) <= 1
    found = [Route("", tuple(servers.values()))] if alike and servers else []
    found += [Route(f"{MODELS}/{uid}", tuple(by_uid[uid])) for uid in sorted(by_uid)]
    return found + [Route(f"{HOSTS}/{host}", (address,)) for host, address in sorted(servers.items())]


def endpoints(gateway: Gateway) -> List[str]:
    """Base URLs for clients: one for all models where every host serves the same, else one for each model."""
    port = "" if gateway.port == 443 else f":{gateway.port}"
    name = f"[{gateway.names[0]}]" if ":" in gateway.names[0] else gateway.names[0]
    prefixes = [route.prefix for route in gateway.routes]
    chosen = [""] if "" in prefixes else [prefix for prefix in prefixes if prefix.startswith(f"{MODELS}/")]
    return [f"https://{name}{port}{prefix}/v1" for prefix in chosen]


def _place_faults(gateway: Gateway) -> Iterator[str]:
    if not _is_address(gateway.host):
        yield f"xinference_gateway_host is {gateway.host!r} and must be an IP address of the host, such as 0.0.0.0"
    if not 0 < gateway.port < 65536:
        yield f"xinference_gateway_port is {gateway.port} and must be from 1 to 65535"
    if not gateway.names:
        yield "xinference_gateway_names is empty; give the names and addresses under which clients ask"
    for name in gateway.names:
        if not (_is_address(name) or _DOMAIN.match(name)):
            yield f"xinference_gateway_names: {name!r} is neither a name nor an address"


def _route_faults(gateway: Gateway) -> Iterator[str]:
    if not gateway.routes:
        yield "xinference_gateway_servers is empty, so that there is nothing to stand before"
    seen = set()
    for route in gateway.routes:
        words = route.prefix.split("/")[1:]
        if route.prefix and not (len(words) == 2 and _NAME.match(words[1])):
            yield f"{words[-1]!r} cannot be part of an address; use letters, digits, dot, _ and - in the model_uid"
        for server in route.servers:
            if server not in seen and not _is_server(server):
                yield f"xinference_gateway_servers: {server!r} is not host:port"
            seen.add(server)


def _access_faults(gateway: Gateway) -> Iterator[str]:
    for variable, networks in (("admin_from", gateway.admin_from), ("metrics_from", gateway.metrics_from)):
        for network in networks:
            if not _is_network(network):
                yield f"xinference_gateway_{variable}: {network!r} is no address and no network such as 10.0.0.0/24"
    if not (gateway.keys or gateway.server_auth or gateway.allow_open):
        yield (
            "nobody would be asked for a key: set xinference_gateway_keys (servers older than 3.0), let the servers "
            "ask (xinference_auth: true), or say xinference_gateway_allow_open: true"
        )
    if gateway.keys and gateway.server_auth:
        yield (
            "xinference_gateway_keys are for servers that do not ask themselves, and these do (xinference_auth); make "
            "the keys on the servers and leave xinference_gateway_keys empty"
        )
    for name, key in gateway.keys.items():
        if not _NAME.match(name):
            yield f"xinference_gateway_keys: the name {name!r} must be of letters, digits, dot, _ and -"
        if not _KEY.match(key):
            yield f"xinference_gateway_keys: the key of {name} has characters that an Authorization header cannot have"
        elif len(key) < KEY_LENGTH:
            yield f"xinference_gateway_keys: the key of {name} has {len(key)} characters; {KEY_LENGTH} are needed"
    for path in gateway.paths:
        fault = path_fault(path)
        if fault:
            yield f"xinference_gateway_client_paths: {path!r} {fault}"


def _limit_faults(gateway: Gateway) -> Iterator[str]:
    if not _SIZE.match(gateway.body_size):
        yield f"xinference_gateway_body_size is {gateway.body_size!r} and {SIZE}"
    if gateway.rate < 0:
        yield f"xinference_gateway_rate is {gateway.rate} and must be requests a second, or 0 for no limit"
    if gateway.timeout < 1:
        yield f"xinference_gateway_timeout is {gateway.timeout} and must be 1 second or more"


def _is_address(text: str) -> bool:
    """A zone (`fe80::1%eth0`) is refused: nginx takes none, and Python takes anything for one."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _is_network(text: str) -> bool:
    """A network whose address has bits of a host in it is refused: nobody knows which of the two was meant."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return "%" not in text


def _is_server(text: str) -> bool:
    host, _colon, port = text.rpartition(":")
    if not (_PORT.match(port) and 0 < int(port) < 65536):
        return False
    if host.startswith("[") and host.endswith("]"):
        return _is_address(host[1:-1])
    return bool(_DOMAIN.match(host))
