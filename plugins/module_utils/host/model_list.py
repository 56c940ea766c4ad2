# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The list of models of the release in force, which the keeper goes by."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Sequence

from . import release
from .definition import PRIVATE, json_text, shipped
from .native_ctl import locked


def put_in_force(root: Path, models: Sequence[Any], rehearse: bool) -> bool:
    """Put a release in force that has these models, and is otherwise the one in force; returns whether it is another.

    `models` are entries of the inventory that were found to be right. What was shipped is taken down anew, because they
    may need it. Nothing happens where no release is in force; to `rehearse` tells what would happen. Whoever changes
    the host at the same time is waited for. Raises ReleaseError and ServiceError.
    """
    if release.current(root) is None:
        return False
    with contextlib.nullcontext() if rehearse else locked(root):
        before = release.in_force(root)
        if not before:
            return False
        lists = {
            "models.json": release.Entry(json_text(list(models)), PRIVATE),
            "artifacts.json": release.Entry(json_text(shipped(root))),
        }
        files = {**before, **lists}
        if release.identity(files) == release.current(root):
            return False
        if not rehearse:
            release.make(root, files)
            release.switch(root, release.identity(files))
        return True
