# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A gateway on this machine, with the real nginx, and clients as a site has them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import shutil
import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import Gateway
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.native import Native
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import Done, converge, files
from ansible_collections.airgap.xinference.plugins.plugin_utils.authority import AUTHORITY, ensure
from servers import free_port
from upstream import Upstream

NAME = "gateway.example"
WAIT = 60.0


@dataclass
class Site:
    """One nginx, the stand-ins behind it, and the authority that made its certificate."""

    place: Path
    runner: Native
    gateway: Gateway
    authority: Path
    upstreams: List[Upstream] = field(default_factory=list)
    wanted: Dict[str, Any] = field(default_factory=dict)

    def put(self, **changes: Any) -> Done:
        """Put the gateway in force with some of it changed."""
        gateway = dataclasses.replace(self.gateway, **changes)
        made = ensure(self.authority, "gateway", gateway.names, 30, 3, datetime.datetime.now(datetime.timezone.utc))
        self.wanted = files(gateway, self.runner, made.certificate.read_text(), made.key.read_text())
        return converge(self.place, self.runner, gateway, self.wanted, WAIT, False)

    def connect(self, source: str = "127.0.0.1") -> ssl.SSLSocket:
        """A connection as a client of the site makes it: it trusts the authority and nothing else."""
        context = ssl.create_default_context(cafile=str(self.authority / f"{AUTHORITY}.crt"))
        address = ("127.0.0.1", self.gateway.port)
        plain = socket.create_connection(address, timeout=WAIT, source_address=(source, 0))
        return context.wrap_socket(plain, server_hostname=NAME)

    def send(self, text: str, body: bytes = b"") -> int:
        """Send exactly these lines of a request; returns the status, 0 when the connection was closed."""
        with self.connect() as connection:
            connection.sendall(text.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
            answer = http.client.HTTPResponse(connection)
            with contextlib.suppress(http.client.HTTPException, OSError):
                answer.begin()
                return answer.status
        return 0

    def ask(
        self,
        method: str,
        path: str,
        body: Optional[Any] = None,
        headers: Optional[Dict[str, str]] = None,
        source: str = "127.0.0.1",
    ) -> http.client.HTTPResponse:
        """One request on a connection of its own, from an address of loopback; its answer may be read by and by."""
        connection = http.client.HTTPSConnection(NAME, self.gateway.port, timeout=WAIT)
        connection.sock = self.connect(source)
        connection.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, (bytes, str)))
        return connection.getresponse()

    def lines(self) -> List[str]:
        """Method and path of every request that reached a server."""
        return [seen.line.rpartition(" ")[0] for upstream in self.upstreams for seen in upstream.seen]


@contextlib.contextmanager
def site(top: Path, **gateway: Any) -> Iterator[Site]:
    """A gateway that is put in force when told, below a directory that others may enter; it ends with the block."""
    if not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        pytest.skip("there is no nginx (apt-get install nginx-light)")
    top.chmod(0o755)
    made = Gateway(host="127.0.0.1", port=free_port(), names=[NAME, "127.0.0.1"], **gateway)
    runner = Native(top / "gateway", "xinference-gateway", manager="none")
    try:
        yield Site(top / "gateway", runner, made, top / "authority")
    finally:
        runner.stop()
