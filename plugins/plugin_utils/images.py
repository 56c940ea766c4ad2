# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images on their way to the engine of a host: ask it, send the layers it lacks, ask again until it has the image.

Manifests and configurations are in the host's store by then. The engine decides what is needed: nothing, some layers,
or, when it refused an archive without those it has, all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact

from .shipping import ShippingError

ROUNDS = 6
"""Questions asked at most. Two are needed, what is missing and the load; after a refusal both once more."""
DONE = ("load", "tag")


@dataclass
class Images:
    """What became of the images: a row about each, and the layers that the store still lacks."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    changed: bool = False
    diff: dict[str, str] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    """How long the engine was at work."""


def bare(artifact: Artifact) -> Artifact:
    """An artifact as it goes to every host; of an image that is manifest and configuration."""
    return with_layers(artifact, ())


def with_layers(artifact: Artifact, layers: Any) -> Artifact:
    """An image with these of its layers only; any other artifact as it is."""
    left_out = {layer.digest for layer in artifact.layers} - set(layers)
    return replace(artifact, blobs=tuple(blob for blob in artifact.blobs if blob.digest not in left_out))


def load(
    images: list[Artifact],
    ask: Callable[[list[Artifact], set[str]], dict[str, Any]],
    send: Callable[[dict[str, dict[str, int]]], None],
    say: Callable[[str], None],
    rehearse: bool = False,
) -> Images:
    """Bring images into the engine. Raises ShippingError when it does not take them.

    `ask` runs the module xinference_image, told which of the images have to go in complete; `send` ships layers, given
    as sizes by digest by name of the image. With `rehearse` it is asked once, and nothing is sent.
    """
    result = Images()
    complete: set[str] = set()
    for _round in range(ROUNDS):
        answer = ask(images, complete)
        done = {row["name"]: row for row in result.rows if row["action"] in DONE}
        result.rows = [done.get(row["name"], row) if row["action"] == "keep" else row for row in answer["images"]]
        result.diff = result.diff or answer.get("diff", {})
        result.changed = result.changed or answer["changed"]
        result.seconds += sum(row["seconds"] for row in answer["images"])
        result.missing = {digest: size for layers in answer["missing"].values() for digest, size in layers.items()}
        if answer.get("msg"):
            say(answer["msg"])
        if rehearse:
            return result
        refused = {row["name"]: row["refused"] for row in answer["images"] if row["refused"]}
        for name, reason in refused.items():
            say(f"{name}: the engine refused an archive without the layers it has ({reason}); sending all of them")
        complete |= set(refused)
        if answer["missing"]:
            send(answer["missing"])
        elif not refused:
            return result
    names = ", ".join(row["reference"] for row in result.rows if not row["id"])
    raise ShippingError(f"The Docker Engine still lacks {names} after {ROUNDS} attempts. Look at its log, run again.")
