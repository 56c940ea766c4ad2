# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host refuses to keep, whatever the controller believed: requests and manifests that lie."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import library as library_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.library import unpack_wheel
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import File
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.pack import model_config, model_manifest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError

DIGEST = hash_bytes(b"manifest")
CONTENT = b"weights" * 1000
FILES = [File("model.bin", hash_bytes(CONTENT), len(CONTENT)), File("config.json", hash_bytes(b"{ }"), 3)]
CONFIG = model_config("m", FILES, {})


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted("models", "..", DIGEST, 8), "'..' is not a name"),
        (Wanted("models", "a/b", DIGEST, 8), "'a/b' is not a name"),
        (Wanted("Models", "a", DIGEST, 8), "'Models' is not a kind"),
        (Wanted("../../etc", "a", DIGEST, 8), "is not a kind"),
        (Wanted("models", "x" * 10**6, DIGEST, 8), "is not a name"),
        (Wanted("models", "a", "sha256:../../etc/passwd", 8), "is not a digest"),
        (Wanted("models", "a", DIGEST, -1), "is not the size of a manifest"),
        (Wanted("models", "a", DIGEST, 2**40), "is not the size of a manifest"),
        (Wanted("images", "a", DIGEST, 8, ("latest",)), "'latest' is not a digest"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused_before_anything_is_written(
    tmp_path: Path, wanted: Wanted, words: str
) -> None:
    sound = Wanted("models", "sound", DIGEST, 8)
    with pytest.raises(StoreError) as caught:
        keep(Store(tmp_path / "root"), [sound, wanted, sound])
    assert words in str(caught.value) and "'models/sound' is asked for twice" in str(caught.value)
    assert len(str(caught.value)) < 500 and list(tmp_path.iterdir()) == []


def received(store: Store, manifest: bytes) -> Wanted:
    """Put a manifest and all the content it could mean where a transport would; returns the wish for it."""
    store.receive()
    for content in (manifest, CONTENT, b"{ }", CONFIG):
        store.partial_path(hash_bytes(content)).write_bytes(content)
    return Wanted("models", "m", hash_bytes(manifest), len(manifest))


def changed(change: Callable[[Dict[str, Any]], Any]) -> bytes:
    """The manifest of the model after a change."""
    content = json.loads(model_manifest(FILES, CONFIG, {}))
    change(content)
    return json.dumps(content).encode()


def trees(root: Path) -> List[str]:
    """What was made beside blobs, received files and state."""
    return sorted({path.name for path in root.iterdir()} - {"blobs", "partial", "state"})


def test_what_does_not_lie_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    answer = keep(store, [received(store, changed(lambda _manifest: None))])
    assert not answer.missing and trees(store.root) == ["models"]


LIES: List[Tuple[Callable[[Dict[str, Any]], Any], str]] = [
    (lambda m: m["layers"][0]["annotations"].update({"org.cncf.model.filepath": "../../evil"}), "component"),
    (lambda m: m["layers"][0]["annotations"].update({"org.cncf.model.filepath": "/etc/cron.d/x"}), "absolute"),
    (lambda m: m["layers"][0]["annotations"].update({"org.cncf.model.filepath": "a\x00b"}), "control"),
    (lambda m: m["layers"].append(m["layers"][0]), "occurs twice"),
    (lambda m: m["layers"][0].update(size=-1), "not a number of bytes"),
    (lambda m: m["layers"][0].update(size=10**30), "31 digits"),
    (lambda m: m["layers"][0].update(size=2**60), "over the limit"),
    (lambda m: m["layers"][0].update(mediaType="application/vnd.cncf.model.weight.v1.tar"), "is not known here"),
    (lambda m: m.update(layers={}), "not an image manifest"),
]


@pytest.mark.parametrize(("change", "words"), LIES)
def test_a_manifest_that_lies_makes_nothing(
    tmp_path: Path, change: Callable[[Dict[str, Any]], Any], words: str
) -> None:
    store = Store(tmp_path / "root")
    with pytest.raises(StoreError, match="models/m: the manifest sha256") as caught:
        keep(store, [received(store, changed(change))])
    assert words in str(caught.value) and trees(store.root) == []


def test_all_manifests_that_lie_are_named_together(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    wishes = []
    for name, (change, _words) in zip("abc", LIES):
        wishes.append(received(store, changed(change))._replace(name=name))
    with pytest.raises(StoreError) as caught:
        keep(store, wishes)
    assert all(f"models/{name}: the manifest" in str(caught.value) for name in "abc")


def test_manifests_that_are_no_json_or_nested_without_end(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    for manifest in (b"[" * 100_000, b"\xff", b'{"layers": [], "layers": []}'):
        with pytest.raises(StoreError, match="cannot be read: not JSON"):
            keep(store, [received(store, manifest)])


def test_two_artifacts_that_disagree_about_a_blob(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    first = received(store, changed(lambda _manifest: None))
    second = received(store, changed(lambda manifest: manifest["layers"][0].update(size=10)))._replace(name="n")
    with pytest.raises(StoreError, match=r"models/n: sha256.* is 10 bytes here and 7000 elsewhere"):
        keep(store, [first, second])
    assert trees(store.root) == []


def test_a_size_that_is_not_that_of_the_blob_harms_no_good_blob(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    keep(store, [received(store, changed(lambda _manifest: None))])
    lying = changed(lambda manifest: manifest["layers"][0].update(size=10))
    for stamped in (True, False):
        again = Store(store.root)
        wish = received(again, lying)
        if not stamped:
            (again.state / "stamps.json").unlink()
            again = Store(store.root)
        with pytest.raises(StoreError, match="has another size than the 10 bytes of the manifest"):
            keep(again, [wish])
        assert again.blob_path(FILES[0].digest).read_bytes() == CONTENT


def test_a_directory_in_the_place_of_a_blob_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    wish = received(store, changed(lambda _manifest: None))
    for content in (CONTENT, CONFIG):
        (store.blob_path(hash_bytes(content)) / "mine").mkdir(parents=True)
    with pytest.raises(StoreError, match="A directory where a blob should be") as caught:
        keep(store, [wish])
    assert str(caught.value).count("blobs/sha256") == 2 and trees(store.root) == []
    assert (store.blob_path(hash_bytes(CONTENT)) / "mine").is_dir()


def wheel(path: Path, *entries: Tuple[str, bytes]) -> Path:
    """A wheel with these files."""
    with zipfile.ZipFile(str(path), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_wheel_with_everything_wrong_is_refused_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "w-1.0-py3-none-any.whl"
    outside = wheel(tmp_path / "a.whl", ("fine.py", b""), ("../evil.py", b""), ("/etc/evil.py", b""), ("c:/x.py", b""))
    with pytest.raises(StoreError) as caught:
        unpack_wheel(outside, name, tmp_path / "made")
    assert all(words in str(caught.value) for words in ("'../evil.py'", "'/etc/evil.py'", "'c:/x.py'"))
    twice = wheel(tmp_path / "b.whl", ("x.py", b"one"), ("x.py", b"two"), ("y", b""), ("y/z.py", b""))
    with pytest.raises(StoreError, match=r"'x.py' occurs twice; 'y' is a file and also the directory of 'y/z.py'"):
        unpack_wheel(twice, name, tmp_path / "made")
    monkeypatch.setattr(library_module, "MAX_LIBRARY", 10**6)
    bomb = wheel(tmp_path / "c.whl", ("bomb.py", b"\0" * (10**6 + 1)))
    assert bomb.stat().st_size < 10_000
    with pytest.raises(StoreError, match="unpacked it would have 977 KiB, the limit is 977 KiB"):
        unpack_wheel(bomb, name, tmp_path / "made")
    assert not os.path.lexists(str(tmp_path / "made"))
