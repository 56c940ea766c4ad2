# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writing volumes: each byte read once, each volume checkable by itself, nothing done twice, nothing half done."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import split as split_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import volumes as volumes_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle, BundleError, cache_dir
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.split import (
    SplitOutcome,
    split_bundle,
    volume_size,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.volume_dir import VolumeDir, read_base

MIB = 1024**2
SIZE, FILE = 4 * MIB, 2 * MIB
"""Limits that cut the sample bundle into several volumes, and its large files."""


def write_model(directory: Path, sizes: Dict[str, int], seed: int = 1) -> Path:
    """A model directory of random content."""
    source = random.Random(seed)
    for name, size in sizes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.getrandbits(8 * size + 8).to_bytes(size + 1, "big")[:size])
    return directory


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of a model with two large files and a few small ones, and tools."""
    model = write_model(
        tmp_path / "source/model", {"a.safetensors": 5 * MIB, "b.safetensors": 3 * MIB, "config.json": 700, "sub/x": 0}
    )
    tools = write_model(tmp_path / "source/tools", {f"t{number}": 1000 + number for number in range(50)}, 2)
    write_bundle(tmp_path / "bundle", [Request("models", "tiny", str(model)), Request("tools", "some", str(tools))])
    return tmp_path / "bundle"


def split(bundle: Path, place: Path, **more: Any) -> SplitOutcome:
    """Split the sample."""
    return split_bundle(bundle, place, more.pop("size", SIZE), more.pop("max_file", FILE), **more)


def tree(place: Path) -> Dict[str, Any]:
    """Content of every file below a directory."""
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def times(place: Path) -> Dict[str, int]:
    """When every file below a directory was written."""
    return {str(path): path.stat().st_mtime_ns for path in place.rglob("*")}


def joined_bytes(place: Path) -> Dict[str, bytes]:
    """Every blob on the volumes, put together by nothing but their lists."""
    blobs: Dict[str, bytearray] = {}
    for path in sorted(place.iterdir()):
        listed = json.loads((path / "volume.json").read_text())
        for number, piece in enumerate(listed["volumes"][listed["volume"] - 1], 1):
            with (path / f"pieces/{number:04}").open("rb") as file:
                for digest, start, length in piece:
                    blob = blobs.setdefault(digest, bytearray())
                    assert len(blob) == start
                    blob += file.read(length)
                assert file.read() == b""
    return {digest: bytes(content) for digest, content in blobs.items()}


def test_volumes_hold_every_blob_and_are_checked_by_sha256sum_alone(bundle: Path, tmp_path: Path) -> None:
    outcome = split(bundle, tmp_path / "out")
    opened = Bundle.open(bundle)
    manifests = {artifact.digest for artifact in opened.artifacts}
    names = [f"bundle-{number}-of-3" for number in (1, 2, 3)]
    assert outcome.changed and outcome.count == 3 and [row.title for row in outcome.volumes] == names
    assert [row.state for row in outcome.volumes] == ["written"] * 3
    assert outcome.volumes[0].artifacts == ("models/tiny", "tools/some") and outcome.volumes[2].artifacts == (
        "models/tiny",
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    blobs = joined_bytes(tmp_path / "out")
    assert set(blobs) == set(opened.blobs) - manifests
    assert all(opened.blob_path(digest).read_bytes() == content for digest, content in blobs.items())
    for name in names:
        volume = tmp_path / "out" / name
        assert sorted(path.name for path in volume.iterdir()) == [
            "SHA256SUMS",
            "index.json",
            "manifests",
            "pieces",
            "volume.json",
        ]
        checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=str(volume), stdout=subprocess.PIPE, check=True)
        files = [path for path in volume.rglob("*") if path.is_file()]
        assert checked.stdout.count(b": OK\n") == len(files) - 1
        assert sum(path.stat().st_size for path in files) <= SIZE
        assert max(path.stat().st_size for path in files) <= FILE
        assert (volume / "index.json").read_bytes() == (bundle / "index.json").read_bytes()
    largest = max(sum(p.stat().st_size for p in (tmp_path / "out" / name).rglob("*") if p.is_file()) for name in names)
    assert largest > 0.7 * SIZE


def test_every_byte_is_hashed_once_and_a_second_run_reads_none(bundle: Path, tmp_path: Path) -> None:
    first = split(bundle, tmp_path / "out")
    carried = sum(map(len, joined_bytes(tmp_path / "out").values()))
    assert first.hashed_bytes == carried == first.copied_bytes + first.linked_bytes
    before = times(tmp_path / "out")
    again = split(bundle, tmp_path / "out")
    assert (again.changed, again.hashed_bytes, again.copied_bytes, again.linked_bytes) == (False, 0, 0, 0)
    assert [row.state for row in again.volumes] == ["there already"] * 3 and again.before == again.after
    assert times(tmp_path / "out") == before and again.set == first.set


def test_whole_files_are_linked_where_that_is_possible(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes_module, "SMALL", MIB)
    monkeypatch.setattr(split_module, "free_bytes", lambda _path: MIB)
    outcome = split(bundle, tmp_path / "out", size=64 * MIB, max_file=0)
    assert outcome.linked_bytes == 8 * MIB and outcome.copied_bytes == outcome.hashed_bytes < MIB
    large = Bundle.open(bundle).artifacts[0].files[0]
    assert (tmp_path / "out/bundle-1-of-1/pieces/0002").samefile(bundle / "blobs/sha256" / large.digest[7:])
    monkeypatch.setattr(os, "link", refuse_link)
    monkeypatch.setattr(split_module, "free_bytes", lambda _path: 9 * MIB)
    assert split(bundle, tmp_path / "copied", size=64 * MIB, max_file=0).copied_bytes > 8 * MIB
    assert tree(tmp_path / "copied") == tree(tmp_path / "out")


def refuse_link(*_paths: Any) -> None:
    """A file system that knows no second names."""
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_split_is_the_same_wherever_and_whenever_it_is_made(bundle: Path, tmp_path: Path) -> None:
    split(bundle, tmp_path / "one")
    shutil.rmtree(str(cache_dir(bundle)))
    outcome = split(bundle, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    parts = 8 * MIB
    assert outcome.hashed_bytes == outcome.copied_bytes + parts


def test_check_mode_writes_nothing_and_tells_what_would_be(bundle: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    outcome = split(bundle, tmp_path / "out", check=True)
    after = {path: content for path, content in tree(tmp_path).items() if not path.endswith(".lock")}
    assert outcome.changed and {path: before[path] for path in after} == after
    assert [row.state for row in outcome.volumes] == ["to write"] * 3 and outcome.before == []
    assert outcome.after[0].startswith("bundle-1-of-3 ") and "pieces" in outcome.after[0]
    split(bundle, tmp_path / "out")
    again = split(bundle, tmp_path / "out", check=True)
    assert not again.changed and again.before == again.after == outcome.after


class Killed(Exception):
    """The process ended here."""


def test_a_run_that_was_cut_goes_on_at_the_piece_where_it_was_cut(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = split(bundle, tmp_path / "whole")
    honest = split_module._Splitter._copy
    calls: List[int] = []

    def dying(self: Any, piece: Any, target: Path) -> Any:
        calls.append(1)
        if len(calls) == 4:
            target.write_bytes(b"half")
            raise Killed
        return honest(self, piece, target)

    monkeypatch.setattr(split_module._Splitter, "_copy", dying)
    with pytest.raises(Killed):
        split(bundle, tmp_path / "out")
    monkeypatch.undo()
    unfinished = sorted(path.name for path in (tmp_path / "out").iterdir() if not (path / "volume.json").exists())
    assert unfinished == ["bundle-2-of-3"] and (tmp_path / "out/bundle-2-of-3/unfinished").read_text() == whole.set
    again = split(bundle, tmp_path / "out")
    assert 0 < again.copied_bytes < whole.copied_bytes
    assert [row.state for row in again.volumes] == ["there already", "written", "written"]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_another_split_left_unfinished_is_not_believed(bundle: Path, tmp_path: Path) -> None:
    split(bundle, tmp_path / "whole")
    split(bundle, tmp_path / "out")
    volume = tmp_path / "out/bundle-2-of-3"
    (volume / "volume.json").unlink()
    (volume / "unfinished").write_text("sha256:" + "0" * 64)
    (volume / "pieces/0001").write_bytes((volume / "pieces/0002").read_bytes())
    (volume / "pieces/0099").write_bytes(b"of a larger set")
    Stamps(cache_dir(bundle) / "volumes.json").digest_of(volume / "pieces/0001")
    assert split(bundle, tmp_path / "out").changed
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone", "index", "sums", "list"])
def test_a_finished_volume_that_was_damaged_is_mended_where_it_is_bad(bundle: Path, tmp_path: Path, harm: str) -> None:
    first = split(bundle, tmp_path / "out")
    sound = tree(tmp_path / "out")
    volume = tmp_path / "out/bundle-2-of-3"
    piece = volume / "pieces/0002"
    size = piece.stat().st_size
    if harm == "changed":
        piece.write_bytes(b"\0" * size)
    elif harm == "shorter":
        os.truncate(str(piece), size // 2)
    elif harm == "gone":
        piece.unlink()
    else:
        name = {"index": "index.json", "sums": "SHA256SUMS", "list": "volume.json"}[harm]
        (volume / name).write_bytes(b"{}")
    again = split(bundle, tmp_path / "out")
    assert again.changed and tree(tmp_path / "out") == sound
    assert again.copied_bytes == (
        size if harm in ("changed", "shorter", "gone") else 0 if harm != "list" else again.copied_bytes
    )
    assert again.copied_bytes < first.copied_bytes


def test_without_stamps_finished_volumes_are_read_once_and_believed_again(bundle: Path, tmp_path: Path) -> None:
    split(bundle, tmp_path / "out")
    (cache_dir(bundle) / "volumes.json").unlink()
    pieces = sum(path.stat().st_size for path in (tmp_path / "out").glob("*/pieces/*"))
    again = split(bundle, tmp_path / "out")
    assert (again.changed, again.hashed_bytes, again.copied_bytes) == (False, pieces, 0)
    assert split(bundle, tmp_path / "out").hashed_bytes == 0


def test_volumes_can_be_written_one_by_one_to_different_sticks(bundle: Path, tmp_path: Path) -> None:
    split(bundle, tmp_path / "whole")
    for number in (3, 1, 2):
        outcome = split(bundle, tmp_path / f"stick{number}", numbers=[number])
        assert [row.title for row in outcome.volumes] == [f"bundle-{number}-of-3"] and outcome.count == 3
        (volume,) = (tmp_path / f"stick{number}").iterdir()
        assert tree(volume) == tree(tmp_path / "whole" / volume.name)
    with pytest.raises(BundleError, match="no volume 0, 4: the bundle takes 3 of this size"):
        split(bundle, tmp_path / "out", numbers=[4, 0])


def test_volumes_of_another_set_are_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    split(bundle, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(BundleError, match="Nothing was written") as caught:
        split(bundle, tmp_path / "out", size=8 * MIB)
    assert len(caught.value.problems) == 3 and "is a volume of something else" in caught.value.problems[0]
    assert tree(tmp_path / "out") == before
    outcome = split(bundle, tmp_path / "out", size=8 * MIB, name="other")
    assert [row.title for row in outcome.volumes] == ["other-1-of-2", "other-2-of-2"]


def test_nor_where_the_stick_takes_two_names_for_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(bundle, tmp_path / "out", name="Bundle")
    for number in (1, 2, 3):
        # As FAT has it, which lists it in the letters of the first and opens it by any.
        (tmp_path / f"out/Bundle-{number}-of-3").rename(tmp_path / f"out/bundle-{number}-of-3")
    before = tree(tmp_path / "out")
    monkeypatch.setattr(Path, "glob", lambda _self, _pattern: iter(()))
    with pytest.raises(BundleError, match="is a volume of something else"):
        split(bundle, tmp_path / "out")
    monkeypatch.undo()
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("thing", ["file", "link", "link inside"])
def test_what_is_in_the_way_is_neither_followed_nor_removed(bundle: Path, tmp_path: Path, thing: str) -> None:
    way = tmp_path / "out/bundle-1-of-3"
    (tmp_path / "elsewhere").mkdir()
    way.parent.mkdir()
    if thing == "file":
        way.write_text("mine")
    elif thing == "link":
        way.symlink_to(tmp_path / "elsewhere")
    else:
        way.mkdir()
        (way / "pieces").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a volume of something else"):
        split(bundle, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_too_little_disk_is_told_in_numbers_before_anything_is_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_module, "free_bytes", lambda _path: 7 * MIB // 2)
    with pytest.raises(BundleError, match=r"needs 8\.1 MiB more for 3 volumes and has 3\.5 MiB free"):
        split(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert split(bundle, tmp_path / "out", numbers=[3]).changed
    monkeypatch.setattr(split_module, "free_bytes", lambda _path: 0)
    assert not split(bundle, tmp_path / "out", numbers=[3]).changed


def test_a_place_for_stamps_that_cannot_be_written_is_named(bundle: Path, tmp_path: Path) -> None:
    shutil.rmtree(str(cache_dir(bundle)), ignore_errors=True)
    cache_dir(bundle).write_text("in the way, as a read-only medium would be")
    with pytest.raises(
        BundleError, match=r"bundle\.cache/build\.lock cannot be written: .* xinference_bundle_cache_dir"
    ):
        split(bundle, tmp_path / "out")
    assert split(bundle, tmp_path / "out", cache=tmp_path / "cache").changed


def test_volumes_inside_the_bundle_and_of_no_size_are_refused(bundle: Path) -> None:
    for place in (bundle, bundle / "volumes"):
        with pytest.raises(BundleError, match="cannot lie inside the bundle"):
            split(bundle, place)
    with pytest.raises(BundleError, match="are too small"):
        split(bundle, bundle.parent / "out", size=1000)
    assert not (bundle / "volumes").exists() and not (bundle.parent / "out").exists()


@pytest.mark.parametrize("stamped", [True, False])
def test_damaged_blobs_are_named_and_what_is_sound_is_written(bundle: Path, tmp_path: Path, stamped: bool) -> None:
    opened = Bundle.open(bundle)
    tiny, some = opened.artifacts
    large, small = tiny.files[0], some.files[7]
    assert large.path == "a.safetensors"
    for file in (large, small):
        path = opened.blob_path(file.digest)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    if not stamped:
        shutil.rmtree(str(cache_dir(bundle)))
    with pytest.raises(BundleError, match="is damaged; copy it again") as caught:
        split(bundle, tmp_path / "out")
    assert len(caught.value.problems) == 2
    assert (
        "models/tiny: a.safetensors" in caught.value.problems[0]
        and f"tools/some: {small.path}" in caught.value.problems[1]
    )
    finished = [path.name for path in (tmp_path / "out").iterdir() if (path / "volume.json").exists()]
    assert "bundle-1-of-3" not in finished
    before = tree(tmp_path / "out")
    with pytest.raises(BundleError):
        split(bundle, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_bundle_that_lies_is_not_split(bundle: Path, tmp_path: Path) -> None:
    Bundle.open(bundle).blob_path(Bundle.open(bundle).artifacts[0].files[0].digest).unlink()
    with pytest.raises(BundleError, match="cannot be used"):
        split(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- differential -----------------------------------------------------------------------------------------------------


@pytest.fixture
def later(tmp_path: Path, bundle: Path) -> Path:
    """A later bundle: one large file of the model is another, and there is one more model."""
    shutil.copytree(str(tmp_path / "source/model"), str(tmp_path / "source/model2"))
    write_model(tmp_path / "source/model2", {"b.safetensors": 3 * MIB}, 9)
    more = write_model(tmp_path / "source/more", {"w.gguf": MIB}, 10)
    requests = [Request("models", "tiny", str(tmp_path / "source/model2")), Request("models", "more", str(more))]
    write_bundle(tmp_path / "later", [*requests, Request("tools", "some", str(tmp_path / "source/tools"))])
    return tmp_path / "later"


def test_a_differential_set_has_only_what_the_earlier_bundle_lacks(bundle: Path, later: Path, tmp_path: Path) -> None:
    outcome = split(later, tmp_path / "out", base=bundle)
    new = set(Bundle.open(later).blobs) - set(Bundle.open(bundle).blobs)
    manifests = {artifact.digest for artifact in Bundle.open(later).artifacts}
    assert set(joined_bytes(tmp_path / "out")) == new - manifests
    assert outcome.omitted_bytes > 5 * MIB and outcome.copied_bytes < 4.2 * MIB
    assert {name for row in outcome.volumes for name in row.artifacts} == {"models/tiny", "models/more"}


def test_the_earlier_bundle_may_be_its_lists_or_any_of_its_volumes(bundle: Path, later: Path, tmp_path: Path) -> None:
    split(bundle, tmp_path / "earlier")
    lists = tmp_path / "lists"
    (lists / "blobs/sha256").mkdir(parents=True)
    shutil.copy(str(bundle / "index.json"), str(lists))
    for artifact in Bundle.open(bundle).artifacts:
        shutil.copy(str(bundle / "blobs/sha256" / artifact.digest[7:]), str(lists / "blobs/sha256"))
    volume = tmp_path / "kept"
    volume.mkdir()
    for name in ("volume.json", "index.json", "manifests"):
        shutil.copy(str(tmp_path / "earlier/bundle-2-of-3" / name), str(volume))
    bases = [bundle, lists, lists / "index.json", tmp_path / "earlier/bundle-3-of-3", volume]
    found = {read_base(base) for base in bases}
    assert len(found) == 1
    outcomes = {split(later, tmp_path / f"out{at}", base=base).set for at, base in enumerate(bases)}
    assert len(outcomes) == 1


def test_an_earlier_bundle_that_cannot_be_read_is_refused_with_all_reasons(
    bundle: Path, later: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(str(bundle), str(tmp_path / "bare"))
    for artifact in Bundle.open(bundle).artifacts:
        (tmp_path / "bare/blobs/sha256" / artifact.digest[7:]).unlink()
    split(bundle, tmp_path / "earlier")
    damaged = tmp_path / "earlier/bundle-1-of-3"
    (damaged / "manifests").write_bytes(b"x")
    for base, count in ((tmp_path / "empty", 1), (tmp_path / "none", 1), (tmp_path / "bare", 2), (damaged, 1)):
        with pytest.raises(BundleError, match=r"The earlier bundle .* cannot be used") as caught:
            split(later, tmp_path / "out", base=base)
        assert len(caught.value.problems) == count
    assert not (tmp_path / "out").exists()


def test_nothing_new_is_one_volume_of_lists(bundle: Path, tmp_path: Path) -> None:
    outcome = split(bundle, tmp_path / "out", base=bundle)
    assert outcome.count == 1 and outcome.copied_bytes == 0 and outcome.volumes[0].artifacts == ()
    volume = VolumeDir.read(tmp_path / "out/bundle-1-of-1")
    assert volume.listed.pieces == () and volume.listed.set.base is not None
    problems: List[str] = []
    assert len(volume.contents(problems).artifacts) == 2 and problems == []


@pytest.mark.parametrize(("text", "size"), [("29G", 29 << 30), ("5000000000", 5000000000), ("100K", 100 << 10)])
def test_a_volume_has_the_size_that_is_written(text: str, size: int) -> None:
    assert volume_size(text) == size


@pytest.mark.parametrize("text", ["29", " 29 ", "4700", "4.7"])
def test_a_size_without_its_unit_is_told(text: str) -> None:
    number = text.strip()
    with pytest.raises(ValueError, match=rf"{number} without a unit means \d+ bytes.* Write {number}G for"):
        volume_size(text)
