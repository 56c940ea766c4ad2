# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Putting blobs into a layout: by hard link where the file system allows it, by a copy hashed on the way otherwise."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .digest import Progress, Stamps, copy_and_hash, hash_bytes, write_atomically
from .layout import BundleError, blob_path
from .scan import SourceFile

_PARTIAL = ".incoming-"


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
