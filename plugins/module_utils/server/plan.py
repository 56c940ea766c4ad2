# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide what must happen to the models of a server. Pure: data in, steps out, nothing asked and nothing written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Collection, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from ..masking import masked
from .fields import BESIDE, REPLACE
from .record import PREVIOUS, Entry, Instead
from .running import Running
from .spec import ModelSpec, from_payload

PRUNE = ("managed", "all", "none")
# A change of these steps is seen on the server; `keep` changes nothing, `adopt` and `cleanup` only our record.
CHANGING = ("launch", "relaunch", "terminate", "adopt", "cleanup")


@dataclass(frozen=True)
class Choice:
    """One way to serve a model: the first choice has the number 0, alternatives are counted from 1.

    PREVIOUS is what ran before; see record.Instead.
    """

    number: int
    spec: ModelSpec


@dataclass(frozen=True)
class Step:
    """One model and what shall happen to it.

    action: launch, relaunch (terminate, then launch), terminate, keep, adopt (take a model into the record that runs
        already as wanted), or cleanup (clear away what is left of a model that is not wanted and does not serve).
    reason: why, for a person.
    spec: how the model shall run; None for terminate and cleanup.
    seen: what the server had when the step was planned; None when it had nothing of that uid.
    before, after: launch fields as they were and as they will be, for a diff; secrets are masked.
    tries: what to launch, the next where one fails; for keep and adopt what runs.
    instead: what the record says of a model that is, or was, not its first choice.
    previous: the launch of the model that serves, or served last, to be brought back when nothing else can be launched.
    beside: whether a model is launched and asked under another uid before the one that serves is ended.
    wanted: the uids of all models that are desired; under none of them another model is tried.
    """

    action: str
    uid: str
    reason: str
    spec: Optional[ModelSpec] = None
    seen: Optional[Running] = None
    before: Optional[Dict[str, Any]] = None
    after: Optional[Dict[str, Any]] = None
    tries: Tuple[Choice, ...] = ()
    instead: Optional[Instead] = None
    previous: Optional[Mapping[str, Any]] = None
    beside: bool = False
    wanted: FrozenSet[str] = frozenset()

    def every_choice(self) -> Tuple[Choice, ...]:
        """The first choice and all alternatives, in their order."""
        return tuple(Choice(number, spec) for number, spec in enumerate(self.spec.choices)) if self.spec else ()

    @property
    def changes(self) -> bool:
        return self.action in CHANGING


def plan(
    desired: Sequence[ModelSpec],
    running: Mapping[str, Running],
    record: Mapping[str, Entry],
    prune: str = "managed",
    relaunch: Collection[str] = (),
    first_choice: bool = True,
    hindered: Optional[Mapping[str, str]] = None,
    how: str = REPLACE,
) -> List[Step]:
    """The steps that bring a server from `running` to `desired`.

    What we launched is known from `record`; a server never tells how a model was launched. `prune` says which models
    that are not desired go: `managed` those of the record, `all` every one, `none` none. `relaunch` names uids to be
    launched anew even when nothing changed. Removals come first, then models in launch order: by type, small ones
    before LLMs, otherwise as listed.

    `first_choice` is whether a model that runs as an alternative goes back to its first choice: an operator's word for
    it. Without it, what the record says of alternatives holds for as long as the first choice is the same. `hindered`
    has the uids whose first choice still cannot run, with the reason. `how` a changed model takes the place of the one
    that serves, where its entry leaves that open: `replace` or `beside`.
    """
    hindered = hindered or {}
    if prune not in PRUNE:
        raise ValueError(f"prune is {prune!r}; it must be one of {', '.join(PRUNE)}")
    wanted = frozenset(spec.uid for spec in desired)
    removals = [
        step
        for uid in sorted((set(running) | set(record)) - wanted)
        for step in [_removal(uid, running.get(uid), record.get(uid), prune)]
        if step
    ]
    ordered = sorted(desired, key=lambda spec: spec.rank)
    wants = [_Want(spec, running.get(spec.uid), record.get(spec.uid), first_choice, how) for spec in ordered]
    return removals + [
        replace(want.step(want.spec.uid in relaunch, hindered.get(want.spec.uid, "")), wanted=wanted) for want in wants
    ]


def standing(spec: ModelSpec, entry: Entry) -> Optional[int]:
    """Which choice of an entry the record's launch is: 0 the first, alternatives from 1, PREVIOUS what ran before.

    None for a launch that the entry does not ask for: it was changed since.
    """
    if entry.fingerprint == spec.fingerprint():
        return 0
    if entry.instead is None or entry.instead.wanted != spec.fingerprint():
        return None
    if entry.instead.number == PREVIOUS:
        return PREVIOUS
    prints = [one.fingerprint() for one in spec.fallbacks]
    return prints.index(entry.fingerprint) + 1 if entry.fingerprint in prints else None


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


class _Want:
    """One model that is desired: what there is of it, and what the record says."""

    def __init__(
        self, spec: ModelSpec, seen: Optional[Running], entry: Optional[Entry], first_choice: bool, how: str
    ) -> None:
        self.spec, self.seen, self.entry, self.first_choice = spec, seen, entry, first_choice
        self.beside = (spec.relaunch or how) == BESIDE
        self.choices = [Choice(number, choice) for number, choice in enumerate(spec.choices)]
        number = standing(spec, entry) if entry else None
        self.known: Optional[Choice] = None
        """What the record's launch is, None when the entry does not ask for it."""
        if entry and number is not None:
            self.known = Choice(PREVIOUS, from_payload(entry.payload)) if number == PREVIOUS else self.choices[number]

    def step(self, anew: bool, hindrance: str) -> Step:
        """What shall happen."""
        seen, entry, known = self.seen, self.entry, self.known
        if seen is None:
            gone = entry and entry.ready and f"launched {_when(entry.launched_at)}, and gone from the server since"
            return self._launch(gone or "not running")
        state = seen.state
        if state == "stopping":
            return self._launch("being terminated; launched again when it is gone")
        if state == "failed":
            reason = f"its last launch failed{': ' + _first_line(seen.error) if seen.error else ''}"
            return self._launch(reason) if seen.model is None else self._relaunch(reason)
        if state == "lost":
            return self._launch(f"the server says {seen.status or 'nothing'} and does not list the model")
        if anew:
            return self._relaunch("relaunch was asked for")
        if entry is None:
            return self._strange(seen)
        if known is None:
            return self._relaunch(_changes(entry.payload, self.spec.payload()))
        if known.number != 0 and self.first_choice:
            if not hindrance or state != "ready" or not entry.ready:
                return self._relaunch(f"{self._other(known, entry)}; the first choice is tried again")
            step = self._recorded(known, seen, entry)
            return replace(step, reason=f"{step.reason}; the first choice still cannot run: {hindrance}")
        if state == "ready" and entry.ready:
            return self._recorded(known, seen, entry)
        return self._keep(known, "as wanted" if state == "ready" else "being launched already; waited for")

    def _strange(self, seen: Running) -> Step:
        """A model that the record does not know."""
        drifts = [visible_drift(choice.spec, seen) if seen.state == "ready" else [] for choice in self.choices]
        fitting = [choice for choice, drift in zip(self.choices, drifts) if not drift]
        if not fitting or (self.first_choice and fitting[0].number != 0):
            return self._relaunch(f"launched by somebody else, and differs: {'; '.join(drifts[0])}")
        instead = None
        if fitting[0].number != 0:
            instead = Instead(fitting[0].number, self.spec.fingerprint(), "it was found running")
        return self._keep(fitting[0], _found(seen.state), "adopt", instead)

    def _recorded(self, known: Choice, seen: Running, entry: Entry) -> Step:
        """A ready model that our record describes: is it still the one we launched?"""
        moved = [
            f"{name} was {entry.shown[name]}, is {now}"
            for name, now in seen.shown.items()
            # A record of an earlier release lacks facts that were not looked at then.
            if name in entry.shown and entry.shown[name] != now
        ]
        if entry.shown and moved:
            return self._relaunch(f"changed on the server since we launched it: {'; '.join(moved)}")
        if entry.since is not None and seen.since is not None and entry.since != seen.since:
            drift = visible_drift(known.spec, seen)
            if drift:
                return self._relaunch(f"launched anew by somebody else {_when(seen.since)}: {'; '.join(drift)}")
            reason = f"launched anew by somebody else {_when(seen.since)}, as wanted as far as the server shows"
            return self._keep(known, reason, "adopt", self._instead())
        return self._keep(known, self._other(known, entry) if known.number else "as wanted")

    def _other(self, known: Choice, entry: Entry) -> str:
        """That something else than the first choice runs, and why."""
        instead = entry.instead
        if known.number == 0 or instead is None:
            return "as wanted"
        because = f" because the first choice failed: {instead.why}" if instead.why else ""
        return f"{instead.words} serves ({known.spec.words}){because}"

    def _keep(self, known: Choice, reason: str, action: str = "keep", instead: Optional[Instead] = None) -> Step:
        after = masked(known.spec.payload())
        instead = instead or (self._instead() if action == "keep" else None)
        return Step(action, self.spec.uid, reason, self.spec, self.seen, after, after, (known,), instead)

    def _launch(self, reason: str) -> Step:
        tries = self._tries()
        after = masked(tries[0].spec.payload())
        return Step(
            "launch", self.spec.uid, reason, self.spec, self.seen, None, after, tries, self._instead(), self._previous()
        )

    def _relaunch(self, reason: str) -> Step:
        tries, seen, entry = self._tries(), self.seen, self.entry
        before = masked(entry.payload) if entry else None
        if before is None and seen and seen.model is not None:
            before = {name: value for name, value in seen.shown.items() if value is not None}
        after, previous = masked(tries[0].spec.payload()), self._previous()
        beside = self.beside and self._serves()
        return Step(
            "relaunch", self.spec.uid, reason, self.spec, seen, before, after, tries, self._instead(), previous, beside
        )

    def _serves(self) -> bool:
        return self.seen is not None and self.seen.state == "ready"

    def _previous(self) -> Optional[Mapping[str, Any]]:
        """The launch of what serves, or served last.

        That is the one of the record until another one begins, so it is known also to whoever comes after a run that
        was interrupted while it ended the model. One that was begun is it where it serves: nobody stayed to note that.
        """
        entry = self.entry
        if entry is None or entry.trial_of:
            return None
        return entry.payload if entry.ready or self._serves() else entry.previous

    def _instead(self) -> Optional[Instead]:
        """What the record says of why the first choice does not serve."""
        return self.entry.instead if self.entry and self.known and self.known.number else None

    def _tries(self) -> Tuple[Choice, ...]:
        """All choices in the order to try them: from the first, or before the others what the record says ran last."""
        known = self.known
        if self.first_choice or known is None or known.number == 0:
            return tuple(self.choices)
        return (known, *(choice for choice in self.choices if choice.number != known.number))


def is_trial(seen: Running, entry: Entry) -> bool:
    """Whether what has the uid of a trial can be that trial: nobody stayed to note how the server shows it.

    Its name is what every server shows in our own words. Somebody else may have taken the uid since, where a trial was
    interrupted and the server restarted.
    """
    now = seen.shown["model_name"]
    return now is None or _same(entry.payload.get("model_name"), now)


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
    if entry.trial_of:
        return not is_trial(seen, entry)
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
