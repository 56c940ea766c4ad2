# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""As whom the server's container runs, and whose its directories on the host therefore are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Sequence, Tuple

_USER = re.compile(r"(\d+)(?::(\d+))?\Z")


class UserError(ValueError):
    """A user as whom the container cannot run; the text says why, and what to do."""


def user_of(wanted: str, info: Mapping[str, Any]) -> str:
    """The user as `uid:gid`, empty for the image's own. `info` is what the engine tells of itself. Raises UserError."""
    if not wanted:
        return ""
    found = _USER.match(wanted)
    if not found:
        raise UserError(
            f"xinference_server_user is {wanted!r}. A container does not know the users of the host: give a number, or "
            "uid:gid, such as 1000:1000."
        )
    others = [name for name in ("rootless", "userns") if f"name={name}" in _told(info)]
    if others:
        raise UserError(
            f"The engine of this host ({others[0]}) gives every container users of its own, so that its root is an "
            "ordinary user of the host already. Leave xinference_server_user empty."
        )
    return f"{found.group(1)}:{found.group(2) or found.group(1)}"


def capabilities(user: str, written: Sequence[str], info: Mapping[str, Any]) -> Tuple[str, ...]:
    """What the container's root keeps: the right to write directories of another user, where they are another's.

    `written` are directories of the host; those that are not there yet will belong to whoever runs this.
    """
    if user or "name=rootless" in _told(info):
        return ()
    owners = {Path(path).stat().st_uid if Path(path).exists() else os.geteuid() for path in written}
    return ("DAC_OVERRIDE",) if owners - {0} else ()


def not_theirs(user: str, written: Sequence[str]) -> List[str]:
    """Directories among `written` that hold something which is not the user's, and that the user could not change."""
    wanted = _numbers(user)
    return [path for path in written if Path(path).is_dir() and any(_others(path, wanted))]


def hand_over(user: str, directories: Sequence[str]) -> None:
    """Give directories with all that is in them to the user. Raises UserError when this is not for us to do.

    Symbolic links below are not followed: who writes there must not get more than is there.
    """
    uid, gid = _numbers(user)
    try:
        for top in directories:
            for name, place in _others(top, (uid, gid)):
                os.chown(name, uid, gid, dir_fd=place, follow_symlinks=False)
    except PermissionError as error:
        raise UserError(
            f"{', '.join(directories)}: not all of it is the user's as whom the container is to run "
            f"(xinference_server_user, {user}), and only root can give it to them. Let the play become root."
        ) from error


def _others(top: str, wanted: Tuple[int, int]) -> Iterator[Tuple[str, int]]:
    """What below `top` belongs to others, as a name and the directory that has it; the top itself is its `.`."""
    for _path, directories, files, place in os.fwalk(os.path.realpath(top)):
        for name in (*directories, *files, "."):
            seen = os.stat(name, dir_fd=place, follow_symlinks=False)
            if (seen.st_uid, seen.st_gid) != wanted:
                yield name, place


def _numbers(user: str) -> Tuple[int, int]:
    uid, _colon, gid = user.partition(":")
    return int(uid), int(gid)


def _told(info: Mapping[str, Any]) -> str:
    return " ".join(str(one) for one in info.get("SecurityOptions") or [])
