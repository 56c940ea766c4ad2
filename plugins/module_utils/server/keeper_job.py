# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A process that does one order of the keeper, seen from the keeper: `keeper_work` is the other side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Dict, List, Optional, Sequence, cast

from .keeper_work import Order

END_LIMIT = 5.0


class Job:
    """Runs `command` (the keeper's own program, told to work) for an order."""

    def __init__(self, command: Sequence[str], order: Order) -> None:
        self.order = order
        self.started = time.monotonic()
        self._rest = b""
        self._process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        order_to, self._said = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        with contextlib.suppress(OSError):  # It ended already, which shows below.
            order_to.write(json.dumps(asdict(order)).encode())
            order_to.close()
        os.set_blocking(self._said.fileno(), False)

    def news(self) -> List[Dict[str, Any]]:
        """What it said since it was last asked. The last thing it says has an `outcome`."""
        with contextlib.suppress(OSError):
            while True:
                piece = self._said.read(65536)
                if not piece:
                    break
                self._rest += piece
        *whole, self._rest = self._rest.split(b"\n")
        found = []
        for line in whole:
            with contextlib.suppress(ValueError):
                told = json.loads(line.decode("utf-8", "replace"))
                if isinstance(told, dict):
                    found.append(told)
        return found

    @property
    def code(self) -> Optional[int]:
        """How it ended, None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """End it now, whatever it does. What it launched goes on on the server."""
        self._process.terminate()
        try:
            self._process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def command(program: Path, root: Path) -> List[str]:
    """How to run the keeper's program for an order."""
    return [sys.executable, "-E", "-s", str(program), "--root", str(root), "work"]
