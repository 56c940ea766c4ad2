# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which images shipping put into the engine of a host: `<root>/state/images.json`.

What the engine had before, or got from somebody else, is not in it, and is nobody's business here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable, NamedTuple

from .digest import PRIVATE, write_atomically


class LoadedImage(NamedTuple):
    """A name that was given to a loaded image; `id` is what the engine calls it, `layers` have sizes in bytes.

    `image_id` is the digest of its configuration, `digest` that of its manifest.
    """

    reference: str
    id: str
    image_id: str
    digest: str
    layers: dict[str, int]


def loaded_images(state: Path) -> list[LoadedImage]:
    """The images that are known, from a state directory. What cannot be read counts as none."""
    try:
        rows: Any = json.loads((state / "images.json").read_text())["images"]
        return [LoadedImage(**row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def note_loaded(state: Path, image: LoadedImage) -> None:
    """Remember one more; the same name of the same image counts once."""
    known = [one for one in loaded_images(state) if (one.reference, one.id) != (image.reference, image.id)]
    _write(state, [*known, image])


def forget_loaded(state: Path, gone: Iterable[tuple[str, str]]) -> None:
    """Forget names (reference, id) that are not there any more."""
    lost = set(gone)
    known = loaded_images(state)
    kept = [one for one in known if (one.reference, one.id) not in lost]
    if kept != known:
        _write(state, kept)


def _write(state: Path, images: list[LoadedImage]) -> None:
    content = {"format": 1, "images": [one._asdict() for one in sorted(images, key=lambda one: one[:2])]}
    write_atomically(state / "images.json", json.dumps(content, indent=1).encode() + b"\n", PRIVATE)
