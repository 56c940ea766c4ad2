# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper takes down of each model: what happened to it, what mended it, and when it may be tried again.

No requests and no files: findings and results come in, `State` is what there is to tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Sequence, Set

from . import keeper_backoff as backoff
from .keeper_backoff import Trouble
from .keeper_drift import (
    ALTERED,
    BY_HAND,
    CHANGED,
    FAILED,
    FOREIGN,
    LEFT,
    NEW,
    RUNNING,
    STARTING,
    STOPPED,
    TAKEN,
    Finding,
    may_act,
)
from .keeper_release import Release
from .keeper_state import Model, State, short, trouble
from .record import Entry

# A server starts a model anew whose process died; it is given this long.
PATIENCE = 20.0
# Servers show a model that has just become ready with a delay.
LOST_PATIENCE = 8.0
# The server ended this often while a model was being launched: from then on it is launched alone.
DEADLY = 2
ELSE = "somebody else"
# Servers renew their metrics every fifteen seconds.
LATE = 40.0


class Book:
    """The models of one keeper. Times given and kept are of the steady clock; those in `state` are the host's."""

    def __init__(self, state: State, say: Callable[[str], None], clock: Any) -> None:
        self.state, self.say, self.clock = state, say, clock
        self.release: Optional[Release] = None
        self.found: Dict[str, Finding] = {}
        """What was found when last looked at; empty while that is not known."""
        self.ready_at: Dict[str, float] = {}
        """When each model was first seen to serve, in the life of the server that runs now."""
        self.relaunch: Set[str] = set()
        """Models that seem to run, and have to be launched anew."""
        self.dead: Set[str] = set()
        """Models that are listed as ready, and have no process any more."""
        self.settled: Set[str] = set()
        """Models that were just brought to run as wanted; what is found of them next has to agree."""
        self.wished: Set[str] = set()
        """Models that do not serve because somebody asked for the end of the server."""
        self.begun: Set[str] = set()
        """Launches that the record knows to be under way."""
        self.bad_since: Dict[str, float] = {}
        self.starting_since: Dict[str, float] = {}
        self.deaths: Dict[str, int] = {}
        self.trouble: Dict[str, Trouble] = {}
        self.told: Dict[str, str] = {}
        now, steady = clock.now(), clock.steady()
        for uid, model in state.models.items():
            self.trouble[uid] = trouble(model, now, steady)
            if model.kind == RUNNING and model.served_since:
                self.ready_at[uid] = steady - max(0.0, now - model.served_since)

    def model(self, uid: str) -> Model:
        """What is told of a model."""
        return self.state.models.setdefault(uid, Model(uid))

    # -- what is found

    def take(
        self, found: Sequence[Finding], record: Mapping[str, Entry], ours: Collection[str] = (), others: bool = False
    ) -> None:
        """Take down what was found. `ours` are being launched by the keeper; with `others` somebody else is at it."""
        self.found = {} if others else {one.uid: one for one in found}
        self.begun = {uid for uid, entry in record.items() if not entry.ready}
        self.state.foreign = [one.uid for one in found if one.kind == FOREIGN]
        self.state.left = [one.uid for one in found if one.kind == LEFT]
        for one in found:
            if one.kind not in (FOREIGN, LEFT):
                self._note(one, record.get(one.uid), others, one.uid in ours)
                # Otherwise what cannot be settled would be done again and again.
                if one.to_do and one.uid in self.settled and not others:
                    self._failed(one.uid, f"still {one.kind} after it was seen to: {one.text}")
        self.settled.clear()

    def wrong(self, uid: str, problem: str, state: str) -> None:
        """Take down that an entry cannot be launched as it stands."""
        model = self.model(uid)
        model.kind, model.text, model.state = "wrong", short(problem), state
        self.once(f"wrong {uid}", problem, f"{uid}: cannot be looked after: {short(problem)}")

    def keep_only(self, wanted: Set[str]) -> None:
        """Forget models that the release does not have any more."""
        for uid in set(self.state.models) - wanted:
            del self.state.models[uid]
            for known in (self.trouble, self.ready_at, self.bad_since, self.starting_since, self.deaths):
                known.pop(uid, None)
            self.wished.discard(uid)
            self.relaunch.discard(uid)
            self.dead.discard(uid)

    def unknown(self) -> None:
        """Nothing can be found out at present."""
        self.found = {}
        for model in self.state.models.values():
            model.state = "unknown"

    def new_life(self, launching: Collection[str], wished: bool = False) -> None:
        """The server was started anew, which is no fault of any model where it was `wished`.

        `launching` are the models that were being launched by the keeper just then.
        """
        for uid in list(self.ready_at):
            if wished:
                self.wished.add(uid)
            else:
                self.fell(uid, "the server was started anew")
        begun = [uid for uid in launching if uid not in self.ready_at and not wished]
        self.ready_at.clear()
        self.dead.clear()
        for uid in begun:
            self.deaths[uid] = self.deaths.get(uid, 0) + 1
            if self.deaths[uid] >= DEADLY:
                what = f"the server ended {self.deaths[uid]} times while it was launched"
                self.fell(uid, what)
                self._failed(uid, what)

    def _note(self, one: Finding, entry: Optional[Entry], others: bool, ours: bool) -> None:
        model, now = self.model(one.uid), self.clock.steady()
        before = model.kind
        if ours and one.kind == TAKEN:
            one = replace(one, kind=STARTING, text="ready; to be taken down")
        model.kind, model.state, model.text = one.kind, one.state, short(one.text)
        instead = entry.instead if entry else None
        model.variant = short(f"{instead.words}, because the first choice failed: {instead.why}") if instead else ""
        if one.state == "ready" and one.kind != FAILED:
            if one.kind == ALTERED and before != ALTERED and not (others or ours):
                self.fell(one.uid, one.text, self.ready_at.get(one.uid))
            self._serves(model, one, entry)
            return
        if one.state == "stopping" and one.uid in self.ready_at:
            # Whether somebody stopped it, or its process died, shows when it is gone.
            self.starting_since.setdefault(one.uid, now)
            return
        served = self.ready_at.pop(one.uid, None)
        self.dead.discard(one.uid)
        if others or ours:
            return
        if served is not None:
            self.fell(one.uid, _fault(one), served)
        if one.kind == STOPPED:
            model.stopped = True
        elif one.kind == FAILED:
            model.stopped = False
        if one.kind == FAILED or one.state == "lost":
            self.bad_since.setdefault(one.uid, now)
        else:
            self.bad_since.pop(one.uid, None)
        if one.kind == STARTING:
            self.starting_since.setdefault(one.uid, now)
        else:
            self.starting_since.pop(one.uid, None)
        if one.kind != before and one.kind in BY_HAND:
            self._tell_drift(one)

    def _serves(self, model: Model, one: Finding, entry: Optional[Entry]) -> None:
        uid, now = one.uid, self.clock.steady()
        for known in (self.bad_since, self.starting_since, self.deaths):
            known.pop(uid, None)
        model.stopped = False
        moved = one.since is not None and model.since is not None and one.since != model.since
        if uid not in self.ready_at or moved:
            if model.served_since is not None and uid not in self.wished and not _was_wished(model, entry):
                model.restarts += 1
            self.wished.discard(uid)
            # What somebody altered serves, and is the fault.
            if one.kind != ALTERED:
                self._cured(model, entry)
            self.ready_at[uid] = now
            self.dead.discard(uid)
            model.served_since = round(self.clock.now(), 1)
        if one.since is not None:
            model.since = float(one.since)
        theirs = one.kind == ALTERED or (one.kind == TAKEN and entry is not None and entry.ready)
        model.by = entry.by if entry and not theirs else ELSE
        self.forgive()
        if one.kind == ALTERED:
            self._tell_drift(one)
        else:
            self.told.pop(f"drift {uid}", None)

    def forgive(self) -> None:
        """Forget the failures of models that have served for a while."""
        now = self.clock.steady()
        for uid, since in self.ready_at.items():
            if uid in self.trouble and self.model(uid).kind == RUNNING and self._answers(uid):
                self.trouble[uid] = backoff.served(self.trouble[uid], now - since)
                self.tell_trouble(uid)

    def _answers(self, uid: str) -> bool:
        """Whether a model passed its last probe, or none was sent."""
        return bool((self.model(uid).verified or {}).get("ok", True))

    def fell(self, uid: str, what: str, served: Optional[float] = None) -> None:
        """Take down that a model does not serve any more; `served` is since when it did.

        One that had only just begun to is not launched again at once.
        """
        model, now = self.model(uid), self.clock.steady()
        model.faults += 1
        model.fault = {"at": round(self.clock.now(), 1), "what": short(what)}
        self.say(f"{uid}: {short(what)}")
        if served is None:
            return
        if self._answers(uid):
            self.trouble[uid] = backoff.served(self.trouble.get(uid, Trouble()), now - served)
        if now - served < backoff.PROVEN or not self._answers(uid):
            self._failed(uid, what)
        self.tell_trouble(uid)

    def _cured(self, model: Model, entry: Optional[Entry]) -> None:
        """Take down that it serves again after a fault, and by whom."""
        since = float((model.fault or {}).get("at") or 0)
        if not since or since <= float((model.cure or {}).get("at") or 0):
            return
        now = self.clock.now()
        fresh = entry is not None and entry.launched_at >= since - 1
        by = (entry.by if entry and fresh else "") or f"the server itself, or {ELSE}"
        took = max(0.0, now - since)
        model.cure = {"at": round(now, 1), "what": short(f"launched again by {by}"), "took_s": round(took, 1)}
        self.say(f"{model.uid}: serves again, {took:.0f} s after the fault was seen")

    def _tell_drift(self, one: Finding) -> None:
        policy = self.release.settings.policy if self.release else ""
        does = "restored" if may_act(one.kind, policy) else f"left so, because the policy is {policy}"
        self.once(f"drift {one.uid}", one.text, f"{one.uid}: {one.kind}: {short(one.text)}; {does}")

    # -- what was done

    def done(self, row: Mapping[str, Any]) -> None:
        """Take down what became of one model that the keeper launched; `row` is one of Applied.models."""
        uid = str(row["model_uid"])
        if row["action"] in ("launch", "relaunch"):
            self.model(uid).launches += 1
            if not row["error"]:
                self.say(f"{uid}: {row['action']} took {float(row['duration']):.0f} s")
        if not row["error"]:
            self.settled.add(uid)

    def failed(self, uid: str, error: str, diagnosis: Optional[Mapping[str, Any]]) -> None:
        """Take down a launch that came to nothing."""
        model, known = self.model(uid), diagnosis or {}
        told = f". Cause: {known['cause']} Cure: {known['cure']}" if known.get("cause") else ""
        text = short(f"launch failed: {error.rstrip('.')}{told}")
        model.faults += 1
        model.fault = {"at": round(self.clock.now(), 1), "what": text}
        self._failed(uid, text, bool(known.get("heals", True)))
        wait = self.trouble[uid].until - self.clock.steady()
        self.say(f"{uid}: {text} (failure {self.trouble[uid].failures} in a row; tried again in {wait:.0f} s)")

    def _failed(self, uid: str, what: str, heals: bool = True) -> None:
        before = self.trouble.get(uid, Trouble())
        self.trouble[uid] = backoff.failed(before, self.key(uid), self.clock.steady(), uid, what, heals)
        self.tell_trouble(uid)

    def tell_trouble(self, uid: str) -> None:
        """Tell how often a model failed, and when it is tried again."""
        model, known = self.model(uid), self.trouble.get(uid, Trouble())
        left = known.until - self.clock.steady()
        model.key, model.failures = known.key, known.failures
        model.again = round(self.clock.now() + left, 1) if known.failures and left > 0 else 0.0

    # -- what is to be done

    def key(self, uid: str) -> str:
        """What a model is tried as."""
        return self.release.key(uid) if self.release else ""

    def due(self, grace_until: float) -> List[str]:
        """The models that may be launched now; what is new in the release not before `grace_until`."""
        return [uid for uid, one in self.found.items() if self._is_due(one, grace_until)]

    def _is_due(self, one: Finding, grace_until: float) -> bool:
        if self.release is None:
            return False
        uid, now = one.uid, self.clock.steady()
        acts = one.to_do and may_act(one.kind, self.release.settings.policy)
        again = uid in self.relaunch and one.kind == RUNNING
        # A launch that nobody follows any more, or somebody else's that takes longer than any may.
        stuck = now - self.starting_since.get(uid, now) > self.release.settings.wait_timeout
        lonely = one.kind == STARTING and uid in self.begun
        if not (acts or again or stuck or lonely) or not self.trouble.get(uid, Trouble()).due(self.key(uid), now):
            return False
        if one.kind in (NEW, CHANGED) and now < grace_until:
            return False
        patience = 0.0
        if one.state == "lost":
            patience = LOST_PATIENCE
        elif one.kind == FAILED and self.model(uid).served_since:
            patience = PATIENCE
        return now - self.bad_since.get(uid, -patience) >= patience

    def young(self, uid: str) -> bool:
        """Whether the last fault of a model is so new that the server may not have told all of it."""
        return self.clock.now() - float((self.model(uid).fault or {}).get("at") or 0) < LATE

    def deadly(self, uids: Sequence[str]) -> List[str]:
        """Those of the models that the server did not live through twice."""
        return [uid for uid in uids if self.deaths.get(uid, 0) >= DEADLY]

    def once(self, about: str, what: str, line: str) -> None:
        """Say a line when it is news."""
        if self.told.get(about) != what:
            self.told[about] = what
            self.say(line)


def _was_wished(model: Model, entry: Optional[Entry]) -> bool:
    """Whether a model serves anew because it was launched anew by us or Ansible, and not after a fault."""
    served, fault = model.served_since or 0.0, float((model.fault or {}).get("at") or 0)
    return entry is not None and entry.launched_at > served >= fault


def _fault(one: Finding) -> str:
    """What happened to a model that served until now."""
    if one.kind == FAILED:
        return f"its process ended: {one.text}" if one.state == "failed" else f"lost: {one.text}"
    if one.kind == STARTING:
        return "it does not serve, and is being launched anew by the server or by somebody else"
    return one.text if one.kind == STOPPED else f"{one.kind}: {one.text}"
