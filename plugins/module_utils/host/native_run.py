# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the server of a host as its release says, until told to stop. systemd or supervisord starts this program.

It stands between them and the server for two reasons. The server gets the environment of the release and nothing of
whoever started the service. And when a server dies, its workers live on, keep their memory (and their GPU's) and
listen on; so everything that an earlier server left is ended before a new one starts, and when the server ends.

Usage: native_run.py ROOT. Part of every release and needs nothing but Python's own library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

SERVICE = "current/service.json"
RUNNER = "current/bin/native_run.py"
DEFINING = (SERVICE, RUNNER, "current/bin/guarded.py", "current/server.env", "current/accounts.json")
"""The files that make a running server what it is; the last two are not in every release."""
STATE = "run/server.json"
LAST_EXIT = "run/exit.json"
MARK = "XINFERENCE_SITE_ROOT"
"""Variable in the environment of every process of the server; its value is the root directory."""
SOCKETS = "XOSCAR_DIR"
"""Variable that says where the processes of the server make the sockets on which they meet."""
SOCKETS_BELOW = len("/.xoscar/socket/") + 32
"""Bytes that a socket's path has beyond that directory; the kernel allows 107 in all."""
KILL_WAIT = 10.0


def digest(root: Path) -> str:
    """A hash of all that makes a running server what it is."""
    return digest_of(*((root / name).read_bytes() for name in DEFINING if (root / name).exists()))


def digest_of(*files: bytes) -> str:
    """The same from the contents of the files that are there."""
    return hashlib.sha256(b"\0".join(files)).hexdigest()


def family(root: Path) -> Iterator[int]:
    """The processes that belong to the server of `root`, whoever their parent is now."""
    mark = f"{MARK}={root}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def sweep(root: Path) -> List[int]:
    """End every process of the server of `root` and wait until they are gone; returns those that were there."""
    ended: List[int] = []
    deadline = time.monotonic() + KILL_WAIT
    while time.monotonic() < deadline:
        there = list(family(root))
        if not there:
            break
        for pid in there:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        ended += [pid for pid in there if pid not in ended]
        time.sleep(0.05)
    return ended


def socket_directory(root: Path) -> str:
    """A private directory that is short enough for sockets: `run` below the root directory, else one in /tmp."""
    own = str(root / "run")
    if len(os.fsencode(own)) + SOCKETS_BELOW <= 107:
        return own
    short = f"/tmp/xinference-{hashlib.sha256(os.fsencode(own)).hexdigest()[:12]}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(short, 0o700)  # noqa: PTH102
    found = os.lstat(short)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
        return short
    return tempfile.mkdtemp(prefix="xinference-", dir="/tmp")


def say(line: str) -> None:
    """Print a line at once, for the log or for a person."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write(path: Path, content: Dict[str, Any]) -> None:
    """Replace a small JSON file at once."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content) + "\n", encoding="utf-8")
    new.replace(path)


def run(root: Path) -> int:
    """Start the server, wait for its end or a signal to stop, and clean up; returns the code to exit with."""
    service = json.loads((root / SERVICE).read_text(encoding="utf-8"))
    state = {"release": Path(os.readlink(str(root / "current"))).name, "digest": digest(root), "runner": os.getpid()}
    left = sweep(root)
    if left:
        say(f"Ended {len(left)} processes that an earlier server left behind")
    stopping: List[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)

    sockets = socket_directory(root)
    environment = {SOCKETS: sockets, **service["environment"], MARK: str(root)}
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    server = subprocess.Popen(
        service["command"], env=environment, cwd=service["directory"], stdin=subprocess.DEVNULL, preexec_fn=_unblock
    )
    started = time.time()
    write(root / STATE, {**state, "pid": server.pid, "started": started})
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    _unblock()
    code = _wait(server, stopping, float(service["stop_timeout"]))
    sweep(root)
    if sockets != str(root / "run"):
        shutil.rmtree(sockets, ignore_errors=True)
    lived = round(time.time() - started, 1)
    write(root / LAST_EXIT, {**state, "code": code, "lived": lived, "ended": time.time(), "asked": bool(stopping)})
    with contextlib.suppress(FileNotFoundError):
        (root / STATE).unlink()
    say(f"The server ended with code {code} after {lived} s")
    return 0 if stopping else 1


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _wait(server: subprocess.Popen[bytes], stopping: List[int], patience: float) -> int:
    """Wait for the server's end; one that was told to stop is killed when it takes longer than `patience` seconds."""
    deadline = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(0.5)
        if stopping and deadline is None:
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() > deadline:
            server.kill()


if __name__ == "__main__":
    raise SystemExit(run(Path(sys.argv[1])))
