# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Recorded answers of real servers, and a server that plays them or misbehaves on purpose."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

FIXTURES = Path(__file__).parents[3] / "fixtures"
VERSIONS = ("4.1.0", "1.8.1")
Answer = Tuple[int, Any]


def recorded(version: str, name: str) -> Any:
    """What the server of a version answered, see tests/fixtures/record.py."""
    return json.loads((FIXTURES / f"xinference-{version}" / f"{name}.json").read_text(encoding="utf-8"))


class Fake:
    """A server on loopback. `answer(method, path, headers)` gives status and body; every request is kept in `seen`."""

    def __init__(self, answer: Callable[[str, str, Dict[str, str]], Answer]) -> None:
        self.seen: List[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fake.seen.append(f"{self.command} {self.path}")
                status, body = answer(self.command, self.path, dict(self.headers))
                if status == 0:  # hang up without a word
                    self.close_connection = True
                    self.connection.close()
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if status in (301, 302):
                    self.send_header("Location", "https://elsewhere/")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _serve

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serving(answer: Callable[[str, str, Dict[str, str]], Answer]) -> Iterator[Fake]:
    """A `Fake` for the length of a block."""
    fake = Fake(answer)
    try:
        yield fake
    finally:
        fake.stop()
