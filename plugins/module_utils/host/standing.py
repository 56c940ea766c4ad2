# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host serves at this moment: the release in force, what runs it, and its models. Reads only.

Whatever cannot be found out is told as a problem and does not keep the rest from being told.
"""

from __future__ import annotations

import calendar
import json
import re
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from ..server import keeper_told, record
from ..server.client import Client, ServerError
from ..server.running import Running, look
from . import container
from .backends import backend_in_force
from .docker_cli import Docker, DockerError
from .native_ctl import Native, ServiceError
from .release import current
from .service import endpoint

RUNNING = "running"
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)")


def server(root: Path, docker_host: Optional[str] = None) -> Dict[str, Any]:
    """The server of the release in force: backend, release, what it runs, GPUs, state, since, endpoint, problem.

    `since` is in seconds since 1970, None when it does not run.
    """
    found: Dict[str, Any] = {
        "backend": "",
        "release": current(root) or "",
        "runs": "",
        "gpus": [],
        "state": "absent",
        "since": None,
        "endpoint": "",
        "problem": "",
    }
    if not found["release"]:
        return found
    try:
        found.update(_in_container(root, docker_host) if backend_in_force(root) == "docker" else _native(root))
    except (DockerError, ServiceError, OSError, ValueError, KeyError) as error:
        found.update(state="unknown", problem=str(error))
    return found


def models(root: Path, client: Client) -> List[Dict[str, Any]]:
    """Models that run or have to: uid, state, since, error, and their story. One that has to and does not is `missing`.

    Raises ServerError when the server cannot be asked.
    """
    running = look(client)
    rows = [_model(one) for _uid, one in sorted(running.items())]
    rows += [
        {
            **_row(uid, "missing"),
            "error": "it is in the release and not on the server; playbooks/models.yml launches it",
        }
        for uid in _absent(root, running)
    ]
    return _with_stories(root, rows)


def unknown(root: Path) -> List[Dict[str, Any]]:
    """The models of the release, for a server that cannot be asked."""
    return _with_stories(root, [_row(uid, "unknown") for uid in _absent(root, {})])


def keeper(root: Path) -> Dict[str, Any]:
    """What the keeper says of itself: state, since, policy, problem, doing, restarts of the server it saw.

    `state` is that of `keeper_told`, `since` in seconds since 1970, None when it does not run.
    """
    told = keeper_told.told(root)
    runs = told["state"] == RUNNING
    return {
        "state": told["state"],
        "since": told.get("started") if runs else None,
        "policy": str(told.get("policy") or ""),
        "problem": str(told.get("problem") or "") if runs else "",
        "doing": str(told.get("doing") or "") if runs else "",
        "server_restarts": int((told.get("server") or {}).get("restarts") or 0),
    }


def _with_stories(root: Path, rows: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The rows with what the record and the keeper know of each model.

    desired: whether it is in the release. by: who launched it. restarts: how often the keeper saw it come back, None
    without one. verified: the keeper's last probe (`at`, `ok`, `detail`). fault, cure: the last ones (`at`, `what`).
    notes: the same and more for a person, a line each.
    """
    wanted, launched, told = set(_absent(root, {})), record.read(root), keeper_told.told(root)
    known = told.get("models") or {}
    for row in rows:
        uid, entry = row["model_uid"], launched.get(row["model_uid"])
        model = known.get(uid) or {}
        by = str(model.get("by") or (entry.by if entry else ""))
        row.update(
            desired=uid in wanted,
            by=(by or ("" if entry else "somebody else")) if row["state"] in ("ready", "starting") else "",
            restarts=model.get("restarts"),
            verified=model.get("verified"),
            fault=model.get("fault"),
            cure=model.get("cure"),
            notes=keeper_told.details(model, time.time()) if model else [],
        )
    return rows


def version(client: Client) -> str:
    """The version of the server, empty when it does not tell."""
    try:
        return client.version()
    except ServerError:
        return ""


def seconds(moment: str) -> Optional[float]:
    """A time as Docker writes it (UTC) in seconds since 1970."""
    match = _TIME.match(moment)
    return float(calendar.timegm(time.strptime(match.group(1), "%Y-%m-%dT%H:%M:%S"))) if match else None


def _in_container(root: Path, docker_host: Optional[str]) -> Dict[str, Any]:
    view = container.load_view(root)
    told = {
        "backend": "docker",
        "runs": _image_name(root, str(view["image"])),
        "gpus": [str(gpu["names"][0]) for gpu in view["gpus"]],
        "endpoint": view["endpoint"],
    }
    seen = container.find(Docker(docker_host), view)
    if seen is None:
        return {**told, "state": "stopped"}
    health = container.health(seen)
    up = bool(seen["State"].get("Running"))
    state = RUNNING if up and health in ("healthy", "none") else health
    return {**told, "state": state, "since": seconds(seen["State"]["StartedAt"]) if up else None}


def _native(root: Path) -> Dict[str, Any]:
    native = Native(root)
    now = native.state()
    visible = str(native.service["environment"].get("CUDA_VISIBLE_DEVICES") or "-1")
    told = {
        "backend": "native",
        "runs": "native",
        "gpus": [] if visible == "-1" else visible.split(","),
        "endpoint": endpoint(native.service),
        "state": RUNNING if now.active else "stopped",
        "since": now.started if now.active else None,
    }
    if now.active and now.digest != native.digest:
        told["problem"] = "it was started from an older definition than the release in force; run playbooks/serve.yml"
    elif now.active and not native.managed:
        told["problem"] = "its manager is gone, so nothing would start it again; run playbooks/serve.yml"
    return told


def _image_name(root: Path, identity: str) -> str:
    """What people call an image, by its id; the id where it is not known."""
    images = _json(root / "current" / "artifacts.json").get("images") or {}
    for entry in images.values():
        if identity in (entry.get("image_id"), entry.get("digest")):
            return str(entry["reference"])
    return identity[:19]


def _absent(root: Path, running: Mapping[str, Running]) -> List[str]:
    """Uids of the release in force that are not among the running ones."""
    entries = _json(root / "current" / "models.json", [])
    wanted = [entry for entry in entries if str(entry.get("enabled", True)).lower() not in ("false", "no", "off")]
    return sorted(uid for uid in (str(entry.get("model_uid")) for entry in wanted) if uid not in running)


def _model(one: Running) -> Dict[str, Any]:
    return {**_row(one.uid, one.state), "since": one.since, "error": one.error}


def _row(uid: str, state: str) -> Dict[str, Any]:
    return {"model_uid": uid, "state": state, "since": None, "error": ""}


def _json(path: Path, without: Any = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {} if without is None else without
