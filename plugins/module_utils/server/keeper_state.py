# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper knows of each model, and the two files it tells it in.

`state/keeper.json` is for `playbooks/status.yml` and for people, `state/xinference.prom` for the textfile collector of
Prometheus' node_exporter. Both are replaced as a whole, and no secret is put into them. A full disk costs nothing but
these files: what the keeper knows is in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from .keeper_backoff import Trouble
from .keeper_drift import BY_HAND, LEAVE

FORMAT = 1
STATE = "keeper.json"
METRICS = "xinference.prom"
# What a server says of a failure may quote what is secret; metrics are read by node_exporter's own user.
MODES = {STATE: 0o640, METRICS: 0o644}
TEXT_LIMIT = 500
# The files are written at least this often.
HEARTBEAT = 30.0


@dataclass
class Model:
    """One model of the release.

    `kind` and `text` are those of the last finding; `state` is the server's word. Times are seconds since 1970: `since`
    when it was created on the server, `served_since` when it was first seen to serve there. `restarts` counts how often
    it came back after a fault. `fault` and `cure` are the last ones (`at`, `what`), `verified` the last probe (`at`,
    `ok`, `detail`). `again` is when it is tried again, 0 when nothing holds it back.
    """

    uid: str
    state: str = "unknown"
    kind: str = ""
    text: str = ""
    by: str = ""
    variant: str = ""
    since: Optional[float] = None
    served_since: Optional[float] = None
    stopped: bool = False
    restarts: int = 0
    faults: int = 0
    launches: int = 0
    fault: Optional[Dict[str, Any]] = None
    cure: Optional[Dict[str, Any]] = None
    verified: Optional[Dict[str, Any]] = None
    failures: int = 0
    again: float = 0.0
    key: str = ""


@dataclass
class State:
    """Everything that is told. `server` has `state`, `since`, `restarts`, `boot` and `problem`.

    `grace_until` is when what is new in the release is no longer left to Ansible, 0 while that has not begun.
    """

    models: Dict[str, Model] = field(default_factory=dict)
    foreign: List[str] = field(default_factory=list)
    left: List[str] = field(default_factory=list)
    server: Dict[str, Any] = field(default_factory=dict)
    release: str = ""
    policy: str = ""
    doing: str = ""
    problem: str = ""
    refused: Optional[Dict[str, Any]] = None
    started: float = 0.0
    grace_until: float = 0.0

    def content(self, now: float) -> Dict[str, Any]:
        """What the file says."""
        told = asdict(self)
        told["models"] = [told["models"][uid] for uid in sorted(told["models"])]
        return {"format": FORMAT, "written": round(now, 1), "pid": os.getpid(), **told}


def trouble(model: Model, now: float, steady: float) -> Trouble:
    """What was known of a model's failures when the file was written, on the steady clock of this process.

    Should the clock of the host have been set meanwhile, it waits no longer than it would have at most.
    """
    left = min(max(0.0, model.again - now), 3600.0 * 1.2)
    reason = str((model.fault or {}).get("what") or "")
    return Trouble(model.key, model.failures, steady + left, reason) if model.failures else Trouble()


def load(directory: Path) -> State:
    """The state that an earlier keeper left; an empty one when there is none, or none that can be understood."""
    try:
        told = json.loads((directory / STATE).read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            return State()
        models = {str(one["uid"]): _model(one) for one in told["models"]}
        server = {name: _number(told["server"].get(name) or 0) for name in ("restarts", "boot")}
        refused = dict(told["refused"]) if told.get("refused") else None
        if refused is not None:
            refused["until"] = _number(refused.get("until") or 0)
        release, grace = str(told.get("release") or ""), _number(told.get("grace_until") or 0)
        return State(models, server=server, release=release, refused=refused, grace_until=grace)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return State()


def _number(told: Any) -> float:
    """A finite number; raises ValueError or TypeError for anything else."""
    found = float(told)
    if not math.isfinite(found):
        raise ValueError(f"{told} is no number to go by")
    return found


def _model(told: Mapping[str, Any]) -> Model:
    """A model of the file; raises TypeError or ValueError for one that we cannot have written."""
    known = {name: value for name, value in told.items() if name in Model.__dataclass_fields__}
    model = Model(**known)
    for name in ("uid", "state", "kind", "text", "by", "variant", "key"):
        setattr(model, name, str(getattr(model, name)))
    for name in ("restarts", "faults", "launches", "failures"):
        setattr(model, name, max(0, int(getattr(model, name))))
    for name in ("since", "served_since"):
        value = getattr(model, name)
        setattr(model, name, None if value is None else _number(value))
    model.again = _number(model.again)
    for name in ("fault", "cure", "verified"):
        value = dict(getattr(model, name) or {})
        if value:
            value["at"] = _number(value.get("at") or 0)
        setattr(model, name, value or None)
    return model


def save(directory: Path, state: State, now: Optional[float] = None) -> str:
    """Write both files; returns what stood in the way, empty when nothing did. Never raises for the disk."""
    now = time.time() if now is None else now
    problems = []
    for name, text in ((STATE, _json(state, now)), (METRICS, metrics(state, now))):
        try:
            _replace(directory / name, text)
        except OSError as error:
            problems.append(f"{directory / name} cannot be written: {error.strerror or error}")
    return "; ".join(problems)


def _json(state: State, now: float) -> str:
    return json.dumps(state.content(now), indent=1, ensure_ascii=False, default=str) + "\n"


def _replace(path: Path, text: str) -> None:
    """Replace a file at once; nothing is left of a failed attempt."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", encoding="utf-8", errors="replace") as file:
            os.fchmod(file.fileno(), MODES[path.name])
            file.write(text)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def short(text: str) -> str:
    """A text for the state: one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 3] + "..."


def metrics(state: State, now: float) -> str:
    """The state as the textfile collector reads it."""
    up = int(state.server.get("state") == "up")
    lines: List[str] = []

    def gauge(name: str, text: str, rows: Mapping[str, Any], kind: str = "gauge") -> None:
        lines.extend((f"# HELP xinference_keeper_{name} {text}", f"# TYPE xinference_keeper_{name} {kind}"))
        lines.extend(f"xinference_keeper_{name}{labels} {value}" for labels, value in rows.items())

    gauge("written_timestamp_seconds", "When the keeper wrote this.", {"": round(now, 1)})
    gauge("server_up", "Whether the server answers.", {"": up})
    gauge("server_restarts_total", "Restarts of the server seen.", {"": state.server.get("restarts", 0)}, "counter")
    gauge("problem", "Whether something keeps the keeper from its work.", {"": int(bool(state.problem))})
    gauge("foreign_models", "Models on the server that are nobody's of the release.", {"": len(state.foreign)})
    models = sorted(state.models.values(), key=lambda model: model.uid)
    label = {model.uid: f'{{model_uid="{_escaped(model.uid)}"}}' for model in models}

    def each(name: str, text: str, value: Any, kind: str = "gauge") -> None:
        rows = {label[model.uid]: value(model) for model in models}
        gauge(name, text, {key: one for key, one in rows.items() if one is not None}, kind)

    each("model_ready", "Whether a model of the release serves.", lambda m: int(up and m.state == "ready"))
    told = state.policy != LEAVE
    each("model_drift", "Whether somebody altered or stopped it by hand.", lambda m: int(told and m.kind in BY_HAND))
    each("model_restarts_total", "How often it came back after a fault.", lambda m: m.restarts, "counter")
    each("model_faults_total", "Faults seen.", lambda m: m.faults, "counter")
    each("model_launches_total", "Launches by the keeper.", lambda m: m.launches, "counter")
    each("model_failures", "Failures in a row.", lambda m: m.failures)
    each("model_retry_timestamp_seconds", "When it is tried again.", lambda m: m.again or None)
    each(
        "model_verified",
        "Whether its last probe passed.",
        lambda m: int(bool(m.verified.get("ok"))) if m.verified else None,
    )
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
