# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a model that does not stay up is left alone."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_backoff as backoff
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_backoff import Trouble, delay


def test_the_wait_doubles_up_to_a_limit_and_never_overflows():
    waits = [delay(failures, "m") for failures in (1, 2, 3, 4, 8, 9, 31, 10**6)]
    plain = [5, 10, 20, 40, 640, 900, 900, 900]
    assert all(0.8 * one <= wait <= 1.2 * one for one, wait in zip(plain, waits))
    assert delay(0, "m") == 0


def test_two_models_and_two_failures_do_not_try_in_step():
    assert len({round(delay(9, uid), 3) for uid in "abcdefgh"}) == 8
    assert delay(9, "a") != delay(10, "a") and delay(9, "a") == delay(9, "a")


def test_what_does_not_heal_by_itself_is_tried_seldom():
    assert 48 <= delay(1, "m", heals=False) <= 72
    assert 2880 <= delay(40, "m", heals=False) <= 4320


def test_failures_in_a_row_add_up_and_hold_the_model_back():
    one = backoff.failed(Trouble(), "k", 100.0, "m", "out of memory")
    assert (one.failures, one.reason) == (1, "out of memory")
    assert not one.due("k", 100.0) and one.due("k", one.until)
    two = backoff.failed(one, "k", 200.0, "m", "again")
    assert two.failures == 2 and two.until - 200 > one.until - 100


def test_another_entry_or_release_is_tried_at_once_and_begins_anew():
    old = Trouble("k", 12, 10_000.0, "x")
    assert old.due("other", 0.0)
    assert backoff.failed(old, "other", 0.0, "m", "y").failures == 1


@pytest.mark.parametrize("seconds, failures", [(0, 3), (backoff.PROVEN - 1, 3), (backoff.PROVEN, 0)])
def test_a_model_that_served_for_a_while_is_forgiven(seconds, failures):
    assert backoff.served(Trouble("k", 3, 5.0, "x"), seconds).failures == failures


def test_nobody_without_failures_waits():
    assert Trouble().due("", 0.0) and Trouble().due("k", 0.0)
