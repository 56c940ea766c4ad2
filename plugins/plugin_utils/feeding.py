# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Feeding receivers: what is still to be sent to a host, and the threads that put it into the pipes to it.

The kernel copies blobs from their files into the pipe, so neither their size nor their number costs memory here.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Iterable, Mapping, Sequence

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.frames import (
    Alive,
    Blob,
    Command,
    End,
    Fetch,
    command_line,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import RESUME, SEND, Step

from .fanout import Source
from .progress import Progress

PIECE = 1024 * 1024
"""Bytes handed to the kernel at a time."""
KEEP_ALIVE = 10.0
"""Seconds of silence after which the host is told that we are still there; it waits far longer."""


@dataclass
class Tally:
    """What a transport did, sizes in bytes, counted while it is done: it holds when the transfer breaks off, too."""

    sent_bytes: int = 0
    hashed_bytes: int = 0
    """Bytes the host read to verify them."""
    blobs: int = 0
    """Blobs the host verified and took in."""
    from_peers_bytes: int = field(default=0, kw_only=True)
    """Bytes the host got from other hosts."""
    peers: list[str] = field(default_factory=list, kw_only=True)
    """The hosts that gave it blobs."""
    refused: dict[str, int] = field(default_factory=dict, kw_only=True)
    """Why blobs came from the controller although other hosts were to give them, and how many."""


class RateLimit:
    """Lets so many bytes a second pass, all threads together; None for no limit."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free = time.monotonic()
        self.piece = PIECE if rate is None else max(4096, min(PIECE, rate // 8))
        """Bytes to let pass at a time."""

    def wait(self, count: int) -> None:
        """Return when `count` more bytes may pass."""
        if self._rate is None:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free)
            self._free = start + count / self._rate
        time.sleep(start - now)


class Work:
    """The blobs of one transfer: those to be sent, and those the host has not answered for yet. For many threads."""

    def __init__(self, steps: Iterable[Step], sources: Mapping[str, Sequence[Source]] | None = None) -> None:
        self._sources = dict(sources or {})
        # The largest first: the others are on their way while these are hashed, and the last one is done at once. But
        # before all what the host is to fetch itself, so that it begins with that.
        ordered = sorted(steps, key=lambda step: (step.digest not in self._sources, -step.travels, step.digest))
        self._steps = deque(ordered)
        self._waiting = {step.digest: step for step in self._steps}
        self.sizes = {step.digest: step.size for step in self._steps}
        """Of every blob, in bytes."""
        self._changed = threading.Condition()
        self._finished = self._stopped = False

    @property
    def done(self) -> bool:
        """Whether the host answered for every blob."""
        with self._changed:
            return not self._waiting

    @property
    def over(self) -> bool:
        """Whether nothing more is to be sent."""
        return self._finished or self._stopped

    @property
    def stopped(self) -> bool:
        """Whether the transfer was given up."""
        return self._stopped

    def next(self, seconds: float) -> Step | None:
        """The next blob to send, waiting for one for so many seconds at most; None when there is none or it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._steps or self.over, seconds)
            return self._steps.popleft() if self._steps and not self.over else None

    def elsewhere(self, digest: str) -> Sequence[Source]:
        """The hosts from which this blob is to be fetched; none when it is sent from here."""
        with self._changed:
            return self._sources.get(digest, ())

    def answered(self, digest: str) -> None:
        """The host has this blob."""
        with self._changed:
            self._waiting.pop(digest, None)

    def again(self, digest: str, offset: int) -> Step | None:
        """This blob has to be sent from here, from `offset` on; None when nobody wants it."""
        with self._changed:
            self._sources.pop(digest, None)
            before = self._waiting.get(digest)
            if before is None or not 0 <= offset <= before.size:
                return None
            step = Step(RESUME if offset else SEND, digest, before.size, offset)
            self._steps.append(step)
            self._changed.notify()
            return step

    def finish(self) -> None:
        """Everything was answered."""
        self._end(stopped=False)

    def stop(self) -> None:
        """Give up: nothing more is sent, not even the rest of a blob."""
        self._end(stopped=True)

    def _end(self, stopped: bool) -> None:
        with self._changed:
            self._finished, self._stopped = True, self._stopped or stopped
            self._changed.notify_all()


class Feeder(threading.Thread):
    """Writes blobs, one after the other, to the standard input of a receiver, and its end when the work is done.

    `problem` is why it ended before that: the pipe broke, or a blob cannot be read (`unreadable`).
    """

    def __init__(
        self, pipe: int, work: Work, bundle: Bundle, limit: RateLimit, progress: Progress, tally: Tally
    ) -> None:
        super().__init__(daemon=True)
        self._pipe, self._work, self._bundle, self._limit = pipe, work, bundle, limit
        self._progress, self._tally = progress, tally
        self.problem: OSError | None = None

    @property
    def unreadable(self) -> OSError | None:
        """The error of a blob in the bundle that cannot be read."""
        return self.problem if self.problem is not None and self.problem.errno != errno.EPIPE else None

    def run(self) -> None:
        """Feed until the work is over."""
        try:
            while not self._work.over:
                step = self._work.next(KEEP_ALIVE)
                if step is not None:
                    self._send(step)
                elif not self._work.over:
                    say(self._pipe, Alive())
            if not self._work.stopped:
                say(self._pipe, End())
        except OSError as error:
            self.problem = error

    def _send(self, step: Step) -> None:
        sources = self._work.elsewhere(step.digest)
        if sources:
            places = tuple((source.address, source.port) for source in sources)
            say(self._pipe, Fetch(step.digest, step.size, step.offset, places))
            return
        path = self._bundle.blob_path(step.digest)
        with path.open("rb", buffering=0) as blob:
            say(self._pipe, Blob(step.digest, step.size, step.offset))
            position = step.offset
            while position < step.size and not self._work.stopped:
                count = min(self._limit.piece, step.size - position)
                self._limit.wait(count)
                count = _copy(self._pipe, blob.fileno(), position, count)
                if not count:
                    raise OSError(errno.EIO, f"{path} is shorter than it was")
                position += count
                with _COUNTING:
                    self._tally.sent_bytes += count
                self._progress.add(count)


_COUNTING = threading.Lock()


def say(pipe: int, command: Command) -> None:
    """Write one command. Raises OSError."""
    write(pipe, command_line(command))


def write(pipe: int, data: bytes) -> None:
    """Write all of some bytes. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _copy(pipe: int, source: int, position: int, count: int) -> int:
    """Have the kernel copy from a file into a pipe, or do it here where it cannot; how many bytes it was."""
    try:
        return os.sendfile(pipe, source, position, count)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP):
            raise
    data = os.pread(source, min(count, 256 * 1024), position)
    write(pipe, data)
    return len(data)
