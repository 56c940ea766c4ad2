# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deep verification: what stamps still vouch for is found damaged, and only that is asked for again."""

from __future__ import annotations

import errno
import json
import os
import random
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import deep as deep_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import digest as digest_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.deep import Deep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Answer, Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store

WEIGHTS, SHARED = b"weights" * 1000, b"tokens" * 500
DIGEST, SHARED_DIGEST = hash_bytes(WEIGHTS), hash_bytes(SHARED)


def make_bundle(place: Path, weights: bytes = WEIGHTS) -> Bundle:
    """A bundle with a model of two files, and the host's libraries."""
    model, wheels = place / "model", place / "wheels"
    for directory in (model / "deep", wheels):
        directory.mkdir(parents=True)
    (model / "weights.bin").write_bytes(weights)
    (model / "deep/tokens").write_bytes(SHARED)
    with zipfile.ZipFile(str(wheels / "kindly-1.0-py3-none-any.whl"), "w") as archive:
        for name in ("kindly/__init__.py", "certifi/cacert.pem", "kindly-1.0.data/scripts/run"):
            info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            archive.writestr(info, f"NAME = {name!r}\n")
    write_bundle(place / "bundle", [Request("models", "m", str(model)), Request("wheels", "host", str(wheels))])
    return Bundle.open(place / "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "source")


def wanted_of(bundle: Bundle) -> List[Wanted]:
    return [Wanted(one.kind, one.name, one.digest, bundle.blobs[one.digest]) for one in bundle.artifacts]


def deliver(bundle: Bundle, root: Path, deep: Optional[Deep] = None) -> Tuple[Answer, List[str]]:
    """Ask (the first time deeply) and send until nothing is missing: the first answer, and what was sent."""
    first = answer = keep(Store(root), wanted_of(bundle), deep=deep)
    sent: List[str] = []
    for _question in range(10):
        if not answer.missing:
            return first, sent
        for digest in answer.missing:
            (root / "partial" / digest[7:]).write_bytes(bundle.blob_path(digest).read_bytes())
            sent.append(digest)
        answer = keep(Store(root), wanted_of(bundle))
    raise AssertionError("never complete")


def damage(path: Path) -> None:
    """Flip one bit, so that nothing but reading shows it."""
    status = path.stat()
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    with path.open("r+b") as file:
        file.write(content)
    os.utime(str(path), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.chmod(status.st_mode)


def tree_of(bundle: Bundle, root: Path) -> Path:
    found = bundle.find("models", "m")
    assert found
    return root / "models/m" / found.digest[7:19]


def same(bundle: Bundle, root: Path) -> bool:
    tree = tree_of(bundle, root)
    return (tree / "deep/tokens").read_bytes() == SHARED and (tree / "weights.bin").stat().st_ino == (
        root / "blobs/sha256" / DIGEST[7:]
    ).stat().st_ino


def test_a_flipped_bit_is_only_seen_deep_down_and_mended_alone(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    blob = root / "blobs/sha256" / DIGEST[7:]
    old = blob.stat().st_ino
    damage(blob)
    first, sent = deliver(bundle, root)
    assert sent == [] and not first.changed

    with (tree_of(bundle, root) / "weights.bin").open("rb") as running:
        first, sent = deliver(bundle, root, Deep())
        assert first.changed and list(first.damaged) == [DIGEST] and "content in the store is" in first.damaged[DIGEST]
        assert sent == [DIGEST] and first.missing == {DIGEST: len(WEIGHTS)}
        # Whoever has the old file open keeps it; everybody else gets the new one.
        assert os.fstat(running.fileno()).st_ino == old
    weights = tree_of(bundle, root) / "weights.bin"
    assert weights.read_bytes() == WEIGHTS and same(bundle, root) and weights.stat().st_ino != old
    first, sent = deliver(bundle, root, Deep())
    assert not first.changed and first.damaged == {} and sent == []


def test_it_says_how_much_it_read(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    store = Store(root)
    answer = keep(store, wanted_of(bundle), deep=Deep())
    assert answer.reread is not None
    assert answer.reread._asdict() == {
        "files": len(bundle.blobs),
        "of_files": len(bundle.blobs),
        "read_bytes": bundle.size,
        "of_bytes": bundle.size,
        "after": "",
    }
    # The manifests are read before the others, because they say which those are.
    manifests = sum(bundle.blobs[one.digest] for one in bundle.artifacts)
    assert store.hashed_bytes == bundle.size + manifests and not answer.changed
    assert keep(Store(root), wanted_of(bundle)).reread is None


def test_it_goes_in_parts_that_read_everything_once(bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    damage(root / "blobs/sha256" / DIGEST[7:])
    read: List[str] = []
    hash_file: Callable[..., str] = digest_module.hash_file

    def noting(path: Any, *rest: Any) -> str:
        read.append(Path(path).name)
        return hash_file(path, *rest)

    monkeypatch.setattr(digest_module, "hash_file", noting)
    after, parts, damaged = "", [], {}
    while True:
        answer = keep(Store(root), wanted_of(bundle), deep=Deep(after, 1e-9))
        assert answer.reread is not None
        damaged.update(answer.damaged)
        parts.append(answer.reread)
        after = answer.reread.after
        if not after:
            break
    # The largest came first, was dropped, and the next part found its place all the same.
    assert list(damaged) == [DIGEST] and len(parts) == len(bundle.blobs)
    assert [part.files for part in parts[1:]] == list(range(1, len(bundle.blobs)))
    manifests = [one.digest[7:] for one in bundle.artifacts]
    assert sorted(read) == sorted([*(digest[7:] for digest in bundle.blobs), *manifests])


def test_a_dry_run_finds_it_and_touches_nothing(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    damage(root / "blobs/sha256" / DIGEST[7:])
    before = {path: path.lstat() for path in root.rglob("*")}
    answer = keep(Store(root, dry_run=True), wanted_of(bundle), deep=Deep())
    assert answer.changed and list(answer.damaged) == [DIGEST] and answer.missing == {DIGEST: len(WEIGHTS)}
    after = {path: path.lstat() for path in root.rglob("*")}
    assert {path: (one.st_ino, one.st_mtime_ns, one.st_size) for path, one in before.items()} == {
        path: (one.st_ino, one.st_mtime_ns, one.st_size) for path, one in after.items()
    }


def test_a_damaged_manifest_is_dropped_before_it_is_believed(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    manifest = bundle.find("models", "m")
    assert manifest
    damage(root / "blobs/sha256" / manifest.digest[7:])
    first, sent = deliver(bundle, root, Deep())
    assert list(first.damaged) == [manifest.digest] and sent == [manifest.digest] and same(bundle, root)


def test_a_file_the_disk_cannot_read_is_damaged(bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    hash_file: Callable[..., str] = digest_module.hash_file

    def failing(path: Any, *rest: Any) -> str:
        if Path(path).name == DIGEST[7:]:
            raise OSError(errno.EIO, "Input/output error")
        return hash_file(path, *rest)

    monkeypatch.setattr(digest_module, "hash_file", failing)
    answer = keep(Store(root), wanted_of(bundle), deep=Deep())
    assert answer.damaged == {DIGEST: "the disk cannot read it: Input/output error"}
    assert not (root / "blobs/sha256" / DIGEST[7:]).exists()
    monkeypatch.undo()
    assert deliver(bundle, root)[1] == [DIGEST] and same(bundle, root)


def test_copies_in_directories_are_read_too(bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_paths: Any) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(os, "link", refuse)
    root = tmp_path / "root"
    deliver(bundle, root)
    weights = tree_of(bundle, root) / "weights.bin"
    assert weights.stat().st_nlink == 1
    damage(weights)
    assert deliver(bundle, root) == (keep(Store(root), wanted_of(bundle)), [])
    answer = keep(Store(root), wanted_of(bundle), deep=Deep())
    assert answer.changed and answer.paths == [str(weights.parent)] and answer.damaged == {}
    assert weights.read_bytes() == WEIGHTS
    assert not keep(Store(root), wanted_of(bundle), deep=Deep()).changed


def test_a_flipped_bit_in_an_unpacked_library_is_found(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    module = root / "lib/python/kindly/__init__.py"
    damage(module)
    (root / "lib/python/certifi/cacert.pem").write_text("of the site")
    assert not keep(Store(root), wanted_of(bundle)).changed
    answer = keep(Store(root, dry_run=True), wanted_of(bundle), deep=Deep())
    assert answer.paths == [str(module.resolve().parents[1])] and b"NAME" not in module.read_bytes()[5:]
    answer = keep(Store(root), wanted_of(bundle), deep=Deep())
    assert answer.paths == [str(module.resolve().parents[1])] and module.read_text().startswith("NAME = ")
    assert not keep(Store(root), wanted_of(bundle), deep=Deep()).changed


def test_a_directory_of_an_older_release_is_mended_with_what_it_shares(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    newer = make_bundle(tmp_path / "newer", b"other weights" * 900)
    deliver(newer, root)
    old, new = tree_of(bundle, root) / "deep/tokens", tree_of(newer, root) / "deep/tokens"
    assert old.stat().st_ino == new.stat().st_ino
    damage(root / "blobs/sha256" / SHARED_DIGEST[7:])
    first, sent = deliver(newer, root, Deep())
    assert list(first.damaged) == sent == [SHARED_DIGEST]
    assert old.read_bytes() == new.read_bytes() == SHARED and old.stat().st_ino == new.stat().st_ino
    assert not (old.parent / ".relinked.new").exists()
    assert old.stat().st_nlink == 3


def test_what_only_an_older_directory_has_is_left_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    newer = make_bundle(tmp_path / "newer", b"other weights" * 900)
    deliver(newer, root)
    (root / "blobs/sha256" / DIGEST[7:]).unlink()
    (root / "models/m/by-hand").mkdir()
    (tree_of(newer, root) / "weights.bin").unlink()
    answer = keep(Store(root), wanted_of(newer))
    assert answer.paths == [str(tree_of(newer, root))]
    assert (tree_of(bundle, root) / "weights.bin").read_bytes() == WEIGHTS


def test_what_is_on_its_way_is_noted_until_it_is_there(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "root"
    keep(Store(root), wanted_of(bundle))
    noted = json.loads((root / "state/arriving.json").read_text())
    assert noted == [{"kind": one.kind, "name": one.name, "digest": one.digest} for one in bundle.artifacts]
    deliver(bundle, root)
    assert not (root / "state/arriving.json").exists()
    keep(Store(tmp_path / "other", dry_run=True), wanted_of(bundle))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("seed", range(5))
def test_any_number_of_flipped_bits_costs_just_those_blobs(bundle: Bundle, tmp_path: Path, seed: int) -> None:
    root = tmp_path / "root"
    deliver(bundle, root)
    source = random.Random(seed)
    sizes: Dict[str, int] = {digest: size for digest, size in bundle.blobs.items() if size}
    chosen = set(source.sample(sorted(sizes), source.randint(1, len(sizes))))
    for digest in chosen:
        damage(root / "blobs/sha256" / digest[7:])
    _first, sent = deliver(bundle, root, Deep())
    # Blobs of an artifact whose manifest is damaged are not known before it has come anew, and believed till then.
    known = {blob.digest for one in bundle.artifacts if one.digest not in chosen for blob in one.blobs}
    assert chosen & known <= set(sent) <= chosen
    deliver(bundle, root, Deep())
    assert same(bundle, root) and not keep(Store(root), wanted_of(bundle), deep=Deep()).changed


def test_the_order_does_not_depend_on_what_is_gone() -> None:
    files = [deep_module.File("b", 3), deep_module.File("a", 3), deep_module.File("c", 9)]
    assert sorted(files, key=deep_module._place) == [files[2], files[1], files[0]]
