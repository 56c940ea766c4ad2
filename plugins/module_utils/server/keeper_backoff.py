# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a model that does not stay up is tried again. Pure: numbers in, numbers out.

Every failure doubles the wait, up to a limit, and shifts it by a share of its own, so that several models (and several
hosts) do not try in step. A model that stayed up for a while begins anew, and so does another entry or release.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FIRST = 5.0
LONGEST = 900.0
# What does not heal by itself (a misspelt name, a missing file) is looked at again, but seldom.
FIRST_HOPELESS = 60.0
LONGEST_HOPELESS = 3600.0
JITTER = 0.2
# A model that served this long has proven that it can; what ends it then is a new fault and not the old one.
PROVEN = 120.0


@dataclass(frozen=True)
class Trouble:
    """What a model has cost so far: `failures` in a row, `until` when it is left alone (seconds of a steady clock).

    `key` is what it was tried as; another key begins anew. `reason` is the last failure, in words.
    """

    key: str = ""
    failures: int = 0
    until: float = 0.0
    reason: str = ""

    def due(self, key: str, now: float) -> bool:
        """Whether it may be tried."""
        return self.key != key or now >= self.until


def delay(failures: int, seed: str, heals: bool = True) -> float:
    """Seconds to wait after so many failures in a row. `seed` is any text of the model's own."""
    if failures <= 0:
        return 0.0
    first, longest = (FIRST, LONGEST) if heals else (FIRST_HOPELESS, LONGEST_HOPELESS)
    wait = longest if failures > 30 else min(longest, first * 2.0 ** (failures - 1))
    share = int(hashlib.sha256(f"{seed} {failures}".encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return wait * (1 + JITTER * (2 * share - 1))


def failed(before: Trouble, key: str, now: float, seed: str, reason: str, heals: bool = True) -> Trouble:
    """After a launch that came to nothing, or a model that did not stay up for a while."""
    failures = (before.failures if before.key == key else 0) + 1
    return Trouble(key, failures, now + delay(failures, seed, heals), reason)


def served(before: Trouble, seconds: float) -> Trouble:
    """After a model has served so long."""
    return Trouble() if seconds >= PROVEN else before
