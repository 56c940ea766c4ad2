# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stranger notices what is open, and nothing else."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from .strangers import Stranger, attempts, strangers

Answer = Callable[[str, str], Tuple[int, str]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts servers that answer as a function says, given method and path; gives their URL."""
    running: List[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = answer(self.command, self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST = do_DELETE = reply

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def closed(method: str, path: str) -> Tuple[int, str]:
    """A server that has its administrator."""
    if path == "/v1/admin/setup/status":
        return 200, '{"needs_setup": false, "initialized": true}'
    if path == "/v1/cluster/auth":
        return 200, '{"auth": true}'
    return (200, "<html>") if "passwd" in path else (401, "{}")


def report(target: str, *more: str) -> Dict[str, Any]:
    """One round of everything."""
    stranger = Stranger(target, more)
    for _foray in itertools.islice(stranger.forays(60), len(attempts(more))):
        pass
    return stranger.report


def test_a_closed_server_is_found_closed(serve: Callable[[Answer], str]) -> None:
    found = report(serve(closed))
    assert found["open"] == []
    assert found["answers"]["401"] > 5 and found["first_answer"] is not None


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/admin/setup/status", (200, '{"needs_setup":true}')),
        ("/v1/cluster/auth", (200, '{"auth":false}')),
        ("/v1/admin/setup", (400, "password too short")),
        ("/token", (200, '{"access_token": "x"}')),
        ("/v1/admin/users", (201, "{}")),
        ("/metrics", (200, "")),
    ],
)
def test_what_is_open_is_found(serve: Callable[[Answer], str], path: str, answer: Tuple[int, str]) -> None:
    target = serve(lambda method, asked: answer if asked == path else closed(method, asked))
    found = report(target, "/metrics")
    assert {one["status"] for one in found["open"]} == {answer[0]}


def test_files_are_known_by_what_is_in_them(serve: Callable[[Answer], str]) -> None:
    passwd = (200, "root:x:0:0:root:/root:/bin/bash\n")
    target = serve(lambda method, asked: passwd if "%2fetc%2fpasswd" in asked else closed(method, asked))
    found = report(target)
    assert [one["attempt"][:14] for one in found["open"]] == ["file /ui/..%2f"]


def test_the_code_says_whether_anything_was_open(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    target = serve(lambda method, asked: (200, '{"auth":false}'))
    assert strangers(target, 0.5, tmp_path / "report.json") == 1
    assert json.loads((tmp_path / "report.json").read_text())["open"][0]["attempt"] == "asks whether it is open"


def test_nobody_there_is_no_success(tmp_path: Path) -> None:
    code = strangers("http://127.0.0.1:9", 0.2, tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert code == 0 and found["unreached"] == found["attempts"] > 0 and found["first_answer"] is None
