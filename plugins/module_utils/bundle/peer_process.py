# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The server of blobs as a process of its own: left behind by one task, ended by another, or by itself.

::

    <root>/state/peer-<run>.json   where it listens; locked as long as it lives
    <root>/state/peer.log          a few lines of the last one

A run of a playbook has one server on a host, told from those of other runs by a name. What the lock says holds also
after a crash or a reboot: a file without one belongs to no process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

from .peer import Credential
from .peer_server import Server
from .store import Store, StoreError

RUN = re.compile(r"[0-9a-f]{8,64}")
ENDING = 5.0
"""Seconds a server has to end when it is told to."""
NAME = "xinference-peer"


class Standing(NamedTuple):
    """A server that runs."""

    run: str
    pid: int
    address: str
    port: int
    fingerprint: str


def standing(store: Store) -> list[Standing]:
    """The servers of this store that run."""
    found = []
    for path in sorted(store.state.glob("peer-*.json")):
        try:
            with path.open() as file:
                if not _held(file.fileno()):
                    continue
                found.append(Standing(**json.load(file)))
        except (OSError, ValueError, TypeError):
            # Ended, or not ready yet.
            continue
    return found


def start(
    store: Store,
    run: str,
    credential: Credential,
    address: str,
    port: int,
    idle: float,
    limit: float,
    keep: Iterable[str] = (),
) -> Standing:
    """Leave a server behind for this run and say where it listens.

    Raises OSError when it cannot listen there, StoreError for a name that cannot be a run's.
    """
    if not RUN.fullmatch(run):
        raise StoreError(f"{run!r} is not the name of a run (8 to 64 hex digits).")
    store.make_directory(store.state)
    with _swept(store):
        return _start(store, run, credential, (address, port), {"idle": idle, "limit": limit, "keep": keep})


@contextmanager
def _swept(store: Store) -> Iterator[None]:
    """Remove what servers left that crashed. One at a time: a file that is not locked yet looks like one of those."""
    turn = _open(store.state / "peer.lock", 0)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for path in store.state.glob("peer-*.json"):
            with suppress(FileNotFoundError), path.open() as file:
                if not _held(file.fileno()):
                    path.unlink()
        yield
    finally:
        os.close(turn)


def _start(store: Store, run: str, credential: Credential, where: tuple[str, int], more: dict[str, Any]) -> Standing:
    """Bind, lock the file of the server, and let a grandchild go on with both."""
    place = store.state / f"peer-{run}.json"
    with ExitStack() as stack:
        log = _open(store.state / "peer.log", os.O_TRUNC | os.O_APPEND)
        stack.callback(os.close, log)
        server = Server(store.root, credential, *where, **more, log=lambda line: _write(log, f"{line}\n"))
        stack.callback(server.close)
        facts = Standing(run, 0, server.address, server.port, credential.fingerprint)
        handle = _open(place, os.O_EXCL)
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _detach(server, place, handle, log, writing, facts)
        os.close(writing)
        os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            pid = int(pipe.read() or 0)
    if not pid:
        place.unlink()
        raise OSError(f"the server of {store.root} did not start")
    return facts._replace(pid=pid)


def stop(store: Store, servers: Iterable[Standing]) -> None:
    """End servers and wait until they have. Raises StoreError for one that stays."""
    for server in servers:
        path = store.state / f"peer-{server.run}.json"
        for number in (signal.SIGTERM, signal.SIGKILL):
            # As long as the file is locked, the process with this number is the server.
            if any(_waits_for(path, number, server.pid)):
                break
        else:
            raise StoreError(f"The server of blobs with the process id {server.pid} does not end; end it by hand.")
    if store.state.is_dir():
        with _swept(store):
            pass


def own_address(name: str, others: Iterable[str], session: str = "") -> str:
    """The address of this host that other hosts of the site can use; empty when there is none to be found.

    That is `name` where it leads to this host, else the address from which the way goes to one of the `others`, else
    the one under which the controller reached it (`session`: what SSH_CONNECTION says). Nothing is sent to find out.
    An address of the loopback is taken only when the others are there, too.
    """
    ways = [address for other in others if (address := _way_to(other))]
    found = [address for address in [*_addresses(name), *ways, *session.split()[2:3]] if _is_mine(address)]
    near = [address for address in found if _is_loopback(address)]
    far = [address for address in found if not _is_loopback(address)]
    if far:
        return far[0]
    return near[0] if near and ways and all(_is_loopback(address) for address in ways) else ""


def _addresses(name: str) -> list[str]:
    """What a name or an address stands for on this host; link-local addresses left out, they are no good alone."""
    if not name:
        return []
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    found = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    return [address for address in found if not address.lower().startswith("fe80:")]


def _way_to(name: str) -> str:
    """The address this host would send from to another one. A datagram socket that is connected sends nothing."""
    for address in _addresses(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
                return str(probe.getsockname()[0])
            except OSError:
                continue
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_mine(address: str) -> bool:
    """Whether this host can listen on an address, and it is not that of all of its interfaces."""
    if address in ("0.0.0.0", "::"):
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
            return True
        except OSError:
            return False


def _open(path: Path, flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _held(handle: int) -> bool:
    """Whether some process holds the lock of an open file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def _waits_for(path: Path, number: int, pid: int) -> Iterator[bool]:
    """Signal a server, then say again and again whether it has ended, for ENDING seconds."""
    deadline = time.monotonic() + ENDING
    signalled = False
    while time.monotonic() < deadline:
        try:
            with path.open() as file:
                held = _held(file.fileno())
        except OSError:
            held = False
        if not held:
            yield True
            return
        if not signalled:
            signalled = True
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        time.sleep(0.02)
        yield False


def _detach(server: Server, place: Path, handle: int, log: int, ready: int, facts: Standing) -> Any:
    """In the child: become a process that belongs to nobody's session, and serve. Never returns."""
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        os.umask(0o077)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        _close_all_but({0, 1, 2, handle, log, ready, server.fileno()})
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _leave(place))
        _rename()
        _write(handle, json.dumps(facts._replace(pid=os.getpid())._asdict()))
        _write(ready, str(os.getpid()))
        os.close(ready)
        server.serve()
        place.unlink()
        status = 0
    except BaseException as error:
        _write(log, f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def _leave(place: Path) -> Any:
    def leave(_number: int, _frame: object) -> None:
        try:
            place.unlink()
        finally:
            os._exit(0)

    return leave


def _close_all_but(kept: set[int]) -> None:
    try:
        numbers = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        numbers = list(range(1024))
    for number in numbers:
        if number not in kept:
            try:
                os.close(number)
            except OSError:
                continue


def _rename() -> None:
    """Be found under our name in lists of processes."""
    try:
        Path("/proc/self/comm").write_text(NAME)
    except OSError:
        pass


def _write(handle: int, text: str) -> None:
    os.write(handle, text.encode("utf-8", "replace"))
