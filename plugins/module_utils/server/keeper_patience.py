# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the launch of one model keeps another from coming back. No requests and no files.

Xinference starts a model's process only after all that it started before have answered it (xoscar announces every new
pool to the others). A process that hangs while it loads does not answer, and so nothing that died comes back, neither
by the keeper's launch nor by the server's own. Then the launch that hangs is given up until the others serve, once for
each of them: where that did not help, it was not the cause.

Times are seconds of one steady clock.
"""

from __future__ import annotations

from typing import Collection, Dict, List, Tuple

# A launch that takes longer may hang.
LONG = 60.0
# A model that served before may be gone for so long while the launch of another takes long.
STARVED = 120.0


class Patience:
    """Remembers since when models are missed, and since when others are being launched."""

    def __init__(self) -> None:
        self.missed: Dict[str, float] = {}
        self.launched: Dict[str, float] = {}
        self.given_up: Dict[Tuple[str, str], float] = {}
        """For each launch that was given up for a model that is missed still, when that was."""

    def see(self, missed: Collection[str], launching: Collection[str], now: float) -> None:
        """Take down which models served before and do not, and which are being launched."""
        self.missed = {uid: self.missed.get(uid, now) for uid in missed}
        self.launched = {uid: self.launched.get(uid, now) for uid in launching}
        self.given_up = {pair: at for pair, at in self.given_up.items() if pair[1] in self.missed}

    def hangs(self, served: Collection[str], now: float) -> List[Tuple[str, str]]:
        """Launches to be given up, each with a model that it keeps from coming back.

        `served` are the models that have ever served. One that has not comes after those that have; among those that
        have, what began long before the other was missed.
        """
        found: Dict[str, str] = {}
        for uid, began in self.launched.items():
            for other, since in self.missed.items():
                late = uid not in served or began <= since - LONG
                long = now - began >= LONG and now - since >= STARVED
                if uid != other and late and long and (uid, other) not in self.given_up:
                    found.setdefault(uid, other)
        return sorted(found.items())

    def give_up(self, uid: str, now: float) -> None:
        """Take down that the launch of a model was given up for all that are missed."""
        self.given_up.update({(uid, other): now for other in self.missed if other != uid})

    def waits(self, uid: str, now: float) -> bool:
        """Whether a launch that was given up is not to be tried again yet."""
        return any(one == uid and now - at < STARVED for (one, _other), at in self.given_up.items())
