# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper can find out about the server beside its two lists, and the one thing it can do to it.

A server whose worker was killed may live on with nothing behind its API (1.x does), and answer every question with an
internal error until somebody ends it. In a container the health check does that; a native server is ended here, and its
manager starts it anew.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Optional, Set

from .client import Client, ServerError
from .keeper_release import Settings

# A server that only starts slowly does not answer at all; one that answers so for so long is half dead.
HALF_DEAD = 45.0
# Behind its API nobody listens any more.
REFUSED, CERTAIN = "connection refused", 15.0
# Written by host/native_ctl.py.
ASKED = "asked.json"
_DOWN = re.compile(r"^xinference:model_unexpected_termination\{([^}]*)\} 1", re.MULTILINE)
_UID = re.compile(r'model_uid="((?:[^"\\]|\\.)*)"')


def died(client: Client) -> Set[str]:
    """Models that the server gave up after their process died, where it tells (its metrics do, from 4.1 on)."""
    try:
        text = client.get_bytes("/metrics").decode("utf-8", "replace")
    except ServerError:
        return set()
    return {match.group(1) for labels in _DOWN.findall(text) for match in [_UID.search(labels)] if match}


def asked(state: Path) -> float:
    """When somebody last asked for the end of the server (by xinferencectl or Ansible), of what is noted in `state`."""
    try:
        return float(json.loads((state / ASKED).read_text(encoding="utf-8"))["at"])
    except (OSError, ValueError, TypeError, LookupError):
        return 0.0


class HalfDead:
    """Watches for a server that answers with nothing but internal errors."""

    def __init__(self) -> None:
        self.since: Optional[float] = None
        self.ended = 0

    def alive(self) -> None:
        """It answered sensibly, or not at all."""
        self.since, self.ended = None, 0

    def seen(self, error: ServerError, now: float, settings: Settings) -> str:
        """It answered with an error; returns what was done about that, empty for nothing."""
        if error.path != "/status" or (error.status or 0) < 500:
            return ""
        self.since = now if self.since is None else self.since
        patience = CERTAIN if REFUSED in error.detail.lower() else HALF_DEAD
        if now - self.since < patience * (self.ended + 1) or not settings.pid_file:
            return ""
        pid = _pid(Path(settings.pid_file), settings.mark)
        if pid is None:
            return ""
        self.ended += 1
        try:
            os.kill(pid, signal.SIGTERM if self.ended == 1 else signal.SIGKILL)
        except OSError as failure:
            return f"the server is half dead, and its process {pid} cannot be ended: {failure}"
        return f"the server is half dead; its process {pid} was ended, so that it is started anew"


def _pid(path: Path, mark: str) -> Optional[int]:
    """The process of the server; None when it is not there, or another one by now."""
    try:
        pid = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return pid if mark and os.fsencode(mark) in environment else None
