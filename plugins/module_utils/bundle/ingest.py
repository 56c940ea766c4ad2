# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Making a bundle hold exactly the artifacts asked for.

Blobs come first, then the index in one atomic step, then blobs nobody refers to are dropped: whoever reads the bundle
at any moment finds the old one or the new one, complete.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

from .archive import Image
from .digest import Progress, Stamps, device_of, free_bytes, hash_bytes, write_atomically
from .images import ImageRequest, Memory, store_image
from .layout import INDEX_FILE, LAYOUT_FILE, LAYOUT_VERSION, BundleError, blob_path, cache_dir, index_lines
from .lock import locked
from .manifest import (
    EMPTY_CONFIG,
    IMAGE_NAME,
    IMAGES,
    TYPE_FILES,
    TYPE_MODEL,
    File,
    is_text_map,
    name_problem,
    split_reference,
)
from .pack import encode, files_manifest, image_manifest, index, index_entry, model_config, model_manifest
from .reference import image_name, reference_problem
from .scan import SourceFile, scan
from .sizes import size_text
from .writer import BlobWriter, same_content


@dataclass(frozen=True)
class Request:
    """An artifact to be in the bundle: the file or directory `path` under ``<kind>/<name>``.

    Kind `models` makes a ModelPack manifest, any other an ORAS one. `annotations` go into the manifest, so they must
    not contain anything that differs from build to build.
    """

    kind: str
    name: str
    path: str
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The artifact's name in the index."""
        return f"{self.kind}/{self.name}"


@dataclass
class Written:
    """An artifact as it is in the bundle; digest is empty when check mode would have had to hash to know it."""

    kind: str
    name: str
    digest: str
    files: int
    size: int
    annotations: dict[str, str]


@dataclass
class Outcome:
    """What `write_bundle` did, sizes in bytes; `before` and `after` are one line for each artifact."""

    changed: bool
    artifacts: list[Written]
    before: list[str]
    after: list[str]
    hashed_bytes: int = 0
    linked_bytes: int = 0
    copied_bytes: int = 0
    dropped_bytes: int = 0


def write_bundle(
    path: str | os.PathLike[str],
    requests: list[Request],
    cache: str | os.PathLike[str] | None = None,
    check: bool = False,
    progress: Progress | None = None,
    images: Sequence[ImageRequest] = (),
) -> Outcome:
    """Make the bundle at `path` hold exactly `requests` and `images`; with `check` say what would happen.

    `cache` is the directory of the stamps (default: beside the bundle). Raises BundleError, before anything is
    written, with everything that is wrong with any request, or with too little disk, or when another build is running.
    An image that turns out to be bad while it is read leaves the bundle's index as it was.
    """
    root = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100
    cache = Path(cache) if cache else cache_dir(root)
    sources = _gather(root, requests, images)
    stamps = Stamps(cache / "stamps.json")
    memory = Memory(cache / "images.json")
    if check:
        return _plan(root, stamps, requests, sources, memory, images)
    with locked(cache / "build.lock", f"another build of {root} is running"):
        _check_space(root, stamps, [file for files in sources for file in files])
        writer = BlobWriter(root, stamps, progress)
        try:
            return _write(writer, requests, sources, memory, images)
        finally:
            writer.remove_partials()
            stamps.save()
            memory.save([image.reference for image in images])


def _gather(root: Path, requests: list[Request], images: Sequence[ImageRequest]) -> list[list[SourceFile]]:
    """The files of every request, or one BundleError about all of them."""
    problems: list[str] = []
    seen: set[str] = set()
    sources: list[list[SourceFile]] = []
    if root.is_dir() and not (root / LAYOUT_FILE).exists() and any(entry.name != "blobs" for entry in root.iterdir()):
        problems.append(f"{root} is not empty and not a bundle; choose an empty or a new directory")
    for request in requests:
        found: list[str] = []
        if split_reference(request.reference) is None:
            found.append(name_problem(request.name) or f"{request.kind!r} is not a kind of artifact (a-z, 0-9)")
        if request.reference in seen:
            found.append("asked for twice")
        seen.add(request.reference)
        if not is_text_map(request.annotations):
            found.append("annotations must be strings")
        sources.append(scan(request.path, found))
        problems.extend(f"{request.reference}: {problem}" for problem in found)
    for image in images:
        problem = reference_problem(image.wanted)
        problem = problem or ("asked for twice" if image.reference in seen else image.origin.problem())
        seen.add(image.reference)
        if problem:
            problems.append(f"image {image.wanted}: {problem}")
    if problems:
        raise BundleError(f"The bundle {root} was not touched ({len(problems)} found wrong):", problems)
    return sources


def _check_space(root: Path, stamps: Stamps, files: list[SourceFile]) -> None:
    """Refuse to start a copy that cannot end: files of another file system need room for all that is not there yet."""
    place = root
    while not place.exists():
        place = place.parent
    device = device_of(place)
    needed = 0
    for file in files:
        digest = stamps.vouches(file.location)
        present = digest is not None and blob_path(root, digest).exists()
        if not present and device_of(file.location) != device:
            needed += file.size
    free = free_bytes(root)
    if needed > free:
        raise BundleError(
            f"The bundle {root} needs {size_text(needed)} more and its file system has {size_text(free)} free. "
            "Free some space or choose another directory."
        )


def _plan(
    root: Path,
    stamps: Stamps,
    requests: list[Request],
    sources: list[list[SourceFile]],
    memory: Memory,
    images: Sequence[ImageRequest],
) -> Outcome:
    """What a build would do, as far as stamps tell; nothing is hashed."""
    entries = []
    artifacts = []
    missing = False
    for request, files in zip(requests, sources):
        digests = [stamps.vouches(file.location) for file in files]
        listed = [File(file.path, digest, file.size) for file, digest in zip(files, digests) if digest]
        entry = None
        if len(listed) == len(files):
            artifact_type, manifest, _config = _documents(request, listed)
            entry = index_entry(request.reference, artifact_type, manifest)
            entries.append(entry)
            missing = missing or any(stamps.vouches(blob_path(root, file.digest)) != file.digest for file in listed)
        artifacts.append(_written(request, files, entry))
    for wanted in images:
        image = memory.recall(wanted, root, stamps)
        if image is not None:
            entries.append(_image_entry(wanted, image)[0])
        artifacts.append(_written_image(wanted, image))
    complete = len(entries) == len(requests) + len(images) and not missing
    same = complete and same_content(root / INDEX_FILE, index(entries))
    return Outcome(not same, artifacts, index_lines(root), _lines_of(artifacts))


def _write(
    writer: BlobWriter,
    requests: list[Request],
    sources: list[list[SourceFile]],
    memory: Memory,
    images: Sequence[ImageRequest],
) -> Outcome:
    """Write blobs, manifests and index, and drop what is no longer used."""
    before = index_lines(writer.root)
    digests = writer.store_files([file for files in sources for file in files])
    entries = []
    artifacts = []
    for request, files in zip(requests, sources):
        listed = [File(file.path, digests[file.location], file.size) for file in files]
        artifact_type, manifest, config = _documents(request, listed)
        writer.store_bytes(config)
        writer.store_bytes(manifest)
        entry = index_entry(request.reference, artifact_type, manifest)
        entries.append(entry)
        artifacts.append(_written(request, files, entry))
    for wanted in images:
        image = store_image(writer, memory, wanted)
        entry, manifest = _image_entry(wanted, image)
        writer.store_bytes(image.config)
        writer.store_bytes(manifest)
        entries.append(entry)
        artifacts.append(_written_image(wanted, image))
    content = index(entries)
    changed = not same_content(writer.root / INDEX_FILE, content)
    write_atomically(writer.root / LAYOUT_FILE, encode({"imageLayoutVersion": LAYOUT_VERSION}))
    write_atomically(writer.root / INDEX_FILE, content)
    dropped = writer.drop_unused()
    return Outcome(
        changed=changed or writer.wrote,
        artifacts=artifacts,
        before=before,
        after=_lines_of(artifacts),
        hashed_bytes=writer.stamps.hashed_bytes,
        linked_bytes=writer.linked,
        copied_bytes=writer.copied,
        dropped_bytes=dropped,
    )


def _documents(request: Request, files: list[File]) -> tuple[str, bytes, bytes]:
    """Artifact type, manifest and configuration of a request whose digests are known."""
    if request.kind == "models":
        config = model_config(request.name, files, request.annotations)
        return TYPE_MODEL, model_manifest(files, config, request.annotations), config
    return TYPE_FILES, files_manifest(files, request.annotations), EMPTY_CONFIG


def _written(request: Request, files: list[SourceFile], entry: dict[str, Any] | None) -> Written:
    digest = str(entry["digest"]) if entry else ""
    size = sum(file.size for file in files)
    return Written(request.kind, request.name, digest, len(files), size, dict(request.annotations))


def _image_entry(request: ImageRequest, image: Image) -> tuple[dict[str, Any], bytes]:
    """The index entry and the manifest of an image."""
    manifest = image_manifest(image.config, image.layers, request.image)
    return index_entry(request.reference, "", manifest), manifest


def _written_image(request: ImageRequest, image: Image | None) -> Written:
    """An image in the list of artifacts; nothing but its name is known before it was read."""
    name, annotations = image_name(request.wanted), {IMAGE_NAME: request.image}
    if image is None:
        return Written(IMAGES, name, "", 0, 0, annotations)
    layers = set(image.layers)
    digest = hash_bytes(image_manifest(image.config, image.layers, request.image))
    return Written(IMAGES, name, digest, len(layers), sum(layer.size for layer in layers), annotations)


def _lines_of(artifacts: list[Written]) -> list[str]:
    """One line an artifact, for a diff."""
    return sorted(
        f"{item.kind}/{item.name} {item.digest or f'({size_text(item.size)} not hashed yet)'}" for item in artifacts
    )
