# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record of what we launched: `<root>/state/launched.json`, and the lock that everyone takes who converges.

A server never tells the path or the options a model was launched with, so this file is the only way to see that they
changed. It is written before a launch and after it, each time as a whole, so that an interruption loses nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Dict, Iterator, Mapping, Optional, Union

from .running import Running
from .spec import ModelSpec, from_payload

FORMAT = 1
# No time of a record is as late as this, the year 3000; what is, no calendar need be able to show.
LATEST = 32503680000


class LockHeld(Exception):
    """Somebody else converges this server, and did not finish in time."""


# The number of what ran before, where it was brought back because nothing of what is wanted could be launched.
PREVIOUS = -1


@dataclass(frozen=True)
class Instead:
    """That a model does not run as its entry says first, but otherwise.

    `number` is the place of the alternative in `fallbacks`, counted from 1, or PREVIOUS. `wanted` is the fingerprint of
    the first choice, `why` what was wrong with it, `fault` the name of that in the table of known failures, if it has
    one.
    """

    number: int
    wanted: str
    why: str = ""
    fault: str = ""

    @property
    def words(self) -> str:
        """`alternative 1`, for a message."""
        return "what ran before" if self.number == PREVIOUS else f"alternative {self.number}"


@dataclass(frozen=True)
class Entry:
    """One model we launched or took over.

    `ready` is false between the start of a launch and its end. `launched_at` is our clock, `since` the server's, both
    in seconds since 1970. `shown` is what the server showed of the model when it became ready. `by` is who launched it
    or took it over. `instead` is set where it is not the first choice. `previous` is the launch of the model that was
    ended for this one, until this one is ready: it is brought back when that fails. `trial_of` is the uid of the model
    that this is a trial of, launched to see whether it works and ended after that; empty for a model that is to serve.
    """

    fingerprint: str
    payload: Mapping[str, Any]
    ready: bool = False
    launched_at: float = 0.0
    since: Optional[int] = None
    shown: Mapping[str, Any] = field(default_factory=dict)
    by: str = ""
    instead: Optional[Instead] = None
    previous: Optional[Mapping[str, Any]] = None
    trial_of: str = ""

    def told(self) -> Dict[str, Any]:
        """What of it may be shown: who launched what and when, and why it is not the first choice."""
        instead = self.instead
        return {
            "by": self.by,
            "launched_at": self.launched_at,
            "runs": from_payload(self.payload).words if self.payload else "",
            "choice": instead.number if instead else 0,
            "why": instead.why if instead else "",
        }


class Record:
    """The entries of one server by uid, kept in `path`; None keeps them in memory only.

    A file that cannot be understood is set aside, and `notice` says so: its models are then found running and taken
    over. `writable` false (check mode) reads and never writes, not even to set a broken file aside. `who` is noted as
    the one who launches. `lenient` goes on in memory where the file cannot be written, and says so in `notice`: on a
    full disk a model that serves is worth more than a record of it, and is taken over later. Only `rewrite` always says
    that nothing can be written.
    """

    def __init__(
        self, path: Union[str, Path, None], writable: bool = True, who: str = "", lenient: bool = False
    ) -> None:
        self.path = Path(path) if path else None
        self.writable = writable
        self.who = who
        self.lenient = lenient
        self.notice = ""
        self.entries: Dict[str, Entry] = self._load()

    def begin(
        self, spec: ModelSpec, instead: Optional[Instead] = None, previous: Optional[Mapping[str, Any]] = None
    ) -> None:
        """Note that a launch starts now."""
        payload = spec.payload()
        entry = Entry(spec.fingerprint(), payload, False, time.time(), by=self.who, instead=instead, previous=previous)
        self.entries[spec.uid] = entry
        self._write()

    def begin_trial(self, spec: ModelSpec, of: str) -> None:
        """Note that a trial of the model `of` starts now; raises OSError also for who is lenient.

        A trial that nobody knows of as one would never be ended.
        """
        self.entries[spec.uid] = Entry(spec.fingerprint(), spec.payload(), False, time.time(), by=self.who, trial_of=of)
        self.rewrite()

    def settle(self, spec: ModelSpec, running: Running, instead: Optional[Instead] = None) -> None:
        """Note that a model is ready, and how the server shows it. Writes only when that is news."""
        old = self.entries.get(spec.uid)
        launched_at, by = (old.launched_at, old.by) if old else (time.time(), self.who)
        entry = Entry(spec.fingerprint(), spec.payload(), True, launched_at, running.since, running.shown, by, instead)
        if entry != old:
            self.entries[spec.uid] = entry
            self._write()

    def rewrite(self) -> None:
        """Write the file as it is; raises OSError where nothing can be noted, also for who is lenient."""
        if self.path is not None and self.writable:
            self._replace(self.path)

    def mark(self, uid: str, instead: Instead) -> None:
        """Note that a model which runs on is not the first choice any more."""
        old = self.entries[uid]
        if old.instead != instead:
            self.entries[uid] = replace(old, instead=instead)
            self._write()

    def forget(self, uid: str) -> None:
        """Note that a model is gone."""
        if self.entries.pop(uid, None) is not None:
            self._write()

    def _load(self) -> Dict[str, Entry]:
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] > FORMAT:
                raise ValueError(f"format {found['format']} of a later version")
            return {str(uid): _entry(uid, told) for uid, told in found["models"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.notice = f"The record {self.path} could not be read ({type(error).__name__}: {error})"
            if self.writable:
                aside = self.path.with_name(f"{self.path.name}.broken-{time.strftime('%Y%m%dT%H%M%S')}")
                self.path.replace(aside)
                self.notice += f" and was set aside as {aside.name}"
            self.notice += "; models that run as wanted are taken over."
            return {}

    def _write(self) -> None:
        if self.path is None or not self.writable:
            return
        try:
            self._replace(self.path)
        except OSError as error:
            if not self.lenient:
                raise
            self.notice = f"The record {self.path} cannot be written ({error.strerror or error}); it goes on without."

    def _replace(self, path: Path) -> None:
        body = {"format": FORMAT, "models": {uid: asdict(entry) for uid, entry in sorted(self.entries.items())}}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Private to the owner: environment variables and options of a model may hold secrets.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(body, file, indent=1, default=str)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise


def read(root: Union[str, Path]) -> Dict[str, Entry]:
    """The entries of the record below a root directory; none where there is no record, or none that can be read."""
    try:
        return Record(Path(root) / "state" / "launched.json", writable=False).entries
    except OSError:
        return {}


def awaited(path: Union[str, Path]) -> bool:
    """Whether somebody waits for the lock `path`. The keeper gives way to whoever does."""
    with _queue(Path(path)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def held(path: Union[str, Path]) -> bool:
    """Whether somebody holds the lock `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _queue(path: Path) -> IO[str]:
    """The file that everybody who waits for the lock `path` holds a shared lock on."""
    path = path.with_name(f"{path.name}.queue")
    path.touch(mode=0o600)
    return path.open("r+", encoding="utf-8")


def _entry(uid: str, told: Mapping[str, Any]) -> Entry:
    """An entry of the file; raises ValueError or TypeError for one that we cannot have written.

    What a later version notes beside what we know is left out.
    """
    known = {one.name for one in fields(Entry)}
    facts = {name: value for name, value in told.items() if name in known}
    if facts.get("instead") is not None:
        facts["instead"] = Instead(**facts["instead"])
    entry = Entry(**facts)
    times = [entry.launched_at] if entry.since is None else [entry.launched_at, entry.since]
    right = (
        isinstance(entry.fingerprint, str)
        and isinstance(entry.payload, dict)
        and isinstance(entry.shown, dict)
        and isinstance(entry.ready, bool)
        and isinstance(entry.by, str)
        and isinstance(entry.trial_of, str)
        and (entry.previous is None or isinstance(entry.previous, dict))
        and (entry.instead is None or _is_instead(entry.instead))
        and all(isinstance(time_s, (int, float)) and 0 <= time_s < LATEST for time_s in times)
    )
    if not right:
        raise ValueError(f"the entry of {uid} is not as this collection writes it")
    return entry


def _is_instead(instead: Instead) -> bool:
    texts = (instead.wanted, instead.why, instead.fault)
    number = isinstance(instead.number, int) and not isinstance(instead.number, bool)
    return number and all(isinstance(one, str) for one in texts)


@contextlib.contextmanager
def lock(path: Union[str, Path], wait: float, who: str) -> Iterator[None]:
    """Hold the lock file `path`; wait up to `wait` seconds while somebody else holds it.

    `who` is written into the file for whoever has to wait, with our process id. The lock ends with the process, however
    that ends. Raises LockHeld, naming the holder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait
    path.touch(mode=0o600)
    with path.open("r+", encoding="utf-8") as file, contextlib.ExitStack() as waiting:
        queued = wait <= 0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                waiting.close()
                break
            except OSError:
                if not queued:
                    fcntl.flock(waiting.enter_context(_queue(path)), fcntl.LOCK_SH)
                    queued = True
                if time.monotonic() >= end:
                    holder = path.read_text(encoding="utf-8").strip() or "an unknown process"
                    raise LockHeld(
                        f"The models of this server are being changed by {holder}. Waited {wait:.0f} s for {path}. "
                        "Run again when that has finished."
                    ) from None
                time.sleep(min(0.2, max(0.01, end - time.monotonic())))
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        file.truncate(0)
        with contextlib.suppress(OSError):  # On a full disk nobody is named, and the lock holds all the same.
            os.pwrite(file.fileno(), f"{who} (process {os.getpid()}, since {since})\n".encode(), 0)
        try:
            yield
        finally:
            file.truncate(0)
