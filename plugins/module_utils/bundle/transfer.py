# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What has to travel to a host, as pure data.

Shipping is the difference between two sets of digests. `transfer_plan` computes it; `batches` and `runs` say how the
blobs of a plan are best handed to a transport that pays for every file it is given.
"""

from __future__ import annotations

from typing import Iterable, Mapping, NamedTuple

SMALL = 8 * 1024 * 1024
"""Bytes: smaller blobs travel together in one archive where every single transfer costs a round trip or more."""
BATCH = 64 * 1024 * 1024
"""Bytes one archive of small blobs may hold: enough to make round trips cheap, little enough to send again."""

KEEP, ADOPT, RESUME, SEND = "keep", "adopt", "resume", "send"


class Step(NamedTuple):
    """What to do about one blob.

    `keep`: the host has it. `adopt`: all its bytes are on the host and only need to be verified. `resume`: the first
    `offset` bytes are there. `send`: nothing useful is there.
    """

    action: str
    digest: str
    size: int
    offset: int = 0

    @property
    def travels(self) -> int:
        """Bytes that have to be sent for this step."""
        return self.size - self.offset if self.action in (RESUME, SEND) else 0


def transfer_plan(wanted: Mapping[str, int], present: Iterable[str], partial: Mapping[str, int]) -> list[Step]:
    """The steps that make every blob of `wanted` (digest: size in bytes) present, in the order of `wanted`.

    `present` are digests the host vouches for, `partial` the bytes it has of blobs that are not finished. A partial
    longer than the blob is worth nothing. Nothing is said about blobs nobody wants.
    """
    there = set(present)
    return [_step(digest, size, digest in there, partial.get(digest)) for digest, size in wanted.items()]


def _step(digest: str, size: int, present: bool, got: int | None) -> Step:
    if present:
        return Step(KEEP, digest, size)
    if got == size:
        return Step(ADOPT, digest, size, size)
    if got is not None and 0 < got < size:
        return Step(RESUME, digest, size, got)
    return Step(SEND, digest, size)


def travelling(steps: Iterable[Step]) -> list[Step]:
    """The steps for which a transport is needed."""
    return [step for step in steps if step.action in (RESUME, SEND)]


def batches(steps: Iterable[Step], small: int = SMALL, limit: int = BATCH) -> list[list[Step]]:
    """Group steps for a transport that pays per file: large blobs alone, small ones together up to `limit` bytes.

    A resumed blob is always alone. A group of one needs no archive. The order within and between groups is kept as
    far as grouping allows, so that a cut transfer is continued where it was.
    """
    groups: list[list[Step]] = []
    group: list[Step] = []
    held = 0
    for step in steps:
        if step.size >= small or step.action == RESUME:
            groups.append([step])
            continue
        if group and held + step.size > limit:
            groups.append(group)
            group, held = [], 0
        group.append(step)
        held += step.size
    if group:
        groups.append(group)
    return groups


def largest_pack(steps: Iterable[Step]) -> int:
    """Bytes of the largest archive of small blobs; it is there twice while the host takes them out."""
    return max((sum(step.size for step in group) for group in batches(steps) if len(group) > 1), default=0)
