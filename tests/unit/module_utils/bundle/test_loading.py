# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the store into an engine: what is left out of the archive, and what the archive looks like."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Iterable, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import loading
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.engine import EngineError, Known
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.loading import (
    Carried,
    archive,
    carried,
    carry_out,
    drop_layers,
    load_plan,
    look,
    shared,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import Artifact, Blob
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.pack import encode, image_manifest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trees import read_artifact

CONTENTS = [b"base" * 1000, b"server" * 500, b"settings"]
LAYERS = [Blob(hash_bytes(content), len(content)) for content in CONTENTS]
NAMES = [layer.digest for layer in LAYERS]
CONFIG = json.dumps({"rootfs": {"diff_ids": NAMES}}).encode()
MANIFEST = image_manifest(CONFIG, LAYERS, "server:1")
IMAGE = Carried(
    "server-1", "server:1", Blob(hash_bytes(MANIFEST), len(MANIFEST)), Blob(hash_bytes(CONFIG), 9), tuple(LAYERS)
)
ID = IMAGE.config.digest


def known(identity: str = ID, tags: Optional[List[str]] = None) -> Known:
    return Known(identity, ["server:1"] if tags is None else tags, NAMES, 5)


class FakeEngine:
    """An engine's answers, for planning and for what follows a load."""

    def __init__(self, images: Optional[List[Known]] = None, deltas: bool = True, says: str = "") -> None:
        self.images = images or []
        self.takes_deltas = deltas
        self.says = says
        self.loaded: List[bytes] = []

    def find(self, reference: str) -> Optional[Known]:
        return next((one for one in self.images if reference in (one.id, *one.tags)), None)

    def layers(self) -> List[List[str]]:
        return [one.layers for one in self.images]

    def load(self, content: Iterable[bytes]) -> None:
        self.loaded.append(b"".join(content))
        if self.says:
            raise EngineError(f"could not: {self.says}", self.says)
        self.images.append(known())

    def tag(self, identity: str, reference: str) -> None:
        self.images = [one._replace(tags=[*one.tags, reference]) for one in self.images]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with manifest, configuration and all layers of the image."""
    store = Store(tmp_path / "root")
    store.receive()
    for content in (MANIFEST, CONFIG, *CONTENTS):
        store.partial_path(hash_bytes(content)).write_bytes(content)
    assert keep(store, [Wanted("images", "server-1", IMAGE.manifest.digest, len(MANIFEST), tuple(NAMES))]).missing == {}
    return store


def image_of(store: Store) -> Carried:
    return carried(store, read_artifact(store, "images", "server-1", IMAGE.manifest.digest, len(MANIFEST)))


@pytest.mark.parametrize(
    ("others", "count"),
    [
        ([], 0),
        ([["x"], []], 0),
        ([NAMES[:1]], 1),
        ([NAMES[:1], NAMES[:2], ["x", *NAMES]], 2),
        ([[*NAMES, "more"]], 3),
        ([NAMES[1:], NAMES[::-1]], 0),
    ],
)
def test_only_the_lowest_layers_can_be_shared(others: List[List[str]], count: int) -> None:
    """An engine keeps a layer on top of those below it; the same layer elsewhere is of no use."""
    assert shared(NAMES, others) == count


def test_what_the_engine_has_is_left_alone() -> None:
    for identity in IMAGE.ids:
        assert load_plan(IMAGE, known(identity), [], [], False)[:1] == ("keep",)
    assert load_plan(IMAGE, known(tags=["other:1"]), [], [], False).action == "tag"


def test_layers_the_engine_has_are_not_needed() -> None:
    plan = load_plan(IMAGE, None, [NAMES[:2]], [], False)
    assert (plan.action, plan.layers, plan.missing, plan.complete) == ("load", LAYERS[2:], {NAMES[2]: 8}, False)
    assert load_plan(IMAGE, None, [NAMES[:2]], NAMES, False).missing == {}
    every = load_plan(IMAGE, None, [NAMES[:2]], NAMES[:1], True)
    assert (every.layers, sorted(every.missing), every.complete) == (LAYERS, sorted(NAMES[1:]), True)
    assert load_plan(IMAGE, None, [["x"]], [], False).complete, "nothing to leave out is complete"


def test_a_layer_used_twice_is_sent_once() -> None:
    twice = Carried("n", "n:1", IMAGE.manifest, IMAGE.config, (LAYERS[0], LAYERS[1], LAYERS[0]))
    assert load_plan(twice, None, [], [], False).layers == LAYERS[:2]


def test_an_engine_with_containerds_store_gets_whole_images(store: Store) -> None:
    image = image_of(store)
    older = Known("sha256:o", ["server:0"], NAMES[:2], 5)
    assert len(look(FakeEngine([older]), store, image, False).layers) == 1  # type: ignore[arg-type]
    assert len(look(FakeEngine([older], deltas=False), store, image, False).layers) == 3  # type: ignore[arg-type]
    by_manifest = FakeEngine([known(image.manifest.digest)], deltas=False)
    assert look(by_manifest, store, image, False).action == "keep"  # type: ignore[arg-type]


def test_the_archive_is_one_for_both_kinds_of_engine(store: Store) -> None:
    image = image_of(store)
    content = b"".join(archive(store, image, image.layers[2:]))
    with tarfile.open(fileobj=io.BytesIO(content)) as found:
        files = {entry.name: found.extractfile(entry).read() for entry in found}  # type: ignore[union-attr]
    saved = json.loads(files["manifest.json"])[0]
    assert saved["RepoTags"] == ["server:1"] and files[saved["Config"]] == CONFIG
    assert [path.rpartition("/")[2] for path in saved["Layers"]] == [name[7:] for name in NAMES]
    assert [path in files for path in saved["Layers"]] == [False, False, True]
    entry = json.loads(files["index.json"])["manifests"][0]
    assert entry["digest"] == hash_bytes(MANIFEST) and files[f"blobs/sha256/{entry['digest'][7:]}"] == MANIFEST
    assert entry["annotations"]["io.containerd.image.name"] == "server:1"
    assert len(content) % 512 == 0 and content.endswith(b"\0" * 1024)


def test_a_load_is_looked_at_afterwards(store: Store) -> None:
    image, engine = image_of(store), FakeEngine()
    done = carry_out(engine, store, image, look(engine, store, image, False))  # type: ignore[arg-type]
    assert (done.action, done.id, done.bytes) == ("load", image.config.digest, sum(map(len, CONTENTS)))

    class Forgetful(FakeEngine):
        def load(self, content: Iterable[bytes]) -> None:
            for _chunk in content:
                pass

    with pytest.raises(EngineError, match="reported no error, but server:1 is not there"):
        carry_out(Forgetful(), store, image, look(Forgetful(), store, image, False))  # type: ignore[arg-type]

    class Confused(Forgetful):
        def find(self, reference: str) -> Optional[Known]:
            return known("sha256:other") if reference == "server:1" else None

    with pytest.raises(EngineError, match="is sha256:other there instead of"):
        carry_out(Confused(), store, image, look(Confused(), store, image, False))  # type: ignore[arg-type]


def test_a_refused_part_is_not_an_error_but_a_refused_whole_is(store: Store) -> None:
    image = image_of(store)
    engine = FakeEngine([Known("sha256:o", ["server:0"], NAMES[:2], 5)], says="open layer.tar: no such file")
    outcome = carry_out(engine, store, image, look(engine, store, image, False))  # type: ignore[arg-type]
    assert (outcome.action, outcome.id, outcome.refused) == ("refused", "", "open layer.tar: no such file")
    with pytest.raises(EngineError):
        carry_out(engine, store, image, look(engine, store, image, True))  # type: ignore[arg-type]
    engine.says = "write /x: no space left on device"
    with pytest.raises(EngineError, match="no space left"):
        carry_out(engine, store, image, look(engine, store, image, False))  # type: ignore[arg-type]


def test_an_engine_that_went_away_is_not_sent_the_whole_image(store: Store) -> None:
    class Gone(FakeEngine):
        def load(self, content: Iterable[bytes]) -> None:
            raise EngineError("The Docker Engine went away")

    engine: Any = Gone([Known("sha256:o", ["server:0"], NAMES[:2], 5)])
    image = image_of(store)
    plan = look(engine, store, image, False)
    assert not plan.complete
    with pytest.raises(EngineError, match="went away"):
        carry_out(engine, store, image, plan)


def test_a_missing_name_is_given(store: Store) -> None:
    image, engine = image_of(store), FakeEngine([known(tags=[])])
    plan = look(engine, store, image, False)  # type: ignore[arg-type]
    assert plan.action == "tag" and carry_out(engine, store, image, plan).id == ID  # type: ignore[arg-type]
    assert engine.loaded == []


def test_layers_leave_the_store_and_nothing_else_does(store: Store, tmp_path: Path) -> None:
    image = image_of(store)
    catalogue = json.loads((store.state / "artifacts.json").read_text())
    assert catalogue["images"]["server-1"]["image_id"] == image.config.digest
    assert catalogue["images"]["server-1"]["reference"] == "server:1"
    model = encode({"layers": [{"digest": NAMES[0]}]})
    store.blob_path(hash_bytes(model)).write_bytes(model)
    catalogue["models"]["m"] = {"digest": hash_bytes(model)}
    (store.state / "artifacts.json").write_text(json.dumps(catalogue))
    rehearsal = Store(store.root, dry_run=True)
    assert drop_layers(rehearsal, [image]) == sum(layer.size for layer in LAYERS[1:])
    assert store.blob_path(NAMES[1]).exists()
    assert drop_layers(store, [image]) == sum(layer.size for layer in LAYERS[1:])
    assert [store.blob_path(name).exists() for name in NAMES] == [True, False, False], "a model has the first one too"
    assert store.blob_path(image.config.digest).exists() and store.blob_path(image.manifest.digest).exists()
    bare = Wanted("images", "server-1", image.manifest.digest, image.manifest.size)
    assert keep(store, [bare]).missing == {}, "without layers the image is as it shall be"
    again = keep(store, [bare._replace(layers=(NAMES[2],))])
    assert again.missing == {NAMES[2]: 8}


def test_layers_an_image_does_not_have_are_refused(store: Store) -> None:
    foreign = (hash_bytes(b"foreign"),)
    with pytest.raises(StoreError, match="has no layer sha256:"):
        keep(store, [Wanted("images", "server-1", IMAGE.manifest.digest, len(MANIFEST), foreign)])


def test_a_manifest_and_a_configuration_that_disagree_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "root")
    store.receive()
    manifest = image_manifest(CONFIG, LAYERS[:2], "server:1")
    for content in (manifest, CONFIG):
        store.partial_path(hash_bytes(content)).write_bytes(content)
    keep(store, [Wanted("images", "server-1", hash_bytes(manifest), len(manifest))])
    with pytest.raises(StoreError, match="other layers than the configuration"):
        carried(store, read_artifact(store, "images", "server-1", hash_bytes(manifest), len(manifest)))


def test_a_manifest_without_a_name_is_refused(store: Store) -> None:
    artifact = read_artifact(store, "images", "server-1", IMAGE.manifest.digest, len(MANIFEST))
    nameless = Artifact("images", "n", artifact.digest, 1, "", {}, (), artifact.blobs)
    with pytest.raises(StoreError, match="does not say what the image is called"):
        carried(store, nameless)


def test_a_blob_that_shrinks_while_it_is_read_is_an_error(store: Store) -> None:
    image = image_of(store)
    path = store.blob_path(NAMES[0])
    path.chmod(0o644)
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match="became shorter"):
        list(loading.archive(store, image, image.layers))
