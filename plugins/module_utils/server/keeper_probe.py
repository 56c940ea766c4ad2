# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether what is listed also answers: one probe now and then, in a thread, because a model may take minutes.

A model that answered before, and of which the server says now, and again, that its process is gone, has to be launched
anew though it is listed as ready. One that answers late, or otherwise than expected, is only told of.
"""

from __future__ import annotations

import re
import threading
from typing import Any, Dict, Mapping, Optional, Sequence

from .client import Client
from .keeper_book import Book
from .keeper_release import Release
from .keeper_state import short
from .probe import ProbeResult, probe

AGAIN = 30.0
DEAD = (
    "remote server",
    "actor not exist",
    "actornotexist",
    "is closed",
)
# The server answers, and nobody behind it.
DESERTED = re.compile(r" with 5\d\d: .*\[errno 111\]", re.DOTALL)
# This is said of whatever name the request gave, which need not be the model's.
UNKNOWN = r"model not found.*\buid: {uid}(?:-(?:rep)?\d+)?(?![\w.-])"


class Prober:
    """Sends probes, one at a time."""

    def __init__(self, book: Book, clock: Any) -> None:
        self.book, self.clock = book, clock
        self.at: Dict[str, float] = {}
        """When each model is asked next; one that is not in here is asked at once."""
        self.asked: Dict[str, float] = {}
        self._asking: Optional[_Asking] = None

    @property
    def busy(self) -> bool:
        """Whether a probe is under way."""
        return self._asking is not None

    def turn(
        self,
        client: Client,
        release: Release,
        running: Sequence[str],
        free: bool,
        at_most: Optional[float] = None,
    ) -> None:
        """Hear of the probe under way; send the next when one of the `running` models is due, if `free`.

        Each is asked as often as the release says, or every `at_most` seconds where that is more often.
        """
        if self._asking is not None:
            if self._asking.result is not None:
                uid, result, self._asking = self._asking.uid, self._asking.result, None
                self._take(uid, result, client.features.ends_the_dead)
            return
        now, ready_at = self.clock.steady(), self.book.ready_at
        every = release.settings.verify
        if not free or every <= 0:
            return
        if at_most is not None:
            every = min(every, at_most)
        due = [uid for uid in running if self._next(uid, ready_at.get(uid, now), every) <= now]
        if due:
            uid = min(due, key=lambda one: self.asked.get(one, 0.0))
            self.asked[uid], self.at[uid] = now, now + every
            self._asking = _Asking(client, uid, release.entry(uid))

    def _next(self, uid: str, ready_at: float, every: float) -> float:
        """When a model is asked next: at once after it began to serve, then every so often."""
        asked = self.asked.get(uid)
        return ready_at if asked is None or asked < ready_at else min(self.at.get(uid, 0.0), asked + every)

    def _take(self, uid: str, result: ProbeResult, relaunch: bool) -> None:
        model = self.book.state.models.get(uid)
        if model is None or result.state == "skipped":
            return
        before = model.verified or {}
        model.verified = {
            "at": round(self.clock.now(), 1),
            "ok": result.ok,
            "detail": short(result.detail if result.ok else result.error),
            "latency_s": result.latency_s,
        }
        if before.get("ok") is not result.ok:
            self.book.say(f"{uid}: answers" if result.ok else f"{uid}: does not pass its probe: {short(result.error)}")
        if result.ok:
            self.book.dead.discard(uid)
            self.book.relaunch.discard(uid)
        if result.ok or uid not in self.book.ready_at:
            return
        self.at[uid] = self.clock.steady() + AGAIN
        if before.get("ok") is False and _is_dead(uid, result.error):
            if uid not in self.book.dead:
                self.book.dead.add(uid)
                self.book.fell(uid, f"listed, but dead: {result.error}", self.book.ready_at[uid])
            # Also after a launch that could not end it. An older server starts it anew itself, and cannot be asked to
            # end it without harm.
            if relaunch:
                self.book.relaunch.add(uid)


def _is_dead(uid: str, error: str) -> bool:
    """Whether an error says that nothing is behind a model that is listed."""
    said = error.lower()
    known = any(word in said for word in DEAD) or DESERTED.search(said) is not None
    return known or re.search(UNKNOWN.format(uid=re.escape(uid)), error, re.IGNORECASE | re.DOTALL) is not None


class _Asking:
    """One probe under way."""

    def __init__(self, client: Client, uid: str, entry: Mapping[str, Any]) -> None:
        self.uid = uid
        self.result: Optional[ProbeResult] = None

        def ask() -> None:
            try:
                self.result = probe(client, entry)
            except Exception as bug:
                self.result = ProbeResult("skipped", detail=f"{type(bug).__name__}: {bug}")

        threading.Thread(target=ask, name=f"probe {uid}", daemon=True).start()
