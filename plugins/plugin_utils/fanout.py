# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who gets which blob from whom, so that each leaves the controller about once however many hosts want it. Pure.

The hosts that a blob passes through form a tree: on top those that have it, or else one host that gets it from the
controller; every host passes it on to two others. There are two such trees, and a host that passes on in one takes only
in the other, so nobody sends much more than it gets. Nobody waits for the end of a blob: it goes down the tree while it
arrives, so the depth costs moments, and the time is that of one host.

Ansible runs as many hosts at a time as it has forks, in the order of the inventory. So whoever passes on in the second
tree comes from the first that run; after them, both follow the inventory, and those above are there before those below.

Every process computes the plan for its own host, all from the same data.
"""

from __future__ import annotations

from typing import Collection, Iterable, Mapping, NamedTuple

DEGREE = 2
"""Hosts one host passes a blob on to."""
TREES = 2
NEAR = 2
"""Hosts straight above that are tried before the top of the tree; then comes the controller."""
DIRECT = 0.05
"""Share of a bundle that may leave the controller once more, in small blobs that are not worth a request each."""


class Source(NamedTuple):
    """A host that passes blobs on, and where it listens."""

    host: str
    address: str
    port: int


class Member(NamedTuple):
    """What is known of a host that takes part.

    `missing` are sizes in bytes by digest, `has` digests others may lack; both may be shared by members that are alike,
    which makes planning quicker. `peer` is where it listens, if it does.
    """

    missing: Mapping[str, int]
    has: Collection[str]
    peer: tuple[str, int] | None


def sources(members: Mapping[str, Member], host: str, forks: int) -> dict[str, list[Source]]:
    """Where `host` gets the blobs it lacks, first choice first; what is not named comes from the controller.

    `members` are in the order of the inventory. Nobody is among its own sources, directly or through others.
    """
    alike = _alike(members)
    blobs = _union(member.missing for member in alike)
    waiting = sum(1 for member in members.values() if member.missing)
    direct = _direct(blobs, waiting)
    trees = _trees(blobs)
    mine = members[host].missing
    lines: dict[tuple[tuple[int, ...], tuple[int, ...], int], list[Source]] = {}
    found = {}
    for digest in blobs:
        if digest not in mine or digest in direct:
            continue
        lack = tuple(number for number, member in enumerate(alike) if digest in member.missing)
        have = tuple(number for number, member in enumerate(alike) if number not in lack and digest in member.has)
        key = (lack, have, trees[digest])
        if key not in lines:
            lines[key] = _above(members, alike, key, host, forks)
        if lines[key]:
            found[digest] = lines[key]
    return found


def in_turn(digests: Mapping[str, int]) -> list[str]:
    """Blobs in the order in which every host gets them, so that nobody waits for what others leave for later."""
    return sorted(digests, key=lambda digest: (-digests[digest], digest))


def _alike(members: Mapping[str, Member]) -> list[Member]:
    """One member for all that miss and have the very same."""
    return list({(id(member.missing), id(member.has)): member for member in members.values()}.values())


def _union(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Every blob that somebody lacks, in turn."""
    blobs: dict[str, int] = {}
    for part in parts:
        blobs.update(part)
    return {digest: blobs[digest] for digest in in_turn(blobs)}


def _direct(blobs: Mapping[str, int], waiting: int) -> set[str]:
    """The smallest blobs, as many as may go to every host from the controller."""
    left = DIRECT * sum(blobs.values()) / max(1, waiting)
    found = set()
    for digest in reversed(list(blobs)):
        left -= blobs[digest]
        if left < 0:
            break
        found.add(digest)
    return found


def _trees(blobs: Mapping[str, int]) -> dict[str, int]:
    """The tree of each blob, so that the trees carry about the same number of bytes."""
    carried = [0] * TREES
    found = {}
    for digest, size in blobs.items():
        tree = carried.index(min(carried))
        carried[tree] += size
        found[digest] = tree
    return found


def _above(
    members: Mapping[str, Member],
    alike: list[Member],
    key: tuple[tuple[int, ...], tuple[int, ...], int],
    host: str,
    forks: int,
) -> list[Source]:
    """The hosts above one in the tree of some blobs, the nearest first."""
    lack, have, tree = key
    kinds = {(id(member.missing), id(member.has)): number for number, member in enumerate(alike)}
    kind = {name: kinds[id(member.missing), id(member.has)] for name, member in members.items()}
    holders = [name for name, member in members.items() if kind[name] in have and member.peer]
    passing = [name for name, member in members.items() if kind[name] in lack and member.peer]
    taking = [name for name, member in members.items() if kind[name] in lack and not member.peer]
    if tree % TREES:
        first = min(max(1, forks), len(passing))
        passing = [*reversed(passing[:first]), *passing[first:]]
    line = holders + passing
    tops = max(1, len(holders))
    if host in passing:
        above = _parents(line.index(host), tops)
    elif line:
        # Nobody can get it from this one, so it goes below any of the others.
        place = taking.index(host) % len(line)
        above = [place, *_parents(place, tops)]
    else:
        above = []
    chosen = list(dict.fromkeys([*above[:NEAR], *above[-1:]]))
    found = ((line[place], members[line[place]].peer) for place in chosen)
    return [Source(name, *peer) for name, peer in found if peer]


def _parents(place: int, tops: int) -> list[int]:
    """The places above one in a line of which the first `tops` have nobody above them."""
    found = []
    while place >= tops:
        below = place - tops
        place = below % tops if below < DEGREE * tops else tops + (below - DEGREE * tops) // DEGREE
        found.append(place)
    return found
