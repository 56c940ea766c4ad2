# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The server's container as it runs: whether it is healthy, what it printed, and which GPUs it sees from inside.

A container can lose its GPUs while it runs (a `systemctl daemon-reload` takes the rights to the devices away), and
nothing but a look from inside shows it.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from .docker_cli import Docker, DockerError
from .docker_release import VIEW
from .service import answers

POLL = 0.5
SHOWN_LINES = 60
"""Lines of the log that a failure shows."""
NO_SUCH_COMMAND = (126, 127)
_UUID = re.compile(r"^GPU \d+: .*\(UUID: ([^)]+)\)", re.MULTILINE)


class NotHealthy(Exception):
    """A container that did not come up; `log` is the end of what it printed."""

    def __init__(self, message: str, log: str, *, ran: bool = True) -> None:
        self.log = log
        super().__init__(f"{message}\nThe end of its log:\n{log.strip() or '(empty)'}" if ran else message)


@dataclass
class Gpus:
    """GPUs of a running server. `lost` are those that were given and are not there; `problem` says what was seen.

    `seen` are UUIDs that `nvidia-smi` lists inside, None where the image cannot tell; `counted` is the number that
    the server itself reports, None where it does not tell.
    """

    given: List[str] = field(default_factory=list)
    seen: Optional[List[str]] = None
    counted: Optional[int] = None
    lost: List[str] = field(default_factory=list)
    problem: str = ""


def load_view(root: Path) -> Dict[str, Any]:
    """How the server of the release in force sees the host. Raises DockerError when none runs in a container."""
    try:
        found: Dict[str, Any] = json.loads((root / "current" / VIEW).read_text(encoding="utf-8"))
    except OSError as error:
        raise DockerError(f"There is no release in force under {root}: {error}; run playbooks/serve.yml") from error
    if found.get("backend") != "docker":
        raise DockerError(f"The release in force under {root} does not run in a container; run playbooks/serve.yml")
    return found


def find(docker: Docker, view: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """The server's container, as `docker inspect` shows it."""
    labels = {"com.docker.compose.project": view["project"], "com.docker.compose.service": view["service"]}
    return docker.container({**labels, "com.docker.compose.oneoff": "False"})


def wait(docker: Docker, view: Mapping[str, Any], timeout: float, pause: Callable[[float], Any] = time.sleep) -> Dict:
    """Wait until the container is healthy and its server answers on the host; returns it as `docker inspect` shows it.

    Raises NotHealthy with the log after `timeout` seconds, or as soon as it ended, was started again by the engine, or
    the engine found it unhealthy.
    """
    deadline = time.monotonic() + timeout
    restarts: Optional[int] = None
    while True:
        seen = find(docker, view)
        if seen is None:
            raise DockerError(f"There is no container of the project {view['project']}; run playbooks/serve.yml")
        restarts = seen["RestartCount"] if restarts is None else restarts
        verdict = judge(seen, restarts)
        if verdict:
            raise NotHealthy(verdict, docker.logs(seen["Id"], SHOWN_LINES))
        if health(seen) in ("healthy", "none") and answers(f"{view['endpoint']}/status"):
            return seen
        if time.monotonic() > deadline:
            message = f"{name(seen)} is {health(seen)} and does not answer on {view['endpoint']} after {timeout:.0f} s"
            raise NotHealthy(message, docker.logs(seen["Id"], SHOWN_LINES))
        pause(POLL)


def failed_start(docker: Docker, view: Mapping[str, Any], said: str) -> NotHealthy:
    """The failure of a container that could not be brought up; with its log where it ran and ended.

    One that runs on is the one before, whose log has nothing to do with what was said.
    """
    seen = find(docker, view)
    state = seen["State"]["Status"] if seen else ""
    if seen and state == "paused":
        return NotHealthy(f"{said.strip()}\n{judge(seen, seen['RestartCount'])}", "", ran=False)
    if seen and seen["State"].get("Running"):
        return NotHealthy(f"{said.strip()}\n{name(seen)} runs on as it was.", "", ran=False)
    if seen is None or state == "created":
        return NotHealthy(said.strip(), "", ran=False)
    return NotHealthy(said.strip(), docker.logs(seen["Id"], SHOWN_LINES))


def judge(seen: Mapping[str, Any], restarts: int) -> str:
    """Why there is no use in waiting for a container, empty when there is. `restarts` is how many it had before."""
    state = seen["State"]
    tries = (state.get("Health") or {}).get("Log") or []
    # A container that ends counts as unhealthy at once, though nobody asked it.
    unasked = health(seen) == "unhealthy" and not tries
    if state["Status"] in ("exited", "dead") or seen["RestartCount"] > restarts or unasked:
        why = " (killed for want of memory)" if state.get("OOMKilled") else ""
        words = f" {state['Error']}" if state.get("Error") else ""
        # The code of a container that runs again is not told any more.
        code = "" if state["Status"] == "running" else f" with code {state['ExitCode']}"
        return f"{name(seen)} ended{code}{why}.{words}"
    if state["Status"] == "paused":
        return f"{name(seen)} is paused; docker unpause {name(seen)}"
    if health(seen) == "unhealthy":
        return (
            f"{name(seen)} runs and does not answer, so it is unhealthy. When its log tells no reason: docker restart "
            f"{name(seen)}, then run again. It said: {str(tries[-1].get('Output', '')).strip()[-500:]}"
        )
    return ""


def health(seen: Mapping[str, Any]) -> str:
    """What the engine says of a container: healthy, unhealthy, starting, none without a check; or how it ended."""
    state = seen["State"]
    if not state.get("Running"):
        return str(state["Status"])
    return str((state.get("Health") or {}).get("Status") or "none")


def name(seen: Mapping[str, Any]) -> str:
    """The container's name."""
    return str(seen["Name"]).lstrip("/")


def gpus(docker: Docker, view: Mapping[str, Any], container: str) -> Gpus:
    """Look from inside for the GPUs that the server was given."""
    given = [list(map(str, gpu["names"])) for gpu in view["gpus"]]
    if not given:
        return Gpus()
    seen, said = listed(docker, container)
    return compare(given, seen, counted(str(view["endpoint"])), said)


def listed(docker: Docker, container: str) -> Tuple[Optional[List[str]], str]:
    """UUIDs that `nvidia-smi` lists inside, None where the image has no such program; and why it failed."""
    answer = docker.inside(container, "nvidia-smi", "-L")
    seen = None if answer.code in NO_SUCH_COMMAND else (_UUID.findall(answer.out) if answer.code == 0 else [])
    return seen, (answer.out + answer.err).strip() if answer.code and seen is not None else ""


def compare(given: Sequence[Sequence[str]], seen: Optional[List[str]], count: Optional[int], said: str = "") -> Gpus:
    """What of the GPUs given is there. Pure. `said` is why nothing could be listed.

    Where UUIDs of the host are not known, the number decides.
    """
    titles = [names[0] for names in given]
    found = Gpus(given=titles, seen=seen, counted=count)
    if seen is not None:
        uuids = [names[1] if len(names) > 1 else "" for names in given]
        if all(uuids):
            found.lost = [title for title, uuid in zip(titles, uuids) if uuid not in seen]
        elif len(seen) < len(given):
            found.lost = titles[len(seen) :]
    if found.lost:
        found.problem = f"The container has lost GPU {', '.join(found.lost)}: " + (
            said or f"nvidia-smi inside lists {len(seen or [])} of {len(given)}"
        )
    elif count is not None and count < len(given):
        found.problem = (
            f"The server counts {count} of its {len(given)} GPUs, though the container has them. The driver of the "
            "host may be too old for the CUDA of the image, or CUDA_VISIBLE_DEVICES hides some."
        )
    return found


def counted(endpoint: str) -> Optional[int]:
    """The number of GPUs that the server itself can use; None when it does not tell without credentials."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{endpoint}/v1/cluster/devices", timeout=10) as answer:
            return int(json.loads(answer.read().decode()))
    except (OSError, ValueError, TypeError):
        return None
