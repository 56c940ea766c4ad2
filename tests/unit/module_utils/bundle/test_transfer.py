# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What travels to a host, from what it has."""

from __future__ import annotations

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import (
    ADOPT,
    KEEP,
    RESUME,
    SEND,
    Step,
    batches,
    transfer_plan,
    travelling,
)


def test_every_wanted_blob_gets_the_cheapest_step_that_makes_it_present():
    wanted = {"a": 10, "b": 10, "c": 10, "d": 10, "e": 10, "f": 0, "g": 0}
    steps = transfer_plan(wanted, {"a", "nobody wants this"}, {"b": 10, "c": 4, "d": 11, "f": 0, "other": 5})
    assert steps == [
        Step(KEEP, "a", 10),
        Step(ADOPT, "b", 10, 10),
        Step(RESUME, "c", 10, 4),
        Step(SEND, "d", 10),
        Step(SEND, "e", 10),
        Step(ADOPT, "f", 0, 0),
        Step(SEND, "g", 0),
    ]
    assert [step.travels for step in steps] == [0, 0, 6, 10, 10, 0, 0]
    assert [step.digest for step in travelling(steps)] == ["c", "d", "e", "g"]


def test_what_is_present_is_not_looked_at_again_even_with_a_partial():
    assert transfer_plan({"a": 5}, ["a"], {"a": 3}) == [Step(KEEP, "a", 5)]


def test_nothing_wanted_is_nothing_to_do():
    assert transfer_plan({}, {"a"}, {"b": 1}) == []


def test_small_blobs_travel_together_and_large_ones_alone():
    steps = [Step(SEND, "s1", 3), Step(SEND, "L", 100), Step(SEND, "s2", 3), Step(SEND, "s3", 5), Step(SEND, "s4", 1)]
    names = [[step.digest for step in group] for group in batches(steps, small=10, limit=8)]
    assert names == [["L"], ["s1", "s2"], ["s3", "s4"]]


def test_a_blob_that_was_begun_is_never_packed():
    steps = [Step(SEND, "a", 1), Step(RESUME, "b", 3, 2), Step(SEND, "c", 1)]
    assert [[step.digest for step in group] for group in batches(steps)] == [["b"], ["a", "c"]]


def test_forty_thousand_blobs_are_planned_at_once():
    wanted = {f"sha256:{number:064x}": 8_000_000 for number in range(40_000)}
    steps = transfer_plan(wanted, (), {})
    assert len(steps) == 40_000 and sum(len(group) for group in batches(steps)) == 40_000
