# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading one piece of a volume, once, and keeping of it what is right.

A whole blob is judged by its own digest, so a damaged row of small ones loses only those that are damaged. A part of a
blob is judged by the digest of its piece, and the blob by its own when the last part is there.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Mapping

from .digest import CHUNK, hash_file
from .documents import DocumentError, open_regular
from .partials import Partials
from .volumes import Part, Piece, VolumeSet, piece_size


class PieceReader:
    """Reads pieces into `partials`, and hands blobs that are whole and right to `admit` as digest and file.

    `sizes` are those of the blobs, in bytes; `count` is told the bytes that were hashed. `taken` are the bytes that
    were needed and right.
    """

    def __init__(
        self,
        partials: Partials,
        volumes: VolumeSet,
        sizes: Mapping[str, int],
        admit: Callable[[str, Path], None],
        count: Callable[[int], None],
    ) -> None:
        self._partials, self._volumes, self._sizes = partials, volumes, sizes
        self._admit, self._count = admit, count
        self.taken = 0

    def take(self, path: Path, piece: Piece, digest: str, needed: Iterable[Part]) -> str | None:
        """Take those parts of a piece that are `needed`, from the file `path`; why not all could be, or None.

        `digest` is what the volume says of the piece.
        """
        try:
            reader = open_regular(path)
        except FileNotFoundError:
            return "is missing"
        except DocumentError as error:
            return f"is {error}"
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        with reader:
            found = os.fstat(reader.fileno()).st_size
            problem = None if found == piece_size(piece) else f"has {found} bytes instead of {piece_size(piece)}"
            try:
                return self._read(reader, piece, digest, set(needed)) or problem
            except _Unreadable as error:
                return problem or str(error)

    def _read(self, reader: BinaryIO, piece: Piece, digest: str, needed: set[Part]) -> str | None:
        """Read a piece; whole blobs are kept when they are right, parts when the whole piece is."""
        sha = None if all(map(self._is_whole, piece)) else hashlib.sha256()
        taken: list[tuple[Part, Any]] = []
        problem = None
        end = 0
        for part in piece:
            end += part.length
            if part not in needed:
                _skip(reader, part.length, sha)
            elif self._is_whole(part):
                found = self._read_whole(reader, part, sha)
                if found is not None:
                    problem = f"is damaged: {part.digest} {found}"
                    if sha is None:
                        reader.seek(end)
            else:
                taken.append((part, self._read_part(reader, part, sha)))
        if sha is not None and f"sha256:{sha.hexdigest()}" != digest:
            return "is damaged: it has another SHA-256 than its volume says"
        for part, running in taken:
            problem = self._accept(part, running) or problem
        return problem

    def _read_whole(self, reader: BinaryIO, part: Part, sha: Any) -> str | None:
        """Read a whole blob and keep it; what is wrong with it, or None. The bytes count for `sha` as well.

        Raises _Unreadable when the piece cannot be judged any more.
        """
        own = hashlib.sha256()
        partial = self._partials.path(part.digest)
        _remove_file(partial)
        try:
            with partial.open("wb", buffering=0) as writer:
                for chunk in _chunks(reader, part.length):
                    own.update(chunk)
                    if sha:
                        sha.update(chunk)
                    _write(writer, chunk)
        except _Unreadable as error:
            partial.unlink()
            if sha:
                raise
            return str(error)
        self._count(part.length)
        found = f"sha256:{own.hexdigest()}"
        if found != part.digest:
            partial.unlink()
            return f"is {found}"
        self.taken += part.length
        self._admit(part.digest, partial)
        return None

    def _read_part(self, reader: BinaryIO, part: Part, sha: Any) -> Any:
        """Read a part of a blob into its place; the hash of the blob up to its end, where it could be followed."""
        partial = self._partials.of(part.digest, self._sizes[part.digest])
        running = partial.hash_before(part)
        partial.remove(part)
        handle = os.open(partial.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "wb", buffering=0) as writer:
            writer.seek(part.start)
            for chunk in _chunks(reader, part.length):
                for each in (sha, running):
                    if each is not None:
                        each.update(chunk)
                _write(writer, chunk)
            os.fsync(handle)
        self._count(part.length)
        return running

    def _accept(self, part: Part, running: Any) -> str | None:
        """Note that a part is right, and keep the blob when it was the last one; what is wrong, or None."""
        partial = self._partials.of(part.digest, self._sizes[part.digest])
        partial.add(part, running)
        self.taken += part.length
        if partial.received < partial.size:
            return None
        found = partial.digest
        if found is None:
            found = hash_file(partial.path)
            self._count(partial.size)
        self._partials.drop(part.digest)
        if found == part.digest:
            self._admit(part.digest, partial.path)
            return None
        partial.path.unlink()
        titles = ", ".join(self._volumes.title(number) for number in self._volumes.bearers([part.digest]))
        return (
            f"is right, and so are the other parts of {part.digest} on {titles}, but together they are {found}: run "
            "again with all of them, and if it happens again, split the bundle again"
        )

    def _is_whole(self, part: Part) -> bool:
        return part.length == self._sizes[part.digest]


class _Unreadable(Exception):
    """A medium that does not give back what was written to it."""


def _chunks(reader: BinaryIO, length: int) -> Iterable[bytes]:
    """The next bytes of a file. Raises _Unreadable when it does not have as many, or the medium fails."""
    while length:
        try:
            chunk = reader.read(min(CHUNK, length))
        except OSError as error:
            raise _Unreadable(f"cannot be read: {error.strerror}") from error
        if not chunk:
            raise _Unreadable("ends too early")
        length -= len(chunk)
        yield chunk


def _skip(reader: BinaryIO, length: int, sha: Any) -> None:
    """Pass over bytes that are not needed, or that count for `sha` only."""
    if sha is None:
        reader.seek(length, os.SEEK_CUR)
        return
    for chunk in _chunks(reader, length):
        sha.update(chunk)


def _write(writer: Any, chunk: bytes) -> None:
    view = memoryview(chunk)
    while len(view):
        view = view[writer.write(view) :]


def _remove_file(path: Path) -> None:
    if os.path.lexists(path):
        path.unlink()
