# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Variables of an inventory that nothing reads. Ansible says nothing of them, and a default is used in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ansible_collections.airgap.xinference.plugins.module_utils.server.fields import suggestion

from .findings import WARNING, Finding

COLLECTION = Path(__file__).parents[2]
READ_IN = ("roles/*/defaults/*.yml", "roles/*/vars/*.yml", "playbooks/*.yml", "playbooks/tasks/*.yml")
VARIABLE = re.compile(r"\bxinference_[a-z0-9_]+")


@cache
def known_variables() -> frozenset[str]:
    """Every variable that roles and playbooks of this collection read."""
    texts = (path.read_text(encoding="utf-8") for pattern in READ_IN for path in COLLECTION.glob(pattern))
    return frozenset(word for text in texts for word in VARIABLE.findall(text))


def judge_variables(names: Iterable[str]) -> list[Finding]:
    """A warning for each of `names` that looks like one of ours and is read nowhere."""
    strangers = sorted(name for name in names if VARIABLE.fullmatch(name) and name not in known_variables())
    cure = "correct its name, or take it out"
    return [
        Finding("variables", "", f"nothing reads {name}{suggestion(name, known_variables())}", cure, WARNING)
        for name in strangers
    ]
