# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a wish means at a hub, and what a directory lacks. (The real client is in the integration tests.)"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import snapshot as module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps, hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.snapshot import (
    Comparison,
    HubFile,
    Record,
    Snapshot,
    Wish,
    carry_out,
    compare,
    resolve,
    select,
)

COMMIT = "c" * 40
WISH = Wish("org/tiny", "master")


def entry(path: str, content: bytes = b"x", kind: str = "blob") -> SimpleNamespace:
    """A file as the client lists it."""
    return SimpleNamespace(path=path, size=len(content), sha256=hash_bytes(content)[7:], type=kind)


def hub(revisions: List[Dict[str, str]], *files: SimpleNamespace) -> SimpleNamespace:
    """A client whose hub has these revisions and files; `asked` remembers the revisions of listings."""
    asked: List[str] = []

    def listing(_model: str, _kind: str, revision: str) -> List[SimpleNamespace]:
        asked.append(revision)
        return list(files)

    return SimpleNamespace(list_repo_revisions=lambda _model, _kind: revisions, list_repo_files=listing, asked=asked)


def snapshot(*files: HubFile) -> Snapshot:
    """A resolved wish."""
    return Snapshot(WISH, COMMIT, COMMIT, list(files))


def test_a_branch_becomes_its_commit_and_files_are_listed_there() -> None:
    client = hub([{"Revision": "master", "CommitId": COMMIT}], entry("a"))
    found = resolve(client, WISH)
    assert (found.revision, found.fetch_revision, client.asked) == (COMMIT, COMMIT, [COMMIT])


def test_a_commit_is_taken_as_it_is() -> None:
    client = hub([], entry("a"))
    assert resolve(client, Wish("org/tiny", COMMIT)).revision == COMMIT


def test_without_commit_ids_the_list_of_files_is_the_pin() -> None:
    first = resolve(hub([{"Revision": "master"}], entry("a", b"1")), WISH)
    other = resolve(hub([{"Revision": "master"}], entry("a", b"2")), WISH)
    assert first.revision.startswith("master+tree.") and first.fetch_revision == "master"
    assert first.revision != other.revision


def test_an_unknown_revision_names_the_known_ones() -> None:
    client = hub([{"Revision": "v1"}, {"Revision": "dev"}])

    def refuse(*_args: object, **_more: object) -> None:
        raise OSError("404")

    client.list_repo_files = refuse
    with pytest.raises(BundleError, match=r"no revision 'master' \(404\); it has: dev, v1"):
        resolve(client, WISH)
    with pytest.raises(OSError, match="404"):
        resolve(client, Wish("org/tiny", "dev"))


def test_a_revision_the_hub_forgot_to_list_is_tried() -> None:
    client = hub([{"Revision": "master", "CommitId": COMMIT}], entry("a"))
    assert resolve(client, Wish("org/tiny", "v1")).fetch_revision == "v1"


def test_patterns_select() -> None:
    listing = [entry("d", kind="tree"), entry("d/a.onnx"), entry("b.json"), entry("c.md")]
    assert [file.path for file in select(listing, WISH)] == ["b.json", "c.md", "d/a.onnx"]
    assert [file.path for file in select(listing, Wish("m", "r", ("d/",)))] == ["d/a.onnx"]
    assert [file.path for file in select(listing, Wish("m", "r", (), ("*.onnx", "c*")))] == ["b.json"]
    with pytest.raises(BundleError, match="No file of m matches"):
        select(listing, Wish("m", "r", ("*.gguf",)))


@pytest.mark.parametrize("paths", [["../a"], ["/a"], ["a", "a"], ["a", "a/b"]])
def test_a_list_of_files_that_cannot_be_stored(paths: List[str]) -> None:
    with pytest.raises(BundleError, match="cannot be used"):
        select([entry(path) for path in paths], WISH)


def test_comparison(tmp_path: Path) -> None:
    files = {name: HubFile(name, 4, hash_bytes(b"good")) for name in ("ok", "bad", "short", "gone", "link")}
    (tmp_path / "ok").write_bytes(b"good")
    (tmp_path / "bad").write_bytes(b"evil")
    (tmp_path / "short").write_bytes(b"goo")
    (tmp_path / "link").symlink_to("ok")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "gone.incomplete").write_bytes(b"go")
    stamps = Stamps()
    todo = compare(tmp_path, snapshot(*files.values()), {"old"}, stamps, hashing=True)
    assert sorted(file.path for file in todo.fetch) == ["bad", "gone", "link", "short"]
    assert sorted(todo.damaged) == ["bad", "link", "short"] and todo.remove == ["old"]
    assert stamps.hashed_bytes == 8
    quick = compare(tmp_path, snapshot(*files.values()), {"old"}, Stamps(), hashing=False)
    assert sorted(file.path for file in quick.fetch) == ["gone", "link", "short"]


def test_files_of_other_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    with pytest.raises(BundleError, match="choose another path") as caught:
        compare(tmp_path, snapshot(HubFile("a", 1, "")), set(), Stamps(), hashing=True)
    assert caught.value.problems == ["mine"]


def test_every_file_is_tried_and_every_failure_told(tmp_path: Path) -> None:
    tries: Dict[str, int] = {}

    def download(file: HubFile) -> None:
        tries[file.path] = tries.get(file.path, 0) + 1
        if file.path == "never":
            raise OSError("connection lost")
        if file.path == "refused":
            error: Any = OSError("no permission")
            error.retryable = False
            raise error
        if file.path == "second" and tries[file.path] == 1:
            raise OSError("connection lost")
        (tmp_path / file.path).write_bytes(b"good")

    files = [HubFile(name, 4, hash_bytes(b"good")) for name in ("never", "refused", "second", "once")]
    stamps = Stamps()
    with pytest.raises(BundleError, match="2 of 4 files of org/tiny") as caught:
        carry_out(tmp_path, snapshot(*files), Comparison(fetch=files), stamps, download, attempts=3, workers=2)
    assert caught.value.problems == ["never: connection lost (3 attempts)", "refused: no permission"]
    assert tries == {"never": 3, "refused": 1, "second": 2, "once": 1}
    assert stamps.vouches(tmp_path / "once") == hash_bytes(b"good") and stamps.hashed_bytes == 0


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _path: 10)
    todo = Comparison(fetch=[HubFile("a", 2048, "")])
    with pytest.raises(BundleError, match=r"needs 2.0 KiB and its file system has 10 B free"):
        carry_out(tmp_path / "m", snapshot(*todo.fetch), todo, Stamps(), lambda _file: None, 1, 1)
    assert not (tmp_path / "m").exists()


def test_the_record_knows_complete_commits_only(tmp_path: Path) -> None:
    wish = Wish("org/tiny", COMMIT, ("*.json",))
    found = Snapshot(wish, COMMIT, COMMIT, [HubFile("a.json", 1, hash_bytes(b"x"))])
    Record(tmp_path, tmp_path / "m").write(found, complete=False)
    record = Record(tmp_path, tmp_path / "m")
    assert record.files == {"a.json"} and record.complete(wish) is None
    record.write(found, complete=True)
    again = Record(tmp_path, tmp_path / "m")
    assert again.complete(wish) == found
    assert again.complete(Wish("org/tiny", COMMIT)) is None
    assert Record(tmp_path, tmp_path / "other").complete(wish) is None
    record.write(Snapshot(WISH, COMMIT, COMMIT, found.files), complete=True)
    assert Record(tmp_path, tmp_path / "m").complete(WISH) is None


def test_an_unfinished_change_still_owns_the_files_of_before(tmp_path: Path) -> None:
    old = snapshot(HubFile("old", 1, ""))
    Record(tmp_path, tmp_path / "m").write(old, complete=True)
    Record(tmp_path, tmp_path / "m").write(snapshot(HubFile("new", 1, "")), complete=False)
    assert Record(tmp_path, tmp_path / "m").files == {"old", "new"}
