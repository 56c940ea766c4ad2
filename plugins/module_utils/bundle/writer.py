# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Putting blobs into a layout: by hard link where the file system allows it, by a copy hashed on the way otherwise."""

from __future__ import annotations

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterable, NamedTuple

from .digest import Progress, Stamps, copy_and_hash, free_bytes, hash_bytes, write_atomically
from .layout import BundleError, blob_path
from .scan import SourceFile
from .sizes import size_text

_PARTIAL = ".incoming-"


class Received(NamedTuple):
    """A stream that was written beside the blobs and is none of them yet: file, digest, size in bytes."""

    path: Path
    digest: str
    size: int


class BlobWriter:
    """Writes blobs below one layout and keeps count.

    `used` are the digests this build needs; `linked`, `copied` bytes it brought in; `wrote` whether any blob came or
    went. Nothing is read again that a stamp vouches for, neither a source nor a blob that is already there.
    """

    def __init__(self, root: Path, stamps: Stamps, progress: Progress | None = None) -> None:
        self.root = root
        self.stamps = stamps
        self.progress = progress
        self.blobs = root / "blobs" / "sha256"
        self.used: set[str] = set()
        self.wrote = False
        self.linked = 0
        self.copied = 0

    def store_files(self, files: list[SourceFile]) -> dict[Path, str]:
        """Bring files in, several at a time and the largest first; returns their digests by location."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        unique = {file.location: file for file in files}
        largest_first = sorted(unique.values(), key=lambda file: (-file.size, str(file.location)))
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(self._store_file, largest_first))
        self.used.update(digests)
        return {file.location: digest for file, digest in zip(largest_first, digests)}

    def store_bytes(self, content: bytes) -> str:
        """Bring a small blob in from memory; returns its digest."""
        digest = hash_bytes(content)
        blob = blob_path(self.root, digest)
        if not same_content(blob, content):
            write_atomically(blob, content)
            self.wrote = True
        self.stamps.record(blob, digest)
        self.used.add(digest)
        return digest

    def receive(self, chunks: Iterable[bytes], expected: int) -> Received:
        """Write a stream beside the blobs, hashing what is written. `expected` are the bytes it has at least, or about.

        Raises BundleError when the file system does not have that much room.
        """
        self.blobs.mkdir(parents=True, exist_ok=True)
        free = free_bytes(self.blobs)
        if expected > free:
            raise BundleError(
                f"The bundle {self.root} needs {size_text(expected)} more for one layer and its file system has "
                f"{size_text(free)} free. Free some space or choose another directory."
            )
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=str(self.blobs))
        sha, size = hashlib.sha256(), 0
        with os.fdopen(handle, "wb", buffering=0) as target:
            os.fchmod(handle, 0o644)
            for chunk in chunks:
                sha.update(chunk)
                size += len(chunk)
                view = memoryview(chunk)
                while len(view):
                    view = view[target.write(view) :]
                if self.progress:
                    self.progress(len(chunk))
        self.stamps.count(size)
        return Received(Path(name), f"sha256:{sha.hexdigest()}", size)

    def keep(self, received: Received) -> None:
        """Make a received stream a blob, unless there is a sound one already."""
        blob = blob_path(self.root, received.digest)
        self.used.add(received.digest)
        if self.stamps.vouches(blob) == received.digest or not received.path.exists():
            return
        received.path.replace(blob)
        self.stamps.record(blob, received.digest)
        self.copied += received.size
        self.wrote = True

    def discard(self, received: Received) -> None:
        """Remove a received stream that was not kept."""
        if received.path.exists():
            received.path.unlink()

    def drop_unused(self) -> int:
        """Remove blobs that this build does not use; returns their bytes."""
        dropped = 0
        for blob in self.blobs.iterdir():
            if f"sha256:{blob.name}" not in self.used:
                dropped += blob.stat().st_size
                self.stamps.forget(blob)
                blob.unlink()
                self.wrote = True
        return dropped

    def remove_partials(self) -> None:
        """Remove what an interrupted copy left behind."""
        for partial in self.blobs.glob(f"{_PARTIAL}*"):
            partial.unlink()

    def _store_file(self, file: SourceFile) -> str:
        digest = self.stamps.vouches(file.location)
        if digest is None and self._can_link(file.location):
            digest = self.stamps.digest_of(file.location, self.progress)
        if digest is None:
            return self._copy(file)
        if self._is_sound(digest, file.location) or self._link(file, digest):
            return digest
        return self._copy(file)

    def _is_sound(self, digest: str, source: Path) -> bool:
        """True when the blob is there and holds what its name says; a damaged one is removed."""
        blob = blob_path(self.root, digest)
        if self.stamps.vouches(blob) == digest:
            return True
        if not blob.exists():
            return False
        if blob.samefile(source):
            self.stamps.record(blob, digest)
            return True
        if self.stamps.digest_of(blob, self.progress) == digest:
            return True
        self.stamps.forget(blob)
        blob.unlink()
        return False

    def _can_link(self, source: Path) -> bool:
        """Whether the system lets us make a hard link of the source here (same file system, permitted owner)."""
        trial = self.blobs / f"{_PARTIAL}{os.getpid()}-{source.stat().st_ino}-{abs(hash(source))}"
        try:
            os.link(str(source), str(trial))
        except OSError:
            return False
        trial.unlink()
        return True

    def _link(self, file: SourceFile, digest: str) -> bool:
        """Make the blob a hard link of the source; False where the system refuses that."""
        blob = blob_path(self.root, digest)
        try:
            os.link(str(file.location), str(blob))
        except FileExistsError:
            return True  # another thread has just brought in the same content from another file
        except OSError:
            return False
        self.stamps.record(blob, digest)
        self.linked += file.size
        self.wrote = True
        return True

    def _copy(self, file: SourceFile) -> str:
        """Copy the source as a blob, hashing what is copied; the source's stamp is taken before it is read."""
        handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=str(self.blobs))
        os.close(handle)
        partial = Path(name)
        status = file.location.stat()
        digest = copy_and_hash(file.location, partial, self.progress)
        if partial.stat().st_size != file.size:
            raise BundleError(f"{file.location} changed while it was read; build again when nothing writes to it.")
        partial.chmod(0o644)
        blob = blob_path(self.root, digest)
        partial.replace(blob)
        self.stamps.count(file.size)
        self.stamps.record(file.location, digest, [status.st_size, status.st_mtime_ns, status.st_ino])
        self.stamps.record(blob, digest)
        self.copied += file.size
        self.wrote = True
        return digest


def same_content(path: Path, content: bytes) -> bool:
    """True when a file exists and holds exactly this."""
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False
