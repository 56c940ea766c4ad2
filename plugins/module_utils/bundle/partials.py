# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blobs that come in parts, from volumes read in any order and over several runs: which bytes of them are right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Mapping

from .digest import is_digest, write_atomically
from .documents import DocumentError, parse, read_small
from .volumes import Part

STATE_FILE = "joining.json"


class Partial:
    """One blob in parts: its file, the `ranges` of it that are right, and its hash while parts come in order."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.ranges: list[tuple[int, int]] = []
        self._sha: tuple[Any, int] | None = None

    def has(self, part: Part) -> bool:
        """Whether the bytes of a part are here and right."""
        return any(start <= part.start and part.start + part.length <= end for start, end in self.ranges)

    def hash_before(self, part: Part) -> Any:
        """The hash of the blob up to a part, to be updated with it; None when the parts before came otherwise."""
        if part.start == 0:
            return hashlib.sha256()
        return self._sha[0].copy() if self._sha and self._sha[1] == part.start else None

    def add(self, part: Part, sha: Any = None) -> None:
        """Note that the bytes of a part are here and right; `sha` is the hash of the blob up to its end, if known."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self.ranges, (part.start, part.start + part.length)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.ranges = merged
        self._sha = None if sha is None else (sha, part.start + part.length)

    def remove(self, part: Part) -> None:
        """Note that the bytes of a part are about to be written, and not right until they are added."""
        first, last = part.start, part.start + part.length
        pieces = [(start, min(end, first)) for start, end in self.ranges]
        pieces += [(max(start, last), end) for start, end in self.ranges]
        self.ranges = sorted({(start, end) for start, end in pieces if start < end})

    @property
    def received(self) -> int:
        """Bytes that are here and right."""
        return sum(end - start for start, end in self.ranges)

    @property
    def digest(self) -> str | None:
        """The digest of the whole blob, where the hash could follow it; None where it has to be read."""
        return f"sha256:{self._sha[0].hexdigest()}" if self._sha and self._sha[1] == self.size else None

    def facts(self) -> list[int]:
        """What the file system says about the file."""
        status = self.path.lstat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]


class Partials:
    """The blobs in parts below one directory, and the file that remembers them for the next run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, Partial] = {}

    def path(self, digest: str) -> Path:
        """Where a blob is put together; the directory is made if need be."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / digest.partition(":")[2]

    def has(self, part: Part) -> bool:
        """Whether the bytes of a part are here and right."""
        return part.digest in self._known and self._known[part.digest].has(part)

    def of(self, digest: str, size: int) -> Partial:
        """A blob in parts; one nothing is known of begins with no file."""
        if digest not in self._known:
            path = self.path(digest)
            if os.path.lexists(path):
                path.unlink()
            self._known[digest] = Partial(path, size)
        return self._known[digest]

    def drop(self, digest: str) -> None:
        """Forget a blob that is whole, or that came to nothing."""
        self._known.pop(digest, None)

    @property
    def received(self) -> int:
        """Bytes of all blobs that are here and right."""
        return sum(partial.received for partial in self._known.values())

    def load(self, sizes: Mapping[str, int]) -> None:
        """What an earlier run left of some blobs (digest: size), where the files are still as they were then."""
        try:
            state = parse(read_small(self.directory / STATE_FILE))
        except (OSError, DocumentError):
            return
        for digest, entry in state.items() if isinstance(state, dict) else ():
            if not is_digest(digest) or digest not in sizes:
                continue
            partial = Partial(self.directory / digest.partition(":")[2], sizes[digest])
            try:
                if entry["facts"] != partial.facts() or not partial.path.is_file() or partial.path.is_symlink():
                    continue
                for start, end in entry["ranges"]:
                    if not 0 <= start < end <= partial.size:
                        raise ValueError
                    partial.add(Part(digest, start, end - start))
            except (OSError, KeyError, TypeError, ValueError):
                continue
            self._known[digest] = partial

    def save(self) -> None:
        """Remember what is here. It must be on the disk already."""
        state = {
            digest: {"ranges": partial.ranges, "facts": partial.facts()}
            for digest, partial in self._known.items()
            if partial.ranges
        }
        if state:
            write_atomically(self.directory / STATE_FILE, json.dumps(state, sort_keys=True).encode())
        elif (self.directory / STATE_FILE).exists():
            (self.directory / STATE_FILE).unlink()

    def clear(self) -> None:
        """Forget everything and remove the directory: the bundle is whole."""
        self._known.clear()
        if self.directory.exists():
            shutil.rmtree(self.directory)
