# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide what must happen to the models of a server. Pure: data in, steps out, nothing asked and nothing written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence

from ..masking import masked
from .record import Entry
from .running import Running
from .spec import ModelSpec

PRUNE = ("managed", "all", "none")
# A change of these steps is seen on the server; `keep` changes nothing, `adopt` and `cleanup` only our record.
CHANGING = ("launch", "relaunch", "terminate", "adopt", "cleanup")


@dataclass(frozen=True)
class Step:
    """One model and what shall happen to it.

    action: launch, relaunch (terminate, then launch), terminate, keep, adopt (take a model into the record that runs
        already as wanted), or cleanup (clear away what is left of a model that is not wanted and does not serve).
    reason: why, for a person.
    spec: how the model shall run; None for terminate and cleanup.
    seen: what the server had when the step was planned; None when it had nothing of that uid.
    before, after: launch fields as they were and as they will be, for a diff; secrets are masked.
    """

    action: str
    uid: str
    reason: str
    spec: Optional[ModelSpec] = None
    seen: Optional[Running] = None
    before: Optional[Dict[str, Any]] = None
    after: Optional[Dict[str, Any]] = None

    @property
    def changes(self) -> bool:
        return self.action in CHANGING


def plan(
    desired: Sequence[ModelSpec],
    running: Mapping[str, Running],
    record: Mapping[str, Entry],
    prune: str = "managed",
    relaunch: Collection[str] = (),
) -> List[Step]:
    """The steps that bring a server from `running` to `desired`.

    What we launched is known from `record`; a server never tells how a model was launched. `prune` says which models
    that are not desired go: `managed` those of the record, `all` every one, `none` none. `relaunch` names uids to be
    launched anew even when nothing changed. Removals come first, then models in launch order: by type, small ones
    before LLMs, otherwise as listed.
    """
    if prune not in PRUNE:
        raise ValueError(f"prune is {prune!r}; it must be one of {', '.join(PRUNE)}")
    wanted = {spec.uid for spec in desired}
    removals = [
        step
        for uid in sorted((set(running) | set(record)) - wanted)
        for step in [_removal(uid, running.get(uid), record.get(uid), prune)]
        if step
    ]
    ordered = sorted(desired, key=lambda spec: spec.rank)
    return removals + [
        _want(spec, running.get(spec.uid), record.get(spec.uid), spec.uid in relaunch) for spec in ordered
    ]


def visible_drift(spec: ModelSpec, seen: Running) -> List[str]:
    """Differences between a specification and what the server shows, where both say something; one sentence each.

    Path, environment and engine options are never shown, so an empty list does not prove that the model is the same.
    """
    shown = seen.shown
    asked = {"replica": 1, **spec.fields}
    differences = []
    for name, now in shown.items():
        want = asked.get(name)
        if want is None or now is None or _same(want, now):
            continue
        differences.append(f"{name} is {now}, wanted {want}")
    told = (seen.model or {}).get("accelerators")
    accelerators = [str(one) for one in told] if isinstance(told, list) else []
    if spec.gpu_idx and accelerators and not set(accelerators) <= {str(one) for one in spec.gpu_idx}:
        wanted = ", ".join(str(one) for one in spec.gpu_idx)
        differences.append(f"it runs on the server's GPU {', '.join(accelerators)}, wanted {wanted}")
    return differences


def _want(spec: ModelSpec, seen: Optional[Running], entry: Optional[Entry], anew: bool) -> Step:
    def step(action: str, reason: str) -> Step:
        after = masked(spec.payload())
        before = masked(entry.payload) if entry and seen else None
        if before is None and seen and seen.model is not None:
            before = {name: value for name, value in seen.shown.items() if value is not None}
        if action == "launch":
            before = None
        if action in ("keep", "adopt"):
            before = after
        return Step(action, spec.uid, reason, spec, seen, before, after)

    if seen is None:
        gone = f"launched {_when(entry.launched_at)}, and gone from the server since" if entry and entry.ready else ""
        return step("launch", gone or "not running")
    state = seen.state
    if state == "stopping":
        return step("launch", "being terminated; launched again when it is gone")
    if state == "failed":
        action = "launch" if seen.model is None else "relaunch"
        return step(action, f"its last launch failed{': ' + _first_line(seen.error) if seen.error else ''}")
    if state == "lost":
        return step("launch", f"the server says {seen.status or 'nothing'} and does not list the model")
    if anew:
        return step("relaunch", "relaunch was asked for")
    if entry is None:
        drift = visible_drift(spec, seen) if state == "ready" else []
        if drift:
            return step("relaunch", f"launched by somebody else, and differs: {'; '.join(drift)}")
        return step("adopt", _found(state))
    if entry.fingerprint != spec.fingerprint():
        return step("relaunch", _changes(entry.payload, spec.payload()))
    if state == "ready" and entry.ready:
        return _recorded(spec, seen, entry, step)
    return step("keep", "as wanted" if state == "ready" else "being launched already; waited for")


def _recorded(spec: ModelSpec, seen: Running, entry: Entry, step: Any) -> Step:
    """A ready model that our record describes: is it still the one we launched?"""
    moved = [
        f"{name} was {entry.shown[name]}, is {now}"
        for name, now in seen.shown.items()
        # A record of an earlier release lacks facts that were not looked at then.
        if name in entry.shown and entry.shown[name] != now
    ]
    if entry.shown and moved:
        return step("relaunch", f"changed on the server since we launched it: {'; '.join(moved)}")
    if entry.since is not None and seen.since is not None and entry.since != seen.since:
        drift = visible_drift(spec, seen)
        if drift:
            return step("relaunch", f"launched anew by somebody else {_when(seen.since)}: {'; '.join(drift)}")
        return step(
            "adopt", f"launched anew by somebody else {_when(seen.since)}, as wanted as far as the server shows"
        )
    return step("keep", "as wanted")


def _removal(uid: str, seen: Optional[Running], entry: Optional[Entry], prune: str) -> Optional[Step]:
    """What happens to a model that is not desired, None for nothing."""
    if prune == "none" or (entry is None and prune == "managed"):
        return None
    before = masked(entry.payload) if entry else (dict(seen.shown) if seen and seen.model is not None else None)
    serves = seen is not None and seen.state in ("ready", "starting", "stopping", "lost")
    if not serves:
        if entry is None:
            return None  # What a failed launch left cannot be removed from a server; it holds nothing.
        return Step("cleanup", uid, "no longer wanted, and not running; forgotten", None, seen, before)
    if prune == "managed" and entry and seen and _somebody_elses(seen, entry):
        reason = "no longer wanted; somebody else launched another model under this uid, which is left alone"
        return Step("cleanup", uid, reason, None, seen, before)
    reason = "no longer wanted" if entry else "not in the list of models, and prune is all"
    return Step("terminate", uid, reason, None, seen, before)


def _somebody_elses(seen: Running, entry: Entry) -> bool:
    """Whether the running model is not the one of the record: created at another time, and visibly different."""
    if entry.since is None or seen.since is None or entry.since == seen.since or not entry.shown:
        return False
    return any(entry.shown.get(name, now) != now for name, now in seen.shown.items())


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    old, new = masked(before), masked(after)
    changes = []
    for name in sorted(set(before) | set(after)):
        if before.get(name) == after.get(name) and (name in before) == (name in after):
            continue
        if name not in before:
            changes.append(f"{name} {new[name]} is new")
        elif name not in after:
            changes.append(f"{name} {old[name]} is gone")
        else:
            changes.append(f"{name} was {old[name]}, becomes {new[name]}")
    return "; ".join(changes) or "launch fields changed"


def _found(state: str) -> str:
    if state == "starting":
        return "somebody else is launching it; waited for and taken over"
    return "running already, as wanted as far as the server shows; taken over"


def _same(want: Any, now: Any) -> bool:
    return str(want).lower().replace(".", "_") == str(now).lower().replace(".", "_")


def _when(moment: Optional[float]) -> str:
    try:
        return time.strftime("on %Y-%m-%d at %H:%M UTC", time.gmtime(moment)) if moment else "before"
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 200 else line[:197] + "..."
