# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host of the testbed as a site has it: its inventory, and the playbooks that are run for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import plays

from .hosts import Host

SERVER = "xinference-server-1"


class Site:
    """One host, and the variables of its inventory."""

    container_name = SERVER

    def __init__(self, host: Host, place: Path, variables: Dict[str, Any]) -> None:
        self.host, self.place, self.variables = host, place, variables
        self.inventories = [host.directory / "inventory/hosts.yml"]

    def play(self, *names: str, options: Sequence[str] = (), expect: int = 0, **variables: Any) -> str:
        """Run playbooks; returns what they printed."""
        wanted = {**self.variables, **variables}
        return plays.play(names, self.inventories, wanted, self.place, options, expect)

    def inside(self, *command: str) -> str:
        """Run a command in the container."""
        return self.host.docker("exec", self.container_name, *command)

    def container(self) -> Dict[str, Any]:
        """The container as the engine shows it."""
        found: List[Dict[str, Any]] = json.loads(self.host.docker("inspect", self.container_name))
        return found[0]
