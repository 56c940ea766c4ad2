# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The side that passes blobs on to other hosts of the site while a playbook ships (the other side: peer.py).

It serves the blobs of one store and nothing else: a name is 64 hex digits, looked up among the verified blobs and among
those that are still being received. Of the latter it sends what is there and follows the file, so that bytes go down a
chain of hosts without waiting for the end. Layers of images leave the store once the engine has them; those it is told
to `keep` it holds open, so that hosts whose turn comes later get them all the same. It ends by itself when nobody is
connected for a while, and in any case after a day.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
import stat
import threading
import time
from pathlib import Path
from typing import Callable, Iterable

from .peer import CONNECT, Credential, PeerError, read_head
from .store import Store

IDLE = 300.0
"""Seconds without a connection after which the server ends: more than the pause between two rounds of hosts."""
LIMIT = 24 * 3600.0
"""Seconds after which it ends whatever happens."""
PATIENCE = 30.0
"""Seconds in which nothing may arrive in the store before what it lacks is given up."""
CONNECTIONS = 64
STRANGERS = 16
"""Connections at a time that have not shown the certificate yet."""
KEPT = 256
"""Files held open at most."""
CHUNK = 256 * 1024
GLANCE = 0.02
"""Seconds between two looks at a file that grows."""
HEARTBEAT = 2.0
LOG_LINES = 50

_REQUEST = re.compile(rb"GET /([0-9a-f]{64}) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nrange: *bytes=([0-9]{1,16})-([0-9]{1,16})(?:\r\n|$)", re.IGNORECASE)


class Server:
    """Serves the blobs below `root` to whoever has the credential, until `serve` returns.

    Made, it is bound and listens already: `address` and `port` say where. Raises OSError where it cannot.
    """

    def __init__(
        self,
        root: Path,
        credential: Credential,
        address: str,
        port: int = 0,
        *,
        idle: float = IDLE,
        limit: float = LIMIT,
        patience: float = PATIENCE,
        keep: Iterable[str] = (),
        log: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._store = Store(root, dry_run=True)
        self._credential = credential
        self._idle, self._limit, self._patience = idle, limit, patience
        self._arrivals = _Arrivals(self._store)
        self._log = _Log(log)
        self._lock = threading.Lock()
        self._connected = self._strangers = 0
        self._wanted = {self._store.blob_path(digest).name for digest in sorted(keep)[:KEPT]}
        self._kept: dict[str, int] = {}
        self._last = time.monotonic()
        self.sent = 0
        family, _kind, _protocol, _name, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )[0]
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if port:
                # A chosen port is the same at every run, and connections of the last one may linger.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
            self._socket.listen(CONNECTIONS)
        except OSError:
            self._socket.close()
            raise
        self.address, self.port = self._socket.getsockname()[:2]

    def fileno(self) -> int:
        """The listening socket."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def serve(self) -> None:
        """Answer until the time is up."""
        began = self._last = time.monotonic()
        self._log.say(f"listening on {self.address} port {self.port}")
        self._socket.settimeout(min(0.5, self._idle / 2))
        reason = ""
        while not reason:
            self._hold()
            try:
                connection, _peer = self._socket.accept()
            except socket.timeout:
                pass
            except OSError as error:
                # Out of file descriptors, or the other side gave up already.
                self._log.say(f"accept: {error}")
                time.sleep(GLANCE)
            else:
                self._receive(connection)
            reason = self._over(time.monotonic() - began)
        self.close()
        self._log.last(f"{reason}; {self.sent} bytes passed on")

    def _hold(self) -> None:
        """Open what is to be kept as soon as it is in the store."""
        for encoded in list(self._wanted):
            handle = _plain_file(self._store.blobs / encoded)
            if handle is not None:
                self._wanted.remove(encoded)
                self._kept[encoded] = handle

    def _over(self, seconds: float) -> str:
        """Why it is time to end, or nothing."""
        if seconds > self._limit:
            return f"ending after {seconds:.0f} s in any case"
        with self._lock:
            quiet = 0.0 if self._connected else time.monotonic() - self._last
        return f"ending: nobody was connected for {quiet:.0f} s" if quiet > self._idle else ""

    def _receive(self, connection: socket.socket) -> None:
        """Give a new connection a thread, if there are not too many."""
        with self._lock:
            full = self._strangers >= STRANGERS or self._connected >= CONNECTIONS
            self._strangers += not full
        if full:
            connection.close()
            self._log.say("too many connections; one was refused")
            return
        threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, plain: socket.socket) -> None:
        """Let in who shows our certificate, and answer."""
        known = False
        connection: ssl.SSLSocket | None = None
        try:
            plain.settimeout(CONNECT)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self._credential.server.wrap_socket(plain, server_side=True)
            known = self._credential.knows(connection)
        except OSError as error:
            self._log.say(f"refused a connection: {error}")
        finally:
            with self._lock:
                self._strangers -= 1
                self._connected += known
        try:
            if connection is not None and known:
                connection.settimeout(max(self._patience, CONNECT))
                while self._answer(connection):
                    pass
        except (OSError, PeerError):
            # The other side hung up, fell silent or talks nonsense.
            pass
        finally:
            (connection or plain).close()
            with self._lock:
                self._connected -= known
                if known:
                    self._last = time.monotonic()

    def _answer(self, connection: ssl.SSLSocket) -> bool:
        """Answer one request; whether the connection can take another."""
        head, rest = read_head(connection)
        request, span = _REQUEST.match(head + b"\r\n"), _RANGE.search(head)
        if not request or not span or rest:
            if head:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return False
        encoded, offset, size = request.group(1).decode("ascii"), int(span.group(1)), int(span.group(2)) + 1
        handle = self._open(connection, encoded, offset, size) if offset < size else None
        if handle is None:
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True
        try:
            text = (
                "HTTP/1.1 206 Partial Content\r\nContent-Type: application/octet-stream\r\n"
                f"Content-Range: bytes {offset}-{size - 1}/{size}\r\nContent-Length: {size - offset}\r\n\r\n"
            )
            connection.sendall(text.encode("ascii"))
            return self._send(connection, handle, encoded, offset, size)
        finally:
            os.close(handle)

    def _open(self, connection: ssl.SSLSocket, encoded: str, offset: int, size: int) -> int | None:
        """A file that has something from `offset` on, waited for as long as blobs arrive here; None: there is none."""
        told = time.monotonic()
        while True:
            kept = self._kept.get(encoded)
            handle = os.dup(kept) if kept is not None else _plain_file(self._store.blobs / encoded)
            if handle is not None:
                if os.fstat(handle).st_size == size:
                    return handle
                os.close(handle)
                return None
            handle = _plain_file(self._store.partial / encoded)
            if handle is not None:
                status = os.fstat(handle)
                # What an earlier run left lies still until its turn comes; it may be long.
                moving = status.st_size == size or abs(time.time() - status.st_mtime) < self._patience
                if offset < status.st_size <= size and moving:
                    return handle
                os.close(handle)
            if self._arrivals.quiet() > self._patience:
                return None
            if _spoke(connection):
                raise PeerError("hung up")
            now = time.monotonic()
            if now - told > HEARTBEAT:
                told = now
                connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
            time.sleep(GLANCE)

    def _send(self, connection: ssl.SSLSocket, handle: int, encoded: str, offset: int, size: int) -> bool:
        """Send a file that may still grow; False when it did not get as long as it should."""
        while offset < size:
            chunk = os.pread(handle, min(CHUNK, size - offset), offset)
            if chunk:
                connection.sendall(chunk)
                offset += len(chunk)
                with self._lock:
                    self.sent += len(chunk)
            elif _spoke(connection):
                return False
            elif self._arrivals.quiet() > self._patience or not self._is_named(handle, encoded):
                self._log.say(f"{encoded[:12]}: {size - offset} of {size} bytes did not arrive here")
                return False
            else:
                time.sleep(GLANCE)
        return True

    def _is_named(self, handle: int, encoded: str) -> bool:
        """Whether an open file still has its name, or the one it gets when it is complete."""
        inode = os.fstat(handle).st_ino
        for path in (self._store.partial / encoded, self._store.blobs / encoded):
            try:
                if path.lstat().st_ino == inode:
                    return True
            except OSError:
                continue
        return False


class _Arrivals:
    """Whether anything arrives in a store, found out by looking twice a second at most."""

    EVERY = 0.5

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._facts: tuple[int, ...] | None = None
        self._looked = self._changed = 0.0

    def quiet(self) -> float:
        """Seconds since something arrived, or since this was first asked."""
        with self._lock:
            now = time.monotonic()
            if self._facts is None or now - self._looked >= self.EVERY:
                self._looked = now
                facts = self._look()
                if facts != self._facts:
                    self._facts, self._changed = facts, now
            return now - self._changed

    def _look(self) -> tuple[int, ...]:
        count = held = 0
        try:
            for entry in os.scandir(self._store.partial):
                count += 1
                held += entry.stat(follow_symlinks=False).st_size
        except OSError:
            pass
        try:
            return count, held, self._store.blobs.stat().st_mtime_ns
        except OSError:
            return count, held, 0


class _Log:
    """The first lines of what there is to say."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines = 0
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """One line with the time, unless there were too many."""
        with self._lock:
            self._lines += 1
            if self._lines <= LOG_LINES:
                self.last(line)

    def last(self, line: str) -> None:
        """A line that must be there."""
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


def _spoke(connection: ssl.SSLSocket) -> bool:
    """Whether the other side said something while it should wait; most likely it hung up."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


def _plain_file(path: Path) -> int | None:
    """A file opened for reading, or None when there is no such regular file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    return None
