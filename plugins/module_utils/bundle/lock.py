# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One writer at a time: a lock file that the kernel releases even when its holder dies."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .layout import BundleError


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; raises BundleError with `message` when somebody else holds it.

    Where nothing can be written, as beside a bundle on read-only media, it says what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise BundleError(
            f"{path} cannot be written: {error.strerror}. Name another directory for stamps (cache_dir of the module, "
            "xinference_bundle_cache_dir of playbooks)."
        ) from error
    with lock as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BundleError(f"{message} (it holds {path}); wait for it and try again.") from error
        yield
