# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk no faster than a site's, whatever this machine has: the block I/O controller of Linux. Needs root.

`reading_at` holds every process started inside it to a number of bytes a second, read from the disk of a directory.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator

CGROUPS = Path("/sys/fs/cgroup")
NAME = "airgap-xinference-bench"


@contextlib.contextmanager
def reading_at(bytes_a_second: int, directory: Path) -> Iterator[None]:
    """This process and its children read no faster than that from the disk that holds `directory`."""
    disk = _disk(directory)
    version_1 = CGROUPS / "blkio"
    parent = version_1 if version_1.is_dir() else CGROUPS
    group = parent / NAME
    try:
        group.mkdir(exist_ok=True)
    except OSError as error:
        raise SystemExit(f"The disk cannot be slowed down without root: {group}: {error.strerror}") from error
    if parent == version_1:
        (group / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_a_second}")
    else:
        (group / "io.max").write_text(f"{disk} rbps={bytes_a_second}")
    # Children stay in it after this process has left.
    before = _group_of_this_process(parent)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (before / "cgroup.procs").write_text(pid)
        group.rmdir()


def _disk(directory: Path) -> str:
    """Major and minor number of the whole disk that holds a directory; a limit on a partition is not accepted."""
    device = directory.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if (place / "partition").exists():
        place = place.parent
    return (place / "dev").read_text().strip()


def _group_of_this_process(parent: Path) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        if controllers == ("blkio" if parent.name == "blkio" else ""):
            return parent / path.lstrip("/")
    return parent
