# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why something failed, from what was said: a lookup in the table of known failures (`failures`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from .failures import ROWS


@dataclass(frozen=True)
class Diagnosis:
    """Why something failed and what to do about it, in one sentence or two each. `name` is the row of the table.

    `heals` is whether it may pass by itself, so that the same is worth another try soon.
    """

    cause: str
    cure: str
    name: str = ""
    heals: bool = False


def diagnose(text: str) -> Optional[Diagnosis]:
    """Cause and cure of an error text or the end of a log, None when it is not known."""
    for row in ROWS:
        match = row.pattern.search(text)
        if match:
            names = {name: value or "" for name, value in match.groupdict().items()}
            names.update(row.more(match) if row.more else {})
            return Diagnosis(row.cause.format(**names), row.cure.format(**names), row.name, row.heals)
    return None
