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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Dict, Iterator, Mapping, Optional, Union

from .running import Running
from .spec import ModelSpec

FORMAT = 1
# No time of a record is as late as this, the year 3000; what is, no calendar need be able to show.
LATEST = 32503680000


class LockHeld(Exception):
    """Somebody else converges this server, and did not finish in time."""


@dataclass(frozen=True)
class Entry:
    """One model we launched or took over.

    `ready` is false between the start of a launch and its end. `launched_at` is our clock, `since` the server's, both
    in seconds since 1970. `shown` is what the server showed of the model when it became ready. `by` is who launched it
    or took it over.
    """

    fingerprint: str
    payload: Mapping[str, Any]
    ready: bool = False
    launched_at: float = 0.0
    since: Optional[int] = None
    shown: Mapping[str, Any] = field(default_factory=dict)
    by: str = ""


class Record:
    """The entries of one server by uid, kept in `path`; None keeps them in memory only.

    A file that cannot be understood is set aside, and `notice` says so: its models are then found running and taken
    over. `writable` false (check mode) reads and never writes, not even to set a broken file aside. `who` is noted as
    the one who launches.
    """

    def __init__(self, path: Union[str, Path, None], writable: bool = True, who: str = "") -> None:
        self.path = Path(path) if path else None
        self.writable = writable
        self.who = who
        self.notice = ""
        self.entries: Dict[str, Entry] = self._load()

    def begin(self, spec: ModelSpec) -> None:
        """Note that a launch starts now."""
        self.entries[spec.uid] = Entry(spec.fingerprint(), spec.payload(), False, time.time(), by=self.who)
        self._write()

    def settle(self, spec: ModelSpec, running: Running) -> None:
        """Note that a model is ready, and how the server shows it. Writes only when that is news."""
        old = self.entries.get(spec.uid)
        launched_at, by = (old.launched_at, old.by) if old else (time.time(), self.who)
        entry = Entry(spec.fingerprint(), spec.payload(), True, launched_at, running.since, running.shown, by)
        if entry != old:
            self.entries[spec.uid] = entry
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
        body = {"format": FORMAT, "models": {uid: asdict(entry) for uid, entry in sorted(self.entries.items())}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Private to the owner: environment variables and options of a model may hold secrets.
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(body, file, indent=1, default=str)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink()
            raise


def awaited(path: Union[str, Path]) -> bool:
    """Whether somebody waits for the lock `path`. The keeper gives way to whoever does."""
    with _queue(Path(path)) as file:
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
    """An entry of the file; raises ValueError or TypeError for one that we cannot have written."""
    entry = Entry(**told)
    times = [entry.launched_at] if entry.since is None else [entry.launched_at, entry.since]
    right = (
        isinstance(entry.fingerprint, str)
        and isinstance(entry.payload, dict)
        and isinstance(entry.shown, dict)
        and isinstance(entry.ready, bool)
        and isinstance(entry.by, str)
        and all(isinstance(time_s, (int, float)) and 0 <= time_s < LATEST for time_s in times)
    )
    if not right:
        raise ValueError(f"the entry of {uid} is not as this collection writes it")
    return entry


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
