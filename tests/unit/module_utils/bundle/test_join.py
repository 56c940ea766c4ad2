# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Joining volumes: in any order, over any number of runs; nothing is believed, nothing good lost or read twice."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import join as join_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import pieces as pieces_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.documents import open_regular
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.join import JoinError, JoinOutcome, join_volumes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle, BundleError, cache_dir
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.lock import locked
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import REF_NAME
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.partials import Partial
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.split import split_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.volumes import Part

MIB = 1024**2
NAMES = [f"bundle-{number}-of-3" for number in (1, 2, 3)]


def write_files(directory: Path, sizes: Dict[str, int], seed: int) -> Path:
    """A directory of random content."""
    source = random.Random(seed)
    for name, size in sizes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.getrandbits(8 * size + 8).to_bytes(size + 1, "big")[:size])
    return directory


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles, the second with one file changed and one model more; volumes of the first and of the difference."""
    place = tmp_path_factory.mktemp("material")
    sizes = {"a.safetensors": 5 * MIB, "b.safetensors": 3 * MIB, "config.json": 700, "sub/empty": 0}
    model = write_files(place / "model", sizes, 1)
    tools = write_files(place / "tools", {f"t{number:02}": 1000 + number for number in range(50)}, 2)
    requests = [Request("models", "tiny", str(model)), Request("tools", "some", str(tools))]
    write_bundle(place / "bundle", requests)
    shutil.copytree(str(model), str(place / "model2"))
    write_files(place / "model2", {"b.safetensors": 3 * MIB}, 3)
    more = write_files(place / "more", {"w.gguf": MIB}, 4)
    requests = [Request("models", "tiny", str(place / "model2")), Request("models", "more", str(more)), requests[1]]
    write_bundle(place / "later", requests)
    split_bundle(place / "bundle", place / "out", 4 * MIB, 2 * MIB)
    split_bundle(place / "later", place / "difference", 4 * MIB, 2 * MIB, base=place / "bundle", name="difference")
    return place


@pytest.fixture
def volumes(material: Path, tmp_path: Path) -> Path:
    """The volumes of the first bundle, to be harmed."""
    shutil.copytree(str(material / "out"), str(tmp_path / "volumes"))
    return tmp_path / "volumes"


def same(bundle: Path, other: Path) -> bool:
    """Whether two bundles consist of the same bytes and of nothing else."""
    files = [sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()) for top in (bundle, other)]
    return files[0] == files[1] and all(
        (bundle / name).read_bytes() == (other / name).read_bytes() for name in files[0]
    )


def tree(place: Path) -> Dict[str, Any]:
    """Every file below a directory, with its time."""
    return {
        str(path.relative_to(place)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in place.rglob("*")
        if not path.is_dir()
    }


def states(outcome: JoinOutcome) -> List[str]:
    """The state of each volume."""
    return [row.state for row in outcome.volumes]


def test_all_volumes_make_the_bundle_and_a_second_run_reads_nothing(
    material: Path, volumes: Path, tmp_path: Path
) -> None:
    outcome = join_volumes(tmp_path / "site", [volumes])
    assert outcome.complete and outcome.changed and outcome.to_come == [] and outcome.lacking == []
    assert same(tmp_path / "site", material / "bundle") and states(outcome) == ["taken"] * 3
    pieces = sum(path.stat().st_size for path in volumes.glob("*/pieces/*"))
    assert outcome.joined_bytes == outcome.hashed_bytes == pieces
    assert Bundle.open(tmp_path / "site").artifacts == Bundle.open(material / "bundle").artifacts
    before = tree(tmp_path)
    again = join_volumes(tmp_path / "site", [volumes])
    assert (again.changed, again.complete, again.hashed_bytes, again.joined_bytes) == (False, True, 0, 0)
    assert tree(tmp_path) == before and again.before == again.after == outcome.after


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 2, 1], [2, 3, 1]])
def test_one_stick_after_another_in_any_order(material: Path, volumes: Path, tmp_path: Path, order: List[int]) -> None:
    site, stick = tmp_path / "site", tmp_path / "stick"
    for step, number in enumerate(order, 1):
        if stick.exists():
            shutil.rmtree(str(stick))
        stick.mkdir()
        shutil.move(str(volumes / NAMES[number - 1]), str(stick))
        outcome = join_volumes(site, [stick])
        assert outcome.changed and outcome.complete == (step == 3)
        assert outcome.to_come == [NAMES[left - 1] for left in sorted(order[step:])]
        again = join_volumes(site, [stick])
        assert (again.changed, again.hashed_bytes, again.joined_bytes) == (False, 0, 0)
        assert again.to_come == outcome.to_come and again.lacking == outcome.lacking
        if step < 3:
            assert any(line.startswith("models/tiny: ") for line in outcome.lacking)
            with pytest.raises(BundleError, match="go on with playbooks/join"):
                Bundle.open(site)
    assert same(site, material / "bundle")
    pieces = sum(path.stat().st_size for path in (material / "out").glob("*/pieces/*"))
    assert outcome.hashed_bytes <= pieces


def test_volumes_may_lie_here_and_there_be_named_themselves_and_come_twice(
    material: Path, volumes: Path, tmp_path: Path
) -> None:
    shutil.copytree(str(volumes / NAMES[1]), str(tmp_path / "copy of the second"))
    (volumes / NAMES[1] / "pieces/0002").write_bytes(b"x")
    (volumes / "lost+found").mkdir()
    (volumes / "readme.txt").write_text("not ours")
    outcome = join_volumes(tmp_path / "site", [volumes, volumes / NAMES[0], tmp_path / "copy of the second"])
    assert outcome.complete and same(tmp_path / "site", material / "bundle")


def test_check_mode_tells_what_would_happen_and_writes_nothing(volumes: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    outcome = join_volumes(tmp_path / "site", [volumes], check=True)
    assert outcome.changed and outcome.complete and outcome.before == [] and len(outcome.after) == 2
    assert outcome.hashed_bytes == 0 and tree(tmp_path) == before
    shutil.move(str(volumes / NAMES[1]), str(tmp_path))
    outcome = join_volumes(tmp_path / "site", [volumes], check=True)
    assert outcome.to_come == [NAMES[1]] and states(outcome) == ["taken", "to come", "taken"]
    real = join_volumes(tmp_path / "site", [volumes])
    assert (real.to_come, real.lacking, states(real), real.after) == (
        outcome.to_come,
        outcome.lacking,
        states(outcome),
        outcome.after,
    )
    assert "files joined)" in real.after[0]
    before = tree(tmp_path)
    assert not join_volumes(tmp_path / "site", [volumes], check=True).changed
    assert join_volumes(tmp_path / "site", [volumes, tmp_path / NAMES[1]], check=True).changed
    assert tree(tmp_path) == before
    join_volumes(tmp_path / "site", [volumes, tmp_path])
    assert not join_volumes(tmp_path / "site", [volumes], check=True).changed


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def pipe(path: Path) -> None:
    """Put a pipe in the place of a file."""
    path.unlink()
    os.mkfifo(str(path))


def folder(path: Path) -> None:
    """Put a directory in the place of a file."""
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    """Put a link in the place of a file."""
    path.unlink()
    path.symlink_to("/etc/passwd")


HARMS: Dict[str, Callable[[Path], Any]] = {
    "a bit of a part": lambda volume: flip(volume / "pieces/0002", 1000),
    "its last byte": lambda volume: flip(volume / "pieces/0001", -1),
    "cut": lambda volume: os.truncate(str(volume / "pieces/0002"), 5000),
    "empty": lambda volume: os.truncate(str(volume / "pieces/0001"), 0),
    "gone": lambda volume: (volume / "pieces/0002").unlink(),
    "all gone": lambda volume: shutil.rmtree(str(volume / "pieces")),
    "a directory": lambda volume: folder(volume / "pieces/0001"),
    "a link": lambda volume: link(volume / "pieces/0001"),
    "a pipe": lambda volume: pipe(volume / "pieces/0001"),
    "exchanged": lambda volume: (volume / "pieces/0001").write_bytes((volume / "pieces/0002").read_bytes()),
    "no list": lambda volume: (volume / "volume.json").unlink(),
    "a bad list": lambda volume: flip(volume / "volume.json", 300),
    "a list that is a pipe": lambda volume: pipe(volume / "volume.json"),
}


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("harm", sorted(HARMS))
def test_a_damaged_volume_is_named_and_only_it_is_read_again(
    material: Path, volumes: Path, tmp_path: Path, harm: str, number: int
) -> None:
    site, volume = tmp_path / "site", volumes / NAMES[number - 1]
    HARMS[harm](volume)
    with pytest.raises(JoinError) as caught:
        join_volumes(site, [volumes])
    told = "\n".join(caught.value.problems)
    assert NAMES[number - 1] in told and all(name not in told for name in NAMES if name != NAMES[number - 1])
    if "list" in harm:
        assert caught.value.details["to_come"] == [NAMES[number - 1]] and "volume.json" in told
    else:
        assert caught.value.details["to_come"] == [] and "pieces/" in told
    assert caught.value.details["lacking"] and caught.value.details["changed"]
    with pytest.raises(BundleError):
        Bundle.open(site)
    shutil.rmtree(str(volume))
    shutil.copytree(str(material / "out" / volume.name), str(volume))
    mended = join_volumes(site, [volume])
    assert mended.complete and same(site, material / "bundle")
    pieces = sum(path.stat().st_size for path in volume.glob("pieces/*"))
    large = 5 * MIB + 3 * MIB
    assert mended.hashed_bytes <= pieces + large


def test_a_damaged_row_of_small_files_loses_only_those_that_are_damaged(volumes: Path, tmp_path: Path) -> None:
    row = volumes / NAMES[0] / "pieces/0001"
    flip(row, row.stat().st_size - 500)
    with pytest.raises(JoinError) as caught:
        join_volumes(tmp_path / "site", [volumes])
    assert len(caught.value.problems) == 1 and "tools/some: 1 of 51 files" in caught.value.problems[0]
    assert caught.value.details["lacking"] == ["tools/some: 1 of 51 files, 1.0 KiB"]


def test_several_damaged_volumes_are_told_in_one_message(volumes: Path, tmp_path: Path) -> None:
    for name in NAMES:
        flip(volumes / name / "pieces/0001", 100)
    with pytest.raises(JoinError, match="what is right was taken") as caught:
        join_volumes(tmp_path / "site", [volumes])
    assert len(caught.value.problems) == 3
    assert all(name in problem for name, problem in zip(NAMES, caught.value.problems))


def test_a_stick_that_cannot_be_read_in_one_place(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = open_regular

    class Bad:
        """A file on a medium with a bad sector at its beginning."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, size: int) -> bytes:
            if self.file.tell() < 1000:
                raise OSError(errno.EIO, "Input/output error")
            return self.file.read(size)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_error: object) -> None:
            self.file.close()

    def bad(path: Any) -> Any:
        return Bad(honest(path)) if str(path).endswith("1-of-3/pieces/0001") else honest(path)

    monkeypatch.setattr(pieces_module, "open_regular", bad)
    with pytest.raises(JoinError) as caught:
        join_volumes(tmp_path / "site", [volumes])
    assert "cannot be read: Input/output error" in caught.value.problems[0] and len(caught.value.problems) == 1
    lost = sum(int(line.split(": ")[1].split(" of")[0]) for line in caught.value.details["lacking"])
    assert 0 < lost < 4
    monkeypatch.undo()
    assert join_volumes(tmp_path / "site", [volumes]).complete


def test_lists_damaged_on_one_volume_are_taken_from_another(material: Path, volumes: Path, tmp_path: Path) -> None:
    (volumes / NAMES[0] / "index.json").unlink()
    flip(volumes / NAMES[1] / "manifests", 50)
    assert join_volumes(tmp_path / "site", [volumes]).complete and same(tmp_path / "site", material / "bundle")
    flip(volumes / NAMES[2] / "index.json", 50)
    with pytest.raises(BundleError, match="cannot be read from any volume") as caught:
        join_volumes(tmp_path / "other", [volumes])
    assert len(caught.value.problems) == 3 and not (tmp_path / "other").exists()


def test_parts_that_are_each_right_and_together_wrong(volumes: Path, tmp_path: Path) -> None:
    """The bundle was damaged when it was split: pieces agree with their volumes, the file not with its digest."""
    volume = volumes / NAMES[1]
    flip(volume / "pieces/0002", 7)
    listed = json.loads((volume / "volume.json").read_text())
    listed["digests"][1] = hash_bytes((volume / "pieces/0002").read_bytes())
    (volume / "volume.json").write_text(json.dumps(listed))
    for _run in range(2):
        with pytest.raises(JoinError, match="split the bundle again") as caught:
            join_volumes(tmp_path / "site", [volumes])
        assert len(caught.value.problems) == 1 and "together they are sha256" in caught.value.problems[0]
        assert len(caught.value.details["lacking"]) == 1


def test_a_blob_damaged_on_the_site_is_taken_again(material: Path, volumes: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    join_volumes(site, [volumes])
    tiny = Bundle.open(site).artifacts[0]
    flip(Bundle.open(site).blob_path(tiny.files[0].digest), 4000)
    outcome = join_volumes(site, [volumes])
    assert outcome.changed and outcome.joined_bytes == tiny.files[0].size and same(site, material / "bundle")


def test_what_changed_in_a_partial_is_not_believed(material: Path, volumes: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    join_volumes(site, [volumes / NAMES[0]])
    (partial,) = (path for path in (site / "partial").iterdir() if path.suffix != ".json")
    flip(partial, 10)
    outcome = join_volumes(site, [volumes / NAMES[1], volumes / NAMES[2]])
    assert not outcome.complete and outcome.to_come == [NAMES[0]]
    assert join_volumes(site, [volumes]).complete and same(site, material / "bundle")


@pytest.mark.parametrize(
    "state", [b"{", b"[]", b'{"x": 1}', b'{"sha256:%s": {"ranges": [[0, 99999999]], "facts": []}}' % (b"0" * 64)]
)
def test_a_memory_that_makes_no_sense_counts_as_none(
    material: Path, volumes: Path, tmp_path: Path, state: bytes
) -> None:
    site = tmp_path / "site"
    join_volumes(site, [volumes / NAMES[1]])
    (site / "partial/joining.json").write_bytes(state)
    assert join_volumes(site, [volumes]).complete and same(site, material / "bundle")


class Killed(Exception):
    """The process ended here."""


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_that_is_killed_loses_at_most_the_piece_it_was_at(
    material: Path, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    site = tmp_path / "site"
    calls: List[int] = []
    honest = pieces_module.PieceReader._accept

    def dying(self: Any, part: Part, running: Any) -> Any:
        calls.append(1)
        if len(calls) == after:
            raise Killed
        return honest(self, part, running)

    monkeypatch.setattr(join_module, "REMEMBER", 0.0)
    monkeypatch.setattr(pieces_module.PieceReader, "_accept", dying)
    with pytest.raises(Killed):
        join_volumes(site, [volumes])
    monkeypatch.undo()
    outcome = join_volumes(site, [volumes])
    assert outcome.complete and same(site, material / "bundle")


def test_a_full_disk_is_told_in_numbers(volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_module, "free_bytes", lambda _path: MIB)
    with pytest.raises(BundleError, match=r"needs 8\.0 MiB more for all its volumes and its file system has 1\.0 MiB"):
        join_volumes(tmp_path / "site", [volumes / NAMES[0]])
    assert not (tmp_path / "site").exists()
    monkeypatch.undo()

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pieces_module, "_write", full)
    with pytest.raises(BundleError, match="The disk is full"):
        join_volumes(tmp_path / "site", [volumes])
    monkeypatch.undo()
    assert join_volumes(tmp_path / "site", [volumes]).complete


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_where_there_is_no_volume(tmp_path: Path, volumes: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"There is no volume of a bundle in .*empty that can be used"):
        join_volumes(tmp_path / "site", [tmp_path / "empty"])
    with pytest.raises(BundleError, match=r"There is no directory .*none; mount"):
        join_volumes(tmp_path / "site", [volumes, tmp_path / "none"])
    with pytest.raises(BundleError, match="There is no volume"):
        join_volumes(tmp_path / "site", [volumes], name="other")
    assert not (tmp_path / "site").exists()


def test_volumes_of_two_sets_are_told_apart_by_name(material: Path, volumes: Path, tmp_path: Path) -> None:
    shutil.copytree(str(material / "difference"), str(tmp_path / "both"))
    for name in NAMES:
        shutil.move(str(volumes / name), str(tmp_path / "both"))
    with pytest.raises(BundleError, match="volumes of 2 different bundles or splits") as caught:
        join_volumes(tmp_path / "site", [tmp_path / "both"])
    assert len(caught.value.problems) > 3 and not (tmp_path / "site").exists()
    assert join_volumes(tmp_path / "site", [tmp_path / "both"], name="bundle").complete


@pytest.mark.parametrize("thing", ["file", "other content", "blobs", "blobs/sha256", "partial", "a blob"])
def test_what_is_in_the_way_is_refused_before_anything_is_written(volumes: Path, tmp_path: Path, thing: str) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if thing == "file":
        site.write_text("mine")
    elif thing == "other content":
        site.mkdir()
        (site / "thesis.tex").write_text("mine")
    elif thing == "a blob":
        digest = next(iter(json.loads((volumes / NAMES[0] / "volume.json").read_text())["volumes"][0][0]))[0]
        (site / "blobs/sha256" / digest[7:]).mkdir(parents=True)
    else:
        (site / thing).parent.mkdir(parents=True)
        (site / thing).symlink_to(elsewhere)
    with pytest.raises(BundleError):
        join_volumes(site, [volumes])
    assert list(elsewhere.iterdir()) == []


def forge(volume: Path, change: Callable[[Dict[str, Any]], Any]) -> None:
    """Change index and manifests of a volume and have its list refer to the changed ones, as a forger would."""
    index = json.loads((volume / "index.json").read_text())
    raw = (volume / "manifests").read_bytes()
    manifests: Dict[str, Any] = {}
    at = 0
    for entry in index["manifests"]:
        manifests[entry["annotations"][REF_NAME]] = json.loads(raw[at : at + entry["size"]])
        at += entry["size"]
    change(manifests)
    row = b""
    for entry in index["manifests"]:
        content = json.dumps(manifests[entry["annotations"][REF_NAME]]).encode()
        entry["digest"], entry["size"] = hash_bytes(content), len(content)
        row += content
    (volume / "manifests").write_bytes(row)
    (volume / "index.json").write_text(json.dumps(index))
    listed = json.loads((volume / "volume.json").read_text())
    listed["manifests"] = [hash_bytes(row), len(row)]
    listed["index"] = [hash_bytes((volume / "index.json").read_bytes()), (volume / "index.json").stat().st_size]
    resign(volume, listed)


def resign(volume: Path, listed: Dict[str, Any]) -> None:
    """Write a list whose set has the digest it should have."""
    honest = {key: listed[key] for key in ("format", "name", "index", "manifests", "base", "volumes")}
    text = json.dumps(honest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    listed["set"] = hash_bytes(text.encode())
    (volume / "volume.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m["models/tiny"]["layers"][0]["annotations"].update({"org.cncf.model.filepath": "../../x"}),
            "component",
        ),
        (
            lambda m: m["models/tiny"]["layers"][0]["annotations"].update({"org.cncf.model.filepath": "/etc/x"}),
            "absolute",
        ),
        (lambda m: m["models/tiny"]["layers"][0].update(size=-1), "not a number of bytes"),
        (lambda m: m["models/tiny"]["layers"][0].update(size=7), "the volumes carry"),
        (lambda m: m["models/tiny"]["layers"].pop(0), "which no artifact of the bundle has as a file"),
        (lambda m: m["tools/some"]["layers"].append(m["tools/some"]["layers"][0]), "occurs twice"),
        (lambda m: m["tools/some"]["layers"][0].update(mediaType="text/html"), "is not known here"),
    ],
)
def test_lists_that_lie_are_refused_before_anything_is_written(
    volumes: Path, tmp_path: Path, change: Callable[[Dict[str, Any]], Any], words: str
) -> None:
    forge(volumes / NAMES[0], change)
    with pytest.raises(BundleError, match="cannot be used") as caught:
        join_volumes(tmp_path / "site", [volumes / NAMES[0]])
    assert any(words in problem for problem in caught.value.problems)
    assert not (tmp_path / "site").exists()


def test_a_forged_list_cannot_bring_other_bytes_under_a_digest(volumes: Path, tmp_path: Path) -> None:
    volume = volumes / NAMES[0]
    listed = json.loads((volume / "volume.json").read_text())
    for number in range(1, len(listed["digests"]) + 1):
        path = volume / f"pieces/{number:04}"
        path.write_bytes(b"evil" * (path.stat().st_size // 4) + b"e" * (path.stat().st_size % 4))
        listed["digests"][number - 1] = hash_bytes(path.read_bytes())
    resign(volume, listed)
    with pytest.raises(JoinError):
        join_volumes(tmp_path / "site", [volumes])
    blobs = list((tmp_path / "site/blobs/sha256").iterdir())
    assert blobs and all(hash_bytes(path.read_bytes())[7:] == path.name for path in blobs)


def test_nobody_joins_while_another_builds(volumes: Path, tmp_path: Path) -> None:
    held = locked(cache_dir(tmp_path / "site") / "build.lock", "busy")
    with held, pytest.raises(BundleError, match="is being built, split or joined"):
        join_volumes(tmp_path / "site", [volumes])
    assert not (tmp_path / "site").exists()


# --- differential -----------------------------------------------------------------------------------------------------


def test_a_difference_makes_the_later_bundle_out_of_the_earlier(material: Path, volumes: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    join_volumes(site, [volumes])
    outcome = join_volumes(site, [material / "difference"])
    assert outcome.complete and same(site, material / "later")
    assert outcome.joined_bytes == outcome.hashed_bytes < 4.2 * MIB and outcome.dropped_bytes > 3 * MIB
    assert len(outcome.before) == 2 and len(outcome.after) == 3
    again = join_volumes(site, [material / "difference"])
    assert (again.changed, again.hashed_bytes) == (False, 0)


def test_until_its_last_volume_the_earlier_bundle_serves(material: Path, volumes: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    join_volumes(site, [volumes])
    names = sorted(path.name for path in (material / "difference").iterdir())
    assert len(names) > 1
    for name in names:
        assert Bundle.open(site).artifacts == Bundle.open(material / "bundle").artifacts
        outcome = join_volumes(site, [material / "difference" / name])
    assert outcome.complete and same(site, material / "later")


@pytest.mark.parametrize("there", ["nothing", "another bundle", "half of it"])
def test_without_the_earlier_bundle_all_that_is_missing_is_named(
    material: Path, volumes: Path, tmp_path: Path, there: str
) -> None:
    site = tmp_path / "site"
    if there == "another bundle":
        write_bundle(site, [Request("tools", "some", str(material / "tools"))])
    elif there == "half of it":
        join_volumes(site, [volumes / NAMES[0]])
    before = tree(site) if site.exists() else {}
    for check in (True, False):
        with pytest.raises(BundleError, match="bring only what an earlier bundle") as caught:
            join_volumes(site, [material / "difference"], check=check)
        assert caught.value.details["missing"][0]["reference"] == "models/tiny"
        expected = {
            "nothing": ["models/tiny: 3 of 5 files, 5.0 MiB", "tools/some: 51 of 51 files, 50.0 KiB"],
            "another bundle": ["models/tiny: 3 of 5 files, 5.0 MiB"],
        }
        if there in expected:
            assert caught.value.problems == expected[there]
        else:
            assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith("models/tiny: 1 of 5 files")
        assert (tree(site) if site.exists() else {}) == before
    if there == "another bundle":
        assert [artifact.reference for artifact in Bundle.open(site).artifacts] == ["tools/some"]


def refuse_link(*_paths: object) -> None:
    """Another file system."""
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("linked", [True, False])
def test_the_earlier_bundle_may_lie_elsewhere(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if not linked:
        monkeypatch.setattr(os, "link", refuse_link)
    outcome = join_volumes(tmp_path / "site", [material / "difference"], base=material / "bundle")
    assert outcome.complete and same(tmp_path / "site", material / "later")
    assert outcome.base_bytes > 5 * MIB and outcome.hashed_bytes == outcome.joined_bytes
    with pytest.raises(BundleError, match=r"neither .*other nor .*later has"):
        join_volumes(tmp_path / "other", [material / "difference"], base=tmp_path / "later")


def test_an_earlier_bundle_that_is_damaged_does_not_count_as_there(material: Path, tmp_path: Path) -> None:
    shutil.copytree(str(material / "bundle"), str(tmp_path / "earlier"))
    large = Bundle.open(tmp_path / "earlier").artifacts[0].files[0]
    flip(tmp_path / "earlier/blobs/sha256" / large.digest[7:], 99)
    with pytest.raises(BundleError, match="bring only what an earlier bundle") as caught:
        join_volumes(tmp_path / "site", [material / "difference"], base=tmp_path / "earlier")
    assert caught.value.problems == ["models/tiny: 1 of 5 files, 5.0 MiB"]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_ranges_of_a_blob_are_merged_and_cut() -> None:
    partial = Partial(Path("/nowhere"), 100)
    for start, length in ((50, 10), (0, 10), (10, 20), (40, 10)):
        partial.add(Part("x", start, length))
    assert partial.ranges == [(0, 30), (40, 60)] and partial.received == 50
    assert partial.has(Part("x", 5, 25)) and not partial.has(Part("x", 20, 30))
    partial.remove(Part("x", 5, 40))
    assert partial.ranges == [(0, 5), (45, 60)]


def test_the_hash_follows_parts_that_come_in_order_and_no_others() -> None:
    content = b"abcdefghij"
    partial = Partial(Path("/nowhere"), 10)
    for start, end in ((0, 4), (4, 10)):
        sha = partial.hash_before(Part("x", start, end - start))
        sha.update(content[start:end])
        partial.add(Part("x", start, end - start), sha)
    assert partial.digest == hash_bytes(content)
    late = Partial(Path("/nowhere"), 10)
    assert late.hash_before(Part("x", 4, 6)) is None
    late.add(Part("x", 4, 6))
    late.add(Part("x", 0, 4), late.hash_before(Part("x", 0, 4)))
    assert late.received == 10 and late.digest is None
