# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The user of the host as whom a native server runs, where systemd can give it one."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from .native_ctl import ServiceError, use_systemd

DEFAULT = "xinference"
ROOT = "root"
SHELLS = ("/usr/sbin/nologin", "/sbin/nologin", "/bin/false")
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")


def user_of(wanted: str, manager: str) -> str:
    """As whom the server runs; empty where no systemd starts it, and it is whoever starts it. Raises ServiceError."""
    if not use_systemd(manager):
        return ""
    if wanted and not _NAME.match(wanted):
        raise ServiceError(f"xinference_server_user is {wanted!r} and must be the name of a user, such as {DEFAULT}")
    return wanted or DEFAULT


def missing(user: str) -> bool:
    """Whether the user has to be made."""
    try:
        pwd.getpwnam(user)
    except KeyError:
        return bool(user)
    return False


def make(user: str, home: str) -> None:
    """Make a system user who cannot log in. Raises ServiceError."""
    program = shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    shell = next((path for path in SHELLS if Path(path).exists()), SHELLS[-1])
    if not program:
        raise ServiceError(f"There is no user {user} and no useradd to make it; make it, then run again.")
    options = ["--system", "--user-group", "--no-create-home", "--home-dir", home, "--shell", shell]
    done = subprocess.run([program, *options, user], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceError(f"The user {user} cannot be made: {done.stderr.strip()}. Make it, then run again.")


def group_of(user: str) -> Optional[int]:
    """The group that reads what the server starts from; None for root, who needs none, and where there is no user."""
    return None if user in ("", ROOT) or missing(user) else pwd.getpwnam(user).pw_gid


def refuse_closed(user: str, needed: Sequence[str]) -> None:
    """Raise ServiceError when the user could not enter a directory above what the server needs."""
    if user in ("", ROOT):
        return
    closed: List[str] = sorted({str(place) for path in needed for place in _closed(Path(os.path.realpath(path)))})
    if closed:
        raise ServiceError(
            f"The server is to run as {user}, who cannot enter {', '.join(closed)}. Let others pass through there "
            "(chmod o+x), put xinference_root and Python elsewhere, or say xinference_server_user: root."
        )


def _closed(path: Path) -> Iterator[Path]:
    """The directories above a path that not everybody may enter."""
    for place in path.parents:
        if place.is_dir() and not place.stat().st_mode & 0o001:
            yield place
