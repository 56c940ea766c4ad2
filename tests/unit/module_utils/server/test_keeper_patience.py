# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When the launch of one model is given up for another."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_patience import LONG, STARVED, Patience


@pytest.fixture
def patience():
    """`big` is being launched since 1000."""
    found = Patience()
    found.see([], ["big"], 1000.0)
    return found


def test_one_that_takes_long_keeps_nobody_waiting_who_is_not_missed(patience):
    patience.see([], ["big"], 5000.0)
    assert patience.hangs(["small"], 5000.0) == []


def test_it_is_given_up_for_one_that_is_missed_for_long(patience):
    patience.see(["small"], ["big"], 1100.0)
    assert patience.hangs(["small"], 1100.0 + STARVED - 1) == []
    assert patience.hangs(["small"], 1100.0 + STARVED) == [("big", "small")]


def test_one_that_never_served_gives_way_also_when_both_were_launched_together(patience):
    patience.see(["small"], ["big", "small"], 1000.0)
    assert patience.hangs(["small"], 1000.0 + STARVED) == [("big", "small")]
    assert patience.hangs(["small", "big"], 1000.0 + STARVED) == [], "both served: neither is to blame"


def test_what_served_before_gives_way_where_it_began_long_before(patience):
    patience.see(["small", "big"], ["big", "small"], 1000.0 + LONG)
    assert patience.hangs(["small", "big"], 1000.0 + LONG + STARVED) == [("big", "small")]


def test_it_waits_until_the_other_is_back(patience):
    patience.see(["small"], ["big"], 1000.0)
    patience.give_up("big", 1200.0)
    patience.see(["small"], [], 1201.0)
    assert patience.waits("big", 1201.0) and not patience.waits("small", 1201.0)
    patience.see([], [], 1230.0)
    assert not patience.waits("big", 1230.0)


def test_it_is_not_given_up_twice_for_the_same(patience):
    patience.see(["small"], ["big"], 1000.0)
    patience.give_up("big", 1200.0)
    assert patience.waits("big", 1199.0 + STARVED) and not patience.waits("big", 1200.0 + STARVED)
    patience.see(["small"], ["big"], 2000.0)
    assert patience.hangs(["small"], 9000.0) == []
    patience.see([], ["big"], 9000.0)
    patience.see(["small"], ["big"], 9100.0)
    assert patience.hangs(["small"], 9100.0 + STARVED) == [("big", "small")], "this is another time"


def test_a_launch_that_ended_is_forgotten(patience):
    patience.see(["small"], [], 1100.0)
    patience.see(["small"], ["big"], 1110.0)
    assert patience.hangs(["small"], 1110.0 + LONG - 1) == []
