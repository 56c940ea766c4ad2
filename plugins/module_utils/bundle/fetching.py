# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Threads of the receiver that get blobs from other hosts, in the order in which the controller names them.

The bytes go the same way as those from the controller: appended, hashed behind, admitted. Whatever goes wrong with a
peer ends in a refusal with the offset that was reached, and the controller sends the rest.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

from . import frames
from .peer import STALL, Credential, Peer, PeerError

if TYPE_CHECKING:
    from .receive import Arrival

THREADS = 4
"""Blobs fetched at a time: enough that small ones do not wait for each other's answers."""


class Intake(Protocol):
    """What a receiver does with blobs (`Receiver`)."""

    def arrive(self, digest: str, size: int, offset: int, source: str) -> Arrival | None:
        """A blob is about to come."""

    def take(self, arrival: Arrival, data: memoryview) -> None:
        """Bytes have come."""

    def leave(self, arrival: Arrival, why: str) -> None:
        """No more comes."""

    def refuse(self, digest: str, offset: int, why: str) -> None:
        """It does not come."""

    def fail(self, error: Exception) -> None:
        """The session is over."""


class Fetchers:
    """Fetches blobs side by side. A peer that cannot be reached is asked once and not again."""

    def __init__(self, intake: Intake, credential: str | None, stall: float = STALL, threads: int = THREADS) -> None:
        self._intake = intake
        self._problem = "there is no credential to fetch with"
        self._credential: Credential | None = None
        try:
            self._credential = Credential(credential) if credential else None
        except ValueError as error:
            self._problem = str(error)
        self._stall = stall
        self._limit = threads
        self._threads: list[threading.Thread] = []
        self._queue: deque[frames.Fetch] = deque()
        self._changed = threading.Condition()
        self._idle = 0
        self._stopped = False
        self._gone: dict[tuple[str, int], str] = {}

    def add(self, command: frames.Fetch) -> None:
        """Fetch one more, after those that were named before."""
        if self._credential is None:
            self._intake.refuse(command.digest, command.offset, self._problem)
            return
        with self._changed:
            self._queue.append(command)
            self._changed.notify()
            if not self._idle and len(self._threads) < self._limit:
                self._threads.append(threading.Thread(target=self._work, args=(self._credential,), daemon=True))
                self._threads[-1].start()

    def stop(self) -> None:
        """Fetch nothing more. A thread that waits for a peer is not waited for."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self, credential: Credential) -> None:
        peers: dict[tuple[str, int], Peer] = {}
        try:
            while True:
                with self._changed:
                    self._idle += 1
                    while not self._queue and not self._stopped:
                        self._changed.wait()
                    self._idle -= 1
                    if self._stopped:
                        return
                    command = self._queue.popleft()
                for place in command.sources:
                    peers.setdefault(place, Peer(*place, credential, self._stall))
                self._fetch(command, peers)
        except Exception as error:  # a thread has nobody above it to tell
            if not self._stopped:
                self._intake.fail(error)
        finally:
            for peer in peers.values():
                peer.close()

    def _fetch(self, command: frames.Fetch, peers: dict[tuple[str, int], Peer]) -> None:
        """Get a blob from the first of its sources that gives it, or what is left of it from the next."""
        arrival: Arrival | None = None
        reasons = []
        for place in command.sources:
            name = _name(place)
            if place in self._gone:
                reasons.append(f"{name} {self._gone[place]}")
                continue
            if arrival is None:
                arrival = self._intake.arrive(command.digest, command.size, command.offset, name)
                if arrival is None:
                    return
            arrival.source = name
            try:
                for chunk in peers[place].fetch(command.digest, arrival.got, command.size):
                    if self._stopped:
                        return
                    self._intake.take(arrival, memoryview(chunk))
                return
            except PeerError as error:
                reasons.append(f"{name} {error}")
                if error.gone:
                    self._gone[place] = str(error)
        why = "; ".join(reasons)
        if arrival is None:
            self._intake.refuse(command.digest, command.offset, why)
        else:
            self._intake.leave(arrival, why)


def _name(place: tuple[str, int]) -> str:
    """A source as it stands in answers."""
    return f"{place[0]}:{place[1]}"
