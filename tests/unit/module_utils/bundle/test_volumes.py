# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Planning volumes: every byte once, nothing too large for its stick, and lists that lie are not believed."""

from __future__ import annotations

import json
import random
from typing import Any, Callable, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.documents import DocumentError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import Artifact, Blob
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import bytes_of
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.volumes import (
    CLUSTER,
    FAT32_FILE,
    MAX_VOLUMES,
    SMALL,
    Limits,
    Part,
    Piece,
    VolumeList,
    VolumeSet,
    cut,
    piece_path,
    piece_size,
    plan_problems,
    plan_volumes,
    read_list,
    shares,
)

GIB = 1024**3
INDEX, MANIFESTS = Blob(hash_bytes(b"index"), 5000), Blob(hash_bytes(b"manifests"), 70_000)


def digest(number: int) -> str:
    """Some digest."""
    return hash_bytes(str(number).encode())


def covered(volumes: List[List[Piece]]) -> Dict[str, int]:
    """Bytes of each blob on volumes, after checking that they follow each other without gap or overlap."""
    ends: Dict[str, int] = {}
    for pieces in volumes:
        for piece in pieces:
            for part in piece:
                assert part.start == ends.get(part.digest, 0)
                ends[part.digest] = part.start + part.length
    return ends


@pytest.mark.parametrize("seed", range(40))
def test_every_byte_is_on_one_volume_and_nothing_is_too_large(seed: int) -> None:
    source = random.Random(seed)
    cluster = source.choice([1, 7, 64])
    small = source.randrange(cluster, 500)
    room = source.randrange(small + cluster, 5000)
    limits = Limits(room, source.randrange(max(small, cluster), 2 * room), small, source.randrange(1, room), cluster)
    sizes = [source.choice([0, 1, small - 1, small, source.randrange(1, 20_000)]) for _blob in range(60)]
    blobs = {digest(number): size for number, size in enumerate(sizes)}
    volumes = cut(blobs, limits)
    assert covered(volumes) == blobs
    for pieces in volumes:
        taken = [-(-piece_size(piece) // cluster) * cluster for piece in pieces]
        assert sum(taken) <= room and all(len(piece) > 0 for piece in pieces)
        assert all(piece_size(piece) <= limits.file for piece in pieces)
        assert all(len(piece) == 1 or all(part.length < small for part in piece) for piece in pieces)
    assert all(volumes) or not any(sizes)
    assert cut(blobs, limits) == volumes


def test_a_volume_is_filled_before_the_next_begins() -> None:
    volumes = cut({digest(1): 250, digest(2): 50}, Limits(100, 1000, 10, 100, 10))
    assert [[tuple(piece[0][1:]) for piece in pieces] for pieces in volumes] == [
        [(0, 100)],
        [(100, 100)],
        [(200, 50), (0, 50)],
    ]


def test_no_scrap_of_a_large_blob_is_left_at_the_end_of_a_volume() -> None:
    volumes = cut({digest(1): 95, digest(2): 95}, Limits(100, 1000, 10, 100, 1))
    assert [[piece_size(piece) for piece in pieces] for pieces in volumes] == [[95], [95]]


def test_nothing_to_carry_is_one_volume_all_the_same() -> None:
    assert cut({}, Limits(100, 100, 10, 10, 1)) == [[]]
    with pytest.raises(ValueError, match="no small blob"):
        cut({}, Limits(100, 100, 101, 10, 1))


def test_files_stay_below_what_fat32_can_hold() -> None:
    blobs = {digest(1): 10 * GIB, digest(2): FAT32_FILE, digest(3): FAT32_FILE + 1, digest(4): 3 * GIB}
    (pieces,) = plan_volumes("b", INDEX, MANIFESTS, blobs, 64 * GIB, FAT32_FILE).volumes
    sizes = [piece_size(piece) for piece in pieces]
    assert max(sizes) <= FAT32_FILE and len(sizes) == 7 and sizes[3] == FAT32_FILE
    (pieces,) = plan_volumes("b", INDEX, MANIFESTS, blobs, 64 * GIB).volumes
    assert [piece_size(piece) for piece in pieces] == list(blobs.values())


def test_volumes_have_room_for_their_lists_too() -> None:
    source = random.Random(5)
    blobs = {digest(number): source.randrange(200_000) for number in range(3000)}
    size = 32 * 1024**2
    planned = plan_volumes("b", INDEX, MANIFESTS, blobs, size, FAT32_FILE)
    for number in range(1, len(planned.volumes) + 1):
        listed = VolumeList(planned, number, tuple(digest(0) for _piece in planned.volumes[number - 1]))
        files = [len(listed.encode()), len(listed.sums()), INDEX.size, MANIFESTS.size]
        files += [piece_size(piece) for piece in listed.pieces]
        assert sum(-(-length // CLUSTER) * CLUSTER for length in files) <= size
    assert sum(blobs.values()) / (len(planned.volumes) * size) > 0.8


def test_forty_thousand_files_are_a_few_pieces_and_planned_at_once() -> None:
    blobs = {digest(number): 10_000 for number in range(40_000)}
    blobs.update({digest(-number): 5 * GIB for number in range(1, 60)})
    planned = plan_volumes("b", INDEX, Blob(digest(0), 12_000_000), blobs, bytes_of("29G"), FAT32_FILE)
    assert len(planned.volumes) == 11 and max(map(len, planned.volumes)) < 40
    assert planned.carried == blobs
    assert len(VolumeList(planned, 1, ()).encode()) < 5_000_000


@pytest.mark.parametrize(("size", "file"), [(1000, 0), (700_000, 0), (10**9, 1000), (-5, 0), (0, 0)])
def test_volumes_that_hold_nothing_but_their_lists_are_refused(size: int, file: int) -> None:
    with pytest.raises(BundleError, match=r"are too small: .* Make them .* or larger"):
        plan_volumes("b", INDEX, MANIFESTS, {digest(1): 100}, size, file)


def test_the_smallest_size_that_is_named_does() -> None:
    with pytest.raises(BundleError) as caught:
        plan_volumes("b", INDEX, MANIFESTS, {digest(1): 10**8}, 1000)
    least = str(caught.value).split("Make them ")[1].split(" or")[0]
    planned = plan_volumes("b", INDEX, MANIFESTS, {digest(1): 10**8}, int(bytes_of(least.replace(" ", "")) * 1.01))
    assert planned.carried == {digest(1): 10**8}


def test_too_many_volumes_and_a_name_that_is_none() -> None:
    with pytest.raises(BundleError, match=f"the limit is {MAX_VOLUMES}"):
        plan_volumes("b", INDEX, MANIFESTS, {digest(1): 10**12}, 100 * 1024**2)
    with pytest.raises(BundleError, match="is not a name"):
        plan_volumes("../b", INDEX, MANIFESTS, {}, GIB)


def test_names_sort_as_their_numbers_do() -> None:
    planned = VolumeSet("bundle", INDEX, MANIFESTS, None, ((),) * 12)
    titles = [planned.title(number) for number in range(1, 13)]
    assert titles[0] == "bundle-01-of-12" and titles == sorted(titles)
    assert VolumeSet("x", INDEX, MANIFESTS, None, ((),) * 3).title(2) == "x-2-of-3"
    assert piece_path(7) == "pieces/0007" and piece_path(12345) == "pieces/12345"


# --- lists ------------------------------------------------------------------------------------------------------------


def sample(number: int = 2) -> VolumeList:
    """The list of a volume of three."""
    blobs = {digest(1): 3 * SMALL, digest(2): 100, digest(3): 0}
    planned = plan_volumes("bundle", INDEX, MANIFESTS, blobs, 2 * SMALL, base=digest(9))
    return VolumeList(planned, number, tuple(digest(50 + at) for at in range(len(planned.volumes[number - 1]))))


def test_a_list_is_read_as_it_was_written() -> None:
    for number in (1, 2):
        assert read_list(sample(number).encode()) == sample(number)
    listed = sample()
    head = listed.encode().decode().splitlines()[1:5]
    assert head == [
        f'"set":"{listed.set.id}",',
        '"volume":2,',
        f'"of":{len(listed.set.volumes)},',
        '"format":"airgap.xinference.volume.v1",',
    ]
    assert listed.title == f"bundle-2-of-{len(listed.set.volumes)}"
    assert listed.set.bearers([digest(1)]).keys() == set(range(1, len(listed.set.volumes) + 1))
    assert listed.set.bearers([digest(2), digest(77)]) == {1: {digest(2)}}


def test_sums_are_what_sha256sum_reads() -> None:
    listed = sample()
    lines = listed.sums().decode().splitlines()
    assert lines[0] == f"{hash_bytes(listed.encode())[7:]}  volume.json"
    assert [line.split("  ")[1] for line in lines[1:]] == ["index.json", "manifests", "pieces/0001"]


def test_the_same_split_is_the_same_set_and_any_other_is_another() -> None:
    blobs = {digest(1): 3 * SMALL, digest(2): 100}
    plans = [
        plan_volumes("bundle", INDEX, MANIFESTS, blobs, 2 * SMALL),
        plan_volumes("bundle", INDEX, MANIFESTS, blobs, 3 * SMALL),
        plan_volumes("bundle", INDEX, MANIFESTS, blobs, 2 * SMALL, base=digest(9)),
        plan_volumes("other", INDEX, MANIFESTS, blobs, 2 * SMALL),
        plan_volumes("bundle", Blob(digest(0), 5), MANIFESTS, blobs, 2 * SMALL),
    ]
    assert len({plan.id for plan in plans}) == len(plans)
    assert plan_volumes("bundle", INDEX, MANIFESTS, dict(blobs), 2 * SMALL).id == plans[0].id


def lie(content: Dict[str, Any], change: Callable[[Dict[str, Any]], Any]) -> bytes:
    """A list after a change, with the set's digest made to fit, as a forger would."""
    change(content)
    try:
        honest = {key: content[key] for key in ("format", "name", "index", "manifests", "base", "volumes")}
        content["set"] = hash_bytes(
            json.dumps(honest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        )
    except (KeyError, ValueError):
        pass
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format="other"), "its format is not"),
        (lambda c: c.update(name="../../etc"), "is not a name"),
        (lambda c: c.pop("name"), "is not a name"),
        (lambda c: c.update(base="latest"), "base 'latest' is not a digest"),
        (lambda c: c.update(index=["x", 1]), "index"),
        (lambda c: c["index"].__setitem__(1, -1), "index"),
        (lambda c: c["index"].__setitem__(1, 2**40), "larger than any"),
        (lambda c: c.update(manifests=None), "manifests"),
        (lambda c: c["manifests"].__setitem__(1, 2**60), "larger than any"),
        (lambda c: c.update(volumes=[]), "is no plan"),
        (lambda c: c.update(volumes=[[]] * (MAX_VOLUMES + 1)), "is no plan"),
        (lambda c: c.update(volumes={"a": 1}), "is no plan"),
        (lambda c: c["volumes"].append(3), "is no list"),
        (lambda c: c["volumes"][0].append([]), "nothing in it"),
        (lambda c: c["volumes"][0].append([["sha256:../../x", 0, 1]]), "not a part of a blob"),
        (lambda c: c["volumes"][0].append([[digest(4), 0, -1]]), "not a part of a blob"),
        (lambda c: c["volumes"][0].append([[digest(4), -1, 1]]), "not a part of a blob"),
        (lambda c: c["volumes"][0].append([[digest(4), 0, 1.5]]), "not a part of a blob"),
        (lambda c: c["volumes"][0].append([[digest(4), False, True]]), "not a part of a blob"),
        (lambda c: c["volumes"][0].append([[digest(4), 0]]), "not a part of a blob"),
        (lambda c: c["volumes"][0].append([[digest(4), 5, 1]]), "byte 0 of"),
        (lambda c: c["volumes"][0].append([[digest(2), 0, 100]]), "twice or not at all"),
        (lambda c: c["volumes"][0].append([[digest(2), 50, 100]]), "twice or not at all"),
        (lambda c: c["volumes"][0].append([[digest(2), 101, 100]]), "twice or not at all"),
        (lambda c: c["volumes"][0].append([[digest(3), 0, 0]]), "twice or not at all"),
        (lambda c: c["volumes"][0].append([[digest(3), 0, 7]]), "twice or not at all"),
        (lambda c: c["volumes"][0].append([[digest(4), 0, 2**60]]), "larger than any blob"),
        (lambda c: c.update(volume=0), "does not exist"),
        (lambda c: c.update(volume=9), "does not exist"),
        (lambda c: c.update(volume=True), "does not exist"),
        (lambda c: c.update(of=99), "does not exist"),
        (lambda c: c.update(digests="abc"), "are none"),
        (lambda c: c.update(digests=["abc"]), "are none"),
        (lambda c: c.update(digests=[]), "not one for each piece"),
    ],
)
def test_a_list_that_lies_is_not_believed(change: Callable[[Dict[str, Any]], Any], words: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read_list(lie(json.loads(sample().encode()), change))
    assert words in str(caught.value) and len(str(caught.value)) < 300


def test_a_list_of_which_one_digit_changed_is_damaged() -> None:
    raw = sample().encode().replace(b"[[[", b"[[ [", 1)
    assert read_list(raw) == sample()
    with pytest.raises(DocumentError, match="not what the set's digest was made of"):
        read_list(sample().encode().replace(b",5000]", b",5001]"))
    for content in (b"", b"[]", b"{}", b"\0" * 100, b"[" * 100_000):
        with pytest.raises(DocumentError):
            read_list(content)


def test_a_plan_and_the_manifests_must_agree() -> None:
    listed = sample()
    blobs = tuple(Blob(name, size) for name, size in listed.set.carried.items())
    model = Artifact("models", "m", digest(8), 0, "", blobs=(Blob(digest(8), 4), *blobs))
    assert list(plan_problems(listed.set, [model])) == []
    less = Artifact("models", "m", digest(8), 0, "", blobs=(Blob(digest(1), 5),))
    found = list(plan_problems(listed.set, [less]))
    assert len(found) == 3 and sum("no artifact of the bundle has as a file" in line for line in found) == 2


def test_shares_name_artifacts_with_counts_and_sizes() -> None:
    model = Artifact(
        "models", "m", digest(0), 0, "", blobs=(Blob(digest(0), 4), Blob(digest(1), 1024), Blob(digest(2), 5))
    )
    tools = Artifact("tools", "t", digest(3), 0, "", blobs=(Blob(digest(3), 4), Blob(digest(4), 7)))
    assert [str(share) for share in shares([model, tools], [digest(0), digest(1)])] == [
        "models/m: 1 of 2 files, 1.0 KiB"
    ]
    assert shares([model, tools], []) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32G", 32 * GIB),
        ("32GiB", 32 * GIB),
        ("32GB", 32 * 10**9),
        (" 1.5 G ", GIB + GIB // 2),
        ("4294967295", FAT32_FILE),
        (FAT32_FILE, FAT32_FILE),
        ("700m", 700 * 1024**2),
        ("2T", 2 * 1024**4),
        ("512K", 524288),
        ("10B", 10),
        ("0", 0),
    ],
)
def test_sizes_as_people_write_them(text: Any, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "1,5G", "32 sticks", "0x10", "9" * 100, "1PB", "1GiBB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        bytes_of(text)


def test_parts_of_a_plan_are_tuples_so_that_plans_compare() -> None:
    assert sample().set.volumes[0][0][0] == Part(digest(2), 0, 100)
