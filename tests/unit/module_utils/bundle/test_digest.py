# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Digests, and stamps that make hashing again unnecessary."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import digest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import (
    CHUNK,
    Stamps,
    copy_and_hash,
    hash_bytes,
    hash_file,
    is_digest,
    write_atomically,
)


def reference(content: bytes) -> str:
    """The digest as hashlib computes it in one go."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
def test_hashing_and_copying_agree_at_every_size(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    source = tmp_path / "source"
    source.write_bytes(content)
    told: List[int] = []
    assert hash_file(source, told.append) == hash_bytes(content) == reference(content)
    assert sum(told) == size
    assert copy_and_hash(source, tmp_path / "copy") == reference(content)
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "",
        "sha256:",
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 63,
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 64 + "\n",
        "sha256:../../../../etc/passwd",
    ],
)
def test_what_is_no_digest(value: object) -> None:
    assert not is_digest(value)


def test_stamps_avoid_a_second_reading(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    stamps = Stamps(tmp_path / "cache" / "stamps.json")
    assert stamps.vouches(file) is None
    assert stamps.digest_of(file) == reference(b"weights")
    stamps.save()
    again = Stamps(tmp_path / "cache" / "stamps.json")
    assert again.digest_of(file) == reference(b"weights")
    assert (stamps.hashed_bytes, again.hashed_bytes) == (7, 0)


@pytest.mark.parametrize("change", ["content", "time", "inode", "size"])
def test_a_stamp_does_not_vouch_for_a_changed_file(tmp_path: Path, change: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    status = file.stat()
    stamps = Stamps()
    stamps.digest_of(file)
    if change == "content":
        file.write_bytes(b"WEIGHTS")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "time":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "inode":
        other = tmp_path / "other"
        other.write_bytes(b"WEIGHTS")
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(file)
    else:
        file.write_bytes(b"weight")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert stamps.vouches(file) is None


def test_a_file_that_changes_while_it_is_hashed_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")

    def hash_and_meddle(path: Path, progress: object = None) -> str:
        found = hash_file(path)
        file.write_bytes(b"after it was read")
        return found

    monkeypatch.setattr(digest, "hash_file", hash_and_meddle)
    stamps = Stamps()
    stamps.digest_of(file)
    assert stamps.vouches(file) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"format": 99, "files": {}}', b'{"format": 1, "files": {"/x": [1, 2]}}', b"\xff\xfe"],
)
def test_unreadable_stamps_count_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stamps.json"
    path.write_bytes(content)
    stamps = Stamps.load(path)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    stamps.digest_of(file)
    stamps.save()
    assert Stamps(path).vouches(file) == reference(b"x")


def test_saving_forgets_files_that_are_gone_and_writes_only_changes(tmp_path: Path) -> None:
    path = tmp_path / "stamps.json"
    file = tmp_path / "file"
    file.write_bytes(b"x")
    stamps = Stamps(path)
    stamps.digest_of(file)
    stamps.save()
    inode = path.stat().st_ino
    Stamps(path).save()
    assert path.stat().st_ino == inode
    file.unlink()
    Stamps(path).save()
    assert path.stat().st_ino == inode
    other = tmp_path / "other"
    other.write_bytes(b"y")
    stamps = Stamps(path)
    stamps.digest_of(other)
    stamps.save()
    assert str(file) not in path.read_text() and str(other) in path.read_text()


def test_blobs_are_sound_while_they_are_the_plain_files_they_were(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    contents = [b"same", b"changed", b"gone", b"link", b"pipe", b"new"]
    paths = {reference(content): blobs / reference(content)[7:] for content in contents}
    stamps = Stamps(tmp_path / "stamps.json")
    for (name, path), content in zip(paths.items(), contents):
        path.write_bytes(content)
        if content != b"new":
            stamps.record(path, name)
    same, changed, gone, link, pipe, _new = paths.values()
    changed.write_bytes(b"CHANGED")
    os.utime(str(changed), ns=(1, 1))
    gone.unlink()
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    pipe.unlink()
    os.mkfifo(str(pipe))
    wanted = [*paths, "sha256:" + "0" * 64, "../../etc/passwd", ""]
    assert stamps.sound(blobs, wanted) == {reference(b"same")} == stamps.sound(f"{blobs}/../blobs/", wanted)
    assert stamps.vouches(same) == reference(b"same") and stamps.sound(tmp_path, wanted) == set()


def test_an_atomic_write_leaves_no_scratch_file_and_keeps_equal_content(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"one")
    inode = path.stat().st_ino
    write_atomically(path, b"one")
    assert path.stat().st_ino == inode
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_space(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]
