# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is in a bundle, as return values and as a table to read."""

from __future__ import annotations

from typing import Any, Iterable, Mapping

from .manifest import IMAGE_NAME, REVISION, WHEELS_PLATFORM, WHEELS_PYTHON, WHEELS_REQUIRES, WHEELS_XINFERENCE
from .sizes import size_text
from .volumes import Row

_COLUMNS = ("NAME", "REVISION", "FILES", "SIZE")


def artifact_values(
    kind: str, name: str, annotations: Mapping[str, str], files: int, size: int, digest: str
) -> dict[str, Any]:
    """An artifact as both modules of the bundle return it; sizes in bytes."""
    return {
        "kind": kind,
        "name": name,
        "revision": annotations.get(REVISION, ""),
        "annotations": dict(annotations),
        "files": files,
        "size": size,
        "size_text": size_text(size),
        "digest": digest,
    }


def table(artifacts: Iterable[Mapping[str, Any]]) -> list[str]:
    """The lines of a table of artifact values: name, what it is a version of, number of files, size."""
    rows = [_COLUMNS]
    rows += [
        (f"{item['kind']}/{item['name']}", version_text(item["annotations"]), str(item["files"]), item["size_text"])
        for item in artifacts
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return [
        f"{name:<{widths[0]}}  {version:<{widths[1]}}  {files:>{widths[2]}}  {size:>{widths[3]}}"
        for name, version, files, size in rows
    ]


def volume_values(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Volumes as their module returns them; sizes in bytes."""
    return [{**row._asdict(), "artifacts": list(row.artifacts), "size_text": size_text(row.size)} for row in rows]


def volume_table(rows: Iterable[Row]) -> list[str]:
    """The lines of a table of volumes: name, size, state, and what they hold."""
    cells = [("VOLUME", "SIZE", "STATE", "HOLDS")]
    cells += [(row.title, size_text(row.size), row.state, ", ".join(row.artifacts) or "-") for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return [
        f"{title:<{widths[0]}}  {size:>{widths[1]}}  {state:<{widths[2]}}  {holds}"
        for title, size, state, holds in cells
    ]


def version_text(annotations: Mapping[str, str]) -> str:
    """Revision of a model, name of an image, or what wheels are for; ``-`` where there is nothing to tell."""
    if REVISION in annotations:
        return annotations[REVISION]
    if IMAGE_NAME in annotations:
        return annotations[IMAGE_NAME]
    if WHEELS_REQUIRES in annotations:
        return f"Python {annotations[WHEELS_REQUIRES]}+"
    if WHEELS_PYTHON in annotations:
        facts = [annotations[WHEELS_PYTHON], annotations.get(WHEELS_PLATFORM, "")]
        version = annotations.get(WHEELS_XINFERENCE)
        return " ".join([f"xinference {version},"] * bool(version) + [fact for fact in facts if fact])
    return "-"
