# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for ModelScope: a small hub on loopback that speaks the part of its API that downloads use.

The real hub cannot be reached from a test, and would not cut a connection or send wrong bytes when asked. This one does
both. It lists files with sizes and SHA-256, lists revisions with or without commit ids, serves ranges, and keeps
count of what it served. What talks to it in the tests is ModelScope's real client.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Optional, Tuple
from urllib.parse import parse_qs, urlsplit


@dataclass
class Repo:
    """A model on the hub: files by path for every revision, and the commit each branch stands at."""

    revisions: Dict[str, Dict[str, bytes]]
    branches: Dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> Optional[Dict[str, bytes]]:
        """The files at a branch or commit."""
        return self.revisions.get(self.branches.get(revision, revision)) or self.revisions.get(revision)


class Hub:
    """The hub; use as a context manager.

    `cut[path] = [n, ...]`: the next answers for that file end the connection after n bytes. `corrupt[path] = k`: the
    next k answers have a wrong byte. `hide_commits`: revisions are listed without commit ids. `token`: what a caller
    has to show. `served`: one (path, first byte, bytes sent) for each answer with content; `listings` counts lists.
    """

    def __init__(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.cut: Dict[str, List[int]] = {}
        self.corrupt: Dict[str, int] = {}
        self.listed_hash: Dict[str, str] = {}
        self.hide_commits = False
        self.token = ""
        self.served: List[Tuple[str, int, int]] = []
        self.listings = 0
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forget(self) -> None:
        """Start counting anew."""
        with self.lock:
            self.served.clear()
            self.listings = 0

    def bytes_of(self, path: str) -> int:
        """Bytes sent for a file since counting began."""
        with self.lock:
            return sum(count for served, _first, count in self.served if served == path)


class _Handler(BaseHTTPRequestHandler):
    """One request; HTTP 1.1, so that the client keeps connections as it does with the real hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    _route = re.compile(r"/api/v1/models/([^/]+/[^/]+)(/.*)?\Z")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer one of the four addresses that downloads use."""
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        match = self._route.match(address.path)
        if match is None:
            return self._fail(404, "no such address")
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._fail(403, "no permission")
        repo = self.hub.repos.get(match.group(1))
        if repo is None:
            return self._fail(404, f"model {match.group(1)} does not exist")
        action = {"/revisions": self._revisions, "/repo/files": self._files, "/repo": self._content}.get(
            match.group(2) or ""
        )
        return action(repo, query) if action else self._json({"Name": match.group(1)})

    def _revisions(self, repo: Repo, _query: Dict[str, str]) -> None:
        names = sorted(repo.branches)
        branches = [
            {"Revision": name} if self.hub.hide_commits else {"Revision": name, "CommitId": repo.branches[name]}
            for name in names
        ]
        self._json({"RevisionMap": {"Branches": branches, "Tags": []}})

    def _files(self, repo: Repo, query: Dict[str, str]) -> None:
        with self.hub.lock:
            self.hub.listings += 1
        files = repo.files(query.get("Revision", "master"))
        if files is None:
            return self._fail(404, f"revision {query.get('Revision')} does not exist")
        folders = {path.rpartition("/")[0] for path in files if "/" in path}
        entries: List[Dict[str, object]] = [
            {"Name": folder.rpartition("/")[2], "Path": folder, "Type": "tree", "Size": 0} for folder in sorted(folders)
        ]
        for path, content in sorted(files.items()):
            listed = self.hub.listed_hash.get(path, hashlib.sha256(content).hexdigest())
            entries.append(
                {
                    "Name": path.rpartition("/")[2],
                    "Path": path,
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": listed,
                }
            )
        return self._json({"Files": entries})

    def _content(self, repo: Repo, query: Dict[str, str]) -> None:
        path = query["FilePath"]
        content = (repo.files(query.get("Revision", "master")) or {}).get(path)
        if content is None:
            return self._fail(404, f"file {path} does not exist")
        first, last = 0, len(content) - 1
        span = re.match(r"bytes=(\d+)-(\d*)\Z", self.headers.get("Range", ""))
        if span:
            first, last = int(span.group(1)), min(int(span.group(2) or last), last)
            if first > last:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
        body = content[first : last + 1]
        with self.hub.lock:
            if self.hub.corrupt.get(path, 0) > 0 and body:
                self.hub.corrupt[path] -= 1
                body = bytes([body[0] ^ 255]) + body[1:]
            cut = self.hub.cut.get(path)
            sent = body[: cut.pop(0)] if cut else body
            self.hub.served.append((path, first, len(sent)))
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(body)))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(sent)
        if len(sent) < len(body):
            self.wfile.flush()
            self.close_connection = True
        return None

    def _json(self, data: object) -> None:
        self._send(200, {"Code": 200, "Success": True, "Message": "success", "Data": data})

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"Code": status, "Success": False, "Message": message})

    def _send(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
