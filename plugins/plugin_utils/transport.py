# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How blobs get from the bundle to the receiving area of a host.

Two transports carry out the same steps: a stream to a receiver that runs on the host for as long as it is talked to,
and the connection plugin's `put_file` where no such process can be had. Neither is trusted: the host verifies what
arrived.
"""

from __future__ import annotations

import errno
import getpass
import os
import socket
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Protocol, Sequence

from ansible.errors import AnsibleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import frames
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import free_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import PACK_PREFIX
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import SMALL, Step, batches

from .fanout import Source
from .feeding import KEEP_ALIVE, Feeder, RateLimit, Tally, Work, say, write
from .fetched import Fetched
from .host_process import START_SECONDS, HostProcess, Launcher, NotStarted, ready
from .program import command, program
from .progress import Progress
from .ssh import SshCommand

RECEIVER = "bundle.receive"
REFUSALS = 5
"""How often a host may ask for the same blob again before it is not believed any more."""
WORTH_A_CONNECTION = 32 * 1024 * 1024
"""Bytes from which on an SSH connection is made for them, where another one stands already."""
TICK = 0.5
"""Seconds after which a quiet transfer is looked at."""
SIGNALLED = 128
"""A status above this, or below 0, is that of what was ended (a connection, 255 with ssh), and no refusal."""


class TransportError(Exception):
    """A transfer that broke off; what arrived stays on the host for the next attempt."""


class Unusable(TransportError):
    """A transport that cannot be used with this host at all."""


class DiskFull(TransportError):
    """The disk (or quota) of the host is full."""


class Hopeless(TransportError):
    """Neither another attempt nor another transport would help."""


class Overtaken(TransportError):
    """Another controller was at work on the host meanwhile: ask again what is missing."""


class Transport(Protocol):
    """A way to a host."""

    name: str
    resumes: bool
    """Whether it can go on in the middle of a blob."""

    def send(self, steps: list[Step], progress: Progress, tally: Tally, turn: int | None = None) -> None:
        """Carry out steps that travel, and count into `tally`. Raises TransportError.

        `turn` is the host's when it said what is missing; one that can tell raises Overtaken when it is another's now.
        """


class PutFile:
    """Files through the connection plugin; small ones go in packs, because each call costs a round trip or more.

    `prepare` makes the receiving area ready for the user who uploads; it is called once, before the first file.
    """

    name = "put_file"
    resumes = False

    def __init__(
        self,
        connection: Any,
        bundle: Bundle,
        target: str,
        temporary: str,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._bundle = bundle
        self._target = target
        self._temporary = temporary
        self._prepare: Callable[[], None] | None = prepare

    def send(self, steps: list[Step], progress: Progress, tally: Tally, turn: int | None = None) -> None:
        """Send the whole blob of each step."""
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        for number, group in enumerate(batches(steps)):
            if len(group) == 1:
                self._put(self._bundle.blob_path(group[0].digest), _encoded(group[0]))
            else:
                with tempfile.NamedTemporaryFile(dir=self._temporary, prefix=PACK_PREFIX) as pack:
                    try:
                        self._write_pack(group, pack)
                    except OSError as error:
                        raise self._no_pack(group, error) from error
                    self._put(Path(pack.name), f"{PACK_PREFIX}{number:04d}.tar")
            sent = sum(step.travels for step in group)
            tally.sent_bytes += sent
            progress.add(sent)

    def _write_pack(self, group: list[Step], pack: Any) -> None:
        with tarfile.open(fileobj=pack, mode="w") as archive:
            for step in group:
                entry = tarfile.TarInfo(_encoded(step))
                entry.size = step.size
                with self._bundle.blob_path(step.digest).open("rb") as blob:
                    archive.addfile(entry, blob)
        pack.flush()

    def _no_pack(self, group: list[Step], error: OSError) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        needed, free = sum(step.size for step in group), free_bytes(Path(self._temporary))
        return TransportError(
            f"{self._temporary} on the controller is full: {size_text(needed)} are needed, {size_text(free)} are free. "
            "Free some there, or set Ansible's local_tmp to a larger disk"
        )

    def _put(self, source: Path, name: str) -> None:
        try:
            self._connection.put_file(str(source), os.path.join(self._target, name))  # noqa: PTH118 - the host's path
        except AnsibleError as error:
            raise TransportError(str(error)) from error


@dataclass(frozen=True)
class Session:
    """What a stream tells a host about itself, and how it is to behave."""

    root: str
    wait: float = 0.0
    """Seconds to wait for another controller that ships to the same host."""
    streams: int = 1
    """Connections opened side by side."""
    rate_limit: int | None = None
    """Bytes a second, all streams together."""
    credential: str | None = None
    """What the receiver shows to other hosts it fetches blobs from."""

    def opening(self, token: str | None, turn: int | None) -> frames.Open:
        """The first frame; `token` is that of the session when it began already, `turn` that of the host's answer."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        return frames.Open(self.root, socket.gethostname(), user, os.getppid(), self.wait, token, self.credential, turn)


class _Line:
    """One receiver: its process, and what it said."""

    def __init__(self, process: HostProcess) -> None:
        self.process = process
        self.answers = frames.Answers()
        self.feeder: Feeder | None = None
        self.token = ""
        self.done: dict[str, Any] | None = None

    def read(self, handle: int) -> list[tuple[str, dict[str, Any]]]:
        """The answers that can be read now. Raises TransportError for what is none."""
        try:
            return self.answers.feed(self.process.read(handle))
        except frames.FrameError as error:
            raise TransportError(f"the host said what makes no sense: {error}") from error

    def lost(self) -> str:
        """Why there is nothing more to read."""
        told = self.process.errors() or self.answers.noise.decode("utf-8", "replace").strip()
        return told or f"it ended with status {self.process.wait(5)}"


class Stream:
    """Frames to a receiver on the host, which runs as the owner of the store, appends, verifies and takes in.

    `launchers` are ways to get a process on the host, best first. `names` calls blobs by names that people know.
    `sources` are hosts from which this one fetches blobs itself; what none of them gives it is sent.
    """

    name = "stream"
    resumes = True

    def __init__(
        self,
        launchers: list[Launcher],
        interpreter: str,
        bundle: Bundle,
        session: Session,
        tell: Callable[[str], None] = lambda _line: None,
        names: Mapping[str, str] | None = None,
        sources: Mapping[str, Sequence[Source]] | None = None,
    ) -> None:
        self._launchers = launchers
        self._command = command(interpreter)
        self._bundle = bundle
        self._session = session
        self._limit = RateLimit(session.rate_limit)
        self._tell = tell
        self._names = names or {}
        self._sources = sources or {}
        self._parent = os.getppid()
        self._turn: int | None = None

    def send(self, steps: list[Step], progress: Progress, tally: Tally, turn: int | None = None) -> None:
        """Send the part of each blob that the host lacks; when this returns, the host has verified all of them."""
        if not steps:
            return
        self._turn = turn
        work = Work(steps, self._sources)
        lines: list[_Line] = []
        try:
            first, launcher = self._first_line(sum(step.travels for step in steps))
            lines.append(first)
            lines += self._more_lines(launcher, first.token, steps)
            for line in lines:
                line.feeder = Feeder(line.process.stdin, work, self._bundle, self._limit, progress, tally)
                line.feeder.start()
            self._attend(lines, _Judge(work, progress, tally, self._names, Fetched(steps, self._sources)))
        finally:
            work.stop()
            progress.hashing(None)
            for line in lines:
                _put_away(line)

    def _attend(self, lines: list[_Line], judge: _Judge) -> None:
        """Listen to the receivers until each said that it is done."""
        while any(line.done is None for line in lines):
            speakers = {handle: line for line in lines for handle in line.process.readable()}
            for handle in ready(speakers, TICK):
                for kind, frame in speakers[handle].read(handle):
                    if kind == frames.DONE:
                        speakers[handle].done = frame[frames.DONE]
                    else:
                        judge.hear(kind, frame)
            for line in lines:
                if line.feeder is not None and line.feeder.unreadable:
                    error = line.feeder.unreadable
                    raise Hopeless(f"the bundle cannot be read: {error.strerror} ({error.filename or 'a blob'})")
                if line.process.ended and line.done is None:
                    raise TransportError(f"the connection to the receiver broke: {line.lost()}")
            if os.getppid() != self._parent:
                raise Hopeless("ansible-playbook has ended; nothing more is sent")
            judge.conclude()

    def _first_line(self, size: int) -> tuple[_Line, Launcher]:
        """A receiver that is ready for so many bytes, reached in the best way that works. Raises TransportError."""
        problem = NotStarted("there is no way to run a process there")
        failed = []
        # A connection of its own is faster, and takes longer to be there than little takes to be sent.
        for launcher in sorted(self._launchers, key=lambda way: way.own != (size >= WORTH_A_CONNECTION)):
            try:
                line = self._line(launcher, None)
            except NotStarted as error:
                problem = error
                failed.append(launcher)
                if not _was_ended(error.status):
                    break
            else:
                self._launchers = [way for way in self._launchers if way not in failed]
                return line, launcher
        if _was_ended(problem.status):
            raise TransportError(str(problem)) from problem
        raise Unusable(f"the receiver cannot be run: {problem}") from problem

    def _more_lines(self, launcher: Launcher, token: str, steps: list[Step]) -> list[_Line]:
        """As many further connections as are wanted and of use; those that cannot be had are done without."""
        lines: list[_Line] = []
        useful = min(self._session.streams, sum(step.travels >= SMALL for step in steps)) if launcher.own else 1
        for number in range(2, useful + 1):
            try:
                lines.append(self._line(launcher, token))
            except (NotStarted, TransportError) as error:
                self._tell(f"stream {number} of {useful} cannot be had ({error}); going on without")
                break
        return lines

    def _line(self, launcher: Launcher, token: str | None) -> _Line:
        """A receiver that is ready. Raises NotStarted, or TransportError for what it said."""
        line = _Line(launcher.start(self._command))
        try:
            self._begin(line, token)
        except BaseException:
            line.process.close()
            raise
        return line

    def _begin(self, line: _Line, token: str | None) -> None:
        try:
            write(line.process.stdin, program(RECEIVER))
            say(line.process.stdin, self._session.opening(token, self._turn))
        except BrokenPipeError:
            pass  # Its last words say more.
        deadline: float | None = time.monotonic() + START_SECONDS
        waited = False
        spoken = time.monotonic()
        while not line.token:
            for handle in line.process.wait_for_output(TICK):
                for kind, frame in line.read(handle):
                    if kind == frames.READY:
                        line.token = frame[frames.READY]["token"]
                    elif kind == frames.BUSY:
                        deadline, waited = None, True
                        self._tell(f"waiting for {holder_text(frame[frames.BUSY])}, who is shipping to this host")
                    elif kind == frames.FAILED:
                        raise _failure(frame)
            now = time.monotonic()
            if line.token:
                break
            if line.process.ended:
                raise NotStarted(line.lost(), line.process.wait(5))
            if deadline is not None and now > deadline:
                raise NotStarted(f"it did not answer within {START_SECONDS:.0f} s")
            if os.getppid() != self._parent:
                raise Hopeless("ansible-playbook has ended")
            if now - spoken > KEEP_ALIVE:
                spoken = now
                say(line.process.stdin, frames.Alive())
        if waited:
            raise Overtaken("another controller was at work")


class _Judge:
    """Draws the conclusions from what receivers say about blobs."""

    def __init__(
        self, work: Work, progress: Progress, tally: Tally, names: Mapping[str, str], fetched: Fetched
    ) -> None:
        self._work, self._progress, self._tally, self._names = work, progress, tally, names
        self._fetched = fetched
        self._sizes = work.sizes
        self._damaged: set[str] = set()
        self._refused: dict[str, int] = {}

    def hear(self, kind: str, frame: Mapping[str, Any]) -> None:
        """Note one answer, and have sent again what needs it. Raises TransportError."""
        self._refuse_what_was_never_said(kind, frame)
        if kind == frames.VERIFIED:
            self._count(frame[frames.VERIFIED], frame["size"])
            self._fetched.given(frame[frames.VERIFIED], str(frame.get("source", "")), self._tally)
            self._work.answered(frame[frames.VERIFIED])
            if frame.get("source") != frames.STORE:
                self._tally.blobs += 1
                self._tally.hashed_bytes += frame["size"]
        elif kind == frames.GOT:
            for digest, count in frame[frames.GOT].items():
                self._count(digest, count)
            digest = frame.get("hashing")
            self._progress.hashing(self._names.get(digest, digest[:19]) if isinstance(digest, str) else None)
        elif kind == frames.DAMAGED:
            digest = frame[frames.DAMAGED]
            if digest in self._damaged:
                raise Hopeless(damaged_twice({digest: frame["why"]}))
            self._damaged.add(digest)
            self._again(digest, 0)
        elif kind == frames.REFUSED:
            digest = frame[frames.REFUSED]
            self._refused[digest] = self._refused.get(digest, 0) + 1
            if self._refused[digest] > REFUSALS:
                raise TransportError(f"the host does not take {digest}: {frame['why']}")
            self._count(digest, frame["offset"])
            more = self._fetched.refused(digest, frame["offset"], frame["why"], self._tally)
            # What turned out to be wrong does not count as got.
            self._tally.from_peers_bytes -= more or 0
            self._again(digest, frame["offset"], more)
        elif kind == frames.FAILED:
            raise _failure(frame)

    def _refuse_what_was_never_said(self, kind: str, frame: Mapping[str, Any]) -> None:
        """A host that speaks of other blobs, or larger ones, heard something else: it would wait for them for ever."""
        if kind not in (frames.VERIFIED, frames.DAMAGED, frames.REFUSED, frames.GOT):
            return
        told = frame[kind] if kind == frames.GOT else {frame[kind]: frame.get("offset", 0)}
        for digest, count in told.items():
            if count > self._sizes.get(digest, -1):
                raise TransportError(f"the host understood something else: {count} bytes of {digest}")

    def conclude(self) -> None:
        """When the host has answered for every blob, there is nothing more to send."""
        if self._work.done:
            self._work.finish()

    def _count(self, digest: str, reached: int) -> None:
        """Of a blob that it fetches, the host has this many bytes."""
        count = self._fetched.more(digest, reached)
        if count:
            self._tally.from_peers_bytes += count
            self._progress.add(count)

    def _again(self, digest: str, offset: int, more: int | None = None) -> None:
        """Have a blob sent from `offset` on; `more` are the bytes that were not counted on, all of them by default."""
        step = self._work.again(digest, offset)
        if step is not None:
            self._progress.total += step.travels if more is None else more


def damaged_twice(reasons: Mapping[str, str]) -> str:
    """The message about blobs that did not verify after they were sent a second time, with the reasons by digest."""
    told = "; ".join(f"{digest}: {why}" for digest, why in reasons.items())
    return (
        f"Arrived damaged twice: {told}. The bundle was verified, so look at the network, the disk and the memory of "
        "the host, then run again. If several hosts say so, the bundle may have changed since; it is read again with "
        "-e xinference_ship_deep_bundle=true."
    )


def holder_text(holder: Mapping[str, Any]) -> str:
    """Who holds a session, for people."""
    named = {name: str(holder.get(name, "?"))[:100] for name in ("controller", "user", "pid", "since")}
    return "{user} on {controller} (process {pid}, since {since})".format(**named)


def _failure(frame: Mapping[str, Any]) -> TransportError:
    """What a receiver ended with, as an error."""
    kinds: dict[Any, type[TransportError]] = {"full": DiskFull, frames.BUSY: Hopeless, frames.OVERTAKEN: Overtaken}
    return kinds.get(frame.get("kind"), TransportError)(frame[frames.FAILED])


def _was_ended(status: int | None) -> bool:
    return status is not None and not 0 <= status <= SIGNALLED


def _put_away(line: _Line) -> None:
    """End what belongs to a receiver; a feeder that still writes is woken up by the end of its process."""
    feeder = line.feeder
    if feeder is not None:
        if line.done is None:
            line.process.terminate()
        feeder.join(10)
        if feeder.is_alive():
            return
    line.process.close()


def launchers(connection: Any, become: Any, aes: bool) -> list[Launcher]:
    """Ways to run a process on the host as the user of the store, best first; none where that cannot be done.

    `become` is Ansible's plugin when another user has to be become, `aes` whether both processors compute AES.
    """
    shell = getattr(connection, "_shell", None)
    if become is not None and become.require_tty:
        return []
    if getattr(connection, "transport", "") == "local":
        return [Launcher(("/bin/sh", "-c"), become, shell, own=False)]
    return [Launcher(way.arguments, become, shell, way.own) for way in SshCommand.of(connection, aes)]


def _encoded(step: Step) -> str:
    """The name of a blob's file."""
    return step.digest.partition(":")[2]
