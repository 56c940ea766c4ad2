# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a support archive comes to the controller whole, whatever Ansible blots out of the result."""

from __future__ import annotations

import base64
import random

import pytest
from ansible.module_utils.common.parameters import remove_values
from ansible_collections.airgap.xinference.plugins.modules import xinference_collect

CONTENT = random.Random(1).randbytes(1 << 20)


@pytest.mark.parametrize("hide", [["gw1x"], ["gw1x", "a longer text"], []])
def test_a_text_to_hide_does_not_damage_the_archive_by_chance(hide: list[str]) -> None:
    plain = base64.b64encode(CONTENT).decode()
    hide = [*hide, *([plain[1000:1004]] if hide else [])]
    assert not hide or remove_values(plain, hide) != plain
    carried = remove_values(xinference_collect.packed(CONTENT, hide), hide)
    assert base64.b64decode(carried) == CONTENT
