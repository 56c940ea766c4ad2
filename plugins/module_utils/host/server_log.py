# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the server of the release in force printed, wherever that is kept: an engine, the journal, a file."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from ..server.log import Reader, files
from . import container
from .backends import backend_in_force
from .docker_cli import Docker, DockerError
from .native_ctl import Native, ServiceError

LINES = 5000


def reader(root: Union[str, Path], docker_host: Optional[str] = None) -> Reader:
    """Reads it from a time on. What cannot be read is empty, because it would only explain something else."""
    root = Path(root)
    from_files = files(root)

    def read(since: float) -> str:
        found = ""
        try:
            if backend_in_force(root) == "docker":
                found = _container(root, docker_host, since)
            elif backend_in_force(root) == "native" and Native(root).systemd:
                found = Native(root).logs(LINES)
        except (DockerError, ServiceError, OSError, ValueError, KeyError):
            pass
        return found or from_files(since)

    return read


def _container(root: Path, docker_host: Optional[str], since: float) -> str:
    """The last lines of the server's container since a time, both of its streams."""
    docker = Docker(docker_host)
    seen = container.find(docker, container.load_view(root))
    if seen is None:
        return ""
    answer = docker.ask("logs", "--since", str(int(since)), "--tail", str(LINES), str(seen["Id"]))
    return answer.out + answer.err
