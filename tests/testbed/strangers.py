# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stranger who tries in a loop to get into a server, from before it starts, and writes down every time it succeeds.

Usage: strangers.py TARGET_URL --seconds N --report FILE [--closed PATH ...]

It tries what an attacker without credentials would: to become the first administrator, to log in with defaults, to
forge tokens, to use keys from the documentation, to launch, register and delete, to use models, and to read files.
Ends after N seconds, or at SIGTERM; the code is 1 when an attempt got in, 0 otherwise, and 2 for wrong arguments. The
report is JSON, rewritten every second::

    {"target": URL, "seconds": float, "attempts": int, "unreached": int, "answers": {"401": int, ...},
     "first_answer": seconds or null, "open": [{"after": seconds, "attempt": NAME, "status": int, "body": START}, ...]}

`answers` counts what came back, so that a test can tell a closed server from none. Needs Python's own library only.

No attempt with a wrong key comes from the stranger's own address: the server would ban the address (10 wrong keys, an
hour) and the rest of the loop would see nothing. It claims another address each time, as an attacker would.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import http.client
import itertools
import json
import signal
import ssl
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

REFUSED = (401, 403, 404, 405, 429, 502, 503, 504)
"""Answers to a request for a protected thing that say no, or that nobody is there. All others mean that it was open."""
TIMEOUT = 5.0
PAUSE = 0.02
LOOT = (b"root:x:0:", b"SQLite format 3", b'"secret_key"', b"BEGIN OPENSSH PRIVATE KEY", b"XINFERENCE_HOME")
"""What is in files that a stranger would look for."""
NAME, PASSWORD = "stranger", "let-me-in-12345"
# From the documentation of Xinference before 3.0.
KNOWN_SECRET = "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7"
KNOWN_KEYS = ("sk-72tkvudyGLPMi", "sk-ZOTLIY4gt9w11", "sk-35tkasdyGLYMy", "sk-3sjLbdwqAhhAF")


class Attempt(NamedTuple):
    """One request. `prize` says when it succeeded: `any` that was not refused, `fine` (2xx), `loot`, or `told` open."""

    name: str
    method: str
    path: str
    body: Any = None
    prize: str = "any"
    token: str = ""


def won(attempt: Attempt, status: int, body: bytes) -> bool:
    """Whether an answer means that the stranger got in."""
    fine = 200 <= status < 300
    if attempt.prize == "told":
        body = body.replace(b" ", b"")
        return fine and (b'"needs_setup":true' in body or b'"auth":false' in body)
    if attempt.prize == "loot":
        return fine and any(mark in body for mark in LOOT)
    return fine if attempt.prize == "fine" else status not in REFUSED


def forged(algorithm: str, secret: str) -> str:
    """A token of an administrator, signed with `secret`, or not at all."""

    def text(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    said = {"sub": "admin", "user_id": 1, "scopes": ["admin"], "type": "access", "exp": 4102444800}
    signed = ".".join(text(json.dumps(part).encode()) for part in ({"alg": algorithm, "typ": "JWT"}, said))
    seal = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest() if secret else b""
    return f"{signed}.{text(seal)}"


def attempts(closed: Tuple[str, ...] = ()) -> List[Attempt]:
    """Everything that is tried, once; `closed` are more paths that must not be answered."""
    new = {"username": NAME, "password": PASSWORD}
    talk = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
    launch = {"model_uid": NAME, "model_name": "bge-small-en-v1.5", "model_type": "embedding", "model_path": "/tmp"}
    spec = {"model": json.dumps({"model_name": NAME, "model_uri": "file:///etc"}), "persist": True}
    pairs = [("admin", "admin"), ("admin", "admin123"), ("admin", "xinference"), ("administrator", "secret"), ("", "")]
    tokens = [("none", ""), ("HS256", KNOWN_SECRET), ("HS256", "secret")]
    files = [
        "/etc/passwd",
        "/../../../../etc/passwd",
        "/ui/../../../../../../../../etc/passwd",
        "/ui/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/auth/auth.db",
        "/root/.xinference/auth/auth.db",
        "/accounts.json",
        "/server.env",
        "/proc/self/environ",
    ]
    return [
        Attempt("asks whether it is open", "GET", "/v1/cluster/auth", prize="told"),
        Attempt("asks whether setup is due", "GET", "/v1/admin/setup/status", prize="told"),
        Attempt("setup", "POST", "/v1/admin/setup", new),
        Attempt("setup with a token", "POST", "/v1/admin/setup", {**new, "setup_token": "setup_token"}),
        *(
            Attempt(f"login as {user}", "POST", "/token", {"username": user, "password": word}, "fine")
            for user, word in [*pairs, (NAME, PASSWORD)]
        ),
        Attempt("new user", "POST", "/v1/admin/users", {**new, "permissions": ["admin"]}),
        Attempt("new key", "POST", "/v1/admin/keys", {"name": NAME}),
        Attempt("users", "GET", "/v1/admin/users"),
        Attempt("keys", "GET", "/v1/admin/keys"),
        Attempt("launch", "POST", "/v1/models", launch),
        Attempt("launch at once", "POST", "/v1/models?wait_ready=false", launch),
        Attempt("launch of a version", "POST", "/v1/models/instance", launch),
        Attempt("end of a model", "DELETE", f"/v1/models/{NAME}"),
        Attempt("registration", "POST", "/v1/model_registrations/embedding", spec),
        Attempt("end of a registration", "DELETE", f"/v1/model_registrations/embedding/{NAME}"),
        Attempt("models", "GET", "/v1/models"),
        Attempt("instances", "GET", "/v1/models/instances"),
        Attempt("embedding", "POST", "/v1/embeddings", {"model": NAME, "input": "a"}),
        Attempt("chat", "POST", "/v1/chat/completions", talk),
        Attempt("log", "GET", "/v1/cluster/logs"),
        Attempt("cache", "GET", "/v1/cache/models"),
        Attempt("end of the server", "DELETE", "/v1/clusters"),
        *(Attempt(f"file {path}", "GET", path, prize="loot") for path in files),
        *(Attempt(f"closed {path}", "GET", path, prize="fine") for path in closed),
        *(Attempt(f"forged token {kind}", "GET", "/v1/models", token=forged(kind, key)) for kind, key in tokens),
        *(Attempt("key of the documentation", "GET", "/v1/models", token=key) for key in KNOWN_KEYS),
        Attempt("launch with a forged token", "POST", "/v1/models", launch, token=forged("HS256", KNOWN_SECRET)),
    ]


def ask(target: str, attempt: Attempt, number: int) -> Optional[Tuple[int, bytes]]:
    """The status and the body of the answer to one attempt; nothing when nobody answered."""
    place = urlsplit(target)
    headers = {"Content-Type": "application/json"}
    if attempt.token:
        headers["Authorization"] = f"Bearer {attempt.token}"
        headers["X-Forwarded-For"] = f"198.18.{number // 250 % 250}.{number % 250}"
    connection: http.client.HTTPConnection
    if place.scheme == "https":
        trusting = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(
            place.hostname or "", place.port or 443, timeout=TIMEOUT, context=trusting
        )
    else:
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=TIMEOUT)
    try:
        body = None if attempt.body is None else json.dumps(attempt.body)
        connection.request(attempt.method, attempt.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(65536)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class Stranger:
    """Tries for some seconds and keeps the report."""

    def __init__(self, target: str, closed: Tuple[str, ...] = ()) -> None:
        self.target, self.closed, self.ended = target, closed, False
        self.report: Dict[str, Any] = {"target": target, "seconds": 0.0, "attempts": 0, "unreached": 0, "answers": {}}
        self.report.update(first_answer=None, open=[])

    def forays(self, seconds: float) -> Iterator[Dict[str, Any]]:
        """Attempt after attempt until the time is over or somebody set `ended`; gives the report after each."""
        begun = time.monotonic()
        for number, attempt in enumerate(itertools.cycle(attempts(self.closed))):
            after = time.monotonic() - begun
            if self.ended or after > seconds:
                return
            answer = ask(self.target, attempt, number)
            self.report["attempts"] += 1
            self.report["seconds"] = round(time.monotonic() - begun, 2)
            if answer is None:
                self.report["unreached"] += 1
            else:
                self.note(attempt, round(after, 3), *answer)
            yield self.report
            time.sleep(PAUSE)

    def note(self, attempt: Attempt, after: float, status: int, body: bytes) -> None:
        """Write down an answer."""
        answers = self.report["answers"]
        answers[str(status)] = answers.get(str(status), 0) + 1
        if self.report["first_answer"] is None:
            self.report["first_answer"] = after
        if won(attempt, status, body) and len(self.report["open"]) < 100:
            start = body[:200].decode(errors="replace")
            self.report["open"].append({"after": after, "attempt": attempt.name, "status": status, "body": start})


def strangers(target: str, seconds: float, report: Path, closed: Tuple[str, ...] = ()) -> int:
    """Try for `seconds` seconds, keep the report in a file; returns 1 when anything was open, else 0."""
    stranger = Stranger(target, closed)

    def end(*_: Any) -> None:
        stranger.ended = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    write(report, stranger.report)
    written = time.monotonic()
    for found in stranger.forays(seconds):
        if time.monotonic() - written > 1:
            write(report, found)
            written = time.monotonic()
    write(report, stranger.report)
    return 1 if stranger.report["open"] else 0


def write(path: Path, content: Dict[str, Any]) -> None:
    """Replace the report at once, so that nobody reads half of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Try in a loop to get into a server without credentials.")
    parser.add_argument("target", help="URL of the server or the gateway, such as http://192.0.2.7:9997")
    parser.add_argument("--seconds", type=float, required=True, help="how long to try")
    parser.add_argument("--report", type=Path, required=True, help="file for the report")
    parser.add_argument("--closed", action="append", default=[], help="one more path that must not be answered")
    told = parser.parse_args()
    return strangers(told.target, told.seconds, told.report, tuple(told.closed))


if __name__ == "__main__":
    raise SystemExit(main())
