# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a container may not do, as settings of a Compose service. Pure: data in, data out.

A server runs with no capability at all: it opens a port above 1024, reads models and writes its own directories. What
it writes beside those (its sockets, compiled code, uploads) goes into memory, and ends with the container.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

BOUND: Dict[str, Any] = {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
"""For every container: no capabilities, and no program that gains any."""
SEALED: Dict[str, Any] = {**BOUND, "read_only": True, "pids_limit": 256}
"""For a program of our own, which writes nothing."""
NOBODY = "65534:65534"
"""For a program that owns no file either."""
PIDS = 32768
"""Processes and threads of a server: far above what many models take, far below what a host has."""
INDEX_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"]
"""The index of packages begins as root, gives its files to a user of its own, and becomes that user."""

IMAGE_HOME = "/root"
HOME = "/home/xinference"
"""The home directory of a server that may not write the image's, or is not root; it is in memory."""
TEMPORARY = "/tmp"


def home(user: str) -> str:
    """Where the directories of the host are seen: below the image's home directory, which root alone can enter."""
    return HOME if user else IMAGE_HOME


def server(user: str, read_only: bool, capabilities: Sequence[str]) -> Dict[str, Any]:
    """The settings of the server's service.

    `user` is `uid:gid`, empty for the image's own; `capabilities` are those that it keeps.
    """
    found: Dict[str, Any] = {**BOUND, "pids_limit": PIDS}
    if capabilities:
        found["cap_add"] = list(capabilities)
    if user:
        found["user"] = user
    if read_only:
        found["read_only"] = True
    if user or read_only:
        found["tmpfs"] = _memory(user, read_only)
    return found


def _memory(user: str, read_only: bool) -> List[str]:
    """Directories in memory. Compiled code is loaded from there, so it may be executed.

    The one above the mounted caches is the user's too, and not that of the engine, which would make it.
    """
    uid, _colon, gid = (user or "0:0").partition(":")
    own = f"mode=0700,uid={uid},gid={gid},exec"
    return [
        f"{HOME}:{own}",
        *([f"{HOME}/.cache:{own}"] if user else []),
        *([f"{TEMPORARY}:mode=1777,exec"] if read_only else []),
    ]
