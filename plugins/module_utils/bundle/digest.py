# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SHA-256 of files, and stamps that say when a file need not be hashed again.

A digest is always written the OCI way, ``sha256:<64 hex digits>``. A stamp is what the file system says about a file
(size, modification time in nanoseconds, inode number) next to the digest that was computed while it said so. As long
as all three still hold, the digest is believed and the file is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import Callable, Iterable, Iterator

ALGORITHM = "sha256"
CHUNK = 4 * 1024 * 1024
"""Bytes read at a time: large enough that the hash, not the system call, is what costs."""

_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")

Progress = Callable[[int], None]


def is_digest(value: object) -> bool:
    """True for ``sha256:`` and 64 lower-case hex digits, and nothing else (so it is safe to build a path from it)."""
    return isinstance(value, str) and _DIGEST.match(value) is not None and not value.endswith("\n")


def hash_bytes(data: bytes) -> str:
    """The digest of bytes in memory."""
    return f"{ALGORITHM}:{hashlib.sha256(data).hexdigest()}"


def hash_file(path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Read a file once and return its digest; `progress` is told the number of bytes of every chunk."""
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as source:  # noqa: PTH123 - str or Path
        for chunk in _chunks(source):
            sha.update(chunk)
            if progress:
                progress(len(chunk))
    return f"{ALGORITHM}:{sha.hexdigest()}"


def copy_and_hash(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], progress: Progress | None = None
) -> str:
    """Copy a file, have it on the disk, and return the digest of what was written; every byte is read once."""
    sha = hashlib.sha256()
    with open(source, "rb", buffering=0) as reader, open(destination, "wb", buffering=0) as writer:  # noqa: PTH123
        for chunk in _chunks(reader):
            sha.update(chunk)
            view = chunk
            while len(view):
                view = view[writer.write(view) :]
            if progress:
                progress(len(chunk))
        os.fsync(writer.fileno())
    return f"{ALGORITHM}:{sha.hexdigest()}"


def _chunks(source: object) -> Iterator[memoryview]:
    """The content of an unbuffered file as views of one reused buffer."""
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while True:
        count = source.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            return
        yield view[:count]


PUBLIC = 0o644
"""Rights of a file that may lie on a medium and be read by anybody."""
PRIVATE = 0o640
"""Rights of a file that tells of a host."""


def write_atomically(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Write a file so that readers see the old content or the new one, never a part; same content is left alone."""
    try:
        if path.read_bytes() == data:
            return
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=str(path.parent))
    try:
        with os.fdopen(handle, "wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
            os.fchmod(target.fileno(), mode)
        os.replace(name, str(path))  # noqa: PTH105 - both names are strings here
    except BaseException:
        Path(name).unlink()
        raise


def device_of(path: Path) -> int:
    """The file system a file or directory is on; hard links are possible within one only."""
    return path.stat().st_dev


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write where `path` is or will be."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(str(place)).free


class Stamps:
    """Digests of files that need not be read again while size, modification time and inode are the same.

    `path` is a JSON file; an unreadable or foreign one counts as empty, because all it can cost is hashing again. The
    object may be shared by threads. `hashed_bytes` counts what had to be read after all.
    """

    FORMAT = 1

    def __init__(self, path: str | os.PathLike[str] | None = None, mode: int = PUBLIC) -> None:
        """`mode` are the rights that the file gets."""
        self.path = Path(path) if path is not None else None
        self.mode = mode
        self.hashed_bytes = 0
        self._lock = threading.Lock()
        self._known: dict[str, list[object]] = {}
        self._own: dict[str, list[object] | None] = {}
        if self.path is not None:
            self._known = _load(self.path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stamps:
        """Read the stamps kept in `path` (same as the constructor)."""
        return cls(path)

    def vouches(self, path: str | os.PathLike[str]) -> str | None:
        """The digest of a file as it is now, or None when it is unknown, changed or gone."""
        key = _key(path)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            return None
        try:
            facts = _facts(key)
        except OSError:
            return None
        return str(known[3]) if known[:3] == facts else None

    def sound(self, directory: str | os.PathLike[str], digests: Iterable[str]) -> set[str]:
        """Those of some blobs that lie in `directory` under their hex digits, as regular files, as they were.

        The same as `vouches`, for tens of thousands of files and without following a link.
        """
        place = os.path.join(_key(directory), "")  # noqa: PTH118
        found = set()
        with self._lock:
            for digest in digests:
                key = place + digest[len(ALGORITHM) + 1 :]
                known = self._known.get(key)
                if known is None or known[3] != digest:
                    continue
                try:
                    status = os.lstat(key)
                except OSError:
                    continue
                if known[:3] == [status.st_size, status.st_mtime_ns, status.st_ino] and stat.S_ISREG(status.st_mode):
                    found.add(digest)
        return found

    def record(self, path: str | os.PathLike[str], digest: str, facts: list[int] | None = None) -> None:
        """Remember that `path`, as it is now (or as `facts` says it was), has `digest`."""
        key = _key(path)
        entry: list[object] = [*(_facts(key) if facts is None else facts), digest]
        with self._lock:
            if self._known.get(key) != entry:
                self._known[key] = self._own[key] = entry

    def digest_of(self, path: str | os.PathLike[str], progress: Progress | None = None) -> str:
        """The digest of a file, from its stamp where that holds and by reading it where not.

        The facts are taken before reading: a file that changes under our hands is hashed again the next time.
        """
        known = self.vouches(path)
        if known is not None:
            return known
        facts = _facts(_key(path))
        digest = hash_file(path, progress)
        self.count(facts[0])
        self.record(path, digest, facts)
        return digest

    def count(self, size: int) -> None:
        """Add to the number of bytes that had to be hashed."""
        with self._lock:
            self.hashed_bytes += size

    def forget(self, path: str | os.PathLike[str]) -> None:
        """Drop what is known about a file."""
        with self._lock:
            if self._known.pop(_key(path), None) is not None:
                self._own[_key(path)] = None

    def changes(self) -> dict[str, list[object] | None]:
        """What was recorded and forgotten and is not saved yet, for `save`."""
        with self._lock:
            return dict(self._own)

    def save(self, changes: dict[str, list[object] | None] | None = None) -> None:
        """Write the stamps of files that still exist, with all changes or with these.

        Without changes (files that are gone are none) or without a path this does nothing. What another process saved
        since these stamps were read is kept; the caller sees to it that two do not save at once.
        """
        if self.path is None:
            return
        own = self.changes() if changes is None else changes
        with self._lock:
            if not own:
                return
            known = {**_load(self.path), **own}
            kept = {key: entry for key, entry in known.items() if entry is not None and os.path.lexists(key)}
            self._own = {key: entry for key, entry in self._own.items() if key not in own or own[key] != entry}
            self._known = {**kept, **{key: entry for key, entry in self._own.items() if entry is not None}}
            content = {"format": self.FORMAT, "files": dict(sorted(kept.items()))}
        write_atomically(self.path, json.dumps(content, separators=(",", ":")).encode() + b"\n", self.mode)


def _key(path: str | os.PathLike[str]) -> str:
    """Stamps are kept by absolute path, symbolic links not followed in the last component."""
    return os.path.abspath(os.fspath(path))  # noqa: PTH100 - Path.absolute() keeps `..`


def _facts(key: str) -> list[int]:
    """Size, modification time (ns) and inode of the file behind a path, links followed."""
    status = os.stat(key)  # noqa: PTH116 - keys are strings
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _load(path: Path) -> dict[str, list[object]]:
    """The entries of a stamps file that have the right shape."""
    try:
        content = json.loads(path.read_text())
        files = content["files"] if content["format"] == Stamps.FORMAT else {}
        return {
            key: entry
            for key, entry in files.items()
            if isinstance(entry, list) and len(entry) == 4 and is_digest(entry[3])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
