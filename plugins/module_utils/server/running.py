# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server runs, put together from its two lists: models that serve, and instances with their state.

The lists disagree in ways that matter: a failed launch leaves an instance that no list of models shows and no call
removes; a launch under way is an instance without a model; a model can be listed while its replicas still load.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .client import Client

STARTING = ("CREATING", "LOADING", "UPDATING")
# Seconds after which the list of models is not an old one.
LIST_AGE = 3.5
# What a server shows of a model that says how it was launched; compared with what it showed when we launched it.
SHOWN = (
    "model_name",
    "model_type",
    "model_engine",
    "model_format",
    "model_size_in_billions",
    "quantization",
    "replica",
)


@dataclass(frozen=True)
class Running:
    """One uid on the server.

    `model` is its entry in the list of models, None when it is not listed. `status` is the instance's own word, None
    where the server has no instance of it. `since` is when the server created it, in seconds since 1970, None when
    unknown. `replicas` are the states of its replicas, where the server tells. `error` is what the server says went
    wrong, empty when nothing did or it does not say.
    """

    uid: str
    model: Optional[Mapping[str, Any]] = None
    status: Optional[str] = None
    since: Optional[int] = None
    replicas: List[str] = field(default_factory=list)
    error: str = ""

    @property
    def loaded(self) -> bool:
        """Whether the instance and each of its replicas say that they are ready."""
        return self.status == "READY" and not any(one in STARTING for one in self.replicas)

    @property
    def unwinding(self) -> bool:
        """Whether its launch was given up, and a replica of it has not ended yet."""
        return self.status == "ERROR" and any(one in STARTING for one in self.replicas)

    @property
    def state(self) -> str:
        """`ready`, `starting`, `stopping`, `failed`, or `lost`: said to run, and missing in the list of models."""
        if self.status == "TERMINATING":
            return "stopping"
        if self.status in STARTING or (self.status == "READY" and not self.loaded):
            return "starting"
        if self.model is None:
            return "failed" if self.status == "ERROR" else "lost"
        return "failed" if self.status == "ERROR" else "ready"

    @property
    def shown(self) -> Dict[str, Any]:
        """The visible facts of how it was launched."""
        return {name: (self.model or {}).get(name) for name in SHOWN}


def combine(models: Mapping[str, Mapping[str, Any]], instances: Sequence[Mapping[str, Any]]) -> Dict[str, Running]:
    """Put the two lists together, by uid."""
    found: Dict[str, Running] = {uid: Running(uid, model) for uid, model in models.items()}
    for instance in instances:
        uid = str(instance.get("model_uid"))
        if instance.get("status") == "TERMINATED" and uid not in models:
            continue
        told, since = instance.get("replica_statuses"), instance.get("instance_created_ts")
        replicas = [one for one in told if isinstance(one, Mapping)] if isinstance(told, list) else []
        errors = [str(one["error_message"]) for one in replicas if one.get("error_message")]
        found[uid] = Running(
            uid,
            models.get(uid),
            instance.get("status"),
            since if isinstance(since, int) else None,
            [str(one.get("status")) for one in replicas],
            "; ".join(dict.fromkeys(errors)),
        )
    return found


def look(client: Client) -> Dict[str, Running]:
    """Ask the server for both lists: two requests."""
    return combine(client.models(), client.instances())


def look_twice(client: Client) -> Dict[str, Running]:
    """The same, once more after a while when a model is listed of which the server has no instance.

    Servers keep the list of models for three seconds; a model that died within them is still in it.
    """
    found = look(client)
    if any(one.model is not None and one.status is None for one in found.values()):
        time.sleep(LIST_AGE)
        found = look(client)
    return found


def settle(client: Client, uid: str, limit: float = 5.0, pause: float = 0.5) -> Running:
    """Look at one model that has just become ready, until the list of models shows it too.

    Servers keep that list for three seconds. After `limit` seconds the last look counts, listed or not.
    """
    end = time.monotonic() + limit
    while True:
        found = look(client).get(uid, Running(uid))
        if found.model is not None or time.monotonic() >= end:
            return found
        time.sleep(pause)
