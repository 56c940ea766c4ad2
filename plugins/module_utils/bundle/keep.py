# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeping artifacts on a host: one function that is asked again until nothing is missing.

`keep` takes in what was received, says what is missing, and once nothing is missing makes the directories people use.
A run that changes nothing is one call and reads no blob. The answer to "what next?" always comes from the host, so a
transfer may break off anywhere: the next question finds what arrived.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import zlib
from itertools import islice
from typing import Any, Iterable, Iterator, NamedTuple

from .deep import Deep, Reread, files, read_again
from .digest import PRIVATE, is_digest, write_atomically
from .documents import shown
from .library import distrust_library, library_is_right, library_is_sound, library_path
from .manifest import MAX_MANIFEST, Artifact, Blob, name_problem, split_reference
from .store import Store, StoreError, room_for
from .trees import LIBRARIES, TREE_KINDS, catalogue, faults, outdated, read_artifact, refresh, tree_path

SMALL_FILES = 1024 * 1024
NAMED = 20
"""Files that are named where some are not as they should be."""
ARRIVING = "arriving.json"
"""In the state directory: kind, name and digest of what is being shipped, until all of it is there."""


class Wanted(NamedTuple):
    """An artifact somebody wants on the host, as the index of a bundle names it; `size` is the manifest's, in bytes.

    Of an image only manifest and configuration are wanted, and those `layers` that are about to go to the engine.
    `manifest` may be its content, as `packed` makes it, which spares a question.
    """

    kind: str
    name: str
    digest: str
    size: int
    layers: tuple[str, ...] = ()
    manifest: str | None = None


class Answer(NamedTuple):
    """What is on the host now.

    `missing` and `partial` are sizes by digest, `damaged` reasons by digest, `paths` what was made (or would be) below
    the root, `artifacts` the content of artifacts.json when nothing is missing. `given_bytes` are those of manifests
    that came with the question and were lacking. `faults` are files of directories, some of those that a deep
    verification found to be others than they should be.
    """

    changed: bool
    missing: dict[str, int]
    partial: dict[str, int]
    damaged: dict[str, str]
    paths: list[str]
    artifacts: dict[str, Any]
    reread: Reread | None = None
    given_bytes: int = 0
    faults: tuple[str, ...] = ()


def packed(manifest: bytes) -> str:
    """The content of a manifest as it goes with a question."""
    return base64.b64encode(zlib.compress(manifest)).decode("ascii")


def keep(store: Store, wanted: Iterable[Wanted], owner: int | None = None, deep: Deep | None = None) -> Answer:
    """Bring the store as near to `wanted` as what was received allows.

    While blobs are missing, the receiving area is made ready for user id `owner`. Manifests come first: only they tell
    which blobs an artifact needs. With `deep`, what is there is read again first. Raises StoreError for a request that
    cannot be right.
    """
    wanted = list(wanted)
    _refuse(_request_problems(wanted))
    # What is written beside blobs and trees is small: stamps and lists.
    with room_for(store.root, SMALL_FILES), store.locked():
        if deep and not deep.after:
            read_again(store, files(store, [], [(entry.digest, entry.size) for entry in wanted]), Deep())
        given = _put_manifests(store, wanted)
        manifests = store.inventory({entry.digest: entry.size for entry in wanted})
        there = [entry for entry in wanted if entry.digest not in manifests.missing]
        artifacts = _read_all(store, there)
        needed = [blob for entry, artifact in zip(there, artifacts) for blob in _needed(entry, artifact)]
        reread = None
        if deep:
            reread = read_again(store, files(store, artifacts, needed), deep)
        blobs = store.inventory({blob.digest: blob.size for blob in needed})
        missing = {**manifests.missing, **blobs.missing}
        damaged = {**manifests.damaged, **blobs.damaged}
        paths: list[str] = []
        wrong: tuple[str, ...] = ()
        if not missing:
            wrong = tuple(islice(_faults(store, artifacts), NAMED)) if deep else ()
            doubted = _doubt_library(store, artifacts) if reread and not reread.after else []
            paths = outdated(store, artifacts) + doubted if store.dry_run else refresh(store, artifacts)
        elif not store.dry_run:
            store.receive(owner)
        _note_arriving(store, wanted if missing else [])
        return Answer(
            changed=bool(store.adopted or paths or missing or damaged),
            missing=missing,
            partial={**manifests.partial, **blobs.partial},
            damaged=damaged,
            paths=paths,
            artifacts={} if missing else catalogue(store, _in_order(artifacts)),
            reread=reread,
            given_bytes=given,
            faults=wrong,
        )


def _faults(store: Store, artifacts: list[Artifact]) -> Iterator[str]:
    """Files of directories that are there and are not as they should be."""
    for artifact in artifacts:
        if artifact.kind in TREE_KINDS and tree_path(store, artifact).is_dir():
            yield from (f"{artifact.reference}: {fault}" for fault in faults(store, artifact))


def _put_manifests(store: Store, wanted: list[Wanted]) -> int:
    """Treat manifests that came with the question as received, where they are lacking; how many bytes they have."""
    given = 0
    for entry in wanted:
        if entry.manifest is None or store.dry_run or store.has(entry.digest):
            continue
        try:
            # No more than it should be, whatever it would unfold to.
            content = zlib.decompressobj().decompress(base64.b64decode(entry.manifest), entry.size + 1)
        except (ValueError, zlib.error):
            continue
        store.put(entry.digest, content)
        given += len(content)
    return given


def _doubt_library(store: Store, artifacts: list[Artifact]) -> list[str]:
    """Have an unpacked library made again whose files are not those of its wheels; its path if it looked whole."""
    found = [artifact for artifact in artifacts if (artifact.kind, artifact.name) == LIBRARIES]
    doubted = [one for one in found if library_is_right(store, one) and not library_is_sound(store, one)]
    for artifact in doubted if not store.dry_run else ():
        distrust_library(store, artifact)
    return [str(library_path(store, artifact)) for artifact in doubted]


def _note_arriving(store: Store, wanted: list[Wanted]) -> None:
    """Leave word of what is being shipped, so that cleaning up does not take it for what nobody wants."""
    path = store.state / ARRIVING
    if store.dry_run:
        return
    if wanted:
        rows = [{"kind": entry.kind, "name": entry.name, "digest": entry.digest} for entry in wanted]
        write_atomically(path, json.dumps(rows).encode() + b"\n", PRIVATE)
    elif path.exists():
        path.unlink()


def _request_problems(wanted: list[Wanted]) -> Iterator[str]:
    """What is wrong with a request by itself; whoever sends one may have believed a bundle that lies."""
    seen: set[str] = set()
    for entry in wanted:
        reference = f"{entry.kind}/{entry.name}"
        if split_reference(reference) is None:
            yield f"{shown(reference)}: {name_problem(entry.name) or f'{shown(entry.kind)} is not a kind'}"
        if reference in seen:
            yield f"{shown(reference)} is asked for twice"
        seen.add(reference)
        for digest in (entry.digest, *entry.layers):
            if not is_digest(digest):
                yield f"{shown(reference)}: {shown(digest)} is not a digest (sha256:<64 hex digits>)"
        if not isinstance(entry.size, int) or not 0 <= entry.size <= MAX_MANIFEST:
            yield f"{shown(reference)}: {shown(entry.size)} is not the size of a manifest"


def _read_all(store: Store, wanted: list[Wanted]) -> list[Artifact]:
    """The artifacts whose manifests are in the store. Raises StoreError with all that is wrong with any of them."""
    artifacts, problems = [], []
    sizes: dict[str, int] = {}
    for entry in wanted:
        try:
            artifacts.append(read_artifact(store, *entry[:4]))
        except StoreError as error:
            problems.append(str(error))
    for artifact in artifacts:
        for digest, size in artifact.blobs:
            known = sizes.setdefault(digest, size)
            if known != size:
                problems.append(f"{artifact.reference}: {digest} is {size} bytes here and {known} elsewhere")
            elif _has_another_size(store, digest, size):
                problems.append(
                    f"{artifact.reference}: {digest} has another size than the {size} bytes of the manifest"
                )
    _refuse(problems)
    return artifacts


def _has_another_size(store: Store, digest: str, size: int) -> bool:
    """Whether a good blob of the store gives the lie to a manifest; a blob that is damaged gives it to nobody."""
    path = f"{store.blobs}/{digest[len('sha256:') :]}"
    try:
        status = os.lstat(path)
        return status.st_size != size and stat.S_ISREG(status.st_mode) and store.stamps.digest_of(path) == digest
    except OSError:
        return False


def _refuse(problems: Iterable[str]) -> None:
    """Raise StoreError when there are problems, with all of them."""
    found = list(problems)
    if found:
        raise StoreError("; ".join(found) + ". Nothing of it was taken.")


def _needed(wanted: Wanted, artifact: Artifact) -> list[Blob]:
    """The blobs of an artifact that are wanted."""
    layers = {layer.digest for layer in artifact.layers}
    unknown = set(wanted.layers) - layers
    if unknown:
        raise StoreError(f"{artifact.reference} has no layer {', '.join(sorted(unknown))}.")
    return [blob for blob in artifact.blobs if blob.digest not in layers - set(wanted.layers)]


def _in_order(artifacts: list[Artifact]) -> list[Artifact]:
    return sorted(artifacts, key=lambda artifact: (artifact.kind, artifact.name))
