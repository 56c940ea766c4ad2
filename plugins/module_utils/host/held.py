# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Directories of somebody else, held by a descriptor while root works in them.

Whoever owns a directory can put a link in the place of anything in it, at any moment. A path of it would then lead root
elsewhere. So no path is used: each name is looked up from the descriptor of its directory, without following links.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from typing import Iterator, Sequence

from ..bundle.places import remove
from .backup import BackupError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def entered(top: Path, parts: Sequence[str] = (), make: bool = False) -> Iterator[int]:
    """The descriptor of the directory `parts` below `top`; with `make`, those that are missing are made.

    A new directory is its parent's owner's. Raises BackupError where a part is no directory, or is a link.
    """
    here = os.open(str(top), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts):
            made = make and _make(part, here)
            try:
                inner = os.open(part, _DIRECTORY, dir_fd=here)
            except OSError as error:
                path = top.joinpath(*parts[: number + 1])
                raise BackupError(
                    f"{path} is not a directory, or is a link ({error.strerror}). Put one there."
                ) from error
            try:
                if made:
                    give(inner, os.fstat(here))
            finally:
                os.close(here)
                here = inner
        yield here
    finally:
        os.close(here)


def _make(name: str, parent: int) -> bool:
    try:
        os.mkdir(name, 0o750, dir_fd=parent)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def private(top: Path, prefix: str) -> Iterator[int]:
    """The descriptor of a new directory in `top` that only this user can enter, gone afterwards.

    Those that killed runs left behind go first.
    """
    for leftover in top.glob(f"{prefix}*"):
        remove(leftover)
    name = f"{prefix}{secrets.token_hex(8)}"
    with entered(top) as parent:
        os.mkdir(name, 0o700, dir_fd=parent)
        inner = os.open(name, _DIRECTORY, dir_fd=parent)
        seen = os.fstat(inner)
        with os.scandir(inner) as entries:
            strange = any(True for _entry in entries)
        if strange or seen.st_uid != os.geteuid() or stat.S_IMODE(seen.st_mode) & 0o077:
            os.close(inner)
            raise BackupError(f"{top / name} was exchanged as soon as it was made. See who is at work in {top}.")
        try:
            yield inner
        finally:
            with os.scandir(inner) as entries:
                for entry in entries:
                    os.unlink(entry.name, dir_fd=inner)
            os.close(inner)
            with contextlib.suppress(OSError):  # Whoever renamed it has an empty directory.
                os.rmdir(name, dir_fd=parent)


def write(name: str, content: bytes, mode: int, directory: int) -> None:
    """Write a new file. Raises FileExistsError for one that is there."""
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(handle, mode)
        os.fsync(handle)


def move(name: str, directory: int, target: str, place: int) -> None:
    """Move a file from one directory into another and give it to the owner of that; what was there is replaced."""
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        give(handle, os.fstat(place))
    finally:
        os.close(handle)
    os.replace(name, target, src_dir_fd=directory, dst_dir_fd=place)
    os.fsync(place)


def drop(name: str, directory: int) -> None:
    """Remove a file, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def give(handle: int, owner: os.stat_result) -> None:
    """Give an open file to the owner of something else; what an ordinary user makes is its own anyway."""
    if os.geteuid() == 0:
        os.fchown(handle, owner.st_uid, owner.st_gid)
