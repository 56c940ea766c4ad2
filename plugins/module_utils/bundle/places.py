# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Directories that appear under their name only when they are complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .store import Store


def short(digest: str) -> str:
    """The first 12 hex digits of a digest: enough for a name, short enough for a path."""
    return digest.partition(":")[2][:12]


def fresh(store: Store, target: Path) -> Path:
    """An empty directory beside `target` to build in; what an interrupted run left there goes."""
    building = target.with_name(f".{target.name}.new")
    remove(building)
    store.make_directory(building)
    return building


def exchange(building: Path, target: Path) -> None:
    """Put a finished directory in its place."""
    old = target.with_name(f".{target.name}.old")
    remove(old)
    if os.path.lexists(target):
        target.rename(old)
    building.rename(target)
    remove(old)


def remove(path: Path) -> None:
    """Remove a directory, a file or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
