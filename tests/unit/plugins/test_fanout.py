# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of who gets what from whom: complete, without circles, and one bundle from the controller."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Dict, List, Mapping, Optional, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils.fanout import DEGREE, DIRECT, Member, in_turn, sources

BLOBS = {f"sha256:{number:064x}": 1000 + 7 * number for number in range(40)}
Plans = Dict[str, Dict[str, List[str]]]


def member(name: str, missing: Mapping[str, int] = BLOBS, has: Tuple[str, ...] = (), listens: bool = True) -> Member:
    return Member(missing, has, (f"address-{name}", 4000) if listens else None)


def fleet(count: int, **more: Member) -> Dict[str, Member]:
    return {**{f"h{number:03}": member(f"h{number:03}") for number in range(count)}, **more}


def plans(members: Mapping[str, Member], forks: int = 100) -> Plans:
    """What every host finds out for itself."""
    return {
        host: {digest: [source.host for source in found] for digest, found in sources(members, host, forks).items()}
        for host in members
    }


def from_controller(members: Mapping[str, Member], made: Plans) -> float:
    """Bundles that leave the controller when every host gets from its first choice."""
    sent = sum(
        size for host, each in members.items() for digest, size in each.missing.items() if digest not in made[host]
    )
    return sent / sum(BLOBS.values())


def path(made: Plans, host: str, digest: str, choice: int) -> List[str]:
    """The hosts a blob comes through, when each takes it from the first, or always from the last, of its sources."""
    found = [host]
    while made[found[-1]].get(digest):
        found.append(made[found[-1]][digest][choice])
        assert len(found) <= len(made), f"a circle: {found}"
    return found


@pytest.mark.parametrize("count", [2, 3, 8, 50, 200])
@pytest.mark.parametrize("forks", [1, 5, 100])
def test_about_one_bundle_leaves_the_controller(count: int, forks: int) -> None:
    members = fleet(count)
    made = plans(members, forks)
    assert 1 <= from_controller(members, made) <= 1 + DIRECT
    for choice in (0, -1):
        for host in members:
            for digest in BLOBS:
                path(made, host, digest, choice)


@pytest.mark.parametrize("count", [8, 50, 200])
def test_nobody_passes_on_much_more_than_it_gets_and_the_tree_is_flat(count: int) -> None:
    made = plans(fleet(count), forks=count)
    size = sum(BLOBS.values())
    given: Counter[str] = Counter()
    for plan in made.values():
        for digest, found in plan.items():
            given[found[0]] += BLOBS[digest]
    assert max(given.values()) <= 1.6 * size
    depth = max(len(path(made, host, digest, 0)) for host in made for digest in BLOBS)
    assert depth <= count.bit_length() + 1
    per_blob = Counter((found[0], digest) for plan in made.values() for digest, found in plan.items())
    assert max(per_blob.values()) <= DEGREE


def test_two_hosts_begin_at_once() -> None:
    made = plans(fleet(8))
    first = Counter(host for digest in BLOBS for host in made if digest not in made[host])
    roots = [host for host, count in first.items() if count > 15]
    assert len(roots) == 2


@pytest.mark.parametrize("forks", [1, 3, 5, 20])
def test_with_few_forks_those_above_are_never_later_than_the_same_round(forks: int) -> None:
    members = fleet(60)
    place = {host: number for number, host in enumerate(members)}
    for host, plan in plans(members, forks).items():
        for found in plan.values():
            for source in found:
                assert place[source] < max(place[host], forks)


def test_those_that_have_a_blob_come_first_and_the_controller_sends_nothing() -> None:
    members = fleet(20, z1=member("z1", {}, tuple(BLOBS)), z2=member("z2", {}, tuple(BLOBS)))
    made = plans(members)
    assert from_controller(members, made) <= DIRECT
    given = Counter(found[0] for plan in made.values() for digest, found in plan.items() if digest == in_turn(BLOBS)[0])
    assert (given["z1"], given["z2"]) == (DEGREE, DEGREE)
    assert made["z1"] == {}


def test_hosts_lack_different_things() -> None:
    half = dict(list(BLOBS.items())[:20])
    rest = dict(list(BLOBS.items())[20:])
    members = {
        "a": member("a", half, tuple(rest)),
        "b": member("b"),
        "c": member("c", rest, tuple(half)),
        "d": member("d"),
    }
    made = plans(members)
    for digest in in_turn(BLOBS)[:30]:
        holder = "a" if digest in rest else "c"
        assert made["b"][digest][-1] == holder and holder in path(made, "d", digest, 0)
    assert from_controller(members, made) <= DIRECT


def test_who_does_not_listen_only_takes() -> None:
    members = fleet(6)
    for host in ("h000", "h003", "h004"):
        members[host] = member(host, listens=False)
    made = plans(members)
    givers = {source for plan in made.values() for found in plan.values() for source in found}
    assert givers <= {"h001", "h002", "h005"} and len(givers) == 3
    assert from_controller(members, made) <= 1 + DIRECT
    assert made["h000"] and made["h003"]


def test_nobody_listens() -> None:
    assert plans({host: member(host, listens=False) for host in "ab"}) == {"a": {}, "b": {}}


def test_one_that_lacks_something_alone_has_nobody_to_ask() -> None:
    assert plans({"a": member("a"), "b": member("b", {})}) == {"a": {}, "b": {}}


def test_a_source_says_where_it_listens_and_there_are_few() -> None:
    found = sources(fleet(100), "h099", 100)
    assert {len(each) for each in found.values()} <= {2, 3}
    source = next(iter(found.values()))[0]
    assert (source.address, source.port) == (f"address-{source.host}", 4000)


def test_every_process_plans_the_same_whatever_the_objects() -> None:
    members = fleet(12)
    copies = {host: Member(dict(each.missing), tuple(each.has), each.peer) for host, each in members.items()}
    assert plans(members) == plans(copies)


def test_small_blobs_are_not_worth_a_request() -> None:
    blobs = {**{f"sha256:{number:064x}": 50 for number in range(100)}, f"sha256:{'f' * 64}": 10_000_000}
    members = {host: member(host, blobs) for host in "abcd"}
    assert all(list(sources(members, host, 9)) in ([], [f"sha256:{'f' * 64}"]) for host in members)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_state_of_a_fleet_there_are_no_circles(seed: int) -> None:
    chance = random.Random(seed)
    members: Dict[str, Member] = {}
    for number in range(chance.randint(1, 25)):
        missing = {digest: size for digest, size in BLOBS.items() if chance.random() < 0.5}
        has = tuple(digest for digest in BLOBS if digest not in missing and chance.random() < 0.7)
        members[f"h{number}"] = member(f"h{number}", missing, has, chance.random() < 0.8)
    made = plans(members, chance.randint(1, 10))
    for host, plan in made.items():
        for digest, found in plan.items():
            assert digest in members[host].missing and host not in found
            assert len(found) == len(set(found)) and all(members[source].peer for source in found)
            for source in found:
                assert digest in members[source].has or digest in members[source].missing
            for choice in (0, -1):
                path(made, host, digest, choice)
    # A blob that somebody has and passes on does not leave the controller, but for the small ones.
    held = {digest for each in members.values() if each.peer for digest in each.has}
    waiting = sum(1 for each in members.values() if each.missing)
    wanted: Dict[str, int] = {}
    for each in members.values():
        wanted.update(each.missing)
    direct = sum(
        size for host, each in members.items() for d, size in each.missing.items() if d in held and d not in made[host]
    )
    assert not waiting or direct <= DIRECT * sum(wanted.values())


def test_a_large_bundle_on_many_hosts_is_planned_at_once() -> None:
    blobs = {f"sha256:{number:064x}": 7_500_000 + number for number in range(40_000)}
    half = dict(list(blobs.items())[:20_000])
    has: Optional[Tuple[str, ...]] = ()
    peers = {f"h{number:03}": Member(half if number % 3 else blobs, has or (), ("a", 1)) for number in range(200)}
    began = time.process_time()
    assert len(sources(peers, "h199", 20)) > 18_000
    assert time.process_time() - began < 2
