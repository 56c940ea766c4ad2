# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What users of a host other than the owner may read below the root directory.

Software and weights are public and read by whoever runs the server, so `models`, `wheels`, `venvs`, `lib` and `tools`
stay readable. All else tells of the site: directories that nobody else enters, because closing one closes whatever is
in it, however it came there. The metrics are for the monitoring's own user.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

SYSTEM = tuple(
    Path(path)
    for path in (
        *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr/bin", "/usr/lib"),
        *("/usr/local/bin", "/usr/sbin", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp"),
        *("/var/cache", "/var/lib/docker", "/var/lib/systemd", "/var/log", "/var/spool", "/var/tmp"),
    )
)
"""Directories in which much lies that is not the server's."""

CLOSED = 0o750
STATE = 0o755
STATE_FILE = 0o640
DIRECTORIES = {
    "blobs": CLOSED,
    "cache": CLOSED,
    "home": CLOSED,
    "logs": CLOSED,
    "releases": CLOSED,
    "state": STATE,
}
OPEN_SUFFIXES = (".prom", ".lock")
"""Files in `state` for others: metrics, and locks, which are empty and whoever shares the directory has to open."""


def limits(root: Path, homes: Sequence[str] = ()) -> Iterator[Tuple[Path, int]]:
    """What is to be closed, with the rights it may have at most; `homes` are more directories to close."""
    for name, mode in DIRECTORIES.items():
        yield root / name, mode
    for home in homes:
        # Never a directory that everything lies in, whatever an inventory says.
        if len(Path(home).resolve().parts) > 2:
            yield Path(home), CLOSED
    for entry in sorted((root / "state").glob("*")):
        if not entry.name.endswith(OPEN_SUFFIXES) and not entry.is_dir():
            yield entry, STATE_FILE


def refuse_shared(root: Path, homes: Sequence[str]) -> None:
    """Raise ValueError for directories that cannot be the server's own: it gets them, and others lose them.

    Who owns the root directory of the collection decides what its programs do, and some of them run as root.
    """
    shared = []
    for home in homes:
        place = Path(os.path.realpath(home))
        others = (*SYSTEM, *(Path(os.path.realpath(str(path))) for path in (root / "releases", root / "state" / "x")))
        if any(place in (other, *other.parents) for other in others):
            shared.append(home)
    if shared:
        raise ValueError(
            f"Nothing was changed. {', '.join(shared)} would become the server's own (xinference_server_home, "
            "xinference_server_writable), and there lies what is not. Name a directory that holds nothing else."
        )


def too_open(root: Path, homes: Sequence[str] = ()) -> List[Tuple[Path, int]]:
    """What has more rights than it may, with those it is to have. Rights that are missing are not given."""
    found = []
    for path, limit in limits(root, homes):
        try:
            seen = path.lstat()
        except FileNotFoundError:
            continue
        mode, ours = stat.S_IMODE(seen.st_mode), os.geteuid() in (0, seen.st_uid)
        if ours and mode & ~limit and not stat.S_ISLNK(seen.st_mode):
            found.append((path, mode & limit))
    return found


def close(found: Sequence[Tuple[Path, int]]) -> None:
    """Take the rights away that are too many."""
    for path, mode in found:
        path.chmod(mode)
