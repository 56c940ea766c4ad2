# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper last told, for `xinference_status` and for people on the host. Reads its file and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from .keeper_release import SETTINGS
from .keeper_state import HEARTBEAT, STATE

# A keeper that wrote nothing for so long does not run, or hangs.
SILENT = 4 * HEARTBEAT


def told(root: Path, now: Optional[float] = None) -> Dict[str, Any]:
    """What the file says, with `state` of the keeper itself.

    `state` is `running`, `ended` (stopped on purpose), `silent` (it should run and wrote nothing for long), `absent`
    (it never ran here) or `off` (the release has none).
    """
    now = time.time() if now is None else now
    try:
        found = json.loads((root / "state" / STATE).read_text(encoding="utf-8"))
        written = float(found["written"])
        found["models"] = {str(one["uid"]): one for one in found["models"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        found, written = {}, 0.0
    if not (root / "current" / SETTINGS).is_file():
        found["state"] = "off"
    elif not written:
        found["state"] = "absent"
    elif found.get("doing") == "ended":
        found["state"] = "ended"
    else:
        found["state"] = "running" if abs(now - written) < SILENT else "silent"
    return found


def lines(root: Path, now: Optional[float] = None) -> List[str]:
    """The same for people."""
    now = time.time() if now is None else now
    found = told(root, now)
    said = [f"keeper: {found['state']}{_after(found.get('written'), now, ', last seen')}"]
    if found.get("policy"):
        said.append(f"release: {found.get('release')}, policy {found['policy']}")
    server = found.get("server") or {}
    if server:
        restarts = f", {int(server.get('restarts') or 0)} restarts seen"
        said.append(f"server: {server.get('state', 'unknown')}{_after(server.get('since'), now, ' for')}{restarts}")
    said += [f"problem: {text}" for text in (found.get("problem"), server.get("problem")) if text]
    if found.get("doing"):
        said.append(f"now: {found['doing']}")
    for uid, model in sorted((found.get("models") or {}).items()):
        said += model_lines(uid, model, now)
    for word, key in (("not ours, left alone", "foreign"), ("no longer in the release, left to Ansible", "left")):
        if found.get(key):
            said.append(f"{word}: {', '.join(found[key])}")
    return said


def model_lines(uid: str, model: Mapping[str, Any], now: float) -> List[str]:
    """One model: how it is, and below what happened to it."""
    by = f", launched by {model['by']}" if model.get("by") and model.get("state") == "ready" else ""
    kind = "" if model.get("kind") in ("running", "", None) else f" ({model['kind']})"
    said = [f"{uid}: {model.get('state')}{kind}{_after(model.get('since'), now, ' since', ' ago')}{by}"]
    said += [f"  {text}" for text in details(model, now)]
    return said


def details(model: Mapping[str, Any], now: float) -> List[str]:
    """What there is to tell of a model beside its state, a line each; nothing of one that never gave reason to."""
    said = []
    if model.get("variant"):
        said.append(f"serves as {model['variant']}")
    if model.get("kind") not in ("running", "starting", "", None) and model.get("text"):
        said.append(f"{model['kind']}: {model['text']}")
    for name in ("fault", "cure"):
        if model.get(name):
            said.append(f"last {name}{_after(model[name].get('at'), now, '', ' ago')}: {model[name].get('what')}")
    if model.get("failures") and float(model.get("again") or 0) > now:
        times = "once" if model["failures"] == 1 else f"{model['failures']} times in a row"
        said.append(f"did not stay up {times}; tried again in {age(float(model['again']) - now)}")
    verified = model.get("verified")
    if verified and not verified.get("ok"):
        said.append(f"does not pass its probe{_after(verified.get('at'), now, '', ' ago')}: {verified.get('detail')}")
    return said


def _after(moment: Any, now: float, before: str, after: str = "") -> str:
    return f"{before} {age(max(0.0, now - float(moment)))}{after}" if moment else ""


def age(seconds: float) -> str:
    """A length of time in the largest unit that fits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"
