# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How far something long has come: counted once, told in lines at intervals that suit a log, or shown by a Screen."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Callable

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text

INTERVAL = 5.0
"""Seconds between two lines, at least."""
STEP = 10
"""Percent that make a line worth reading before `LONG` has passed."""
LONG = 60.0
"""Seconds after which a line is due, however little happened."""
COUNTED = ("sent_bytes", "skipped_bytes", "deduplicated_bytes", "from_peers_bytes")
"""The numbers of a result that make sense as a sum over hosts."""
WINDOW = 10.0
"""Seconds over which the rate is measured: long enough to be steady, short enough to show a line that slows down."""


class Progress:
    """Counts bytes towards `total` and tells `say` about it in lines, not before `interval` seconds and not more often.

    What is quick says nothing at all. `say` may be a Screen, which then looks at the counts itself and shows them as
    they are. May be used by several threads.
    """

    def __init__(
        self,
        label: str,
        total: int,
        say: Callable[[str], None],
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.name = ""
        """What is being verified at this moment; empty for nothing."""
        self._say = say
        self._interval = max(interval, getattr(say, "interval", 0.0))
        self._clock = clock
        self._began = self._told = clock()
        self._told_done = 0
        self._marks: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._lock = threading.Lock()
        watch: Callable[[Progress], bool] = getattr(say, "watch", lambda _progress: False)
        self._shown = watch(self)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Bytes a second, lately."""
        with self._lock:
            return self._rate(self._clock())

    def add(self, count: int) -> None:
        """Count more bytes."""
        with self._lock:
            self.done += count
            now = self._clock()
            self._mark(now)
            if self._shown or not self._due(now):
                return
            self._told, self._told_done = now, self.done
            line = self._line(now)
        self._say(line)

    def reach(self, done: int) -> None:
        """Count up to an absolute number of bytes."""
        if done > self.done:
            self.add(done - self.done)

    def hashing(self, name: str | None) -> None:
        """Tell what is being verified on the host at this moment, by a name that people know; None for nothing."""
        self.name = name or ""

    def _mark(self, now: float) -> None:
        """Keep one count for each second of the window, and the last one before it."""
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= WINDOW:
            self._marks.popleft()

    def _rate(self, now: float) -> float:
        since, before = self._marks[0]
        return (self.done - before) / (now - since) if now > since else 0.0

    def _due(self, now: float) -> bool:
        passed = now - self._told
        if passed < self._interval:
            return False
        return passed >= LONG or 100 * (self.done - self._told_done) >= STEP * self.total or self._told == self._began

    def _line(self, now: float) -> str:
        name = f", verifying {self.name}" if self.name else ""
        return f"{self.label}: {counts(self.done, self.total, self._rate(now))}{name}"


def counts(done: int, total: int, rate: float) -> str:
    """How far, how fast and how long still; sizes in bytes, the rate in bytes a second."""
    left = f", {duration_text((total - done) / rate)} left" if rate >= 1 and total > done else ""
    return f"{size_text(done)} of {size_text(total)} ({percent(done, total)} %), {size_text(rate)}/s{left}"


def percent(done: int, total: int) -> int:
    """How much of it, rounded down; everything of nothing."""
    return 100 * done // total if total else 100


def totals(numbers: dict[str, Any], seconds: float) -> str:
    """What was done for one host or for many, in the units of people.

    `numbers` may have `sent_bytes`, `skipped_bytes` (there already), `deduplicated_bytes` (several artifacts share
    them, and they count once), `from_peers_bytes` (got from other hosts).
    """
    sent, peers = int(numbers.get("sent_bytes", 0)), int(numbers.get("from_peers_bytes", 0))
    rate = f" ({size_text((sent + peers) / seconds)}/s)" if seconds > 0 and sent + peers else ""
    words = [f"{size_text(sent)} sent in {duration_text(seconds)}{rate}"]
    words += [f"{size_text(peers)} of other hosts"] if peers else []
    words += [f"{size_text(int(numbers.get('skipped_bytes', 0)))} were there already"]
    twice = int(numbers.get("deduplicated_bytes", 0))
    return ", ".join([*words, *([f"{size_text(twice)} saved as they occur more than once"] if twice else [])])


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
