# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the GPUs an inventory names to the ones a server is given, and to the numbers it knows them by.

An inventory names GPUs as `nvidia-smi -L` on the host does, by number or UUID. A container sees only those it was
given, numbered from 0 in the order of their host numbers, whatever the order in which they were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence


class GpuError(ValueError):
    """GPUs of an inventory that the host does not have."""


@dataclass(frozen=True)
class Given:
    """One GPU given to a server: `name` as the inventory has it, `index` and `uuid` on the host (uuid if known)."""

    name: str
    index: int
    uuid: str = ""

    @property
    def names(self) -> List[str]:
        """All that an inventory may call it."""
        return [str(self.index), *([self.uuid] if self.uuid else [])]


def given(wanted: Sequence[Any], host: Sequence[Mapping[str, Any]], problem: str = "") -> List[Given]:
    """The GPUs of an inventory in the order in which a container numbers them.

    `host` are the GPUs of the host (`index`, `uuid`), `problem` says why that list may be empty. Numbers are believed
    where the host has no list. Raises GpuError with every name that means no GPU, or one that is named twice.
    """
    found: List[Given] = []
    unknown: List[str] = []
    table: Dict[str, Mapping[str, Any]] = {}
    for gpu in host:
        table[str(gpu["index"])] = table[str(gpu["uuid"]).lower()] = gpu
    for name in (str(entry).strip() for entry in wanted):
        gpu = table.get(name.lower(), {})
        if gpu:
            found.append(Given(name, int(gpu["index"]), str(gpu["uuid"])))
        elif not host and name.isdigit():
            found.append(Given(name, int(name)))
        else:
            unknown.append(name)
    if unknown:
        there = ", ".join(f"{gpu['index']} ({gpu['uuid']})" for gpu in host) or f"none: {problem or 'no GPU'}"
        raise GpuError(f"The inventory gives the server GPU {', '.join(unknown)}, and the host has {there}.")
    indexes = [gpu.index for gpu in found]
    twice = sorted({index for index in indexes if indexes.count(index) > 1})
    if twice:
        raise GpuError(f"The inventory gives the server GPU {', '.join(map(str, twice))} more than once.")
    return sorted(found, key=lambda gpu: gpu.index)
