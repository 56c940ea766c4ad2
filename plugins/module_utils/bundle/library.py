# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure-Python libraries of the bundle, unpacked for the modules that run on the host."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

from .digest import write_atomically
from .manifest import Artifact, path_problem, paths_problems
from .places import exchange, fresh, remove, short
from .sizes import size_text
from .store import DIRECTORY_MODE, Store, StoreError

FILE_MODE = 0o644
MAX_LIBRARY = 1024**3
"""Bytes the files of one wheel may have: the largest of these libraries has a few million."""
AUTHORITIES = "certifi/cacert.pem"
"""Sites add certificate authorities of their own to this file; that is no damage, and must not be undone."""


def library_path(store: Store, artifact: Artifact) -> Path:
    """The directory the wheels of an artifact are unpacked in."""
    return store.root / "lib" / short(artifact.digest)


def library_is_right(store: Store, artifact: Artifact) -> bool:
    """True when the wheels are unpacked, as they were then, and in use."""
    target = library_path(store, artifact)
    link = store.root / "lib" / "python"
    return _is_whole(target) and link.is_symlink() and os.readlink(link) == target.name


def library_is_sound(store: Store, artifact: Artifact) -> bool:
    """True when every file that is unpacked has the bytes it has in its wheel; all of them are read."""
    target = library_path(store, artifact)
    try:
        for file in artifact.files:
            with zipfile.ZipFile(store.blob_path(file.digest)) as archive:
                for member in archive.infolist():
                    path = _wheel_path(member.filename)
                    if member.is_dir() or path in (None, AUTHORITIES):
                        continue
                    if (target / str(path)).read_bytes() != archive.read(member):
                        return False
    except (OSError, zipfile.BadZipFile, EOFError):
        return False
    return True


def distrust_library(store: Store, artifact: Artifact) -> None:
    """Have a library unpacked again the next time it is asked for, however whole it looks."""
    remove(_listing(library_path(store, artifact)))


def make_library(store: Store, artifact: Artifact) -> None:
    """Unpack the wheels and point `lib/python` at them, in one atomic step."""
    target = library_path(store, artifact)
    store.make_directory(target.parent)
    if not _is_whole(target):
        building = fresh(store, target)
        for file in artifact.files:
            if file.path.endswith(".whl"):
                unpack_wheel(store.blob_path(file.digest), file.path, building)
        compileall.compile_dir(str(building), ddir=str(target), quiet=2)
        _open_modes(building)
        exchange(building, target)
        # The listing says that the files are whole, so they must be on the disk before it.
        os.sync()
        write_atomically(_listing(target), json.dumps(_files(target), sort_keys=True).encode() + b"\n")
    link = target.with_name("python")
    if os.path.lexists(link) and not link.is_symlink():
        raise StoreError(f"{link} must be a link that shipping makes, but is something else; move it away.")
    pointer = target.with_name(".python.new")
    remove(pointer)
    pointer.symlink_to(target.name)
    pointer.replace(link)


def unpack_wheel(wheel: Path, name: str, target: Path) -> None:
    """Unpack a pure-Python wheel into a directory for PYTHONPATH.

    Raises StoreError for a wheel with compiled code, an unsafe path, or one that is no wheel at all.
    """
    if not name.endswith("-none-any.whl"):
        raise StoreError(f"{name}: host libraries must be pure Python wheels (…-none-any.whl).")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            problems = _wheel_problems(members)
            if problems:
                raise StoreError(f"{name}: the wheel is refused: {'; '.join(problems)}.")
            for member in members:
                path = _wheel_path(member.filename)
                if path is None:
                    continue
                destination = target / path
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, destination.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1024 * 1024)
    except (zipfile.BadZipFile, EOFError) as error:
        raise StoreError(f"{name}: not a wheel ({error}).") from error


def _wheel_problems(members: list[zipfile.ZipInfo]) -> list[str]:
    """Why the files of a wheel cannot be unpacked, before any of them is."""
    paths = [member.filename for member in members]
    problems = [problem for problem in map(path_problem, paths) if problem]
    if not problems:
        special = [
            entry.filename for entry in members if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG)
        ]
        problems = [*paths_problems(paths), *(f"{path} is a link or a device" for path in special)]
    size = sum(member.file_size for member in members)
    if size > MAX_LIBRARY:
        problems.append(f"unpacked it would have {size_text(size)}, the limit is {size_text(MAX_LIBRARY)}")
    return problems


def _listing(target: Path) -> Path:
    """Where it is written what an unpacked library consists of."""
    return target.with_name(f".{target.name}.json")


def _files(target: Path) -> dict[str, Any]:
    """Size and time of each file of a library, by path."""
    found = {}
    for place, _directories, names in os.walk(str(target)):
        for name in names:
            path = Path(place, name)
            status = path.lstat()
            found[path.relative_to(target).as_posix()] = [status.st_size, status.st_mtime_ns]
    return found


def _is_whole(target: Path) -> bool:
    """Whether a library has the files it was made with, unchanged, and no other but what Python itself compiled."""
    try:
        made = json.loads(_listing(target).read_text())
        found = _files(target)
    except (OSError, ValueError):
        return False
    if not isinstance(made, dict) or (AUTHORITIES in made) != (AUTHORITIES in found):
        return False
    known = {path: facts for path, facts in found.items() if path in made or "__pycache__/" not in path}
    return {**made, AUTHORITIES: None} == {**known, AUTHORITIES: None}


def _wheel_path(member: str) -> str | None:
    """Where a file of a wheel goes in the library: modules of its data folder at the top, scripts nowhere."""
    top, _slash, rest = member.partition("/")
    if not top.endswith(".data"):
        return member
    scheme, _slash, path = rest.partition("/")
    return path if scheme in ("purelib", "platlib") and path else None


def _open_modes(top: Path) -> None:
    """Let everybody read a library, whatever the umask was."""
    for place, _directories, files in os.walk(str(top)):
        Path(place).chmod(DIRECTORY_MODE)
        for name in files:
            Path(place, name).chmod(FILE_MODE)
