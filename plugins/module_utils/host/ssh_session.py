# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The port at which the SSH session listens that this process came through.

sshd tells a session in `SSH_CONNECTION`: address and port of the client, address and port of the server
(ssh(1)). sudo takes the variable away, so the processes above this one are asked as well.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Set

_CONNECTION = re.compile(rb"SSH_CONNECTION=\S+ \d+ \S+ (\d+)\Z")
_PARENT = re.compile(r"^PPid:\s*(\d+)", re.MULTILINE)


def ports(processes: Path = Path("/proc"), pid: int = 0) -> Set[int]:
    """The ports of sshd that this process, or one above it, was reached through; empty without SSH."""
    found: Set[int] = set()
    seen: Set[int] = set()
    pid = pid or os.getpid()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        with contextlib.suppress(OSError):
            for variable in (processes / str(pid) / "environ").read_bytes().split(b"\0"):
                match = _CONNECTION.match(variable)
                if match:
                    found.add(int(match.group(1)))
        try:
            parent = _PARENT.search((processes / str(pid) / "status").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            break
        pid = int(parent.group(1)) if parent else 0
    return found
