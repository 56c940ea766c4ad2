# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deep verification: files are read again from the disk, whatever their stamps say.

It only replaces stamps by what was read. What is damaged is then found, dropped and asked for again where every missing
blob is, and a directory that had it is made again, because its file is the same one. Hundreds of GB take minutes, so it
can go in parts, each of which says where the next one begins.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from .manifest import Artifact
from .store import UNREADABLE, Store
from .trees import TREE_KINDS, is_link_of, tree_path


class Deep(NamedTuple):
    """A part of a deep verification: from the file behind `after` on, for about `seconds`; 0 means to the end."""

    after: str = ""
    seconds: float = 0.0


class File(NamedTuple):
    """Something to be read again: its path below the root and its size in bytes."""

    path: str
    size: int


class Reread(NamedTuple):
    """How far a deep verification has come since its beginning: files and bytes, of how many.

    `after` says where it goes on, empty at the end.
    """

    files: int
    of_files: int
    read_bytes: int
    of_bytes: int
    after: str


def files(store: Store, artifacts: Iterable[Artifact], blobs: Iterable[tuple[str, int]]) -> list[File]:
    """What is to be read: these blobs (digest, size) as far as they are there, and copies of any in directories.

    The largest come first, so that no processor begins with one when the others have finished.
    """
    there = {File(f"blobs/sha256/{digest.partition(':')[2]}", size) for digest, size in blobs}
    there = {file for file in there if os.path.lexists(store.root / file.path)}
    return sorted({*there, *_copies(store, artifacts)}, key=_place)


def read_again(store: Store, wanted: list[File], deep: Deep) -> Reread:
    """Read files in this order over all processors, and have the stamps say what was read."""
    size, _space, path = deep.after.partition(" ")
    # The file it goes on behind may have been damaged, and be gone.
    start = sum(_place(file) <= (-int(size), path) for file in wanted) if deep.after else 0
    deadline = time.monotonic() + deep.seconds if deep.seconds > 0 else None
    lock, rest = threading.Lock(), iter(wanted[start:])
    done: list[File] = []

    def work() -> None:
        while True:
            with lock:
                file = None if deadline is not None and done and time.monotonic() >= deadline else next(rest, None)
                if file is None:
                    return
                done.append(file)
            _read(store, store.root / file.path)

    workers = min(16, os.cpu_count() or 1, max(1, len(wanted) - start))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for result in [pool.submit(work) for _worker in range(workers)]:
            result.result()
    end = start + len(done)
    return Reread(
        files=end,
        of_files=len(wanted),
        read_bytes=sum(file.size for file in wanted[:end]),
        of_bytes=sum(file.size for file in wanted),
        after=f"{wanted[end - 1].size} {wanted[end - 1].path}" if 0 < end < len(wanted) else "",
    )


def _place(file: File) -> tuple[int, str]:
    """The place of a file in the order."""
    return -file.size, file.path


def _copies(store: Store, artifacts: Iterable[Artifact]) -> Iterator[File]:
    """Files of directories that are no links of their blobs, because the file system gives no second names."""
    for artifact in artifacts:
        for file in artifact.files if artifact.kind in TREE_KINDS else ():
            path = tree_path(store, artifact) / file.path
            with suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and not is_link_of(path, store.blob_path(file.digest)):
                    yield File(path.relative_to(store.root).as_posix(), status.st_size)


def leave_cache(path: str | os.PathLike[str]) -> None:
    """Have the next reading of a file come from the disk: what the kernel remembers says nothing about that."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read(store: Store, path: Path) -> None:
    """Let the stamp of a file say what is on the disk; one that cannot be read, or is no file, has none afterwards."""
    store.stamps.forget(path)
    leave_cache(path)
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            store.stamps.digest_of(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
