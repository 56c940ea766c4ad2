# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a controller and the receiver on a host say to each other while blobs travel. Pure: bytes in, values out.

Both sides speak in lines of JSON; after `blob` the bytes of the blob follow, from its offset to its end.

Controller to host::

    {"open": {"root", "controller", "user", "pid", "wait", "token", "credential"}}   first, once
    {"blob": digest, "size": n, "offset": o}                                         and then n - o bytes
    {"fetch": digest, "size": n, "offset": o, "from": [[address, port], ...]}        get it from another host
    {"alive": true}                                                                  said when nothing else is to say
    {"end": true}                                                                    everything was answered; leave

Host to controller::

    {"busy": {"controller", "user", "pid", "since"}}       another controller is at work here; waiting for it
    {"ready": {"free_bytes": n, "token": text}}            blobs may come; further streams of the session show the token
    {"got": {digest: bytes, ...}, "hashing": digest|null}  what arrived of blobs that are not verified yet, now and then
    {"verified": digest, "size": n, "source": text}        the blob is in the store
    {"damaged": digest, "why": text}                       it was not what it is called and is gone; send it again
    {"refused": digest, "offset": n, "why": text}          it did not come (from there); send it from this offset on
    {"failed": text, "kind": "busy"|"full"|"other"}        the end
    {"done": {"adopted": n, "hashed_bytes": n, "from_peers_bytes": n}}

Neither side believes the other: what is not a frame raises FrameError.
"""

from __future__ import annotations

import json
from typing import Any, Iterator, Mapping, NamedTuple, Union

from .digest import is_digest
from .manifest import MAX_BLOB

MAX_LINE = 1024 * 1024
"""Bytes a line may have; the longest lists the blobs that are on their way."""

OPEN, BLOB, FETCH, ALIVE, END = "open", "blob", "fetch", "alive", "end"
BUSY, READY, GOT, VERIFIED, DAMAGED = "busy", "ready", "got", "verified", "damaged"
REFUSED, FAILED, DONE = "refused", "failed", "done"
OVERTAKEN = "overtaken"
"""Why a session fails whose controller asked what is missing before another one's turn."""
CONTROLLER = "controller"
"""The source of a blob that did not come from another host."""
STORE = "store"
"""The source of a blob that was in the store already."""


class FrameError(Exception):
    """The other side said something that is not of this protocol."""


class Open(NamedTuple):
    """Who wants to ship and where to.

    `wait` is in seconds, `token` that of the session this stream belongs to. `turn` is the store's when the controller
    asked what is missing: when another one had its turn since, the session ends with OVERTAKEN.
    """

    root: str
    controller: str
    user: str
    pid: int
    wait: float = 0.0
    token: str | None = None
    credential: str | None = None
    turn: int | None = None


class Blob(NamedTuple):
    """Bytes of a blob follow, from `offset` to `size`."""

    digest: str
    size: int
    offset: int


class Fetch(NamedTuple):
    """A blob is to be fetched from one of `sources`, (address, port), from `offset` to `size`."""

    digest: str
    size: int
    offset: int
    sources: tuple[tuple[str, int], ...]


class Alive(NamedTuple):
    """The controller is still there."""


class End(NamedTuple):
    """The controller wants nothing more."""


Command = Union[Open, Blob, Fetch, Alive, End]


def line(frame: Mapping[str, Any]) -> bytes:
    """A frame as it travels."""
    return json.dumps(frame, separators=(",", ":")).encode("ascii") + b"\n"


def command_line(command: Command) -> bytes:
    """What a controller says, as it travels."""
    if isinstance(command, Open):
        return line({OPEN: command._asdict()})
    if isinstance(command, Blob):
        return line({BLOB: command.digest, "size": command.size, "offset": command.offset})
    if isinstance(command, Fetch):
        sources = [list(source) for source in command.sources]
        return line({FETCH: command.digest, "size": command.size, "offset": command.offset, "from": sources})
    return line({(ALIVE if isinstance(command, Alive) else END): True})


def parse_command(text: bytes) -> Command:
    """What a controller said in one line. Raises FrameError."""
    frame = _object(text)
    if OPEN in frame:
        return _open(frame[OPEN])
    if BLOB in frame or FETCH in frame:
        values: tuple[Any, Any, Any] = (frame.get(BLOB, frame.get(FETCH)), frame.get("size"), frame.get("offset", 0))
        digest, size, offset = values
        if not is_digest(digest) or not _count(size) or not _count(offset) or not offset <= size <= MAX_BLOB:
            raise FrameError(f"not a blob: {_shown(text)}")
        return Blob(digest, size, offset) if BLOB in frame else Fetch(digest, size, offset, _sources(frame))
    if frame.get(ALIVE) is True:
        return Alive()
    if frame.get(END) is True:
        return End()
    raise FrameError(f"not a command: {_shown(text)}")


def parse_answer(text: bytes) -> tuple[str, dict[str, Any]]:
    """What a host said in one line: which kind of answer it is, and the whole of it. Raises FrameError."""
    frame = _object(text)
    for kind, problem in _ANSWERS.items():
        if kind in frame:
            if problem(frame):
                raise FrameError(f"not an answer: {_shown(text)}")
            return kind, frame
    raise FrameError(f"not an answer: {_shown(text)}")


class Commands:
    """Takes what a controller sends apart; how it was cut into pieces on the way makes no difference."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._payload = 0

    @property
    def inside(self) -> bool:
        """Whether the stream may not end here."""
        return bool(self._line) or self._payload > 0

    @property
    def payload(self) -> int:
        """Bytes of the current blob that are still to come."""
        return self._payload

    def feed(self, buffer: bytes | bytearray, count: int) -> Iterator[Command | memoryview]:
        """The commands, and the pieces of blobs as views, in the first `count` bytes of a buffer.

        A view is good until the next step. Raises FrameError, after which the stream is of no use any more.
        """
        position = 0
        view = memoryview(buffer)
        while position < count:
            if self._payload:
                piece = view[position : min(count, position + self._payload)]
                self._payload -= len(piece)
                position += len(piece)
                yield piece
                continue
            end = buffer.find(b"\n", position, count)
            stop = count if end < 0 else end
            self._line += view[position:stop]
            position = stop + 1
            if len(self._line) > MAX_LINE:
                raise FrameError(f"a line of more than {MAX_LINE} bytes")
            if end < 0:
                return
            command = parse_command(bytes(self._line))
            self._line.clear()
            if isinstance(command, Blob):
                self._payload = command.size - command.offset
            yield command


class Answers:
    """Takes what a host sends apart. What a login shell says before the first answer is kept aside as `noise`."""

    def __init__(self) -> None:
        self.noise = b""
        self._rest = b""
        self._began = False

    def feed(self, data: bytes) -> list[tuple[str, dict[str, Any]]]:
        """The answers that are complete now. Raises FrameError."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise FrameError(f"a line of more than {MAX_LINE} bytes")
        found = []
        for text in lines:
            try:
                found.append(parse_answer(text))
                self._began = True
            except FrameError:
                if self._began:
                    raise
                self.noise = (self.noise + text + b"\n")[-4096:]
        return found


def _object(text: bytes) -> dict[str, Any]:
    try:
        frame = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        frame = None
    if not isinstance(frame, dict):
        raise FrameError(f"not a frame: {_shown(text)}")
    return frame


def _open(value: Any) -> Open:
    try:
        found = Open(**value)
    except TypeError:
        raise FrameError(f"not an opening: {str(value)[:200]!r}") from None
    texts = (found.root, found.controller, found.user, found.token or "", found.credential or "")
    wait = found.wait
    if (
        not all(isinstance(text, str) for text in texts)
        or not _count(found.pid)
        or not (found.turn is None or _count(found.turn))
        or isinstance(wait, bool)
        or not isinstance(wait, (int, float))
        or not wait >= 0
    ):
        raise FrameError("an opening with values of the wrong type")
    return found


def _sources(frame: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    try:
        found = tuple((address, port) for address, port in frame["from"])
    except (KeyError, TypeError, ValueError):
        found = ()
    if not found or not all(isinstance(address, str) and _count(port) and port < 65536 for address, port in found):
        raise FrameError(f"not a list of hosts: {str(frame.get('from'))[:200]!r}")
    return found


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counts(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(_count(value.get(name)) for name in names)


_ANSWERS = {
    GOT: lambda frame: not isinstance(frame[GOT], dict) or not _counts(frame[GOT], *frame[GOT]),
    VERIFIED: lambda frame: not is_digest(frame[VERIFIED]) or not _counts(frame, "size"),
    DAMAGED: lambda frame: not is_digest(frame[DAMAGED]) or not isinstance(frame.get("why"), str),
    REFUSED: lambda frame: (
        not is_digest(frame[REFUSED]) or not _counts(frame, "offset") or not isinstance(frame.get("why"), str)
    ),
    FAILED: lambda frame: not isinstance(frame[FAILED], str),
    BUSY: lambda frame: not isinstance(frame[BUSY], dict),
    READY: lambda frame: not _counts(frame[READY], "free_bytes") or not isinstance(frame[READY].get("token"), str),
    DONE: lambda frame: not _counts(frame[DONE], "adopted", "hashed_bytes", "from_peers_bytes"),
}
"""What a host may say, and what is wrong with it."""


def _shown(text: bytes) -> str:
    return repr(bytes(text[:200]))
