# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What one backend needs to know of the other: whether its server still runs here, and would be in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

from .compose import KEEPER
from .container import find, load_view
from .docker_cli import Docker, DockerError
from .native_ctl import Native, ServiceError


class OtherBackend(Exception):
    """A server or a keeper of the other backend that runs."""


def refuse_other(root: Path, wanted: str, docker_host: Optional[str] = None) -> None:
    """Raise OtherBackend when the release in force runs its server or keeper by another backend than `wanted`.

    That has to be stopped by what knows it, before another release takes its place.
    """
    known = backend_in_force(root)
    if known in ("", wanted):
        return
    try:
        if known == "native":
            native = Native(root)
            running = native.state().active or bool(native.keepers())
        else:
            docker, view = Docker(docker_host), load_view(root)
            seen = [find(docker, {**view, "service": name}) for name in (view["service"], KEEPER)]
            running = any(one is not None and one["State"].get("Running") for one in seen)
    except (ServiceError, DockerError):
        return
    if running:
        raise OtherBackend(
            f"The backend is {wanted} now, and what runs under {root} was started by {known}. Stop it first "
            f"(playbooks/stop.yml -e xinference_backend={known}), then run again."
        )


def backend_in_force(root: Path) -> str:
    """The backend of the release in force, empty when there is none."""
    try:
        return str(json.loads((root / "current" / "server.json").read_text(encoding="utf-8"))["backend"])
    except (OSError, ValueError, KeyError):
        return "native" if (root / "current" / "service.json").exists() else ""
