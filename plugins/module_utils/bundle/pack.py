# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The JSON a bundle is made of, from what is known about files. Pure: same input, same bytes, and no clock in it.

Models follow the CNCF ModelPack specification (one raw layer per file, its path in an annotation). Container images
are OCI images with uncompressed layers. Everything else is an artifact as ORAS writes it (empty configuration, file
name as the layer's title).
"""

from __future__ import annotations

import json
from typing import Any, Iterable

from .digest import hash_bytes
from .manifest import (
    EMPTY_CONFIG,
    IMAGE_NAME,
    MEDIA_EMPTY,
    MEDIA_FILE,
    MEDIA_IMAGE_CONFIG,
    MEDIA_IMAGE_LAYER,
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    MEDIA_MODEL_CONFIG,
    MODEL_PATH,
    REF_NAME,
    REVISION,
    SOURCE,
    TITLE,
    TYPE_FILES,
    TYPE_MODEL,
    Blob,
    File,
)

_WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
_WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
_DOC = "application/vnd.cncf.model.doc.v1.raw"
_CODE = "application/vnd.cncf.model.code.v1.raw"

_WEIGHT_FORMATS = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".onnx": "onnx",
    ".bin": "pytorch",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".ckpt": "pytorch",
    ".h5": "keras",
    ".msgpack": "flax",
    ".npz": "numpy",
}
_CODE_SUFFIXES = (".py", ".sh", ".ipynb", ".cu", ".cpp")
_DOC_SUFFIXES = (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
_DOC_NAMES = ("license", "notice", "readme", "copying")


def encode(content: Any) -> bytes:
    """JSON in one canonical form, so that equal content has equal digests."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def model_media_type(path: str) -> str:
    """The ModelPack media type of a model's file, from its name: weights, their configuration, documents or code."""
    name = path.rpartition("/")[2].lower()
    if name.endswith(tuple(_WEIGHT_FORMATS)):
        return _WEIGHT
    if name.endswith(_CODE_SUFFIXES):
        return _CODE
    if name.endswith(_DOC_SUFFIXES) or name.startswith(_DOC_NAMES):
        return _DOC
    return _WEIGHT_CONFIG


def model_config(name: str, files: Iterable[File], annotations: dict[str, str]) -> bytes:
    """The ModelPack configuration of a model; its revision and source come from the annotations."""
    files = list(files)
    about = {"name": name, "revision": annotations.get(REVISION, ""), "sourceURL": annotations.get(SOURCE, "")}
    formats = {kind for file in files for suffix, kind in _WEIGHT_FORMATS.items() if file.path.lower().endswith(suffix)}
    return encode(
        {
            "descriptor": {key: value for key, value in about.items() if value},
            "config": {"format": formats.pop()} if len(formats) == 1 else {},
            "modelfs": {"type": "layers", "diffIds": [file.digest for file in files]},
        }
    )


def model_manifest(files: Iterable[File], config: bytes, annotations: dict[str, str]) -> bytes:
    """The manifest of a model whose configuration is `config`."""
    layers = [
        {
            "mediaType": model_media_type(file.path),
            "digest": file.digest,
            "size": file.size,
            "annotations": {MODEL_PATH: file.path},
        }
        for file in files
    ]
    return _manifest(TYPE_MODEL, MEDIA_MODEL_CONFIG, config, layers, annotations)


def files_manifest(files: Iterable[File], annotations: dict[str, str]) -> bytes:
    """The manifest of a set of plain files; its configuration is EMPTY_CONFIG."""
    layers = [
        {"mediaType": MEDIA_FILE, "digest": file.digest, "size": file.size, "annotations": {TITLE: file.path}}
        for file in files
    ]
    return _manifest(TYPE_FILES, MEDIA_EMPTY, EMPTY_CONFIG, layers, annotations)


def image_manifest(config: bytes, layers: Iterable[Blob], name: str) -> bytes:
    """The manifest of a container image; `name` is what the engine calls it."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "config": {"mediaType": MEDIA_IMAGE_CONFIG, "digest": hash_bytes(config), "size": len(config)},
            "layers": [
                {"mediaType": MEDIA_IMAGE_LAYER, "digest": layer.digest, "size": layer.size} for layer in layers
            ],
            "annotations": {IMAGE_NAME: name},
        }
    )


def index_entry(reference: str, artifact_type: str, manifest: bytes) -> dict[str, Any]:
    """The descriptor by which the index names an artifact; a container image has no artifact type."""
    entry = {
        "mediaType": MEDIA_MANIFEST,
        "artifactType": artifact_type,
        "digest": hash_bytes(manifest),
        "size": len(manifest),
        "annotations": {REF_NAME: reference},
    }
    return entry if artifact_type else {key: value for key, value in entry.items() if key != "artifactType"}


def index(entries: Iterable[dict[str, Any]]) -> bytes:
    """The index of a bundle, entries in order of their names; readable, because people look into it."""
    ordered = sorted(entries, key=lambda entry: str(entry["annotations"][REF_NAME]))
    content = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": ordered}
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode("utf-8") + b"\n"


def _manifest(
    artifact_type: str, config_type: str, config: bytes, layers: list[dict[str, Any]], annotations: dict[str, str]
) -> bytes:
    content: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "artifactType": artifact_type,
        "config": {"mediaType": config_type, "digest": hash_bytes(config), "size": len(config)},
        "layers": layers,
    }
    if annotations:
        content["annotations"] = annotations
    return encode(content)
