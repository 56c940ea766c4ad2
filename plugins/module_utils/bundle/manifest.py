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
from typing import Any, Container, NamedTuple

from .digest import hash_bytes, is_digest
from .documents import MAX_DOCUMENT, DocumentError, parse, shown

MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_EMPTY = "application/vnd.oci.empty.v1+json"
MEDIA_FILE = "application/octet-stream"

TYPE_MODEL = "application/vnd.cncf.model.manifest.v1+json"
MEDIA_MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
TYPE_FILES = "application/vnd.airgap.xinference.files.v1"
MEDIA_IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_IMAGE_LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_MODEL_FILES = frozenset(
    f"application/vnd.cncf.model.{part}.v1.raw" for part in ("weight", "weight.config", "doc", "code", "dataset")
)
"""Media types of a model's files. Archives (`.tar`) are none of them: they would be served as they are."""

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
MODELS = "models"
"""The kind of models."""
MAX_MANIFEST = MAX_DOCUMENT
MAX_BLOB = 64 * 1024**4
"""Bytes a blob may have (64 TiB): anything larger is a mistake or a lie."""
MAX_PATH = 1024
MAX_COMPONENT = 255
MAX_DEPTH = 64
"""Components of a path."""

_KIND = re.compile(r"[a-z][a-z0-9]{0,31}\Z")
_NAME = re.compile(r"[A-Za-z0-9]+(?:[._+-]+[A-Za-z0-9]+)*\Z")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal obeys or no file name can have."""
_NO_COMPONENT = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)")
_DEVICE = re.compile(r"(?:\A|/)(?:(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:/|\Z)|[a-z]:)", re.IGNORECASE)
"""Names that mean a device or a drive on systems that disks and sticks also go to."""


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
    if not isinstance(name, str) or len(name) > 128 or not _NAME.match(name):
        return f"{shown(name)} is not a name: use letters and digits, with . _ + - between them, 128 characters at most"
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
    try:
        length = len(path.encode("utf-8"))
    except UnicodeEncodeError:
        return f"path {shown(path)} is not UTF-8"
    if length > MAX_PATH:
        return f"path {shown(path)} is longer than {MAX_PATH} bytes"
    if path.startswith("/") or "\\" in path or _CONTROL.search(path):
        return f"path {shown(path)} is absolute or has a backslash or control character"
    if path.count("/") >= MAX_DEPTH:
        return f"path {shown(path)} has more than {MAX_DEPTH} components"
    if _NO_COMPONENT.search(path):
        return f"path {shown(path)} has an empty, `.` or `..` component"
    if _DEVICE.search(path):
        return f"path {shown(path)} has the name of a device as component"
    if length > MAX_COMPONENT and any(len(part.encode("utf-8")) > MAX_COMPONENT for part in path.split("/")):
        return f"path {shown(path)} has a component longer than {MAX_COMPONENT} bytes"
    return None


def paths_problems(paths: list[str]) -> list[str]:
    """What is wrong with a set of paths together: a path twice, or a file where another path needs a directory."""
    files = set(paths)
    problems = []
    if len(files) < len(paths):
        seen: set[str] = set()
        problems = [f"path {shown(path)} occurs twice" for path in paths if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
    known: set[str] = set()
    for path in sorted(files):
        parent = path.rpartition("/")[0]
        while parent and parent not in known:
            known.add(parent)
            if parent in files:
                problems.append(f"{shown(parent)} is a file and also the directory of {shown(path)}")
            parent = parent.rpartition("/")[0]
    return problems


def descriptor(
    where: str, value: Any, problems: list[str], media: Container[str], limit: int = MAX_BLOB
) -> dict[str, Any] | None:
    """A descriptor with a usable digest, size, media type and string annotations; None and problems otherwise.

    `media` are the media types that make sense there, `limit` the bytes the blob may have.
    """
    if not isinstance(value, dict):
        problems.append(f"{where}: not a descriptor object")
        return None
    found: list[str] = []
    if not is_digest(value.get("digest")):
        found.append(f"digest {shown(value.get('digest'))} is not sha256:<64 hex digits>")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        found.append(f"size {shown(size)} is not a number of bytes")
    elif size > limit:
        found.append(f"size {size} is over the limit of {limit} bytes for one blob of this sort")
    media_type = value.get("mediaType")
    if not isinstance(media_type, str):
        found.append("mediaType is missing")
    elif media_type not in media:
        found.append(f"mediaType {shown(media_type)} is not known here")
    found += text_map_problems(value.get("annotations", {}))
    problems.extend(f"{where}: {problem}" for problem in found)
    return None if found else value


def is_text_map(value: Any) -> bool:
    """True for a JSON object whose values are strings."""
    return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())


def text_map_problems(value: Any) -> list[str]:
    """Why something cannot be annotations: they are strings, shown to people, and written to other files."""
    if not is_text_map(value):
        return ["annotations are not strings"]
    if _CONTROL.search("".join(value)) or _CONTROL.search("".join(value.values())):
        return ["annotations have control characters"]
    return []


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
    form = _FORMS.get(kind, _FILES)
    if content.get("schemaVersion") != 2 or content.get("mediaType", MEDIA_MANIFEST) != MEDIA_MANIFEST:
        problems.append(f"{where}: schemaVersion or mediaType is not an OCI image manifest's")
    for source in (content, entry):
        artifact_type = source.get("artifactType", form.artifact_type)
        if artifact_type != form.artifact_type:
            problems.append(f"{where}: artifactType {shown(artifact_type)} is not that of {kind}")
    annotations = content.get("annotations", {})
    problems.extend(f"{where}: {problem}" for problem in text_map_problems(annotations))
    config = descriptor(f"{where} config", content.get("config"), problems, form.config, MAX_MANIFEST)
    if config is not None and config["mediaType"] == MEDIA_EMPTY and config["digest"] != _EMPTY_DIGEST:
        problems.append(f"{where} config: {config['digest']} is not the empty one it says it is")
    layers = [
        (f"layer {number}", descriptor(f"{where} layer {number}", layer, problems, form.layers))
        for number, layer in enumerate(content["layers"], 1)
    ]
    files: list[File] = []
    blobs: dict[str, int] = {entry["digest"]: entry["size"]}
    for label, layer in [("config", config), *layers]:
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
        size=sum(layer["size"] for _label, layer in layers if layer is not None),
        artifact_type=str(content.get("artifactType") or config["mediaType"]),
        annotations=dict(annotations),
        files=tuple(sorted(files, key=lambda file: file.path)),
        blobs=tuple(Blob(digest, size) for digest, size in blobs.items()),
    )


def config_layers(raw: bytes) -> list[str]:
    """The layers (diff ids) that the configuration of an image names. Raises DocumentError when it is none."""
    content = parse(raw)
    try:
        layers = content["rootfs"]["diff_ids"]
    except (KeyError, TypeError) as error:
        raise DocumentError("the image's configuration is not one (no rootfs with diff_ids)") from error
    if not isinstance(layers, list) or not all(is_digest(layer) for layer in layers) or not layers:
        raise DocumentError("the image's configuration does not name its layers by digest")
    if content.get("os", "linux") != "linux":
        raise DocumentError(f"the image is for {shown(content.get('os'))}, not for Linux")
    return layers


class _Form(NamedTuple):
    """What a manifest of one kind consists of: its type, and the media types of its configuration and its layers."""

    artifact_type: str | None
    config: Container[str]
    layers: Container[str]


_FORMS = {
    MODELS: _Form(TYPE_MODEL, (MEDIA_MODEL_CONFIG,), MEDIA_MODEL_FILES),
    IMAGES: _Form(None, (MEDIA_IMAGE_CONFIG,), (MEDIA_IMAGE_LAYER,)),
}
_FILES = _Form(TYPE_FILES, (MEDIA_EMPTY,), (MEDIA_FILE,))
_EMPTY_DIGEST = hash_bytes(EMPTY_CONFIG)
