# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A few of the faults of tests/faults/shipping.py, with random seeds; `make ship-faults` tries all of them, repeatedly.

Those that other tests provoke already (a killed controller, a full disk, a peer that lies) are left to them.
"""

from __future__ import annotations

import os
import random
from typing import Iterator

import pytest
from faults.shipping import FAULTS, Lab, lab, try_once

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server and the testbed need root")


@pytest.fixture(scope="module")
def place() -> Iterator[Lab]:
    with lab() as made:
        yield made


@pytest.mark.parametrize(
    "name",
    [
        "connection killed",
        "bit flipped on the wire",
        "bit flipped behind ssh",
        "bit flipped in a partial",
        "bit flipped in a committed blob",
        "host rebooted",
        "two controllers",
    ],
)
def test_the_next_run_completes_and_sends_no_more_than_was_lost(name: str, place: Lab) -> None:
    seed = random.SystemRandom().randrange(10**6)
    problem = try_once(place, FAULTS[name], seed)
    assert problem is None, f"{problem}\nAgain: python tests/faults/shipping.py --only '{name}' --tries 1 --seed {seed}"
