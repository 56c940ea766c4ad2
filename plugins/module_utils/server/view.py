# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the server of the release in force sees the host: other paths and other numbers of GPUs, when in a container.

The release says so itself, in `server.json`, so that whoever changes models needs no inventory for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

FILE = Path("current", "server.json")


@dataclass(frozen=True)
class View:
    """`models` is where the server finds `<root>/models`, empty where it is the same place.

    `gpus` has the index the server knows a GPU by under each of the GPU's names on the host; None where the release
    says nothing about GPUs.
    """

    root: Path
    models: str = ""
    gpus: Optional[Mapping[str, int]] = None

    @classmethod
    def load(cls, root: Union[str, Path]) -> View:
        """The view of the release in force; that of the host itself where there is none."""
        try:
            text = (Path(root) / FILE).read_text(encoding="utf-8")
        except OSError:
            return cls(Path(root))
        told: Dict[str, Any] = json.loads(text)
        gpus = told.get("gpus")
        names = None if gpus is None else {str(name): int(gpu["index"]) for gpu in gpus for name in gpu["names"]}
        return cls(Path(root), str(told.get("models") or ""), names)

    def path(self, path: str) -> str:
        """Where the server finds what is at `path` on the host. Only models of the bundle are elsewhere."""
        top = f"{self.root / 'models'}/"
        return f"{self.models}/{path[len(top) :]}" if self.models and path.startswith(top) else path
