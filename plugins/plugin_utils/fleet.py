# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that are shipped to together, as each of them sees the others."""

from __future__ import annotations

from typing import Iterable, Mapping

from .credential import Run
from .fanout import Source, sources
from .notes import Notes


class Fleet:
    """The others from which one host may get what it lacks; `hosts` are all of them in the order of the inventory."""

    def __init__(self, host: str, hosts: Iterable[str] = (), forks: int = 1) -> None:
        self._host, self._hosts, self._forks = host, list(hosts), forks
        self._run = Run()
        self._notes = Notes(self._run)

    def wait(self, missing: Mapping[str, int], passing: Iterable[str], counted: Mapping[str, int]) -> None:
        """Note what the host lacks, sizes in bytes by digest; those `passing` leave its store soon after they came.

        `counted` is what was done for it already.
        """
        self._notes.missing(self._host, missing, passing, counted)

    def counted(self) -> dict[str, int]:
        """What was done for the host before it was put off; nothing when it was not, or is shipped to alone."""
        return self._notes.counted(self._host) if self._hosts else {}

    def complete(self) -> None:
        """Note that the host lacks nothing."""
        self._notes.missing(self._host, {})

    @property
    def waiting(self) -> int:
        """How many of the hosts lack something."""
        return len(self._notes.waiting(self._hosts))

    def sources(self) -> dict[str, list[Source]]:
        """Where the host is to get blobs first; what is not named comes from the controller."""
        members = self._notes.members(self._hosts)
        return sources(members, self._host, self._forks) if self._host in members else {}

    def credential(self) -> str:
        """What the hosts know each other by."""
        return self._run.credential()


def refusals(refused: Mapping[str, int]) -> list[dict[str, object]]:
    """Why blobs came from the controller after all, as a result tells it: the most frequent reason first."""
    ordered = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return [{"why": why, "blobs": count} for why, count in ordered]


def refusal_text(refused: Mapping[str, int]) -> str:
    """One line about them."""
    rows = refusals(refused)
    rest = sum(refused.values()) - refused[str(rows[0]["why"])]
    more = f" (and {'another reason' if len(rows) == 2 else 'other reasons'} for {rest})" if rest else ""
    return f"{sum(refused.values())} blobs came from the controller instead of other hosts: {rows[0]['why']}{more}"
