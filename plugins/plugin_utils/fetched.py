# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the blobs that a host fetches from others while it is shipped to, as its receiver tells it."""

from __future__ import annotations

import re
from typing import Iterable, Mapping, Sequence

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import Step

from .fanout import Source
from .feeding import Tally

WHY = 1000
"""Characters of a reason that are kept; it comes from a host."""


class Fetched:
    """The blobs that a host fetches from others: how far it got, and who gave or refused them."""

    def __init__(self, steps: Iterable[Step], sources: Mapping[str, Sequence[Source]]) -> None:
        self._sources = sources
        self._reached = {step.digest: step.offset for step in steps if step.digest in sources}
        self._sizes = {step.digest: step.size for step in steps if step.digest in sources}

    def more(self, digest: str, reached: int) -> int:
        """Bytes that are new when `reached` of a blob are there; none of one that is not fetched."""
        before = self._reached.get(digest)
        if before is None:
            return 0
        self._reached[digest] = max(before, min(reached, self._sizes[digest]))
        return self._reached[digest] - before

    def given(self, digest: str, source: str, tally: Tally) -> None:
        """A blob is complete, and the last of it came from `source`."""
        for host in {each.host for each in self._sources.get(digest, ()) if _place(each) == source}:
            if host not in tally.peers:
                tally.peers.append(host)

    def refused(self, digest: str, offset: int, why: str, tally: Tally) -> int | None:
        """A blob does not come as planned; the bytes to be sent that nobody counted on, None for one not fetched."""
        reached = self._reached.pop(digest, None)
        if reached is None and digest not in self._sources:
            return None
        why = why[:WHY]
        for source in self._sources[digest]:
            # Not the first digits of a longer port.
            why = re.sub(rf"{re.escape(_place(source))}(?![0-9])", f"{source.host} ({_place(source)})", why)
        tally.refused[why] = tally.refused.get(why, 0) + 1
        return None if reached is None else max(0, reached - offset)


def _place(source: Source) -> str:
    """A source as the receiver calls it."""
    return f"{source.address}:{source.port}"
