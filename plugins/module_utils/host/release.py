# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Releases: immutable directories that say what a host serves.

::

    <root>/releases/<id>/   files; the id is a hash of their names, modes and contents
    <root>/current          symbolic link to the release in force

A release never changes; another content is another release. Switching is one rename. The time of a release's directory
says when it was put in force last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

from ..masking import masked_json, masked_yaml
from . import release_files

RELEASES = "releases"
CURRENT = "current"
ID_LENGTH = 12
NAMED = 5
"""Files that are named where some were changed."""
_ID = re.compile(r"[0-9a-f]{12}\Z")


@dataclass(frozen=True)
class Entry:
    """One file of a release: its text, or its bytes where it is none."""

    text: str = ""
    mode: int = 0o440
    data: Optional[bytes] = None

    @property
    def content(self) -> bytes:
        """What stands in the file."""
        return self.text.encode("utf-8") if self.data is None else self.data


class ReleaseError(Exception):
    """A release that cannot be put in force; the text says what is in the way.

    `changed` are files of it that are not as they were written, as far as they are known.
    """

    def __init__(self, message: str, changed: Sequence[str] = ()) -> None:
        self.changed = list(changed)
        super().__init__(message)


Files = Mapping[str, Entry]
"""The files of a release by their path in it."""


def identity(files: Files) -> str:
    """The id of the release that has exactly these files."""
    listing = [
        [path, entry.mode, entry.text if entry.data is None else hashlib.sha256(entry.data).hexdigest()]
        for path, entry in sorted(files.items())
    ]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:ID_LENGTH]


def current(root: Path) -> Optional[str]:
    """The id of the release in force, None when there is none, or when the link leads out of the releases."""
    try:
        target = Path(os.readlink(str(root / CURRENT)))
    except OSError:
        return None
    return target.name if (root / target).parent == root / RELEASES else None


def whole(root: Path, files: Files, group: Optional[int] = None) -> bool:
    """Whether the release with these files stands on disk, complete and unchanged, with the same rights."""
    directory = root / RELEASES / identity(files)
    if group is not None and not all(_group(path) == group for path in (directory, directory.parent)):
        return False
    found = {str(path.relative_to(directory)): path for path in _paths(directory)}
    return set(found) == set(files) and all(
        found[path].read_bytes() == entry.content and stat.S_IMODE(found[path].stat().st_mode) == entry.mode
        for path, entry in files.items()
    )


def make(root: Path, files: Files, group: Optional[int] = None) -> bool:
    """Write the release with these files unless it stands; returns whether it had to be written.

    `group` may enter it, and read what a group may.

    It appears with one rename, so that an interruption leaves no half release; what it leaves the next call removes,
    so nobody else may do the same meanwhile. One that somebody changed is replaced.
    """
    if whole(root, files, group):
        return False
    directory = root / RELEASES / identity(files)
    root.mkdir(mode=0o755, parents=True, exist_ok=True)  # Nobody else writes in there, whatever the umask is.
    directory.parent.mkdir(mode=0o755, exist_ok=True)
    if group is not None:
        os.chown(str(directory.parent), -1, group)
    _clear(directory.parent)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=str(directory.parent)))
    try:
        scratch.chmod(0o750)
        for name, entry in files.items():
            path = scratch / name
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                path.parent.chmod(0o750)
            path.touch(mode=0o600)
            path.write_bytes(entry.content)
            path.chmod(entry.mode)
        if group is not None:
            for path in (scratch, *scratch.rglob("*")):
                os.chown(str(path), -1, group)
        if directory.exists():
            directory.replace(Path(tempfile.mkdtemp(prefix=".old-", dir=str(directory.parent)), "old"))
        scratch.replace(directory)
    finally:
        _clear(directory.parent)
    return True


def _clear(directory: Path) -> None:
    """Remove what was being written, now or by a call that was interrupted; it may hold secrets."""
    for leftover in [*directory.glob(".new-*"), *directory.glob(".old-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def switch(root: Path, release: str) -> bool:
    """Put a release in force; returns whether another one (or none) was.

    Raises ReleaseError when something stands where the link should be.
    """
    place = root / CURRENT
    if current(root) == release:
        return False
    if place.exists() and not place.is_symlink():
        raise ReleaseError(
            f"{place} is no link to a release, and not written by the collection. Move it away, then run again."
        )
    for leftover in root.glob(f".{CURRENT}-*"):
        leftover.unlink()
    link = root / f".{CURRENT}-{os.getpid()}"
    link.symlink_to(Path(RELEASES, release))
    release_files.note(root, root / RELEASES / release)
    link.replace(place)
    # The kernel's own time for this would be as coarse as its tick, and clocks of hosts without a network are set back.
    others = (root / RELEASES / one for one in history(root) if one != release)
    now = max([time.time_ns(), *(one.stat().st_mtime_ns + 1 for one in others)])
    os.utime(str(root / RELEASES / release), ns=(now, now))
    return True


def history(root: Path) -> List[str]:
    """The ids of all releases, the one that was put in force last first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(str(root / RELEASES)):
            if _ID.match(entry.name) and entry.is_dir(follow_symlinks=False):
                found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))
    return [name for _time, name in sorted(found, reverse=True)]


def in_force(root: Path) -> Dict[str, Entry]:
    """The files of the release in force, as they were given to `make`; nothing when there is none.

    Raises ReleaseError when they are not as they were written.
    """
    name = current(root)
    directory = root / RELEASES / str(name)
    files = {}
    for path in _paths(directory) if name else []:
        mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
        binary = path.suffix == ".pyz"
        entry = Entry(mode=mode, data=content) if binary else Entry(content.decode("utf-8", "replace"), mode)
        files[str(path.relative_to(directory))] = entry
    if name and directory.is_dir() and identity(files) != name:
        changed = list(release_files.differences(root, directory))
        raise ReleaseError(
            f"{directory} is not as it was written{f' ({_some(changed)})' if changed else ''}. "
            "Run playbooks/serve.yml, which makes it anew.",
            changed,
        )
    return files


def read(directory: Path) -> Dict[str, str]:
    """The texts of a release by path; nothing when it is not there."""
    return {
        str(path.relative_to(directory)): path.read_bytes().decode("utf-8", "replace") for path in _paths(directory)
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _group(path: Path) -> Optional[int]:
    return path.stat().st_gid if path.is_dir() else None


def _paths(directory: Path) -> List[Path]:
    """The files of a release; none when it is not there."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file()] if directory.is_dir() else []


VARIABLE = re.compile(r"(?m)^([^=\n]+)=.*$")


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> List[Dict[str, str]]:
    """What changes from one release to another, file by file, as Ansible's diff.

    Values of secrets and the text of programs are left out.
    """
    changes = []
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path) and not path.startswith("bin/"):
            shown = [_without_secrets(path, texts.get(path, "")) for texts in (before, after)]
            changes.append({"before_header": path, "after_header": path, "before": shown[0], "after": shown[1]})
    return changes


def _without_secrets(path: str, text: str) -> str:
    """A file as it may be shown. All values in a file of variables are secret, which is why they are there."""
    if path.endswith(".env"):
        return VARIABLE.sub(r"\1=(hidden)", text)
    if path.endswith(".json"):
        return masked_json(text)
    return masked_yaml(text) if path.endswith((".yaml", ".yml")) else text
