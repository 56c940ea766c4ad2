# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for a server behind a gateway: it writes down what reaches it, and answers when a test lets it.

What it stands in for is only the HTTP side: which bytes arrive, when, and over which connection. As a script it listens
on a port of loopback for good.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, Iterator, List, Tuple


@dataclass
class Seen:
    """One request as it arrived: its line, its headers in order, its body and the connection it came over."""

    line: str
    headers: List[Tuple[str, str]]
    connection: Tuple[str, int]
    body: bytes = b""

    def values(self, name: str) -> List[str]:
        """All values of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


@dataclass
class Upstream:
    """A running stand-in; `go` lets an answer that was begun go on, `began` tells that bytes of a body came."""

    name: str = "one"
    port: int = 0
    seen: List[Seen] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    server: Any = None
    connections: List[Any] = field(default_factory=list)

    def start(self) -> Upstream:
        """Listen on loopback; on any free port unless one is set."""
        handler = type("Handler", (_Handler,), {"upstream": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """Go away as a process does: nobody listens any more, and what is connected is cut off."""
        self.go.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        """Begin anew: nothing was seen, nothing may go on."""
        self.seen.clear()
        self.go.clear()
        self.began.clear()


class _Handler(BaseHTTPRequestHandler):
    upstream: Upstream
    raw_requestline: bytes
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def setup(self) -> None:
        """Note the connection, so that it can be cut off."""
        super().setup()
        self.upstream.connections.append(self.connection)

    def log_message(self, *_arguments: Any) -> None:
        """Be silent."""

    def handle_any(self) -> None:
        line = self.raw_requestline.decode("latin-1").rstrip("\r\n")
        seen = Seen(line, list(self.headers.items()), self.client_address)
        self.upstream.seen.append(seen)
        if self.headers.get("Upgrade", "").lower() == "websocket":
            self._echo()
            return
        for part in self._body():
            seen.body += part
            self.upstream.began.set()
        if b'"stream": true' in seen.body:
            self._stream()
            return
        self._answer({"server": self.upstream.name, "line": line, "body": len(seen.body)})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_HEAD = handle_any

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while True:
                size = int(self.rfile.readline().strip() or b"0", 16)
                if size:
                    yield self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            part = self.rfile.read1(min(left, 65536))
            if not part:
                return
            left -= len(part)
            yield part

    def _answer(self, content: Dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else text)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b"data: first\n\n")
        self.upstream.go.wait(60)
        self._chunk(b"data: last\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _echo(self) -> None:
        """Accept the upgrade and send back whatever comes; frames are of no interest to a gateway."""
        self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while True:
            data = self.rfile.read1(65536)
            if not data:
                self.close_connection = True
                return
            self.wfile.write(data)


if __name__ == "__main__":
    Upstream(port=int(sys.argv[1])).start()
    threading.Event().wait()
