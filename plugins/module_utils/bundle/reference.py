# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of container images: how people write them, how the engine shows them, and what a bundle calls them."""

from __future__ import annotations

import re

from .documents import shown
from .manifest import IMAGE_NAME, IMAGES, Artifact, name_problem

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?"
_REFERENCE = re.compile(rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?\Z")
MAX_REFERENCE = 512
_DEFAULT_PLACES = ("docker.io/library/", "index.docker.io/library/", "docker.io/", "index.docker.io/")


def reference_problem(reference: object) -> str | None:
    """Why something cannot be the name of an image, or None."""
    if not isinstance(reference, str) or len(reference) > MAX_REFERENCE or not _REFERENCE.match(reference):
        digest = " and no digest" if isinstance(reference, str) and "@" in reference else ""
        return f"{shown(reference)} is not the name of an image; write repository:tag{digest}"
    return name_problem(image_name(reference))


def image_problem(artifact: Artifact) -> str | None:
    """Why an image is not the one its name says, or None (also for what is no image).

    The engine is given the name in the annotation, so it must not be another one than the index has.
    """
    if artifact.kind != IMAGES:
        return None
    reference = artifact.annotations.get(IMAGE_NAME)
    if reference is None:
        return f"the manifest does not say what the image is called ({IMAGE_NAME})"
    if reference_problem(reference) or image_name(reference) != artifact.name:
        return f"the manifest calls the image {shown(reference)}, which has another name in a bundle"
    return None


def familiar(reference: str) -> str:
    """A reference as the engine shows it: with a tag, and without what it would assume anyway."""
    for place in _DEFAULT_PLACES:
        if reference.startswith(place):
            reference = reference[len(place) :]
            break
    return reference if ":" in reference.rpartition("/")[2] else f"{reference}:latest"


def image_name(reference: str) -> str:
    """What a bundle calls an image: ``xprobe/xinference:v4.1.0`` is ``xprobe-xinference-v4.1.0``."""
    return re.sub(r"[/:]", "-", familiar(reference))


def repository_and_tag(reference: str) -> tuple[str, str]:
    """The two halves of a reference."""
    repository, _colon, tag = familiar(reference).rpartition(":")
    return repository, tag
