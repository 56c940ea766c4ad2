# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The receiver: the program on a host that takes blobs in while they arrive on its standard input.

It runs as the owner of the store, for as long as its controller talks to it, and leaves nothing running behind. Every
blob is appended to its file in `<root>/partial`, hashed once by threads that follow the growing files, and renamed into
the store. Receiving never waits for hashing. What arrived stays, wherever the connection breaks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import stat
import struct
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

from . import frames
from .digest import ALGORITHM, free_bytes
from .fetching import Fetchers
from .store import NotTaken, Store, StoreError, room_for

IDLE = 60.0
"""Seconds of silence after which the controller is taken for dead; a live one says something far more often."""
REPORT_EVERY = 0.5
FLUSH_EVERY = 0.5
"""Seconds after which what was written is on its way to the disk, so that little is left to wait for at the end."""
COMMIT_EVERY = 30.0
"""Seconds after which stamps of what was taken in are saved, so that a host that goes down forgets little."""
GRACE = 2.0
"""Seconds that blobs which arrived whole get to be verified in, when the controller went away."""
PIECE = 1024 * 1024
AT_ONCE = 128 * 1024
"""Bytes up to which a blob is hashed by the thread that brought it: handing it to another one would cost more."""
QUANTUM = 16 * PIECE
"""Bytes hashed of one file before another one gets its turn."""
_SET_PIPE_SIZE = 1031
"""F_SETPIPE_SZ, which Python has a name for since 3.10."""


class Gone(Exception):
    """The controller is not there any more; the text says how that was noticed."""


class Failure(Exception):
    """The session cannot go on; `kind` tells the controller what to do about it."""

    def __init__(self, text: str, kind: str = "other") -> None:
        super().__init__(text)
        self.kind = kind


class Arrival:
    """A blob while its bytes arrive, be it from the controller or another host: appended to its file, hashed behind.

    One thread at a time may `add`. `got` counts the bytes in the file, `hashed` those that were hashed.
    """

    def __init__(self, digest: str, size: int, source: str, place: Path, handle: int, got: int) -> None:
        self.digest, self.size, self.source = digest, size, source
        self.place, self.handle = place, handle
        self.got, self.hashed, self.flushed = got, 0, got
        self.peers: list[str] = []
        self.growing = True
        self.queued = False
        self._sha = hashlib.sha256()
        self._wake: Callable[[Arrival], None] = lambda _arrival: None

    def followed_by(self, wake: Callable[[Arrival], None]) -> Arrival:
        """Have `wake` called when there is more to hash; once now."""
        self._wake = wake
        wake(self)
        return self

    def add(self, data: memoryview) -> None:
        """Append what came. Raises ValueError for more than the blob has, StoreError for a full disk, OSError."""
        if self.got + len(data) > self.size:
            raise ValueError(f"more than the {self.size} bytes of {self.digest}")
        while len(data):
            with room_for(self.place, self.size - self.got):
                count = os.pwrite(self.handle, data, self.got)
            self.got += count
            data = data[count:]
        self._wake(self)

    def hash_some(self, buffer: memoryview) -> None:
        """Hash some of what is there and was not hashed yet."""
        until = min(self.got, self.hashed + QUANTUM)
        while self.hashed < until:
            count = os.preadv(self.handle, [buffer[: until - self.hashed]], self.hashed)
            if not count:
                raise OSError(errno.EIO, f"{self.digest} lost bytes that were written")
            self._sha.update(buffer[:count])
            self.hashed += count

    @property
    def found(self) -> str:
        """The digest of what was hashed so far."""
        return f"{ALGORITHM}:{self._sha.hexdigest()}"


class Hashers:
    """Threads, one for each core, that hash whatever arrives; each file is with one of them at a time.

    `settle` is called, in one of them, for every arrival that is hashed to its end, `fail` when reading is impossible.
    """

    def __init__(
        self, settle: Callable[[Arrival], None], fail: Callable[[Exception], None], threads: int | None = None
    ) -> None:
        self._settle, self._fail = settle, fail
        self._ready: deque[Arrival] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        count = threads or min(16, os.cpu_count() or 1)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _number in range(count)]
        for thread in self._threads:
            thread.start()

    def wake(self, arrival: Arrival) -> None:
        """There is more to hash of this one, or it is complete."""
        with self._changed:
            if not arrival.queued:
                arrival.queued = True
                self._ready.append(arrival)
                self._changed.notify()

    def stop(self) -> None:
        """End the threads, each after what it has in hand."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        buffer = memoryview(bytearray(PIECE))
        while True:
            with self._changed:
                while not self._ready and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                arrival = self._ready.popleft()
            try:
                arrival.hash_some(buffer)
                if arrival.hashed == arrival.size:
                    self._settle(arrival)
                    continue
            except Exception as error:  # a thread has nobody above it to tell
                self._fail(error)
                continue
            with self._changed:
                arrival.queued = arrival.got > arrival.hashed
                if arrival.queued:
                    self._ready.append(arrival)
                    self._changed.notify()


class Session:
    """The right to write into the receiving area: one controller has it, for all its streams.

    Whoever begins one holds the lock alone for a moment, says in the file who it is, and shares the lock from then on
    with those who know the token. The kernel gives it back however a receiver ends.
    """

    def __init__(self, store: Store, opening: frames.Open) -> None:
        self._opening, self._store = opening, store
        how = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(store.receiving_lock, how, 0o600)
        self._began = False
        self.token = opening.token or secrets.token_hex(16)

    def enter(self, busy: Callable[[dict[str, Any]], None], pause: Callable[[float], None]) -> None:
        """Begin or join the session. `busy` is told who has it, `pause` lets time pass. Raises Failure."""
        deadline = time.monotonic() + self._opening.wait
        told: dict[str, Any] = {}
        while not (self._join() if self._opening.token else self._begin()):
            holder = self._holder()
            holder.pop("token", None)
            if holder and holder != told:
                busy(holder)
                told = holder
            if time.monotonic() >= deadline:
                raise Failure(
                    f"Another controller is shipping to this host: {_who(told)}. Wait for it to end, or end it there",
                    frames.BUSY,
                )
            pause(0.3)

    def close(self) -> None:
        """Give the lock back, and let those know that asked what is missing before this."""
        if self._began:
            os.utime(self._handle)
        os.close(self._handle)

    def _begin(self) -> bool:
        if not self._lock(fcntl.LOCK_EX):
            return False
        opening = self._opening
        if opening.turn not in (None, self._store.turn()):
            raise Failure("another controller was at work", frames.OVERTAKEN)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        me = {"controller": opening.controller, "user": opening.user, "pid": opening.pid, "since": since}
        content = json.dumps({**me, "token": self.token}).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)
        # Sharing is not atomic: another one may get the lock in between, and then the file says so.
        self._began = self._lock(fcntl.LOCK_SH) and self._holder().get("token") == self.token
        return self._began

    def _join(self) -> bool:
        if not self._lock(fcntl.LOCK_SH):
            return False
        if self._holder().get("token") == self.token:
            return True
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        return False

    def _lock(self, how: int) -> bool:
        try:
            fcntl.flock(self._handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            content = json.loads(os.pread(self._handle, 65536, 0))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


class Input:
    """Standard input, read in pieces as large as what comes soon allows, because each piece costs the same."""

    def __init__(self, handle: int, idle: float = IDLE) -> None:
        self._handle, self._idle = handle, idle
        self._poll = select.poll()
        self._poll.register(handle, select.POLLIN)
        self._socket: socket.socket | None = None
        self.buffer = bytearray(PIECE)
        kind = os.fstat(handle).st_mode
        if stat.S_ISFIFO(kind):
            try:
                fcntl.fcntl(handle, _SET_PIPE_SIZE, PIECE)
            except OSError:
                pass  # A smaller pipe is slower, no more.
        elif stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(handle))
            # How long a piece may take to fill up.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 250_000))

    def wait(self, seconds: float) -> bool:
        """Whether something can be read within so many seconds; the end counts as something."""
        return bool(self._poll.poll(int(seconds * 1000)))

    def read(self, expected: int) -> int:
        """Read into `buffer` and return how many bytes; `expected` are sure to come if all is well. Raises Gone."""
        if not self.wait(self._idle):
            raise Gone(f"nothing was heard for {self._idle:.0f} s")
        count = min(expected, len(self.buffer))
        if self._socket is not None and count > 65536:
            received = self._socket.recv_into(self.buffer, count, socket.MSG_WAITALL)
        else:
            received = os.readv(self._handle, [self.buffer])
        if not received:
            raise Gone("the connection was closed")
        return received


class Receiver:
    """One session with a controller: reads its frames from `source`, answers to `target` (file descriptors)."""

    def __init__(self, source: int, target: int, idle: float = IDLE, threads: int | None = None) -> None:
        self._input = Input(source, idle)
        self._target = target
        self._threads = threads
        self._commands = frames.Commands()
        self._answering = threading.Lock()
        self._over = False
        self._changed = threading.Condition()
        self._arrivals: dict[str, Arrival] = {}
        self._leaving = threading.Event()
        self._broken = False
        self._capacity = _open_files() // 2
        self._from_peers = 0
        self._committed = 0
        self._told: Mapping[str, int] = {}
        self.store: Store
        self.opening: frames.Open
        self._hashers: Hashers
        self._fetchers: Fetchers

    def run(self) -> None:
        """Receive until the controller says it is enough, or is gone."""
        try:
            self._receive()
        except Gone:
            pass
        except (Failure, StoreError, OSError, frames.FrameError) as error:
            self.fail(error)
        finally:
            # A thread that still waits for another host has nobody to tell any more.
            with self._answering:
                self._over = True

    def _receive(self) -> None:
        commands = self._read()

        def pause(seconds: float) -> None:
            if self._input.wait(seconds) and not isinstance(next(commands), frames.Alive):
                raise frames.FrameError("the session is not ready for that")

        opening = next(commands)
        if not isinstance(opening, frames.Open):
            raise frames.FrameError("the first frame does not open a session")
        self.opening = opening
        self.store = Store(opening.root)
        self.store.make_directory(self.store.state)
        session = Session(self.store, opening)
        try:
            session.enter(lambda holder: self.answer({frames.BUSY: holder}), pause)
            # What was saved by whoever was at work here until now is known now.
            self.store = Store(opening.root)
            self.store.receive()
            self.answer({frames.READY: {"free_bytes": free_bytes(self.store.partial), "token": session.token}})
            self._serve(commands)
        finally:
            session.close()

    def _serve(self, commands: Iterator[frames.Command | memoryview]) -> None:
        self._hashers = Hashers(self._settle, self.fail, self._threads)
        self._fetchers = Fetchers(self, self.opening.credential)
        helpers = [
            threading.Thread(target=self._every, args=(REPORT_EVERY, self._report), daemon=True),
            threading.Thread(target=self._every, args=(FLUSH_EVERY, self._flush), daemon=True),
            threading.Thread(target=self._every, args=(COMMIT_EVERY, self._commit), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        patience: float | None = 0.0
        try:
            self._obey(commands)
            patience = None
        except Gone:
            patience = GRACE
            raise
        finally:
            self._fetchers.stop()
            self._wait_for_hashers(patience)
            self._leaving.set()
            self._hashers.stop()
            for helper in helpers:
                helper.join()
            self._commit()
        adopted, hashed = self.store.adopted, self.store.hashed_bytes
        self.answer({frames.DONE: {"adopted": adopted, "hashed_bytes": hashed, "from_peers_bytes": self._from_peers}})

    def _obey(self, commands: Iterator[frames.Command | memoryview]) -> None:
        """Do what the controller says until it says `end`."""
        arrival: Arrival | None = None
        for command in commands:
            if self._broken:
                raise Gone("the session failed")
            if isinstance(command, memoryview):
                if arrival is not None:
                    self.take(arrival, command)
            elif isinstance(command, frames.Blob):
                arrival = self.arrive(command.digest, command.size, command.offset, frames.CONTROLLER)
            elif isinstance(command, frames.Fetch):
                self._fetchers.add(command)
            elif isinstance(command, frames.End):
                return
            elif not isinstance(command, frames.Alive):
                raise frames.FrameError("a session is opened once")

    def arrive(self, digest: str, size: int, offset: int, source: str) -> Arrival | None:
        """A blob is about to come from `source`, from `offset` on; None when that is no use, which is answered then.

        Waits while more blobs are waiting to be hashed than files can be open, but not with one that is open already:
        the rest of what a peer left may be what all others wait for.
        """
        if self.store.sound([digest]):
            # Somebody else brought it since the controller asked.
            self.answer({frames.VERIFIED: digest, "size": size, "source": frames.STORE})
            return None
        with self._changed:
            while digest not in self._arrivals and len(self._arrivals) >= self._capacity and not self._broken:
                self._changed.wait(1)
            known = self._arrivals.get(digest)
        if known is not None:
            if known.growing:
                raise frames.FrameError(f"{digest} is on its way already")
            if known.got == offset:
                known.growing, known.source = True, source
                return known
            self.refuse(digest, known.got, f"{known.got} bytes are here")
            return None
        try:
            handle = self.store.claim(digest, writing=True)
        except NotTaken as problem:
            self.refuse(digest, 0, str(problem))
            return None
        there = os.fstat(handle).st_size
        if there < offset:
            os.close(handle)
            self.refuse(digest, there, f"{there} bytes are here")
            return None
        if there > offset:
            os.ftruncate(handle, offset)
        arrival = Arrival(digest, size, source, self.store.partial, handle, offset)
        arrival.growing = offset < size
        with self._changed:
            self._arrivals[digest] = arrival
        return arrival.followed_by(self._hash_at_once if size <= AT_ONCE else self._hashers.wake)

    def take(self, arrival: Arrival, data: memoryview) -> None:
        """Bytes of an arrival have come. Raises StoreError for a full disk, OSError."""
        if arrival.source != frames.CONTROLLER:
            with self._changed:
                self._from_peers += len(data)
            if arrival.source not in arrival.peers:
                arrival.peers.append(arrival.source)
        # Set before the bytes are there: who hashes the last of them settles the arrival.
        arrival.growing = arrival.got + len(data) < arrival.size
        arrival.add(data)

    def leave(self, arrival: Arrival, why: str) -> None:
        """No more of an arrival comes from its source: tell the controller from where on it has to send it."""
        arrival.growing = False
        self.refuse(arrival.digest, arrival.got, why)

    def refuse(self, digest: str, offset: int, why: str) -> None:
        """Tell the controller to send a blob from `offset` on."""
        self.answer({frames.REFUSED: digest, "offset": offset, "why": why})

    def fail(self, error: Exception) -> None:
        """End the session for a reason the controller is told; may be called in any thread."""
        if isinstance(error, Failure):
            kind = error.kind
        else:
            cause = error if isinstance(error, OSError) else error.__cause__
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = "full" if full else "other"
        ours = isinstance(error, (Failure, StoreError, OSError))
        self.answer({frames.FAILED: str(error) if ours else f"{type(error).__name__}: {error}", "kind": kind})
        self._break()

    def answer(self, frame: Mapping[str, Any]) -> None:
        """Say something to the controller; when it does not listen any more, the session is over."""
        data = frames.line(frame)
        try:
            with self._answering:
                while data and not self._over:
                    data = data[os.write(self._target, data) :]
        except OSError:
            self._break()

    def _break(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def _hash_at_once(self, arrival: Arrival) -> None:
        if arrival.got == arrival.size:
            arrival.hash_some(memoryview(bytearray(max(1, arrival.size))))
            self._settle(arrival)

    def _settle(self, arrival: Arrival) -> None:
        """An arrival was hashed to its end: take it in or throw it away."""
        with room_for(self.store.blobs, arrival.size):
            problem = self.store.admit(arrival.digest, arrival.handle, arrival.found)
        os.close(arrival.handle)
        self.store.stamps.count(arrival.size)
        with self._changed:
            del self._arrivals[arrival.digest]
            self.store.adopted += problem is None
            self._changed.notify_all()
        if problem is None:
            self.answer({frames.VERIFIED: arrival.digest, "size": arrival.size, "source": arrival.source})
        elif not arrival.peers:
            self.answer({frames.DAMAGED: arrival.digest, "why": problem})
        else:
            self.refuse(arrival.digest, 0, f"{' and '.join(arrival.peers)} gave wrong bytes: {problem}")

    def _read(self) -> Iterator[frames.Command | memoryview]:
        while True:
            count = self._input.read(self._commands.payload)
            yield from self._commands.feed(self._input.buffer, count)

    def _wait_for_hashers(self, seconds: float | None) -> None:
        """Let what arrived whole be verified, within so many seconds if need be."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not self._broken and any(arrival.got == arrival.size for arrival in self._arrivals.values()):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                self._changed.wait(left)

    def _every(self, seconds: float, work: Callable[[], None]) -> None:
        while not self._leaving.wait(seconds):
            work()

    def _report(self) -> None:
        """Tell how far those blobs are that moved since the last time."""
        with self._changed:
            arrivals = list(self._arrivals.values())
        got = {arrival.digest: arrival.got for arrival in arrivals}
        behind = max(arrivals, key=lambda arrival: arrival.got - arrival.hashed, default=None)
        moved = {digest: count for digest, count in got.items() if self._told.get(digest) != count}
        hashing = behind.digest if behind is not None and behind.got > behind.hashed else None
        self._told = got
        if moved or hashing:
            self.answer({frames.GOT: moved, "hashing": hashing})

    def _flush(self) -> None:
        """Have the disk begin with what large blobs brought lately."""
        with self._changed:
            arrivals = [arrival for arrival in self._arrivals.values() if arrival.got - arrival.flushed >= QUANTUM]
        for arrival in arrivals:
            arrival.flushed = arrival.got
            try:
                os.fdatasync(arrival.handle)
            except OSError:
                pass  # It was settled meanwhile; what a disk cannot take is told by others.

    def _commit(self) -> None:
        adopted = self.store.adopted
        if adopted > self._committed:
            self.store.commit()
            self._committed = adopted


def _who(holder: Mapping[str, Any]) -> str:
    """Somebody who ships, for people."""
    if not holder:
        return "it did not say who it is"
    named = {name: str(holder.get(name, "?"))[:100] for name in ("controller", "user", "pid", "since")}
    return "{user} on {controller} (process {pid}), since {since}".format(**named)


def _open_files() -> int:
    """How many files this process may have open, after asking for some thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return wanted


def main() -> None:
    """Receive on standard input, answer on standard output, until the controller is done or gone."""

    def end(number: int, _frame: Any) -> None:
        raise Gone(f"signal {number}")

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end)
    Receiver(0, 1).run()
