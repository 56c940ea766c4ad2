# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lines that tell how far something long has come, at intervals that suit a log."""

from __future__ import annotations

import threading
import time
from typing import Callable

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text


class Progress:
    """Counts bytes towards `total` and tells `say` about it, not before `interval` seconds and not more often.

    May be used by several threads. What is quick says nothing at all.
    """

    def __init__(
        self,
        label: str,
        total: int,
        say: Callable[[str], None],
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._say = say
        self._interval = interval
        self._clock = clock
        self._began = self._told = clock()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    def add(self, count: int) -> None:
        """Count more bytes."""
        with self._lock:
            self.done += count
            now = self._clock()
            if now - self._told < self._interval:
                return
            self._told = now
            line = self._line(now - self._began)
        self._say(line)

    def reach(self, done: int) -> None:
        """Count up to an absolute number of bytes."""
        if done > self.done:
            self.add(done - self.done)

    def _line(self, seconds: float) -> str:
        rate = self.done / seconds if seconds > 0 else 0
        left = f", {duration_text((self.total - self.done) / rate)} left" if rate and self.total > self.done else ""
        percent = 100 * self.done // self.total if self.total else 100
        return (
            f"{self.label}: {size_text(self.done)} of {size_text(self.total)} ({percent} %), {size_text(rate)}/s{left}"
        )


def duration_text(seconds: float) -> str:
    """Seconds as people read them: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 7 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
