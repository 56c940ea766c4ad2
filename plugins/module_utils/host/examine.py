# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything `diagnose` wants to know of a host, gathered in one walk. Reads only, judges nothing.

What cannot be found out is told under `problems` and keeps nothing else from being told: a host may be half installed,
and whoever asks may have few rights. Known secrets are taken out of every text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

from ..scrubbing import Scrubber
from ..server.client import REQUESTS_ERROR, Client, ServerError
from . import container, examine_files, examine_server, facts, standing
from .deployed import Deployed, deployed
from .docker_cli import Docker, DockerError
from .known_secrets import known_secrets
from .native_ctl import ServiceError
from .system_facts import volume

FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, DockerError, ServiceError, ServerError)
"""What files that somebody changed, an engine that is down, or missing rights come to."""


def examine(
    root: Path,
    docker_host: Optional[str] = None,
    deep: bool = False,
    hash_seconds: float = 0.0,
    credentials: Optional[Mapping[str, Any]] = None,
) -> Dict[str, Any]:
    """The facts, by area; see `plugin_utils/diagnosis` for what is made of them.

    `credentials` are what `Client` takes beside the endpoint, for the list of models. `hash_seconds` is how long files
    are read that no stamp vouches for, 0 for as long as it takes; with `deep` all are.
    """
    found: Dict[str, Any] = {"root": str(root), "problems": {}}

    def attempt(area: str, look: Callable[[], Any], without: Any = None) -> Any:
        try:
            return look()
        except FAILURES as error:
            found["problems"][area] = f"{type(error).__name__}: {error}"
            return without

    def put(area: str, look: Callable[[], Any], without: Any = None) -> Any:
        found[area] = attempt(area, look, without)
        return found[area]

    place = put("place", lambda: facts.place(str(root)), {})
    put("user", lambda: facts.machine()["user"], "")
    found["installed"] = bool(place) and not place["obstacle"] and place["existing"] == str(root)
    if not found["installed"]:
        return found
    found["shipped"] = any((root / mark).exists() for mark in facts.MARKS)
    seen: Deployed = attempt("release", lambda: deployed(root)) or Deployed()
    found["deployed"] = {name: getattr(seen, name) for name in ("backend", "home", "addresses", "port", "endpoint")}
    put("server", lambda: standing.server(root, docker_host), {})
    docker = attempt("engine", lambda: Docker(docker_host)) if seen.backend == "docker" else None
    inside = attempt("container", lambda: container.find(docker, seen.view)) if docker else None
    found["container"] = bool(inside)
    process = put("process", lambda: examine_server.processes(root, seen, inside), {}) or {}

    put("volumes", lambda: examine_files.volumes(root, seen), [])
    found["engine_data"], found["unseen"], found["image"] = None, [], True
    if docker:
        put("engine_data", lambda: volume(str(docker.info()["DockerRootDir"])))
        put("image", lambda: docker.image_id([str(seen.view["image"])]) is not None, True)
    if docker and inside:
        put("unseen", lambda: examine_server.unseen(docker, inside, seen), [])
    put("integrity", lambda: examine_files.integrity(root, seen, deep, hash_seconds), {})
    put("log", lambda: examine_server.log(root, docker_host, process), {})
    put("port", lambda: examine_server.port(root, seen, inside), {})
    put("permissions", lambda: examine_files.permissions(root, seen, process.get("uid")), {})
    put("selinux", lambda: examine_files.labels(root, seen), {})
    put("denials", lambda: examine_files.denials(root, process.get("pids") or []), {})
    answers = bool((found["port"] or {}).get("answers"))
    access = put("access", lambda: examine_server.access(seen, answers), {}) or {}
    asked = answers and access.get("auth") is False
    put("gpus", lambda: examine_server.gpus(seen, docker, inside, asked), {})
    put("switches", lambda: examine_server.switches(root, seen, process, inside), {})
    put("keeper", lambda: standing.keeper(root), {})
    put("models", lambda: _models(root, seen, found, credentials or {}), {"asked": False, "rows": []})
    return dict(Scrubber(known_secrets(root, seen, inside)).clean_data(found))


def _models(root: Path, seen: Deployed, found: Mapping[str, Any], credentials: Mapping[str, Any]) -> Dict[str, Any]:
    """The models that have to serve, and do: `rows` as `standing.models`; `asked` is whether the server told it.

    `problem` is why it did not.
    """
    if not seen.endpoint or not (found["port"] or {}).get("answers"):
        return {"asked": False, "problem": "", "rows": standing.unknown(root)}
    if (found["access"] or {}).get("auth") and not (credentials.get("api_key") or credentials.get("username")):
        problem = "it asks for credentials, and none were given"
        return {"asked": False, "problem": problem, "rows": standing.unknown(root)}
    if REQUESTS_ERROR:
        problem = "the library requests is not there"
        return {"asked": False, "problem": problem, "rows": standing.unknown(root)}
    try:
        rows = standing.models(root, Client(seen.endpoint, **credentials))
        return {"asked": True, "problem": "", "rows": rows}
    except ServerError as error:
        return {"asked": False, "problem": error.message, "rows": standing.unknown(root)}
