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

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .digest import Progress, Stamps, hash_bytes
from .manifest import MAX_MANIFEST, REF_NAME, Artifact, Blob, File, artifact_from, descriptor, split_reference

__all__ = ["Artifact", "Blob", "Bundle", "BundleError", "Damaged", "File", "blob_path", "cache_dir", "verify"]

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
LAYOUT_VERSION = "1.0.0"
SHOWN_PROBLEMS = 25


class BundleError(Exception):
    """A bundle that cannot be used or made; `problems` lists everything found wrong with it."""

    def __init__(self, summary: str, problems: list[str] | None = None) -> None:
        self.summary = summary
        self.problems = list(problems or [])
        self.details = {"problems": self.problems}
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
        index = _read_index(root, problems)
        artifacts = [] if index is None else _read_artifacts(root, index, problems)
        sizes: dict[str, int] = {}
        for artifact in artifacts:
            for blob in artifact.blobs:
                known = sizes.setdefault(blob.digest, blob.size)
                if known != blob.size:
                    problems.append(f"{artifact.reference}: {blob.digest} is {blob.size} bytes, elsewhere {known}")
        problems.extend(_blob_problems(root, artifacts))
        if problems:
            raise BundleError(f"The bundle {root} cannot be used ({len(problems)} found wrong):", problems)
        return cls(root, sorted(artifacts, key=lambda artifact: (artifact.kind, artifact.name)))

    def find(self, kind: str, name: str) -> Artifact | None:
        """The artifact of a kind and name, or None."""
        return next((entry for entry in self.artifacts if (entry.kind, entry.name) == (kind, name)), None)

    def blob_path(self, digest: str) -> Path:
        """The file that holds a blob."""
        return blob_path(self.root, digest)

    @property
    def blobs(self) -> dict[str, int]:
        """Every blob the bundle refers to: digest and size in bytes."""
        return {blob.digest: blob.size for artifact in self.artifacts for blob in artifact.blobs}

    @property
    def size(self) -> int:
        """Bytes of all blobs together, each counted once."""
        return sum(self.blobs.values())


def verify(
    bundle: Bundle, stamps: Stamps, progress: Progress | None = None, threads: int | None = None
) -> list[Damaged]:
    """Hash every blob no stamp vouches for and return those whose content is wrong; saves the stamps.

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

    largest_first = sorted(bundle.blobs.items(), key=lambda item: (-item[1], item[0]))
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
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{where}: not a regular file")
        elif status.st_size > MAX_MANIFEST:
            problems.append(f"{where}: {status.st_size} bytes is more than a manifest can have ({MAX_MANIFEST})")
        else:
            return path.read_bytes()
    except OSError as error:
        problems.append(f"{where}: {error.strerror}")
    return None


def _parse(raw: bytes, where: str, problems: list[str]) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        problems.append(f"{where}: not JSON ({error})")
        return None


def _read_index(root: Path, problems: list[str]) -> list[Any] | None:
    """The entries of the index, after checking that this is an image layout at all."""
    if not root.is_dir():
        problems.append("there is no such directory; make it with playbooks/bundle.yml or mount the disk it is on")
        return None
    marker = read_json(root / LAYOUT_FILE, LAYOUT_FILE, problems)
    if marker is not None and (not isinstance(marker, dict) or marker.get("imageLayoutVersion") != LAYOUT_VERSION):
        problems.append(f"{LAYOUT_FILE}: imageLayoutVersion is not {LAYOUT_VERSION}")
    index = read_json(root / INDEX_FILE, INDEX_FILE, problems)
    if index is None:
        return None
    if not isinstance(index, dict) or index.get("schemaVersion") != 2 or not isinstance(index.get("manifests"), list):
        problems.append(f"{INDEX_FILE}: not an image index with schemaVersion 2 and manifests")
        return None
    return index["manifests"]


def _read_artifacts(root: Path, entries: list[Any], problems: list[str]) -> list[Artifact]:
    """Every artifact of the index that makes sense; what does not is added to problems."""
    artifacts: list[Artifact] = []
    seen: set[tuple[str, str]] = set()
    for number, value in enumerate(entries, 1):
        where = f"{INDEX_FILE} entry {number}"
        entry = descriptor(where, value, problems)
        if entry is None:
            continue
        name = entry.get("annotations", {}).get(REF_NAME)
        reference = split_reference(name)
        if reference is None:
            problems.append(f"{where}: {REF_NAME} {name!r} is not <kind>/<name>")
            continue
        if reference in seen:
            problems.append(f"{where}: {name} occurs twice")
            continue
        seen.add(reference)
        raw = _read_small(blob_path(root, entry["digest"]), f"{name} manifest {entry['digest']}", problems)
        if raw is None:
            continue
        if len(raw) != entry["size"] or hash_bytes(raw) != entry["digest"]:
            problems.append(f"{name}: manifest {entry['digest']} is damaged ({len(raw)} of {entry['size']} bytes)")
            continue
        artifact = artifact_from(reference, entry, _parse(raw, f"{name} manifest", problems), problems)
        if artifact is not None:
            artifacts.append(artifact)
    return artifacts


def _blob_problems(root: Path, artifacts: list[Artifact]) -> list[str]:
    """Blobs that are missing, are no plain file, or have another size than their descriptor says."""
    problems: list[str] = []
    looked_at: set[str] = set()
    for artifact in artifacts:
        paths = {file.digest: file.path for file in artifact.files}
        for blob in artifact.blobs:
            if blob.digest in looked_at:
                continue
            looked_at.add(blob.digest)
            where = f"{artifact.reference}: {paths.get(blob.digest, 'config or layer')} ({blob.digest})"
            try:
                status = blob_path(root, blob.digest).lstat()
            except OSError as error:
                problems.append(f"{where}: blob is missing ({error.strerror})")
                continue
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"{where}: blob is not a regular file")
            elif status.st_size != blob.size:
                problems.append(f"{where}: blob has {status.st_size} bytes, expected {blob.size}")
    return problems
