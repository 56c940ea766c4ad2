# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A few of the faults of tests/faults/model_faults.py on one host; `make faults` tries all of them, on all servers."""

from __future__ import annotations

import os
import random

import pytest
from faults.keeping import try_once
from faults.kept_host import KeptHost
from faults.model_faults import FAULTS

from .conftest import Carried
from .hosts import Testbed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the testbed needs root")
REFUSES_S = 20.0


@pytest.fixture(scope="module")
def kept(bare: Testbed, carried: Carried, tmp_path_factory: pytest.TempPathFactory) -> KeptHost:
    made = KeptHost("docker", "4.1.0", bare, tmp_path_factory.mktemp("kept"))
    made.host = bare.hosts["gpu-1"]
    made.variables.update(carried.variables)
    made.begin()
    return made


@pytest.mark.parametrize("name", ["server killed", "keeper and Ansible", "API refuses"])
def test_every_model_is_back_once_and_nobody_elses_touched(name: str, kept: KeptHost) -> None:
    seed = random.SystemRandom().randrange(10**6)
    seconds, problem = try_once(kept, FAULTS[name], seed, REFUSES_S)
    assert seconds is not None, (
        f"{problem}\nAgain: make faults FAULT='{name}' BACKEND=docker SERVER=4.1.0 TRIES=1 SEED={seed}"
    )
