# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules run as Ansible runs them, and a recorder that stands between them and a server."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple
from urllib.parse import urlsplit

# What the controller does on a host, without the transfer: arguments on standard input, the result on standard output.
RUNNER = """
import runpy, sys
from ansible.module_utils import basic
basic._ANSIBLE_PROFILE = "legacy"
runpy.run_module("ansible_collections.airgap.xinference.plugins.modules." + sys.argv.pop(), run_name="__main__")
"""


def run_module(name: str, params: Mapping[str, Any], check: bool = False) -> Tuple[Dict[str, Any], float]:
    """The result of a module in diff mode, failed or not, and the seconds its process took from start to end."""
    arguments = {**params, "_ansible_check_mode": check, "_ansible_diff": True, "_ansible_remote_tmp": "/tmp"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, name],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout), seconds


def tree(root: Path) -> List[Tuple[str, int, bytes]]:
    """Every file below `root` with its time of change and content, to see that nothing was written."""
    return sorted(
        (str(path), path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in root.rglob("*")
    )


class Recorder:
    """Passes requests on to `target` and keeps a line for each in `lines`: method, path, status."""

    def __init__(self, target: str) -> None:
        lines: List[str] = []
        host = urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                onward = http.client.HTTPConnection(host, timeout=300)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                onward.request(self.command, self.path, body or None, headers)
                answer = onward.getresponse()
                content = answer.read()
                lines.append(f"{self.command} {self.path} {answer.status}")
                self.send_response(answer.status)
                for name in ("Content-Type", "Retry-After"):
                    if answer.getheader(name):
                        self.send_header(name, str(answer.getheader(name)))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                onward.close()

            do_GET = do_POST = do_DELETE = do_PUT = _pass_on

            def log_message(self, *arguments: Any) -> None:
                pass

        self.lines = lines
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Recorder:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def methods(self) -> set:
        return {line.split()[0] for line in self.lines}
