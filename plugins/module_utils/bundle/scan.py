# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Listing what is to be carried, and refusing what cannot be carried faithfully."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from .manifest import path_problem


@dataclass(frozen=True)
class SourceFile:
    """A file to take in: path inside the artifact (with `/`), where it is now, size in bytes."""

    path: str
    location: Path
    size: int


def scan(source: str | os.PathLike[str], problems: list[str]) -> list[SourceFile]:
    """The files of a directory in order of path, or the one file `source` is, under its own name.

    A symbolic link to a file inside the directory is taken as that file. Added to `problems` and left out: links that
    leave the directory or lead to a directory or nowhere, devices, sockets and pipes, directories without files,
    files that cannot be read, names that are not UTF-8 or not safe on another machine.
    """
    root = Path(os.path.realpath(os.fspath(source)))
    try:
        status = root.stat()
    except OSError as error:
        problems.append(f"{source}: {error.strerror}")
        return []
    if stat.S_ISREG(status.st_mode):
        name = Path(source).name
        problem = path_problem(name)
        if problem:
            problems.append(f"{source}: {problem}")
        return [] if problem else [SourceFile(name, root, status.st_size)]
    if not stat.S_ISDIR(status.st_mode):
        problems.append(f"{source}: neither a directory nor a regular file")
        return []
    found: list[SourceFile] = []
    _scan_directory(root, root, found, problems)
    if not found and not problems:
        problems.append(f"{source}: there is no file in it")
    return sorted(found, key=lambda file: file.path)


def _scan_directory(root: Path, directory: Path, found: list[SourceFile], problems: list[str]) -> None:
    """Add the files below one directory, depth first."""
    try:
        entries = sorted(os.scandir(str(directory)), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{directory}: {error.strerror}")
        return
    if not entries and directory != root:
        problems.append(f"{directory}: empty directory; an artifact holds files only, so delete it or put a file in it")
    for entry in entries:
        location = Path(entry.path)
        path = location.relative_to(root).as_posix()
        problem = path_problem(path)
        if problem:
            problems.append(f"{directory}: {problem}")
        elif entry.is_dir(follow_symlinks=False):
            _scan_directory(root, location, found, problems)
        else:
            _scan_file(root, location, path, entry.is_symlink(), found, problems)


def _scan_file(
    root: Path, location: Path, path: str, is_link: bool, found: list[SourceFile], problems: list[str]
) -> None:
    """Add one file or link to a file, or say why not."""
    target = Path(os.path.realpath(str(location))) if is_link else location
    if is_link and root not in target.parents:
        problems.append(f"{location}: symbolic link that leaves the directory ({target}); copy the file (cp -L)")
        return
    try:
        status = target.stat()
    except OSError as error:
        problems.append(f"{location}: {error.strerror}")
        return
    if stat.S_ISDIR(status.st_mode):
        problems.append(f"{location}: symbolic link to a directory; copy the directory")
    elif not stat.S_ISREG(status.st_mode):
        problems.append(f"{location}: a device, socket or pipe is not a file that can be carried")
    elif not os.access(str(target), os.R_OK):
        problems.append(f"{location}: no permission to read it")
    else:
        found.append(SourceFile(path, target, status.st_size))
