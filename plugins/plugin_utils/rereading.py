# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Having a host read all it has again, one part after the other, so that people see how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text

from .progress import Progress, duration_text

FIRST_PART = 2.0
"""Seconds of the first part: soon enough to say how much there is."""
PART = 10.0
"""Seconds of every other part. Each costs a question, which takes about one."""
SHOWN = 5


@dataclass
class Reread:
    """What a host read again: files and bytes, what was damaged (reasons by digest, and sizes of what is missing now).

    `made` are directories that were made again because something in them was damaged, `faults` files of those.
    """

    files: int = 0
    read_bytes: int = 0
    hashed_bytes: int = 0
    seconds: float = 0.0
    damaged: dict[str, str] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Reread) -> None:
        """Count another pass over the same blobs, which were partly not known in the one before."""
        self.files, self.read_bytes = max(self.files, other.files), max(self.read_bytes, other.read_bytes)
        self.hashed_bytes += other.hashed_bytes
        self.seconds += other.seconds
        self.damaged.update(other.damaged)
        self.missing.update(other.missing)
        self.made = list(dict.fromkeys([*self.made, *other.made]))
        self.faults = list(dict.fromkeys([*self.faults, *other.faults]))


def read_again(
    ask: Callable[[str, float], dict[str, Any]],
    label: str,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Reread:
    """Have everything read once. `ask` has xinference_store read from a place on, for so many seconds."""
    began, found, progress = clock(), Reread(), None
    after, seconds = "", FIRST_PART
    while True:
        answer = ask(after, seconds)
        part = answer["deep"]
        found.files, found.read_bytes = part["files"], part["read_bytes"]
        found.hashed_bytes += answer["hashed_bytes"]
        found.damaged.update(answer["damaged"])
        found.missing.update(
            {digest: size for digest, size in answer["missing"].items() if digest in answer["damaged"]}
        )
        found.made = list(dict.fromkeys([*found.made, *answer["made"]]))
        found.faults = list(dict.fromkeys([*found.faults, *answer["faults"]]))
        if progress is None:
            progress = Progress(f"{label}: verifying", part["of_bytes"], say)
        progress.total = part["of_bytes"]
        progress.reach(part["read_bytes"])
        if not part["after"]:
            found.seconds = clock() - began
            return found
        after, seconds = part["after"], PART


def names_of(artifacts: Iterable[Artifact], digest: str) -> list[str]:
    """Where a blob is used, as people call it."""
    found = []
    for artifact in artifacts:
        files = [f"{artifact.reference}: {file.path}" for file in artifact.files if file.digest == digest]
        if not files and any(blob.digest == digest for blob in artifact.blobs):
            files = [f"{artifact.reference}: {'manifest' if digest == artifact.digest else 'configuration'}"]
        found += files
    return found


def rows(found: Reread, artifacts: list[Artifact]) -> list[dict[str, Any]]:
    """What was damaged, with the files it is."""
    return [
        {"digest": digest, "files": names_of(artifacts, digest), "why": why}
        for digest, why in sorted(found.damaged.items())
    ]


def told(found: Reread, artifacts: list[Artifact], repaired: bool) -> str:
    """A line about it; what was damaged is named. `repaired` says whether it was sent anew."""
    rate = f" ({size_text(found.read_bytes / found.seconds)}/s)" if found.seconds > 0 and found.read_bytes else ""
    line = f"read {size_text(found.read_bytes)} again in {duration_text(found.seconds)}{rate}: "
    if not found.damaged and not found.made:
        return f"{line}nothing is damaged"
    names = [name for row in rows(found, artifacts) for name in row["files"] or [row["digest"]]]
    counts = [f"{len(found.damaged)} damaged blobs ({_some(names)})"] if names else []
    if found.faults:
        counts.append(f"changed files ({_some(found.faults)})")
    elif not names:
        counts.append(f"damaged files in {', '.join(found.made)}")
    count = " and ".join(counts)
    if not repaired:
        return f"{line}{count} would be {'removed and sent anew' if names else 'replaced'}"
    return (
        f"{line}{count} were replaced. A server that has an old file open keeps it until it is started again "
        "(playbooks/stop.yml, then site.yml)"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
