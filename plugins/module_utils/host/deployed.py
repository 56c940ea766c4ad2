# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the release in force wants its server: the same questions for both backends. Reads only, and only its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Mapping, Optional
from urllib.parse import urlsplit

from . import compose, isolation
from .backends import backend_in_force
from .docker_release import COMPOSE_FILE, VIEW
from .service import endpoint
from .yaml_text import plain_data


@dataclass(frozen=True)
class Deployed:
    """A server as its release defines it. `backend` is empty where no release is in force.

    `home` is where it keeps what it writes, on the host. `address` and `port` are where it is to listen on the host.
    `volumes` have `source`, `target` and `read_only`; a native server has none. `environment` has no secrets with
    docker, where they are in a file of their own.
    """

    backend: str = ""
    home: str = ""
    addresses: List[str] = field(default_factory=list)
    port: int = 0
    endpoint: str = ""
    command: List[str] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    volumes: List[Dict[str, Any]] = field(default_factory=list)
    gpus: List[List[str]] = field(default_factory=list)
    view: Mapping[str, Any] = field(default_factory=dict)

    def on_host(self, path: str) -> Optional[Path]:
        """Where on the host a path of the server's lies; None where nothing but its container has it."""
        if not self.volumes:
            return Path(path)
        inside = PurePosixPath(path)
        sources = {PurePosixPath(one["target"]): Path(one["source"]) for one in self.volumes}
        # The deepest mount is the one that is seen.
        found = next((place for place in (inside, *inside.parents) if place in sources), None)
        return None if found is None else sources[found] / inside.relative_to(found)


def deployed(root: Path) -> Deployed:
    """The server of the release in force. Raises OSError, ValueError or KeyError for files that cannot be read."""
    backend = backend_in_force(root)
    if not backend:
        return Deployed()
    view = json.loads((root / "current" / VIEW).read_text(encoding="utf-8"))
    gpus = [[str(name) for name in gpu["names"]] for gpu in view.get("gpus") or []]
    if backend == "native":
        service = json.loads((root / "current" / "service.json").read_text(encoding="utf-8"))
        environment = {str(name): str(value) for name, value in service["environment"].items()}
        return Deployed(
            backend=backend,
            home=environment.get("XINFERENCE_HOME") or str(service["directory"]),
            addresses=[str(service["host"])],
            port=int(service["port"]),
            endpoint=endpoint(service),
            command=[str(word) for word in service["command"]],
            environment=environment,
            gpus=gpus,
            view=view,
        )
    project = plain_data((root / "current" / COMPOSE_FILE).read_text(encoding="utf-8"))
    service = _undoubled(project["services"][compose.SERVICE])
    volumes = [
        {"source": one["source"], "target": one["target"], "read_only": bool(one.get("read_only"))}
        for one in service.get("volumes") or []
        if isinstance(one, Mapping)
    ]
    place = (service.get("environment") or {}).get("XINFERENCE_HOME")
    homes = [one["source"] for one in volumes if one["target"] == place]
    # A server without a way out has a companion that publishes its port.
    ports = (project["services"].get(isolation.SERVICE) or service).get("ports") or []
    return Deployed(
        backend=backend,
        home=homes[0] if homes else str(root / "home"),
        addresses=[str(one.get("host_ip") or "0.0.0.0") for one in ports],
        port=int(ports[0]["published"]) if ports else int(urlsplit(str(view["endpoint"])).port or 0),
        endpoint=str(view["endpoint"]),
        command=[str(word) for word in service.get("command") or []],
        environment={str(name): str(value) for name, value in (service.get("environment") or {}).items()},
        volumes=volumes,
        gpus=gpus,
        view=view,
    )


def _undoubled(value: Any) -> Any:
    """Plain data with the dollar signs that Compose reads doubled as they are meant."""
    if isinstance(value, Mapping):
        return {name: _undoubled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_undoubled(item) for item in value]
    return value.replace("$$", "$") if isinstance(value, str) else value
