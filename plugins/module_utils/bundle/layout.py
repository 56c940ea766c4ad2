# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading a bundle: a directory that is an OCI image layout.

::

    oci-layout                    {"imageLayoutVersion": "1.0.0"}
    index.json                    one descriptor per artifact, named <kind>/<name>
    blobs/sha256/<64 hex digits>  everything else

`Bundle.open` believes nothing: it reads the index and every manifest, checks that each says the truth about the others
and that every blob is there with the right size, and reports all problems together. It does not hash file contents;
that is `verify`, which reads only what no stamp vouches for.
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Container, Iterable

from .digest import Progress, Stamps, hash_bytes
from .documents import DocumentError, parse, read_small, shown
from .manifest import (
    IMAGES,
    MAX_MANIFEST,
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    REF_NAME,
    Artifact,
    Blob,
    File,
    artifact_from,
    config_layers,
    descriptor,
    split_reference,
)
from .reference import image_problem

__all__ = ["Artifact", "Blob", "Bundle", "BundleError", "Damaged", "File", "blob_path", "cache_dir", "verify"]

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
LAYOUT_VERSION = "1.0.0"
VOLUME_FILE = "volume.json"
"""What a volume of a split bundle has and a bundle has not."""
PARTIAL = "partial"
"""Directory inside a bundle that is being joined from volumes; a bundle that is whole has none."""
SHOWN_PROBLEMS = 25
MAX_ARTIFACTS = 4096
MAX_MANIFESTS = 8 * MAX_MANIFEST
"""Bytes all manifests of a bundle may have together."""


class BundleError(Exception):
    """A bundle that cannot be used or made; `problems` lists everything found wrong with it."""

    def __init__(self, summary: str, problems: list[str] | None = None) -> None:
        self.summary = summary
        self.problems = list(problems or [])
        self.details: dict[str, Any] = {"problems": self.problems}
        lines = [f"- {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"- and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join([summary, *lines]))


@dataclass(frozen=True)
class Damaged:
    """A blob whose content is not what its name says; `files` are the places it is used, as ``<kind>/<name>: path``."""

    digest: str
    size: int
    found: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.digest} ({', '.join(self.files)}): {self.found}"


def blob_path(root: str | os.PathLike[str], digest: str) -> Path:
    """Where a layout keeps the blob of a (checked) digest."""
    algorithm, _colon, encoded = digest.partition(":")
    return Path(root) / "blobs" / algorithm / encoded


def cache_dir(root: str | os.PathLike[str]) -> Path:
    """The directory beside a bundle that holds its stamps; it is not part of the bundle and may be deleted."""
    path = Path(os.path.abspath(os.fspath(root)))  # noqa: PTH100
    return path.with_name(path.name + ".cache")


class Bundle:
    """A bundle that was opened and found sound; `artifacts` are in order of kind and name."""

    def __init__(self, root: Path, artifacts: list[Artifact]) -> None:
        self.root = root
        self.artifacts = artifacts

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check a bundle (all but the content of its files).

        Raises BundleError with every problem: no layout, unreadable index, damaged or lying manifest, unsafe path,
        blob missing or of the wrong size, name used twice.
        """
        root = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100 - no link in the path is followed
        problems: list[str] = []
        artifacts = read_artifacts(root, problems)
        problems.extend(_blob_problems(root, artifacts))
        if problems:
            raise BundleError(f"The bundle {root} cannot be used ({len(problems)} found wrong):", problems)
        return cls(root, artifacts)

    def find(self, kind: str, name: str) -> Artifact | None:
        """The artifact of a kind and name, or None."""
        return next((entry for entry in self.artifacts if (entry.kind, entry.name) == (kind, name)), None)

    def blob_path(self, digest: str) -> Path:
        """The file that holds a blob."""
        return blob_path(self.root, digest)

    def unvouched(self, stamps: Stamps) -> dict[str, int]:
        """The blobs that would have to be read to know that they are right: digest and size in bytes."""
        blobs = self.blobs
        sound = stamps.sound(self.root / "blobs" / "sha256", blobs)
        return {digest: size for digest, size in blobs.items() if digest not in sound}

    @property
    def blobs(self) -> dict[str, int]:
        """Every blob the bundle refers to: digest and size in bytes."""
        return {blob.digest: blob.size for artifact in self.artifacts for blob in artifact.blobs}

    @property
    def size(self) -> int:
        """Bytes of all blobs together, each counted once."""
        return sum(self.blobs.values())


def verify(
    bundle: Bundle,
    stamps: Stamps,
    progress: Progress | None = None,
    threads: int | None = None,
    only: Container[str] | None = None,
) -> list[Damaged]:
    """Hash every blob (or `only` some) no stamp vouches for, and return those whose content is wrong; saves the stamps.

    `threads` defaults to the number of processors (8 at most); hashing releases Python's lock, so they really work
    side by side. Largest first, so that the last thread does not start with the biggest file.
    """
    used: dict[str, list[str]] = {}
    for artifact in bundle.artifacts:
        paths = {file.digest: f"{artifact.reference}: {file.path}" for file in artifact.files}
        for blob in artifact.blobs:
            used.setdefault(blob.digest, []).append(paths.get(blob.digest, f"{artifact.reference}: manifest or layer"))

    def check(item: tuple[str, int]) -> Damaged | None:
        digest, size = item
        try:
            found = stamps.digest_of(bundle.blob_path(digest), progress)
        except OSError as error:
            return Damaged(digest, size, f"cannot be read: {error.strerror}", tuple(used[digest]))
        if found == digest:
            return None
        return Damaged(digest, size, f"content is {found}", tuple(used[digest]))

    blobs = [item for item in bundle.unvouched(stamps).items() if only is None or item[0] in only]
    largest_first = sorted(blobs, key=lambda item: (-item[1], item[0]))
    with ThreadPoolExecutor(max_workers=threads or min(8, os.cpu_count() or 1)) as pool:
        damaged = [entry for entry in pool.map(check, largest_first) if entry is not None]
    stamps.save()
    return damaged


def read_json(path: Path, where: str, problems: list[str]) -> Any:
    """Parsed content of a small JSON file, or None and a problem."""
    raw = _read_small(path, where, problems)
    return None if raw is None else _parse(raw, where, problems)


def _read_small(path: Path, where: str, problems: list[str]) -> bytes | None:
    try:
        return read_small(path)
    except DocumentError as error:
        problems.append(f"{where}: {error}")
    except OSError as error:
        problems.append(f"{where}: {error.strerror}")
    return None


def _parse(raw: bytes, where: str, problems: list[str]) -> Any:
    try:
        return parse(raw)
    except DocumentError as error:
        problems.append(f"{where}: {error}")
        return None


def index_lines(root: Path) -> list[str]:
    """One line for each artifact of an index, for a diff; none when there is no usable index."""
    content = read_json(root / INDEX_FILE, INDEX_FILE, [])
    try:
        return sorted(f"{entry['annotations'][REF_NAME]} {entry['digest']}" for entry in content["manifests"])
    except (TypeError, KeyError):
        return []


def read_artifacts(root: Path, problems: list[str], marked: bool = True) -> list[Artifact]:
    """What the index and the manifests below `root` say, in order of kind and name; other blobs are not looked at.

    What makes no sense is left out and added to `problems`. Without `marked`, `oci-layout` may be missing: somebody
    kept only what tells the content.
    """
    if not root.is_dir():
        problems.append("there is no such directory; make it with playbooks/bundle.yml or mount the disk it is on")
        return []
    if not (root / INDEX_FILE).exists() or (marked and not (root / LAYOUT_FILE).exists()):
        if (root / VOLUME_FILE).exists():
            problems.append("this is one volume of a bundle that was split; join them with playbooks/join.yml")
        elif (root / PARTIAL).exists():
            problems.append("volumes are still missing here; go on with playbooks/join.yml")
    problems.extend(
        f"{place}: not a plain directory"
        for place in ("blobs", "blobs/sha256")
        if os.path.lexists(root / place) and ((root / place).is_symlink() or not (root / place).is_dir())
    )
    marker = read_json(root / LAYOUT_FILE, LAYOUT_FILE, problems) if marked else None
    if marker is not None and (not isinstance(marker, dict) or marker.get("imageLayoutVersion") != LAYOUT_VERSION):
        problems.append(f"{LAYOUT_FILE}: imageLayoutVersion is not {LAYOUT_VERSION}")
    index = read_json(root / INDEX_FILE, INDEX_FILE, problems)

    def manifest(blob: Blob, where: str) -> bytes | None:
        return _read_small(blob_path(root, blob.digest), where, problems)

    return [] if index is None else artifacts_of(index, manifest, problems)


def artifacts_of(index: Any, manifest: Callable[[Blob, str], bytes | None], problems: list[str]) -> list[Artifact]:
    """Every artifact of a parsed index that makes sense, in order of kind and name; the rest is added to `problems`.

    `manifest` reads a manifest (`where` is its name for messages), or says in `problems` why it cannot.
    """
    if not isinstance(index, dict) or index.get("schemaVersion") != 2 or not isinstance(index.get("manifests"), list):
        problems.append(f"{INDEX_FILE}: not an image index with schemaVersion 2 and manifests")
        return []
    if index.get("mediaType", MEDIA_INDEX) != MEDIA_INDEX:
        problems.append(f"{INDEX_FILE}: mediaType {shown(index['mediaType'])} is not that of an image index")
    entries = index["manifests"]
    if len(entries) > MAX_ARTIFACTS:
        problems.append(f"{INDEX_FILE}: {len(entries)} artifacts are more than a bundle can have ({MAX_ARTIFACTS})")
        return []
    named = list(_named_entries(entries, problems))
    total = sum(entry["size"] for _reference, entry in named)
    if total > MAX_MANIFESTS:
        problems.append(f"{INDEX_FILE}: {total} bytes of manifests are more than a bundle can have ({MAX_MANIFESTS})")
        return []
    artifacts = []
    for reference, entry in named:
        name = "/".join(reference)
        raw = manifest(Blob(entry["digest"], entry["size"]), f"{name} manifest {entry['digest']}")
        if raw is None:
            continue
        if len(raw) != entry["size"] or hash_bytes(raw) != entry["digest"]:
            problems.append(f"{name}: manifest {entry['digest']} is damaged ({len(raw)} of {entry['size']} bytes)")
            continue
        content = _parse(raw, f"{name} manifest", problems)
        artifact = None if content is None else artifact_from(reference, entry, content, problems)
        if artifact is not None:
            artifacts.append(artifact)
    problems.extend(_contradictions(artifacts))
    return sorted(artifacts, key=lambda artifact: (artifact.kind, artifact.name))


def _named_entries(entries: Iterable[Any], problems: list[str]) -> Iterable[tuple[tuple[str, str], dict[str, Any]]]:
    """Kind and name of every entry of the index that makes sense, with the entry."""
    seen: set[tuple[str, str]] = set()
    for number, value in enumerate(entries, 1):
        where = f"{INDEX_FILE} entry {number}"
        entry = descriptor(where, value, problems, (MEDIA_MANIFEST,), MAX_MANIFEST)
        if entry is None:
            continue
        name = entry.get("annotations", {}).get(REF_NAME)
        reference = split_reference(name)
        if reference is None:
            problems.append(f"{where}: {REF_NAME} {shown(name)} is not <kind>/<name>")
        elif reference in seen:
            problems.append(f"{where}: {name} occurs twice")
        else:
            seen.add(reference)
            yield reference, entry


def _contradictions(artifacts: list[Artifact]) -> Iterable[str]:
    """Where artifacts do not agree about the size of a blob, or an image is not what it is called."""
    sizes: dict[str, int] = {}
    for artifact in artifacts:
        for blob in artifact.blobs:
            known = sizes.setdefault(blob.digest, blob.size)
            if known != blob.size:
                yield f"{artifact.reference}: {blob.digest} is {blob.size} bytes, elsewhere {known}"
        problem = image_problem(artifact)
        if problem:
            yield f"{artifact.reference}: {problem}"


def _blob_problems(root: Path, artifacts: list[Artifact]) -> list[str]:
    """Blobs that are missing, are no plain file, or have another size than their descriptor says.

    The configuration of an image, which its engine will believe, must name the layers that the manifest names.
    """
    problems: list[str] = []
    place = os.path.join(root, "blobs", "sha256", "")  # noqa: PTH118 - tens of thousands of blobs, each below it
    looked_at: set[str] = set()
    for artifact in artifacts:
        paths = {file.digest: file.path for file in artifact.files}
        for digest, size in artifact.blobs:
            if digest in looked_at:
                continue
            looked_at.add(digest)
            problem = _blob_problem(place + digest[len("sha256:") :], size)
            if problem:
                problems.append(f"{artifact.reference}: {paths.get(digest, 'config or layer')} ({digest}): {problem}")
        if artifact.kind == IMAGES and not problems:
            problems.extend(f"{artifact.reference}: {problem}" for problem in _config_problems(root, artifact))
    return problems


def _blob_problem(path: str, size: int) -> str | None:
    """Why a file cannot be a blob of `size` bytes, or None."""
    try:
        status = os.lstat(path)
    except OSError as error:
        return f"blob is missing ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "blob is not a regular file"
    return None if status.st_size == size else f"blob has {status.st_size} bytes, expected {size}"


def _config_problems(root: Path, image: Artifact) -> list[str]:
    """What is wrong with the configuration of an image."""
    problems: list[str] = []
    config = image.blobs[1].digest
    raw = _read_small(blob_path(root, config), f"configuration {config}", problems)
    if raw is None:
        return problems
    try:
        layers = config_layers(raw)
    except DocumentError as error:
        return [f"configuration {config}: {error}"]
    if hash_bytes(raw) != config:
        return [f"configuration {config} is damaged"]
    if set(layers) != {layer.digest for layer in image.layers}:
        return [f"the manifest has other layers than the configuration {config}"]
    return []
