# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper finds: every model of the release as it should be against what is there. Pure.

The comparison itself is `plan`, the same for everyone who changes models; here its steps get the name of what happened,
because a fault is mended, a model that somebody stopped by hand is a matter of policy, and a stranger is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, List, Mapping, Optional, Sequence

from .plan import Step, plan, standing
from .record import Entry
from .running import Running
from .spec import ModelSpec

POLICIES = RESTORE, REPORT, LEAVE = ("restore", "report", "leave")

RUNNING = "running"
STARTING = "starting"
NEW = "new"
CHANGED = "changed in the release"
GONE = "gone"
FAILED = "failed"
TAKEN = "launched by somebody else"
ALTERED = "altered by hand"
STOPPED = "stopped by hand"
LEFT = "no longer wanted"
FOREIGN = "foreign"

# What somebody did on purpose, though not here.
BY_HAND = (ALTERED, STOPPED)
FAULTS = (GONE, FAILED)


@dataclass(frozen=True)
class Finding:
    """One model. `kind` is one of the words above, `text` says it for a person.

    `state` is the server's word, or `missing`; `since` is when the server created it, in seconds since 1970, None when
    unknown.
    """

    uid: str
    kind: str
    text: str = ""
    state: str = "missing"
    since: Optional[float] = None

    @property
    def to_do(self) -> bool:
        """Whether a converged server would look otherwise, or its record."""
        return self.kind in (NEW, CHANGED, GONE, FAILED, TAKEN, ALTERED, STOPPED)


def findings(
    specs: Sequence[ModelSpec],
    running: Mapping[str, Running],
    record: Mapping[str, Entry],
    served: Collection[str] = (),
    stopped: Collection[str] = (),
) -> List[Finding]:
    """All models of the release, then those that are no longer of it, then strangers.

    `served` are those that were seen to serve in the life of this server, which nothing but a fault or somebody's wish
    ends; `stopped` those that somebody stopped by hand and that did not run since.
    """
    found = [
        _finding(step, running.get(step.uid), record.get(step.uid), step.uid in served, step.uid in stopped)
        for step in plan(specs, running, record, "none", first_choice=False)
    ]
    wanted = {spec.uid for spec in specs}
    for uid, seen in sorted(running.items()):
        if uid not in wanted and seen.state in ("ready", "starting", "stopping", "lost"):
            kind = LEFT if uid in record else FOREIGN
            found.append(Finding(uid, kind, "", seen.state, seen.since))
    return found


def may_act(kind: str, policy: str) -> bool:
    """Whether the keeper does something about it. Models of others, and those no longer wanted, are never touched."""
    if kind in BY_HAND:
        return policy == RESTORE
    return kind in (NEW, CHANGED, GONE, FAILED, TAKEN)


def serves(kind: str, policy: str, dead: bool) -> bool:
    """Whether a model is as it shall be: it serves, also what somebody launched, or is gone and left so.

    `dead` is whether it is listed and has no process any more.
    """
    if kind in (RUNNING, TAKEN, ALTERED):
        return not dead
    return kind != STARTING and not may_act(kind, policy)


def _finding(step: Step, seen: Optional[Running], entry: Optional[Entry], served: bool, stopped: bool) -> Finding:
    state = seen.state if seen else "missing"
    since = seen.since if seen else None

    def found(kind: str, text: str = "") -> Finding:
        return Finding(step.uid, kind, text or step.reason, state, since)

    if step.action == "keep" and state == "ready" and entry is not None and not entry.ready:
        return found(TAKEN, "ready; whoever launched it did not stay to see it")
    if step.action == "keep":
        return found(RUNNING if state == "ready" else STARTING)
    if step.action == "adopt":
        return found(TAKEN if state == "ready" else STARTING)
    changed = entry is not None and step.spec is not None and standing(step.spec, entry) is None
    if step.action == "relaunch":
        if state == "failed":
            return found(FAILED)
        return found(CHANGED if changed else ALTERED)
    if state in ("stopping", "starting"):
        return found(STARTING)
    was = served or (entry is not None and entry.ready)
    if seen is not None and state != "missing":
        return found(FAILED if was else NEW)
    if stopped:
        return found(STOPPED, "somebody stopped it")
    if changed:
        return found(CHANGED)
    if served:
        return found(STOPPED, "gone while the server ran on: somebody stopped it, or the server gave it up")
    return found(GONE if entry is not None or served else NEW)
