# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Counting, and the lines that tell about it."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils.progress import Progress, counts, percent, totals

MIB = 1024 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds: int, rate: int, total: int, interval: float = 5.0) -> list[str]:
    """The lines about something that goes on for so long at so many bytes a second."""
    clock = Clock()
    lines: list[str] = []
    progress = Progress("site1", total, lines.append, interval, clock)
    for _second in range(seconds):
        clock.now += 1
        progress.add(rate)
    return lines


def test_what_is_quick_says_nothing():
    assert lines_of(4, 100, 400) == []


def test_what_takes_long_says_ten_lines_and_not_a_thousand():
    assert len(lines_of(600, 100, 60000)) == 10
    assert lines_of(600, 100, 60000)[0] == "site1: 500 B of 58.6 KiB (0 %), 100 B/s, 9 min 55 s left"


def test_what_takes_very_long_says_a_line_a_minute():
    assert len(lines_of(3600, 1, 10**9)) == pytest.approx(60, abs=1)


def test_many_hosts_say_less_each():
    class Many:
        interval = 100.0
        lines: list[str] = []

        def __call__(self, line: str) -> None:
            self.lines.append(line)

    clock, many = Clock(), Many()
    progress = Progress("site1", 300, many, clock=clock)
    for _second in range(300):
        clock.now += 1
        progress.add(1)
    assert len(many.lines) == 3


def test_the_rate_is_that_of_the_last_seconds():
    clock = Clock()
    progress = Progress("site1", 10**6, print, 1e9, clock)
    for _second in range(60):
        clock.now += 1
        progress.add(1000)
    assert progress.rate == pytest.approx(1000, rel=0.1)
    for _second in range(12):
        clock.now += 1
        progress.add(10)
    assert progress.rate == pytest.approx(10, rel=0.1)


def test_who_shows_it_otherwise_gets_no_lines():
    class Shown:
        watched: list[Progress] = []

        def watch(self, progress: Progress) -> bool:
            self.watched.append(progress)
            return True

        def __call__(self, line: str) -> None:
            raise AssertionError(line)

    clock, shown = Clock(), Shown()
    progress = Progress("site1", 1000, shown, clock=clock)
    clock.now = 100
    progress.add(10)
    assert shown.watched == [progress] and progress.done == 10


def test_what_is_verified_is_told():
    clock = Clock()
    lines: list[str] = []
    progress = Progress("site1", 900, lines.append, 1, clock)
    progress.hashing("models/bge-m3: weights.bin")
    clock.now = 2
    progress.add(450)
    progress.hashing(None)
    clock.now = 4
    progress.add(450)
    assert lines == [
        "site1: 450 B of 900 B (50 %), 225 B/s, 2.0 s left, verifying models/bge-m3: weights.bin",
        "site1: 900 B of 900 B (100 %), 225 B/s",
    ]


def test_nothing_of_nothing_is_everything():
    assert percent(0, 0) == 100 and counts(0, 0, 0.0) == "0 B of 0 B (100 %), 0 B/s"


@pytest.mark.parametrize(
    ("numbers", "seconds", "line"),
    [
        (
            {"sent_bytes": 90 * MIB, "skipped_bytes": 0},
            2,
            "90.0 MiB sent in 2.0 s (45.0 MiB/s), 0 B were there already",
        ),
        (
            {"sent_bytes": MIB, "from_peers_bytes": 3 * MIB, "skipped_bytes": 5 * MIB, "deduplicated_bytes": MIB},
            4,
            "1.0 MiB sent in 4.0 s (1.0 MiB/s), 3.0 MiB of other hosts, 5.0 MiB were there already, "
            "1.0 MiB saved as they occur more than once",
        ),
        ({}, 0, "0 B sent in 0.0 s, 0 B were there already"),
    ],
)
def test_totals_are_for_people(numbers, seconds, line):
    assert totals(numbers, seconds) == line
