# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration of nginx for a gateway. Pure: data in, text out.

Whatever is decided is decided over the request line as it was received, and the same bytes are passed on, so that nginx
and the server behind it cannot read two different paths. Bodies and answers go through without ever touching a disk.
Needs nginx 1.19.4 or newer with TLS, as every package and image has it; no other module.
"""

from __future__ import annotations

import re
from typing import Dict, Iterator, List, Sequence, Tuple

from .definition import Gateway
from .paths import ADMINISTRATION, CLIENT, HEALTH, LOGIN, METRICS, SOCKET, kinds

CONFIGURATION = "nginx.conf"
KEYS = "keys.conf"
CERTIFICATE = "tls.crt"
PRIVATE_KEY = "tls.key"
"""Files beside each other; nginx takes their names from the directory of its configuration."""

MARK = "X-Gateway-Configuration"
"""The header with the mark of the configuration that runs."""
WORKERS = 4
# Uvicorn closes a connection after 5 idle seconds. One that nginx takes up at that moment would fail.
IDLE = 3
EMPTY = '""'
NEVER_SENT = ("X-Forwarded-Host", "X-Forwarded-Prefix", "Forwarded", "X-Xinference-Backend-Authorization")
"""Headers with which a client could pose as another gateway, or as a part of the server."""
CIPHERS = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:" + (
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)


def configuration(gateway: Gateway, scratch: str, log: str, user: str = "", mark: str = "") -> str:
    """The whole of nginx.conf.

    `scratch` is a directory of its own for its pid and for what nginx insists on, `log` the file of the access log.
    `user` are user and group of the workers, empty where nginx does not start as root. `mark` is what nginx answers to
    who asks for another name, so that one can tell which configuration it runs.
    """
    upstreams = _upstreams(gateway)
    lines = [
        "# Written by airgap.xinference; what is changed here is lost.",
        *([f"user {user};"] if user else []),
        f"worker_processes {WORKERS};",
        f"pid {scratch}/nginx.pid;",
        # Lower levels quote request lines, and these may hold what nobody else shall read.
        "error_log stderr alert;",
        "events { worker_connections 4096; }",
        "http {",
        *(f"    {line}" if line else "" for line in _http(gateway, upstreams, scratch, log, mark)),
        "}",
    ]
    return "".join(f"{line}\n" for line in lines)


def keys_file(gateway: Gateway) -> str:
    """The clients' keys, for a file that only nginx reads; expressions, as plain texts are compared without case."""
    lines = [f'    "~^(?i:bearer) {re.escape(key)}$" {name};' for name, key in sorted(gateway.keys.items())]
    return "".join(
        f"{line}\n" for line in ["map $http_authorization $xinference_client {", '    default "";', *lines, "}"]
    )


def _upstreams(gateway: Gateway) -> Dict[Tuple[str, ...], str]:
    """Names of nginx's groups by the servers in them; routes to the same servers share one."""
    found: Dict[Tuple[str, ...], str] = {}
    for route in gateway.routes:
        found.setdefault(route.servers, f"xinference_{len(found)}")
    return found


def _http(gateway: Gateway, upstreams: Dict[Tuple[str, ...], str], scratch: str, log: str, mark: str) -> Iterator[str]:
    yield from (
        "default_type application/json;",
        "server_tokens off;",
        "tcp_nodelay on;",
        "client_header_timeout 15s;",
        "client_body_timeout 60s;",
        "send_timeout 300s;",
        "reset_timedout_connection on;",
        "server_names_hash_bucket_size 256;",
        *(f"{name}_temp_path {scratch}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")),
        "",
        # No query, no header, no body; of a path that is not a client's not even the path.
        'log_format xinference escape=json \'{"time": "$time_iso8601", "from": "$remote_addr", \'',
        '    \'"client": "$xinference_client", "kind": "$xinference_kind", "method": "$request_method", \'',
        '    \'"path": "$xinference_logged", "status": $status, "sent": $body_bytes_sent, \'',
        '    \'"seconds": $request_time, "server": "$upstream_addr", "server_seconds": "$upstream_response_time"}\';',
        f"access_log {log} xinference;",
        "",
    )
    for servers, name in upstreams.items():
        yield from _upstream(name, servers)
    yield from _maps(gateway, upstreams)
    yield from _servers(gateway, mark)


def _upstream(name: str, servers: Sequence[str]) -> Iterator[str]:
    # A lone server is always tried: leaving it out would help nobody.
    failing = " max_fails=1 fail_timeout=10s" if len(servers) > 1 else ""
    yield from (
        f"upstream {name} {{",
        f"    zone {name} 128k;",
        *(["    least_conn;"] if len(servers) > 1 else []),
        *(f"    server {server}{failing};" for server in servers),
        "    keepalive 64;",
        f"    keepalive_timeout {IDLE}s;",
        "}",
    )


def _maps(gateway: Gateway, upstreams: Dict[Tuple[str, ...], str]) -> Iterator[str]:
    main = next((route for route in gateway.routes if not route.prefix), None)
    below = [route for route in gateway.routes if route.prefix]
    single = [name for servers, name in upstreams.items() if len(servers) == 1]
    yield from _map(
        "$request_uri",
        "$xinference_upstream",
        upstreams[main.servers] if main else EMPTY,
        [(f"^{re.escape(route.prefix)}/", upstreams[route.servers]) for route in below],
    )
    yield from _map(
        "$request_uri",
        "$xinference_uri",
        "$request_uri",
        [(f"^{re.escape(route.prefix)}(?<xinference_rest>/.*)$", "$xinference_rest") for route in below],
    )
    yield from _map(
        '"$request_method $xinference_uri"', "$xinference_kind", ADMINISTRATION, kinds(tuple(gateway.paths))
    )
    yield from _map("$xinference_upstream", "$xinference_single", "0", [(f"^{name}$", "1") for name in single])
    yield from _map(
        '"$xinference_kind $xinference_upstream"', "$xinference_missing", EMPTY, [(f"^{HEALTH} $", HEALTH), (" $", "1")]
    )
    yield from _geo("$xinference_admin", gateway.admin_from)
    yield from _geo("$xinference_monitor", gateway.metrics_from)
    yield from _map(
        '"$xinference_kind $xinference_admin $xinference_monitor $xinference_single"',
        "$xinference_refused",
        "1",
        [
            (f"^(?:{CLIENT}|{SOCKET}|{HEALTH}|{LOGIN}) ", "0"),
            # What is done to a server is done to one that is named.
            (f"^{METRICS} . 1 1$", "0"),
            (f"^(?:{METRICS}|{ADMINISTRATION}) 1 . 1$", "0"),
        ],
    )
    yield from _map("$xinference_kind", "$xinference_logged", "$xinference_path", [(f"^{ADMINISTRATION}$", "-")])
    yield from _map(
        "$request_uri", "$xinference_path", '"-"', [(r"^(?<xinference_before>[^?]*)", "$xinference_before")]
    )
    # Only a WebSocket is an upgrade; with others, requests have been smuggled past gateways.
    yield from _map(
        '"$xinference_kind $http_upgrade"', "$xinference_upgrade", EMPTY, [(f"^{SOCKET} (?i:websocket)$", "websocket")]
    )
    yield from _map("$xinference_upgrade", "$xinference_connection", EMPTY, [("^websocket$", "upgrade")])
    if gateway.keys:
        yield f"include {KEYS};"
        yield from _map(
            '"$xinference_kind $xinference_client"',
            "$xinference_unknown",
            "1",
            [(f"^(?:{HEALTH}|{LOGIN}|{METRICS}) ", "0"), ("^[a-z]+ .", "0")],
        )
        yield from _map("$xinference_client", "$xinference_who", "$xinference_client", [("^$", "$binary_remote_addr")])
    else:
        yield from _map("$http_host", "$xinference_client", EMPTY, [])
        yield from _map("$http_host", "$xinference_who", "$binary_remote_addr", [])


def _servers(gateway: Gateway, mark: str) -> Iterator[str]:
    address = f"[{gateway.host}]" if ":" in gateway.host else gateway.host
    names = " ".join(f'"[{name}]"' if ":" in name else name.lower() for name in gateway.names)
    tls = [
        f"ssl_certificate {CERTIFICATE};",
        f"ssl_certificate_key {PRIVATE_KEY};",
        "ssl_protocols TLSv1.2 TLSv1.3;",
        f"ssl_ciphers {CIPHERS};",
        "ssl_session_cache shared:xinference_tls:10m;",
        "ssl_session_tickets off;",
    ]
    if gateway.rate:
        yield f"limit_req_zone $xinference_who zone=xinference_rate:10m rate={gateway.rate}r/s;"
    yield from _block(
        "server",
        [
            f"listen {address}:{gateway.port} ssl default_server;",
            *tls,
            *_marked(mark),
            _say(421, "This gateway has another name."),
        ],
    )
    yield from _block(
        "server",
        [
            f"listen {address}:{gateway.port} ssl;",
            f"server_name {names};",
            *tls,
            *_block("location /", _passing(gateway)),
        ],
    )


def _marked(mark: str) -> List[str]:
    return [f"add_header {MARK} {mark} always;"] if mark else []


def _passing(gateway: Gateway) -> List[str]:
    """The one location: who may not is told why, all others are passed on."""
    nowhere = f"Name the model: the base URL is https://{gateway.names[0]}/models/<model uid>/v1."
    lines = [
        *_block("if ($xinference_refused)", [_say(403, "Not open to this address, or nothing that a client asks.")]),
        # Before hosts that serve different models the gateway answers for itself.
        *_block(f"if ($xinference_missing = {HEALTH})", ['return 200 \'{"status": "ok"}\';']),
        *_block("if ($xinference_missing)", [_say(404, nowhere)]),
    ]
    if gateway.keys:
        challenge = "add_header WWW-Authenticate Bearer always;"
        lines += [
            # The servers behind do not ask, so the gateway says that a key is wanted.
            *_block(f"if ($xinference_kind = {LOGIN})", ["return 200 '{\"auth\": true}';"]),
            *_block("if ($xinference_unknown)", [challenge, _say(401, "A valid key is needed.")]),
        ]
    if gateway.rate:
        lines += [f"limit_req zone=xinference_rate burst={gateway.rate} nodelay;", "limit_req_status 429;"]
    return [
        *lines,
        f"client_max_body_size {gateway.body_size};",
        "proxy_pass http://$xinference_upstream$xinference_uri;",
        "proxy_http_version 1.1;",
        "proxy_request_buffering off;",
        "proxy_buffering off;",
        "proxy_connect_timeout 3s;",
        f"proxy_send_timeout {gateway.timeout}s;",
        f"proxy_read_timeout {gateway.timeout}s;",
        # What a server may have begun to work on is not sent to another one.
        "proxy_next_upstream error timeout;",
        "proxy_next_upstream_tries 3;",
        "proxy_set_header Host $host;",
        "proxy_set_header Connection $xinference_connection;",
        "proxy_set_header Upgrade $xinference_upgrade;",
        # One value, the gateway's own: servers count failed logins by it, and a client could name another.
        "proxy_set_header X-Forwarded-For $remote_addr;",
        "proxy_set_header X-Forwarded-Proto https;",
        "proxy_set_header X-Real-IP $remote_addr;",
        *(f"proxy_set_header {name} {EMPTY};" for name in NEVER_SENT),
        f"proxy_set_header Authorization {EMPTY if gateway.keys else '$http_authorization'};",
    ]


def _map(source: str, target: str, default: str, rows: Sequence[Tuple[str, str]]) -> List[str]:
    return [
        f"map {source} {target} {{",
        f"    default {default};",
        *(f'    "~{row[0]}" {row[1]};' for row in rows),
        "}",
    ]


def _geo(target: str, networks: Sequence[str]) -> List[str]:
    return [f"geo {target} {{", "    default 0;", *(f"    {network} 1;" for network in networks), "}"]


def _block(head: str, lines: Sequence[str]) -> List[str]:
    return [f"{head} {{", *(f"    {line}" for line in lines), "}"]


def _say(code: int, message: str) -> str:
    return f'return {code} \'{{"error": {{"code": {code}, "message": "{message}"}}}}\';'
