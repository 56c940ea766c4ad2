# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host has room for what this very run would add to it: blobs, what is unpacked from them, and images."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.archive import ArchiveError, image_layers
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.loading import shared
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import IMAGES
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.places import short
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import (
    largest_pack,
    transfer_plan,
    travelling,
)

from .bundles import LIBRARIES, WHEELHOUSE
from .findings import Facts, Finding, Needs

BYTECODE = 1.35
"""An unpacked wheel with its compiled modules, as a multiple of the unpacked wheel (measured with Xinference's own)."""
SLACK = 64 * 1024**2
"""Bytes that must stay free for logs, records and the blocks that files round up to."""
LOADING = 2
"""Room the engine takes while it loads, as a multiple of the layers: it unpacks the archive first, then each layer."""


def judge_disk(needs: Needs, facts: Facts, bundle: Bundle, artifacts: Sequence[Artifact]) -> list[Finding]:
    """Whether root directory and engine have room for what will be sent, unpacked and loaded."""
    sent, unpacked = _for_root(facts, bundle, artifacts)
    layers = new_layers(bundle, artifacts, facts.get("engine"))
    loaded = LOADING * sum(layers.values())
    contents = facts["contents"]
    present = [digest for digest, size in layers.items() if contents["blobs"].get(digest) == size]
    steps = travelling(transfer_plan(layers, present, contents["partial"]))
    sent += sum(step.travels for step in steps)
    unpacked = max(unpacked, largest_pack(steps))
    place, data = facts["place"], (facts.get("engine") or {}).get("data")
    mine = f"{needs.root} ({size_text(sent)} to send, {size_text(unpacked)} to unpack)"
    move = "choose an xinference_root on a larger disk"
    if data and loaded and data["device"] == place.get("device"):
        wanted = f"{mine} and the Docker Engine's {data['path']} ({size_text(loaded)} while images are loaded)"
        return _room(sent + unpacked + loaded, place["free_bytes"], wanted, place["existing"], move)
    findings = _room(sent + unpacked, place["free_bytes"], mine, place["existing"], move)
    if data:
        wanted = f"the Docker Engine's {data['path']} while images are loaded"
        move = "remove images there that nobody needs (docker image prune), or move its data-root"
        findings += _room(loaded, data["free_bytes"], wanted, data["path"], move)
    return findings


def new_layers(bundle: Bundle, artifacts: Iterable[Artifact], engine: Mapping[str, Any] | None) -> dict[str, int]:
    """Layers of the images that this engine would be sent, with their bytes; none when it cannot be asked."""
    if not engine or engine["problem"]:
        return {}
    images = engine["images"]
    known = {image["id"] for image in images}
    wanted: dict[str, int] = {}
    for artifact in artifacts:
        if artifact.kind != IMAGES or known & {artifact.blobs[1].digest, artifact.digest}:
            continue
        sizes = {layer.digest: layer.size for layer in artifact.layers}
        try:
            layers = image_layers(bundle.blob_path(artifact.blobs[1].digest).read_bytes())
        except (OSError, ArchiveError):
            layers = list(sizes)  # damaged, which is a finding of its own
        start = 0 if engine["containerd"] else shared(layers, [image["layers"] for image in images])
        wanted.update({digest: sizes[digest] for digest in layers[start:] if digest in sizes})
    return wanted


def unpacked_size(bundle: Bundle, artifact: Artifact) -> int:
    """Bytes of the files in the wheels of an artifact, from their tables of contents; a damaged one counts as is."""
    total = 0
    for file in artifact.files:
        try:
            with zipfile.ZipFile(bundle.blob_path(file.digest)) as archive:
                total += sum(member.file_size for member in archive.infolist())
        except (OSError, zipfile.BadZipFile):
            total += file.size
    return total


def _for_root(facts: Facts, bundle: Bundle, artifacts: Sequence[Artifact]) -> tuple[int, int]:
    """Bytes to send and to unpack below the root directory, layers of images left out."""
    contents = facts["contents"]
    layers = {layer.digest for artifact in artifacts if artifact.kind == IMAGES for layer in artifact.layers}
    blobs = Bundle(bundle.root, list(artifacts)).blobs
    wanted = {digest: size for digest, size in blobs.items() if digest not in layers}
    present = [digest for digest, size in wanted.items() if contents["blobs"].get(digest) == size]
    steps = travelling(transfer_plan(wanted, present, contents["partial"]))
    unpacked = 0
    for reference, directories in ((WHEELHOUSE, contents["venvs"]), (LIBRARIES, contents["lib"])):
        artifact = next((entry for entry in artifacts if (entry.kind, entry.name) == reference), None)
        if artifact is not None and short(artifact.digest) not in directories:
            unpacked += round(unpacked_size(bundle, artifact) * BYTECODE)
    # Packs of small blobs have gone when wheels are unpacked.
    return sum(step.travels for step in steps), max(unpacked, largest_pack(steps))


def _room(bytes_needed: int, free: int, purpose: str, where: str, move: str) -> list[Finding]:
    """A finding when there is less free than is needed."""
    needed = bytes_needed + SLACK if bytes_needed else 0
    if needed <= free:
        return []
    wanted = f"{size_text(needed)} for {purpose}"
    return [
        Finding(
            "disk", wanted, f"{size_text(free)} free in {where}", f"free {size_text(needed - free)} there, or {move}"
        )
    ]
