# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait until a server answers and its models serve, and say what is wrong when they do not.

`wait_healthy` asks again and again until everything that was required is there or the time is up. What ends the wait
early is what waiting cannot mend: a refused key or login, or a model whose launch failed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from .client import AccessRefused, Client, ServerError
from .diagnose import Diagnosis, diagnose
from .features import supported
from .probe import ProbeResult, probe
from .running import Running, combine

PROBES_AT_ONCE = 4


@dataclass
class Health:
    """What a server was like when last asked.

    `listed` says whether it told its models. `problems` are sentences, empty when all is well; `diagnosis` explains the
    first that is known. `waited_s` is how long it took in seconds.
    """

    endpoint: str
    reachable: bool = False
    version: Optional[str] = None
    supported: Optional[bool] = None
    auth: Optional[bool] = None
    uptime_s: Optional[float] = None
    listed: bool = False
    workers: List[Dict[str, Any]] = field(default_factory=list)
    models: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    problems: List[str] = field(default_factory=list)
    diagnosis: Optional[Diagnosis] = None
    waited_s: float = 0.0
    hopeless: bool = False

    @property
    def healthy(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems

    def result(self) -> Dict[str, Any]:
        """As a module returns it."""
        found = {name: value for name, value in asdict(self).items() if name not in ("hopeless",)}
        found["healthy"] = self.healthy
        return found

    def _trouble(self, problem: str, said: str = "", hopeless: bool = False) -> None:
        self.problems.append(problem)
        self.diagnosis = self.diagnosis or diagnose(said or problem)
        self.hopeless = self.hopeless or hopeless


def look_at(client: Client, required: Sequence[str] = (), workers: int = 1) -> Health:
    """Ask once. `required` are the uids that must serve, `workers` how many must have joined.

    A server that asks for credentials is looked at from outside only when there are none and no model is required.
    """
    health = Health(client.endpoint)
    try:
        status = client.status()
        health.reachable = True
        health.uptime_s = status.get("uptime")
        health.workers = [_worker(address, told) for address, told in sorted((status.get("workers") or {}).items())]
        if len(health.workers) < workers:
            health._trouble(f"{len(health.workers)} of {workers} workers have joined {client.endpoint}.")
        health.auth = client.auth_enabled()
        if health.auth and not client.has_credentials and not required:
            return health  # More is not to be had without a key; that it answers is what was asked.
        health.version = client.version()
        health.supported = supported(health.version)
        _add_gpus(health, client.cluster_info())
        running = combine(client.models(), client.instances())
    except ServerError as error:
        health._trouble(error.message, error.detail, hopeless=isinstance(error, AccessRefused))
        return health
    health.listed = True
    health.models = {uid: _model(one) for uid, one in sorted(running.items())}
    for uid in required:
        _require(health, uid, running.get(uid))
    return health


def wait_healthy(
    client: Client,
    required: Sequence[str] = (),
    workers: int = 1,
    timeout: float = 0.0,
    pause: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Health:
    """Ask every `pause` seconds until the server is healthy, waiting is in vain, or `timeout` seconds are over.

    Asks once when `timeout` is 0. Returns the last look, healthy or not.
    """
    started = clock()
    while True:
        health = look_at(client, required, workers)
        waited = clock() - started
        health.waited_s = round(waited, 1)
        if health.healthy or health.hopeless:
            return health
        if waited + pause > timeout:
            if timeout > 0:
                health.problems.append(f"That was so for {waited:.0f} s, the limit is {timeout:g} s.")
            return health
        sleep(pause)


def probe_all(
    client: Client, entries: Sequence[Mapping[str, Any]], health: Health, at_once: int = PROBES_AT_ONCE
) -> Dict[str, ProbeResult]:
    """Probe the models of `entries`, several at once, and note failures in `health`. Returns the results by uid."""
    shown = {uid: model["model"] for uid, model in health.models.items()}
    with ThreadPoolExecutor(max_workers=max(1, at_once)) as pool:
        jobs = {
            str(one["model_uid"]): pool.submit(probe, client, one, shown.get(str(one["model_uid"]))) for one in entries
        }
        results = {uid: job.result() for uid, job in jobs.items()}
    for uid, result in results.items():
        if not result.ok:
            health.problems.append(f"Model {uid} does not pass its probe: {result.error}")
            health.diagnosis = health.diagnosis or result.diagnosis
    return results


def _require(health: Health, uid: str, found: Optional[Running]) -> None:
    if found is None:
        near = f"It knows: {', '.join(health.models)}." if health.models else "It knows no model at all."
        health._trouble(f"Model {uid} is not on the server. {near}")
    elif found.state == "failed":
        reason = found.error or "the server does not say why, its log does"
        health._trouble(f"The launch of model {uid} failed: {reason}", found.error, hopeless=True)
    elif found.state != "ready":
        health._trouble(f"Model {uid} is {found.state}.")


def _model(found: Running) -> Dict[str, Any]:
    return {
        "state": found.state,
        "status": found.status,
        "replicas": list(found.replicas),
        "error": found.error,
        "model": dict(found.model) if found.model is not None else None,
    }


def _worker(address: str, told: Mapping[str, Any]) -> Dict[str, Any]:
    """One worker of `/status`: address, memory in bytes."""
    status = told.get("status")
    memory = status.get("cpu") if isinstance(status, Mapping) else None
    memory = memory if isinstance(memory, Mapping) else {}
    return {
        "address": address,
        "memory_total": memory.get("memory_total"),
        "memory_available": memory.get("memory_available"),
    }


def _add_gpus(health: Health, nodes: Sequence[Mapping[str, Any]]) -> None:
    """GPU count and memory of each worker; versions before 2 tell the address of a worker without its port."""
    told = [node for node in nodes if node.get("node_type") == "Worker"]
    for worker in health.workers:
        for node in told:
            address = str(node.get("ip_address"))
            if address in (worker["address"], str(worker["address"]).rsplit(":", 1)[0]):
                worker["gpu_count"] = node.get("gpu_count")
                worker["gpu_memory_total"] = node.get("gpu_vram_total")
