# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store of a host: only what was verified gets in, and what is in is not read again."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import library as library_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import store as store_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.deep import Deep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep, packed
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.library import unpack_wheel
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trees import faults

CONTENT = b"weights" * 1000
DIGEST = hash_bytes(CONTENT)
WANTED = {DIGEST: len(CONTENT)}
ABSENT = hash_bytes(b"never sent")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "root")
    made.receive()
    return made


def receive(store, digest, content):
    """Put bytes where a transport would."""
    store.partial_path(digest).write_bytes(content)


def look(store, wanted):
    with store.locked():
        return store.inventory(wanted)


def test_a_received_blob_is_verified_renamed_and_stamped(store):
    receive(store, DIGEST, CONTENT)
    found = look(store, WANTED)
    assert (found.missing, found.partial, found.damaged) == ({}, {}, {})
    blob = store.blob_path(DIGEST)
    assert blob.read_bytes() == CONTENT and stat.S_IMODE(blob.stat().st_mode) == 0o444
    assert not store.partial_path(DIGEST).exists()
    assert (store.adopted, store.hashed_bytes) == (1, len(CONTENT))

    again = Store(store.root)
    assert look(again, WANTED).missing == {} and (again.adopted, again.hashed_bytes) == (0, 0)


def test_a_received_file_that_does_not_verify_is_dropped_and_named(store):
    receive(store, DIGEST, b"x" * len(CONTENT))
    found = look(store, WANTED)
    assert found.missing == WANTED and found.partial == {}
    assert "content received is sha256:" in found.damaged[DIGEST]
    assert not store.partial_path(DIGEST).exists() and not store.blob_path(DIGEST).exists()


def test_an_unfinished_file_stays_and_a_too_long_one_goes(store):
    receive(store, DIGEST, CONTENT[:100])
    assert look(store, WANTED).partial == {DIGEST: 100}
    assert store.partial_path(DIGEST).stat().st_size == 100
    receive(store, DIGEST, CONTENT + b"more")
    found = look(store, WANTED)
    assert found.partial == {} and "more than" in found.damaged[DIGEST]


@pytest.mark.parametrize("harm", ["content", "length", "link"])
def test_a_blob_that_was_changed_in_the_store_is_found_without_being_asked(store, harm, tmp_path):
    receive(store, DIGEST, CONTENT)
    look(store, WANTED)
    blob = store.blob_path(DIGEST)
    blob.chmod(0o644)
    if harm == "content":
        blob.write_bytes(b"y" * len(CONTENT))
    elif harm == "length":
        blob.write_bytes(b"short")
    else:
        (tmp_path / "elsewhere").write_bytes(CONTENT)
        blob.unlink()
        blob.symlink_to(tmp_path / "elsewhere")
    found = look(Store(store.root), WANTED)
    assert found.missing == WANTED and DIGEST in found.damaged and not os.path.lexists(blob)


def test_without_stamps_a_blob_is_read_once_more_and_believed_again(store):
    receive(store, DIGEST, CONTENT)
    look(store, WANTED)
    (store.state / "stamps.json").write_text("{ not json")
    again = Store(store.root)
    assert look(again, WANTED).missing == {} and again.hashed_bytes == len(CONTENT)
    third = Store(store.root)
    assert look(third, WANTED).missing == {} and third.hashed_bytes == 0


def test_links_in_the_receiving_area_are_not_followed(store, tmp_path):
    (tmp_path / "secret").write_bytes(CONTENT)
    store.partial_path(DIGEST).symlink_to(tmp_path / "secret")
    assert look(store, WANTED).missing == WANTED
    store.partial_path(DIGEST).unlink()
    os.link(str(tmp_path / "secret"), str(store.partial_path(DIGEST)))
    found = look(store, WANTED)
    assert "second name" in found.damaged[DIGEST] and (tmp_path / "secret").read_bytes() == CONTENT


def pack(entries):
    """A tar in memory; an entry is a name and content, or a ready TarInfo."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_a_pack_gives_its_blobs_and_goes(store):
    small = {hash_bytes(name): name for name in (b"one", b"two", b"")}
    content = [(digest.partition(":")[2], data) for digest, data in small.items()]
    (store.partial / "pack-0001.tar").write_bytes(pack(content))
    found = look(store, {digest: len(data) for digest, data in small.items()})
    assert found.missing == {} and store.adopted == 3 and list(store.partial.iterdir()) == []


def test_a_pack_that_was_cut_gives_what_it_has(store):
    first, second = b"a" * 4000, b"b" * 4000
    wanted = {hash_bytes(data): len(data) for data in (first, second)}
    whole = pack([(hash_bytes(data).partition(":")[2], data) for data in (first, second)])
    (store.partial / "pack-0001.tar").write_bytes(whole[:6000])
    found = look(store, wanted)
    assert list(found.missing) == [hash_bytes(second)] and not (store.partial / "pack-0001.tar").exists()


def test_a_pack_cannot_write_outside_the_receiving_area(store, tmp_path):
    link = tarfile.TarInfo(DIGEST.partition(":")[2])
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "target")
    entries = [("../../escaped", b"x"), (str(tmp_path / "absolute"), b"x"), ("0" * 64 + "/../../x", b"x"), (link, b"")]
    (store.partial / "pack-0001.tar").write_bytes(pack(entries))
    assert look(store, WANTED).missing == WANTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
    assert list(store.partial.iterdir()) == []


def full_disk(*_anything):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_pack_that_does_not_fit_stays_and_is_told_in_numbers(store, monkeypatch):
    received = store.partial / "pack-0001.tar"
    received.write_bytes(pack([(DIGEST.partition(":")[2], CONTENT)]))
    monkeypatch.setattr(store_module, "_write_new", full_disk)
    needed = size_text(received.stat().st_size)
    with pytest.raises(StoreError, match=f"The disk is full: {store.partial} needs {needed}, .* are free"):
        look(store, WANTED)
    monkeypatch.undo()
    assert look(store, WANTED).missing == {} and not received.exists()


BAD_DIGESTS = ["sha256:../../etc/passwd", "md5:00", "sha256:" + "0" * 63, "", "sha256:" + "A" * 64]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_what_is_not_a_digest_never_becomes_a_path(store, digest):
    with pytest.raises(StoreError, match="is not a digest"):
        store.blob_path(digest)


def test_a_root_that_is_relative_or_an_area_that_is_a_link_is_refused(tmp_path):
    with pytest.raises(StoreError, match="absolute"):
        Store("some/where")
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "other").mkdir()
    (root / "blobs").symlink_to(tmp_path / "other")
    with pytest.raises(StoreError, match="plain directory"):
        Store(root).receive()


def test_a_dry_run_writes_nothing_at_all(tmp_path):
    store = Store(tmp_path / "root", dry_run=True)
    assert look(store, WANTED).missing == WANTED
    assert list(tmp_path.iterdir()) == []


# --- whole artifacts --------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    """A bundle with a model and the host's libraries."""
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    for name, content in {"weights.bin": CONTENT, "deep/config.json": b"{}", "empty": b""}.items():
        (model / name).write_bytes(content)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(str(wheels / "kindly-1.0-py3-none-any.whl"), "w") as archive:
        archive.writestr("kindly/__init__.py", "NAME = 'kindly'\n")
        archive.writestr("kindly-1.0.data/purelib/extra.py", "")
        archive.writestr("certifi/cacert.pem", "the world's authorities\n")
        archive.writestr("kindly-1.0.data/scripts/run", "")
    requests = [Request("models", "m", str(model)), Request("wheels", "host", str(wheels))]
    write_bundle(tmp_path / "bundle", requests)
    return Bundle.open(tmp_path / "bundle")


def wanted_of(bundle):
    sizes = bundle.blobs
    return [Wanted(entry.kind, entry.name, entry.digest, sizes[entry.digest]) for entry in bundle.artifacts]


def deliver(bundle, root, dry_run=False):
    """Ask and send until nothing is missing; the last answer and the number of questions."""
    for questions in range(1, 10):
        store = Store(root, dry_run)
        answer = keep(store, wanted_of(bundle))
        if not answer.missing or dry_run:
            return answer, store, questions
        for digest in answer.missing:
            receive(store, digest, bundle.blob_path(digest).read_bytes())
    raise AssertionError("never complete")


def test_artifacts_become_trees_a_library_and_a_catalogue(bundle, tmp_path):
    root = tmp_path / "root"
    answer, store, questions = deliver(bundle, root)
    assert answer.changed and questions == 3
    listed = json.loads((root / "state/artifacts.json").read_text())
    assert listed == answer.artifacts and set(listed) == {"models", "wheels", "tools", "images"}
    tree = Path(listed["models"]["m"]["path"])
    assert tree == root / "models/m" / bundle.find("models", "m").digest[7:19]
    assert (tree / "weights.bin").read_bytes() == CONTENT and (tree / "deep/config.json").read_bytes() == b"{}"
    assert (tree / "weights.bin").stat().st_ino == store.blob_path(DIGEST).stat().st_ino
    library = root / "lib/python"
    assert (library / "kindly/__init__.py").is_file() and (library / "extra.py").is_file()
    assert not (library / "run").exists() and library.is_symlink()

    answer, store, questions = deliver(bundle, root)
    assert (answer.changed, answer.paths, store.hashed_bytes, questions) == (False, [], 0, 1)


def test_a_dry_run_says_what_would_be_made(bundle, tmp_path):
    root = tmp_path / "root"
    answer, _store, _questions = deliver(bundle, root, dry_run=True)
    assert answer.changed and len(answer.missing) == 2 and not root.exists()
    deliver(bundle, root)
    tree = root / "models/m" / bundle.find("models", "m").digest[7:19]
    (tree / "empty").unlink()
    answer, _store, _questions = deliver(bundle, root, dry_run=True)
    assert answer.paths == [str(tree)] and not (tree / "empty").exists()


@pytest.mark.parametrize("harm", ["file gone", "file replaced", "tree gone", "half built", "link moved", "catalogue"])
def test_what_was_made_is_made_again_when_it_is_not_right(bundle, tmp_path, harm):
    root = tmp_path / "root"
    deliver(bundle, root)
    tree = root / "models/m" / bundle.find("models", "m").digest[7:19]
    if harm == "file gone":
        (tree / "weights.bin").unlink()
    elif harm == "file replaced":
        (tree / "weights.bin").unlink()
        (tree / "weights.bin").write_bytes(CONTENT)
    elif harm in ("tree gone", "half built"):
        tree.rename(tree.with_name(f".{tree.name}.new" if harm == "half built" else "away"))
    elif harm == "link moved":
        (root / "lib/python").unlink()
        (root / "lib/python").symlink_to("nowhere")
    else:
        (root / "state/artifacts.json").write_text("{}")
    answer, store, _questions = deliver(bundle, root)
    assert answer.changed and len(answer.paths) == 1 and store.hashed_bytes == 0
    assert (tree / "weights.bin").read_bytes() == CONTENT and (root / "lib/python/extra.py").is_file()
    assert not tree.with_name(f".{tree.name}.new").exists()
    assert deliver(bundle, root)[0].changed is False


@pytest.mark.parametrize("harm", ["cut", "gone", "changed", "extra", "bytecode", "listing"])
def test_a_damaged_library_is_unpacked_again(bundle, tmp_path, harm):
    root = tmp_path / "root"
    deliver(bundle, root)
    library = (root / "lib/python").resolve()
    module = library / "kindly/__init__.py"
    if harm == "cut":
        module.write_bytes(module.read_bytes()[:3])
    elif harm == "gone":
        module.unlink()
    elif harm == "changed":
        module.write_text("NAME = 'KINDLY'\n")
    elif harm == "extra":
        (library / "sitecustomize.py").touch()
    elif harm == "bytecode":
        next((library / "kindly/__pycache__").iterdir()).write_bytes(b"")
    else:
        library.with_name(f".{library.name}.json").write_text("[]")
    answer, store, _questions = deliver(bundle, root)
    assert answer.changed and answer.paths == [str(library)] and store.hashed_bytes == 0
    assert module.read_text() == "NAME = 'kindly'\n" and not (library / "sitecustomize.py").exists()
    assert deliver(bundle, root)[0].changed is False


def test_bytecode_of_another_python_is_no_damage(bundle, tmp_path):
    root = tmp_path / "root"
    deliver(bundle, root)
    (root / "lib/python/kindly/__pycache__/__init__.cpython-399.pyc").touch()
    (root / "models/m" / bundle.find("models", "m").digest[7:19] / "__pycache__").mkdir()
    assert deliver(bundle, root)[0].changed is False


def test_authorities_that_a_site_adds_stay(bundle, tmp_path):
    root = tmp_path / "root"
    deliver(bundle, root)
    with (root / "lib/python/certifi/cacert.pem").open("a") as authorities:
        authorities.write("and the site's own\n")
    assert deliver(bundle, root)[0].changed is False
    (root / "lib/python/certifi/cacert.pem").unlink()
    assert deliver(bundle, root)[0].changed is True


def test_a_tree_or_library_that_does_not_fit_is_told_in_numbers(bundle, tmp_path, monkeypatch):
    root = tmp_path / "root"
    deliver(bundle, root)
    (root / "lib/python/extra.py").unlink()
    monkeypatch.setattr(library_module, "unpack_wheel", full_disk)
    with pytest.raises(StoreError, match=rf"{root}/lib/\w+ needs .*xinference_root"):
        deliver(bundle, root)


@pytest.mark.parametrize("kind", ["file", "link", "link to a directory"])
def test_what_does_not_belong_into_a_tree_goes(bundle, tmp_path, kind):
    root = tmp_path / "root"
    deliver(bundle, root)
    tree = root / "models/m" / bundle.find("models", "m").digest[7:19]
    extra = tree / "deep/extra.json"
    if kind == "file":
        extra.write_text("{}")
    else:
        extra.symlink_to("config.json" if kind == "link" else "..")
    answer, _store, _questions = deliver(bundle, root)
    assert answer.paths == [str(tree)] and not os.path.lexists(extra)
    assert deliver(bundle, root)[0].changed is False


def test_each_file_of_a_directory_that_is_another_is_named(bundle, tmp_path):
    root = tmp_path / "root"
    answer, store, _questions = deliver(bundle, root)
    tree = Path(answer.artifacts["models"]["m"]["path"])
    model = bundle.find("models", "m")
    assert list(faults(store, model)) == []
    weights = (tree / "weights.bin").read_bytes()
    for name, content in (("weights.bin", weights[::-1]), ("deep/config.json", b"{ }"), ("more.txt", b"")):
        (tree / name).unlink(missing_ok=True)
        (tree / name).write_bytes(content)
    (tree / "empty").unlink()
    found = ["deep/config.json has 3 bytes instead of 2", "empty is missing", "weights.bin was replaced"]
    assert sorted(faults(store, model)) == sorted([*found, "more.txt does not belong to it"])
    # Whoever reads everything again, in check mode too, is told of them, and then they are right.
    store = Store(root, dry_run=True)
    told = keep(store, wanted_of(bundle), None, Deep()).faults
    assert "models/m: weights.bin has other content" in told and "models/m: empty is missing" in told
    assert keep(Store(root), wanted_of(bundle), None, Deep()).faults == told
    assert keep(Store(root), wanted_of(bundle), None, Deep()).faults == ()
    shutil.rmtree(tree)
    assert list(faults(store, model)) == ["the directory is missing"]


def test_trees_are_copies_where_the_file_system_gives_no_second_name(bundle, tmp_path, monkeypatch):
    def refuse(*_paths):
        raise OSError(31, "Too many links")

    monkeypatch.setattr(os, "link", refuse)
    answer, _store, _questions = deliver(bundle, tmp_path / "root")
    tree = Path(answer.artifacts["models"]["m"]["path"])
    assert (tree / "weights.bin").read_bytes() == CONTENT and (tree / "weights.bin").stat().st_nlink == 1
    answer, store, _questions = deliver(bundle, tmp_path / "root")
    assert (answer.changed, store.hashed_bytes) == (False, 0)


def test_the_catalogue_lists_what_was_shipped_last_and_older_trees_stay(bundle, tmp_path):
    root = tmp_path / "root"
    deliver(bundle, root)
    only = [entry for entry in wanted_of(bundle) if entry.kind == "wheels"]
    answer = keep(Store(root), only)
    assert answer.changed and answer.artifacts["models"] == {}
    assert (root / "models/m").is_dir()


@pytest.mark.parametrize(("kind", "name"), [("models", "../x"), ("..", "m"), ("models", "a/b"), ("models", "")])
def test_a_name_that_would_leave_the_store_is_refused(tmp_path, kind, name):
    with pytest.raises(StoreError):
        keep(Store(tmp_path / "root"), [Wanted(kind, name, ABSENT, 10)])


@pytest.mark.parametrize("path", ["../out", "/etc/x", "a/../../b"])
def test_a_manifest_with_a_path_out_of_its_tree_is_refused(tmp_path, path):
    blob = {"mediaType": "x", "digest": DIGEST, "size": len(CONTENT)}
    layer = {**blob, "annotations": {"org.cncf.model.filepath": path}}
    raw = json.dumps({"schemaVersion": 2, "config": blob, "layers": [layer]}).encode()
    store = Store(tmp_path / "root")
    store.receive()
    receive(store, hash_bytes(raw), raw)
    with pytest.raises(StoreError, match="refused"):
        keep(store, [Wanted("models", "m", hash_bytes(raw), len(raw))])
    assert not (tmp_path / "root/models").exists()


def test_wheels_with_compiled_code_or_unsafe_paths_are_refused(tmp_path):
    with zipfile.ZipFile(str(tmp_path / "w.whl"), "w") as archive:
        archive.writestr("../evil.py", "")
    with pytest.raises(StoreError, match="pure Python"):
        unpack_wheel(tmp_path / "w.whl", "w-1.0-cp311-cp311-linux_x86_64.whl", tmp_path / "t")
    with pytest.raises(StoreError, match="refused"):
        unpack_wheel(tmp_path / "w.whl", "w-1.0-py3-none-any.whl", tmp_path / "t")
    assert not (tmp_path / "evil.py").exists()
    with zipfile.ZipFile(str(tmp_path / "w.whl"), "w") as archive:
        link = zipfile.ZipInfo("link.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(StoreError, match=r"link\.py is a link"):
        unpack_wheel(tmp_path / "w.whl", "w-1.0-py3-none-any.whl", tmp_path / "t")
    (tmp_path / "w.whl").write_bytes(b"no zip")
    with pytest.raises(StoreError, match="not a wheel"):
        unpack_wheel(tmp_path / "w.whl", "w-1.0-py3-none-any.whl", tmp_path / "t")


def test_a_manifest_that_comes_with_the_question_spares_one(tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    (place / "file").write_bytes(CONTENT)
    write_bundle(tmp_path / "bundle", [Request("models", "m", str(place))])
    bundle = Bundle.open(tmp_path / "bundle")
    entry = bundle.artifacts[0]
    path = bundle.blob_path(entry.digest)
    wanted = Wanted(entry.kind, entry.name, entry.digest, path.stat().st_size, manifest=packed(path.read_bytes()))
    store = Store(tmp_path / "root")
    answer = keep(store, [wanted])
    assert answer.given_bytes == wanted.size and entry.digest not in answer.missing
    assert answer.missing == {digest: size for digest, size in entry.blobs if digest != entry.digest}
    assert keep(Store(tmp_path / "root"), [wanted]).given_bytes == 0
    # What is not what it is called is not taken, and neither is what unfolds to more than it should be.
    for number, content in enumerate((b"x" * wanted.size, b"x" * 10_000_000, b"short")):
        store = Store(tmp_path / f"other{number}")
        answer = keep(store, [wanted._replace(manifest=packed(content))])
        assert entry.digest in answer.missing and not store.has(entry.digest)
        assert sum(file.stat().st_size for file in store.partial.iterdir()) <= wanted.size + 1
    answer = keep(Store(tmp_path / "odd"), [wanted._replace(manifest="no base64")])
    assert answer.given_bytes == 0 and entry.digest in answer.missing
    assert keep(Store(tmp_path / "dry", dry_run=True), [wanted]).missing and not (tmp_path / "dry").exists()
