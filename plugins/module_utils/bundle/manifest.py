# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the JSON in a bundle may say: media types, descriptors, manifests, and the checks that they make sense.

A bundle comes from a disk somebody carried, so nothing in it is believed. A path that would leave the directory it is
unpacked in, a digest that is not one, or a size no disk has is refused here, before anything uses it. Functions take a
list `problems` and add to it rather than raise, so that a reader can report everything that is wrong at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .digest import is_digest

MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_EMPTY = "application/vnd.oci.empty.v1+json"
MEDIA_FILE = "application/octet-stream"

TYPE_MODEL = "application/vnd.cncf.model.manifest.v1+json"
MEDIA_MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
TYPE_FILES = "application/vnd.airgap.xinference.files.v1"
MEDIA_IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_IMAGE_LAYER = "application/vnd.oci.image.layer.v1.tar"

REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
REVISION = "org.opencontainers.image.revision"
SOURCE = "org.opencontainers.image.source"
VERSION = "org.opencontainers.image.version"
MODEL_PATH = "org.cncf.model.filepath"
PATH_ANNOTATIONS = (MODEL_PATH, TITLE)
IMAGE_NAME = "io.containerd.image.name"
"""Annotation of an image: the name the engine gives it, with its tag."""
IMAGES = "images"
"""The kind of container images: their layers have no path."""

WHEELS_PYTHON = "airgap.xinference.python"
"""Annotation of a wheelhouse: tag of the Python it is for, ``cp311``, or ``py3`` when any will do."""
WHEELS_REQUIRES = "airgap.xinference.python-requires"
"""Annotation of a wheelhouse for any Python 3: the oldest that will do, ``3.8``."""
WHEELS_PLATFORM = "airgap.xinference.platform"
"""Annotation of a wheelhouse: system and processor, ``linux_x86_64``, or ``any``."""
WHEELS_GLIBC = "airgap.xinference.glibc"
"""Annotation of a wheelhouse: the oldest C library its wheels run with, ``2.28``; absent when any will do."""
WHEELS_XINFERENCE = "airgap.xinference.xinference-version"
"""Annotation of a wheelhouse: the version of Xinference in it."""

EMPTY_CONFIG = b"{}"
MAX_MANIFEST = 32 * 1024 * 1024
"""Bytes a manifest or the index may have; a model of 50,000 files needs less."""
MAX_BLOB = 64 * 1024**4
"""Bytes a blob may have (64 TiB): anything larger is a mistake or a lie."""
MAX_PATH = 1024
MAX_COMPONENT = 255

_KIND = re.compile(r"[a-z][a-z0-9]*\Z")
_NAME = re.compile(r"[A-Za-z0-9]+(?:[._+-]+[A-Za-z0-9]+)*\Z")


class Blob(NamedTuple):
    """A blob somebody points at: its digest and its size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True)
class File:
    """A file of an artifact: relative path with `/`, digest, size in bytes."""

    path: str
    digest: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """One manifest of the bundle and everything it points at.

    `digest` is the manifest's, `size` the sum of its files in bytes (for an image: of its layers). `blobs` lists every
    blob the artifact needs once: manifest, config, then files.
    """

    kind: str
    name: str
    digest: str
    size: int
    artifact_type: str
    annotations: dict[str, str] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    blobs: tuple[Blob, ...] = ()

    @property
    def reference(self) -> str:
        """The artifact's name in the index: ``<kind>/<name>``."""
        return f"{self.kind}/{self.name}"

    @property
    def layers(self) -> tuple[Blob, ...]:
        """The layers of an image, each once; empty for any other artifact."""
        return self.blobs[2:] if self.kind == IMAGES else ()

    @property
    def revision(self) -> str:
        """The pinned revision of the source, or an empty string when the source has none."""
        return self.annotations.get(REVISION, "")


def name_problem(name: object) -> str | None:
    """Why `name` cannot name an artifact, or None. It becomes a directory on the host, so it is one plain component."""
    if not isinstance(name, str) or not _NAME.match(name) or len(name) > 128:
        return f"{name!r} is not a name: use letters and digits, with . _ + - between them, 128 characters at most"
    return None


def split_reference(reference: object) -> tuple[str, str] | None:
    """Kind and name from ``<kind>/<name>``, or None when it is not of that form."""
    if not isinstance(reference, str):
        return None
    kind, _slash, name = reference.partition("/")
    return (kind, name) if _KIND.match(kind) and name_problem(name) is None else None


def path_problem(path: object) -> str | None:
    """Why a file path from outside cannot be used below a directory of ours, or None."""
    if not isinstance(path, str) or not path:
        return "has no path"
    if any(55296 <= ord(char) <= 57343 for char in path):
        return f"path {path!r} is not UTF-8"
    if len(path.encode("utf-8")) > MAX_PATH:
        return f"path {path[:60]!r}... is longer than {MAX_PATH} bytes"
    if path.startswith("/") or "\\" in path or any(ord(char) < 32 or ord(char) == 127 for char in path):
        return f"path {path!r} is absolute or has a backslash or control character"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return f"path {path!r} has an empty, `.` or `..` component"
    if any(len(part.encode("utf-8")) > MAX_COMPONENT for part in parts):
        return f"path {path[:60]!r}... has a component longer than {MAX_COMPONENT} bytes"
    return None


def paths_problems(paths: list[str]) -> list[str]:
    """What is wrong with a set of paths together: a path twice, or a file where another path needs a directory."""
    problems = []
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            problems.append(f"path {path!r} occurs twice")
        seen.add(path)
    for path in sorted(seen):
        parents = path.split("/")[:-1]
        problems.extend(
            f"{'/'.join(parents[:depth])!r} is a file and also the directory of {path!r}"
            for depth in range(1, len(parents) + 1)
            if "/".join(parents[:depth]) in seen
        )
    return problems


def descriptor(where: str, value: Any, problems: list[str]) -> dict[str, Any] | None:
    """A descriptor with a usable digest, size, media type and string annotations; None and problems otherwise."""
    if not isinstance(value, dict):
        problems.append(f"{where}: not a descriptor object")
        return None
    found = []
    if not is_digest(value.get("digest")):
        found.append(f"digest {value.get('digest')!r} is not sha256:<64 hex digits>")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        found.append(f"size {size!r} is not a number of bytes")
    elif size > MAX_BLOB:
        found.append(f"size {size} is over the limit of {MAX_BLOB} bytes for one blob")
    if not isinstance(value.get("mediaType"), str):
        found.append("mediaType is missing")
    if not is_text_map(value.get("annotations", {})):
        found.append("annotations are not strings")
    problems.extend(f"{where}: {problem}" for problem in found)
    return None if found else value


def is_text_map(value: Any) -> bool:
    """True for a JSON object whose values are strings."""
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())


def artifact_from(
    reference: tuple[str, str], entry: dict[str, Any], content: Any, problems: list[str]
) -> Artifact | None:
    """The artifact that a checked index entry and its parsed manifest describe; None and problems when they do not.

    Container images have layers without a path; every layer of another kind must be a file with a safe path.
    """
    kind, name = reference
    where = f"{kind}/{name}"
    if not isinstance(content, dict) or not isinstance(content.get("layers"), list):
        problems.append(f"{where}: not an image manifest with layers")
        return None
    before = len(problems)
    if content.get("schemaVersion") != 2 or content.get("mediaType", MEDIA_MANIFEST) != MEDIA_MANIFEST:
        problems.append(f"{where}: schemaVersion or mediaType is not an OCI image manifest's")
    annotations = content.get("annotations", {})
    if not is_text_map(annotations):
        problems.append(f"{where}: annotations are not strings")
    config = descriptor(f"{where} config", content.get("config"), problems)
    files: list[File] = []
    blobs = {entry["digest"]: entry["size"]}
    layers = [("config", config)]
    layers += [
        (f"layer {number}", descriptor(f"{where} layer {number}", layer, problems))
        for number, layer in enumerate(content["layers"], 1)
    ]
    for label, layer in layers:
        if layer is None:
            continue
        known = blobs.setdefault(layer["digest"], layer["size"])
        if known != layer["size"]:
            problems.append(f"{where} {label}: {layer['digest']} is {layer['size']} bytes here and {known} elsewhere")
        if label != "config" and kind != IMAGES:
            marks = layer.get("annotations", {})
            path = next((marks[key] for key in PATH_ANNOTATIONS if key in marks), None)
            problem = path_problem(path)
            if problem or path is None:
                problems.append(f"{where} {label}: {problem}")
            else:
                files.append(File(path, layer["digest"], layer["size"]))
    problems.extend(f"{where}: {problem}" for problem in paths_problems([file.path for file in files]))
    if len(problems) > before or config is None:
        return None
    return Artifact(
        kind=kind,
        name=name,
        digest=entry["digest"],
        size=sum(layer["size"] for label, layer in layers if layer is not None and label != "config"),
        artifact_type=str(content.get("artifactType") or config["mediaType"]),
        annotations=dict(annotations),
        files=tuple(sorted(files, key=lambda file: file.path)),
        blobs=tuple(Blob(digest, size) for digest, size in blobs.items()),
    )
