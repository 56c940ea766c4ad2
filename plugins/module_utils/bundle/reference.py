# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of container images: how people write them, how the engine shows them, and what a bundle calls them."""

from __future__ import annotations

import re

from .manifest import name_problem

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?"
_REFERENCE = re.compile(rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?\Z")
_DEFAULT_PLACES = ("docker.io/library/", "index.docker.io/library/", "docker.io/", "index.docker.io/")


def reference_problem(reference: object) -> str | None:
    """Why something cannot be the name of an image, or None."""
    if not isinstance(reference, str) or not _REFERENCE.match(reference):
        digest = " and no digest" if isinstance(reference, str) and "@" in reference else ""
        return f"{reference!r} is not the name of an image; write repository:tag{digest}"
    return name_problem(image_name(reference))


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
