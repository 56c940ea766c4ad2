# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of what runs where, and since when."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .table import Row, draw

COLUMNS = ("host", "release", "runs", "gpus", "model", "state", "since")


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
        return [((host, "-", "-", "-", "-", state, "-"), why.splitlines())]
    gpus = " ".join(str(gpu) for gpu in server.get("gpus") or []) or "none"
    known = (host, server.get("release") or "-", server.get("runs") or "-", gpus)
    rows: list[Row] = [
        (
            (*known, "(server)", server.get("state") or "-", when(server.get("since"), now)),
            [server["problem"]] if server.get("problem") else [],
        )
    ]
    for model in found.get("models") or []:
        error = [model["error"]] if model.get("error") else []
        rows.append(((*known, model["model_uid"], model["state"], when(model.get("since"), now)), error))
    return rows


def summary(results: Mapping[str, Any]) -> str:
    """One line of totals."""
    models = [model for found in results.values() for model in (found or {}).get("models") or []]
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
