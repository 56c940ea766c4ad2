# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of what runs where, and since when."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .table import Row, draw

COLUMNS = ("host", "release", "runs", "gpus", "model", "wanted", "state", "since", "by", "restarts", "verified")
LOUD = ("silent", "absent")
"""States of a keeper that ought to run."""


def table(results: Mapping[str, Any], now: float | None = None) -> list[str]:
    """One table over all hosts; `results` are those of the module xinference_status, empty for a host not reached."""
    moment = time.time() if now is None else now
    rows = [row for host, found in results.items() for row in rows_of(host, found or {}, moment)]
    return [*draw(COLUMNS, rows), summary(results)]


def rows_of(host: str, found: Mapping[str, Any], now: float) -> list[Row]:
    """A row for the server of a host, and one for each model on it."""
    server = found.get("server") or {}
    if not server:
        why = str(found.get("msg") or "it was not reached")
        state = "unreachable" if found.get("unreachable") or not found else "failed"
        return [((host, *["-"] * 5, state, *["-"] * 4), why.splitlines())]
    gpus = " ".join(str(gpu) for gpu in server.get("gpus") or []) or "none"
    known = (host, server.get("release") or "-", server.get("runs") or "-", gpus)
    keeper = found.get("keeper") or {}
    restarts = str(keeper.get("server_restarts", "-")) if keeper.get("state") not in (None, "off", "absent") else "-"
    problem = [server["problem"]] if server.get("problem") else []
    since = when(server.get("since"), now)
    rows: list[Row] = [((*known, "(server)", "-", server.get("state") or "-", since, "-", restarts, "-"), problem)]
    if keeper:
        rows.append(_keeper(host, keeper, now))
    return [*rows, *(_model(host, model, now) for model in found.get("models") or [])]


def _keeper(host: str, keeper: Mapping[str, Any], now: float) -> Row:
    """The row of the keeper."""
    state = str(keeper["state"])
    told = [str(keeper[name]) for name in ("problem", "doing") if keeper.get(name)]
    if state in LOUD:
        told.append("it ought to run; docs/keeper.md says how to start it anew")
    elif state == "running":
        told.append(f"policy: {keeper.get('policy')}")
    return (host, "", "", "", "(keeper)", "-", state, when(keeper.get("since"), now), "-", "-", "-"), told


def _model(host: str, model: Mapping[str, Any], now: float) -> Row:
    """The row of a model; below it what is wrong, and what happened to it."""
    restarts = model.get("restarts")
    cells = (
        *(host, "", "", ""),
        str(model["model_uid"]),
        "yes" if model.get("desired") else "no",
        str(model["state"]),
        when(model.get("since"), now),
        launcher(str(model.get("by") or "")),
        "-" if restarts is None else str(restarts),
        proof(model.get("verified"), now),
    )
    return cells, [*([model["error"]] if model.get("error") else []), *(model.get("notes") or [])]


def launcher(by: str) -> str:
    """Who launched a model, in a word."""
    return "Ansible" if "Ansible" in by else by.replace("the keeper", "keeper") or "-"


def proof(verified: Mapping[str, Any] | None, now: float) -> str:
    """Whether the last probe passed, and how long ago: `yes (3 min)`."""
    if not verified:
        return "-"
    passed = "yes" if verified.get("ok") else "no"
    return f"{passed} ({age(max(0.0, now - float(verified.get('at') or now)))})"


def summary(results: Mapping[str, Any]) -> str:
    """One line of totals."""
    models = [
        model
        for found in results.values()
        for model in (found or {}).get("models") or []
        # What a failed launch left in the server's list until it ends is no model that somebody misses.
        if model.get("desired", True) or model["state"] != "failed"
    ]
    ready = sum(model["state"] == "ready" for model in models)
    up = sum(((found or {}).get("server") or {}).get("state") == "running" for found in results.values())
    return f"{up} of {len(results)} servers run; {ready} of {len(models)} models are ready."


def when(moment: float | None, now: float) -> str:
    """A moment for people: `2026-11-20 06:21 (3 h)`, `-` when unknown. Times are the controller's local ones."""
    if not moment:
        return "-"
    return f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(moment))} ({age(max(0.0, now - moment))})"


def age(seconds: float) -> str:
    """How long ago, in the largest unit that fits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"
