# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the blobs of a store into the engine of the host: what is needed for that, and the archive that carries it.

An engine keeps a layer as part of a chain, so it has the lowest layers of an image exactly where one of its images
begins with the same ones. Only what lies above has to be sent, in an archive that leaves out the rest. An engine that
refuses such an archive gets a whole one. The archive has both forms there are: `manifest.json` for the engine's own
image store, an OCI layout for that of containerd, where the image's id is the digest of our manifest.
"""

from __future__ import annotations

import json
import tarfile
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .archive import ArchiveError, image_layers
from .digest import CHUNK
from .engine import Engine, EngineError, Known
from .layout import INDEX_FILE, LAYOUT_FILE, LAYOUT_VERSION
from .manifest import IMAGE_NAME, MEDIA_MANIFEST, Artifact, Blob
from .pack import encode
from .reference import familiar
from .store import Store, StoreError

HOPELESS = ("no space left", "disk quota", "permission denied", "read-only file system", "input/output error")
"""What an engine says when a whole archive would fare no better than a part of it."""


@dataclass(frozen=True)
class Carried:
    """An image whose manifest and configuration are in the store; `layers` from the lowest up, some may be equal."""

    name: str
    reference: str
    manifest: Blob
    config: Blob
    layers: Tuple[Blob, ...]

    @property
    def ids(self) -> Tuple[str, str]:
        """What an engine may call it: its own image store by configuration, that of containerd by manifest."""
        return self.config.digest, self.manifest.digest


class Plan(NamedTuple):
    """What has to be done: `action` is keep, tag or load; `layers` go into the archive, `missing` are not in the store.

    `known` is the image as the engine has it, `complete` whether the archive leaves nothing out.
    """

    action: str
    known: Optional[Known]
    layers: List[Blob]
    missing: Dict[str, int]
    complete: bool


class Loaded(NamedTuple):
    """What was done. `refused` is why the engine did not take an archive that leaves out what it has."""

    action: str
    id: str
    bytes: int
    seconds: float
    refused: str = ""


def carried(store: Store, artifact: Artifact) -> Carried:
    """An image of the store, after checking that configuration and manifest agree. Raises StoreError."""
    config = artifact.blobs[1]
    sizes = {layer.digest: layer.size for layer in artifact.layers}
    try:
        names = image_layers(store.blob_path(config.digest).read_bytes())
    except (OSError, ArchiveError) as error:
        raise StoreError(f"{artifact.reference}: the configuration {config.digest} is refused: {error}") from error
    if set(names) != set(sizes):
        raise StoreError(f"{artifact.reference}: the manifest has other layers than the configuration {config.digest}.")
    reference = artifact.annotations.get(IMAGE_NAME, "")
    if not reference:
        raise StoreError(f"{artifact.reference}: the manifest does not say what the image is called ({IMAGE_NAME}).")
    manifest = artifact.blobs[0]
    return Carried(artifact.name, familiar(reference), manifest, config, tuple(Blob(n, sizes[n]) for n in names))


def shared(layers: Sequence[str], others: Iterable[Sequence[str]]) -> int:
    """How many of the lowest layers some other image begins with."""
    most = 0
    for other in others:
        count = 0
        for mine, theirs in zip(layers, other):
            if mine != theirs:
                break
            count += 1
        most = max(most, count)
    return most


def load_plan(
    image: Carried, known: Optional[Known], others: Iterable[Sequence[str]], present: Iterable[str], complete: bool
) -> Plan:
    """What to do about an image. Pure.

    `known` is the image as the engine has it, `others` are the layers of all its images, `present` the digests in the
    store. With `complete` nothing is left out of the archive.
    """
    if known is not None:
        return Plan("keep" if image.reference in known.tags else "tag", known, [], {}, False)
    start = 0 if complete else shared([layer.digest for layer in image.layers], others)
    layers = list(dict.fromkeys(image.layers[start:]))
    there = set(present)
    missing = {layer.digest: layer.size for layer in layers if layer.digest not in there}
    return Plan("load", None, layers, missing, start == 0)


def look(engine: Engine, store: Store, image: Carried, complete: bool) -> Plan:
    """The plan for an image as engine and store are now."""
    known = next((found for found in map(engine.find, image.ids) if found is not None), None)
    complete = complete or (known is None and not engine.takes_deltas)
    others = [] if complete or known is not None else engine.layers()
    present = store.sound(layer.digest for layer in image.layers)
    return load_plan(image, known, others, present, complete)


def carry_out(engine: Engine, store: Store, image: Carried, plan: Plan) -> Loaded:
    """Do what a plan without missing layers says, and look at the result. Raises EngineError."""
    began = time.monotonic()
    total = 0
    if plan.action == "load":
        total = sum(layer.size for layer in plan.layers)
        try:
            engine.load(archive(store, image, plan.layers))
        except EngineError as error:
            # An engine that went away has not refused anything.
            if plan.complete or not error.said or any(words in error.said.lower() for words in HOPELESS):
                raise
            return Loaded("refused", "", 0, time.monotonic() - began, error.said)
    elif plan.action == "tag" and plan.known is not None:
        engine.tag(plan.known.id, image.reference)
    found = engine.find(image.reference)
    if found is None or found.id not in image.ids:
        has = f"is {found.id} there" if found else "is not there"
        raise EngineError(
            f"The Docker Engine reported no error, but {image.reference} {has} instead of {image.config.digest}. "
            "Look at the engine's log and at its free space, then run again."
        )
    return Loaded(plan.action, found.id, total, time.monotonic() - began)


def archive(store: Store, image: Carried, layers: Iterable[Blob]) -> Iterator[bytes]:
    """The archive of an image with these of its layers, straight from the blobs of the store."""
    names = [_path(layer.digest) for layer in image.layers]
    saved = [{"Config": _path(image.config.digest), "RepoTags": [image.reference], "Layers": names}]
    entry = {
        "mediaType": MEDIA_MANIFEST,
        "digest": image.manifest.digest,
        "size": image.manifest.size,
        "annotations": {IMAGE_NAME: image.reference, "org.opencontainers.image.ref.name": _tag(image.reference)},
    }
    yield from _document("manifest.json", encode(saved))
    yield from _document(LAYOUT_FILE, encode({"imageLayoutVersion": LAYOUT_VERSION}))
    yield from _document(INDEX_FILE, encode({"schemaVersion": 2, "manifests": [entry]}))
    for blob in (image.manifest, image.config, *layers):
        yield _header(_path(blob.digest), blob.size)
        yield from _content(store, blob)
        yield _padding(blob.size)
    yield b"\0" * tarfile.BLOCKSIZE * 2


def drop_layers(store: Store, images: Iterable[Carried]) -> int:
    """Remove the layers of images the engine has from the store; returns their bytes.

    What another artifact on the host uses too stays: its directory is made of hard links that are checked.
    """
    used = _used_elsewhere(store)
    freed = 0
    for layer in {layer for image in images for layer in image.layers}:
        for path in (store.blob_path(layer.digest), store.partial_path(layer.digest)):
            if layer.digest in used or not path.is_file():
                continue
            freed += path.stat().st_size
            if not store.dry_run:
                store.stamps.forget(path)
                path.unlink()
    return freed


def _used_elsewhere(store: Store) -> set:
    """Blobs of what the host's catalogue lists beside images."""
    try:
        content = json.loads((store.state / "artifacts.json").read_text())
    except (OSError, ValueError):
        return set()
    used: set[str] = set()
    for kind, entries in content.items():
        for entry in entries.values() if kind != "images" else ():
            try:
                manifest = json.loads(store.blob_path(entry["digest"]).read_text())
                used.update(layer["digest"] for layer in manifest["layers"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return used


def _path(digest: str) -> str:
    return f"blobs/sha256/{digest.partition(':')[2]}"


def _tag(reference: str) -> str:
    return reference.rpartition(":")[2]


def _document(name: str, content: bytes) -> Iterator[bytes]:
    yield _header(name, len(content)) + content + _padding(len(content))


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return b"\0" * (-size % tarfile.BLOCKSIZE)


def _content(store: Store, blob: Blob) -> Iterator[bytes]:
    """The bytes of a blob; exactly as many as its size says, or the archive would be garbage."""
    left = blob.size
    with store.blob_path(blob.digest).open("rb", buffering=0) as file:
        while left:
            chunk: Any = file.read(min(CHUNK, left))
            if not chunk:
                raise StoreError(f"The blob {blob.digest} in {store.root} became shorter while it was read.")
            left -= len(chunk)
            yield chunk
