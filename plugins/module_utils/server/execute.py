# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Do one step: end, wait for or launch a model, its alternatives after it, and what ran before when all of them fail.

Xinference can neither rename a model nor change one that runs, in any version: a uid is free only when its model has
ended. So a changed model is always ended and launched; `beside` proves the new one under another uid first, so that
what serves is ended only for what works, and the time without it is that of one launch whose files are in memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any, Callable, List, Mapping, Optional, Sequence, Tuple, Type

from .client import AccessRefused, Client, ServerError, Unreachable
from .diagnose import Diagnosis, diagnose
from .explain import explain
from .failures import NO_PLACE, NO_ROOM
from .launch import HELD, Launcher, LaunchFailed
from .log import Reader, reasons
from .outcome import Attempt, Outcome, short
from .plan import Choice, Step, is_trial, visible_drift
from .probe import probe
from .record import PREVIOUS, Instead, Record
from .running import Running, look
from .spec import ModelSpec, fingerprint, from_payload

# Seconds before the same launch is tried again, where what was wrong may pass by itself.
RETRY_PAUSES = (3.0, 10.0)
# Under so many uids a model is tried beside the one that serves, before all of them count as taken.
TRIALS = 5
# The row of the table of known failures for a server with nothing behind its API.
HALF_DEAD = "half-dead"
# Failures whose cause stands in the server's log, if anywhere.
VAGUE = ("engine-core", "no-reason", "process-died")
RIVAL = Diagnosis(
    cause="Somebody else launched a model under this uid at the same moment.",
    cure="Find out who; a run of this collection while nobody else launches puts the wanted model in its place.",
    name="rival",
)
NO_PROOF = Diagnosis(
    cause="The model was launched under another uid, and does not give the answer that a working model gives.",
    cure="Look at the answer above; where it is right, say so in the entry's `probe`.",
    name="probe",
)
NO_UID = Diagnosis(
    cause="A model is tried under another uid before the one that serves is ended, and other models have all of those.",
    cure="End or rename one of the models that have them, or set `relaunch` of this one to `replace`.",
    name="no-uid",
)
# uid, what happens to it, for a log: `launch`, `progress 40 %`, `ready`, `failed: ...`
Listener = Callable[[str, str], None]


class Failed(Exception):
    """Something that came to nothing, with its cause and cure.

    `final` is whether nothing else would do better. `unknown` is whether the launch may go on, unseen.
    """

    def __init__(
        self, error: str, diagnosis: Optional[Diagnosis] = None, final: bool = False, unknown: bool = False
    ) -> None:
        super().__init__(error)
        self.error = error
        self.diagnosis = diagnosis
        self.final = final
        self.unknown = unknown


class _Taken(Failed):
    """The uid of a trial is somebody else's."""


class _Trial(Launcher):
    """Launches a trial, whose uid was free a moment ago: whoever has it now keeps it."""

    def _contested(self, payload: Mapping[str, Any]) -> Running:
        raise _Taken(f"somebody else launched a model as {self.uid} at the same moment", RIVAL, final=True)


class Executor:
    """Does single steps. Several threads use one; the record is written by one of them at a time.

    `timeout` is how many seconds one launch may take; `log` reads what the server printed, where that can be had.
    """

    def __init__(
        self, client: Client, record: Record, timeout: float, listener: Listener, log: Optional[Reader] = None
    ) -> None:
        self.client = client
        self.record = record
        self.timeout = timeout
        self.listener = listener
        self.log = log
        self.writing = threading.Lock()
        # Whether anything was ended that may not have given its memory back yet.
        self.freed = False

    def outcome(self, step: Step) -> Outcome:
        """Do a step and report on it. Only bugs are raised."""
        start = time.monotonic()
        work = _Work(self, step)
        failure = None
        try:
            work.do()
        except Failed as found:
            failure = found
        except ServerError as found:
            failure = self.explained(found, step.spec)
        except LaunchFailed as found:
            failure = self.explained(found, step.spec)
        except OSError as found:
            failure = Failed(f"the record could not be written: {found}")
        if failure:
            self.listener(step.uid, f"failed: {failure.error}")
        chosen = work.chosen
        return Outcome(
            uid=step.uid,
            action=work.action,
            reason=work.reason,
            ok=failure is None,
            changed=work.changed,
            model=work.model,
            duration=time.monotonic() - start,
            error=short(failure.error) if failure else "",
            diagnosis=failure.diagnosis if failure else None,
            choice=chosen.number if chosen else 0,
            runs=chosen.spec.words if chosen else "",
            why=work.why if chosen and chosen.number else "",
            attempts=tuple(work.attempts),
        )

    def explained(self, failure: Exception, spec: Optional[ModelSpec]) -> Failed:
        """A failure with its cause and cure."""
        if isinstance(failure, LaunchFailed):
            diagnosis = failure.diagnosis or (explain(self.client, spec, failure.said) if spec else None)
            return Failed(str(failure), diagnosis, failure.final, diagnosis is HELD)
        if isinstance(failure, ServerError):
            diagnosis = explain(self.client, spec, failure.detail or failure.message) if spec else None
            silent = isinstance(failure, Unreachable) or (diagnosis is not None and diagnosis.name == HALF_DEAD)
            return Failed(failure.message, diagnosis, silent or isinstance(failure, AccessRefused), silent)
        return Failed(str(failure))

    def shown(self, failure: Failed, uid: str, since: float) -> List[str]:
        """The lines of the server's log that show more of a failed launch than its error. May name its cause."""
        lines: List[str] = []
        with contextlib.suppress(OSError):
            lines = reasons(self.log(since), uid, since) if self.log else []
        known = failure.diagnosis
        if lines and (known is None or known.name in VAGUE):
            failure.diagnosis = diagnose("\n".join(lines)) or known
        told = (line.partition(": ")[2] or line for line in lines)
        return [line for line, said in zip(lines, told) if failure.error not in line and said not in failure.error]

    def write(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write the record, one thread at a time."""
        with self.writing:
            write(*arguments)

    def launcher(self, uid: str, kind: Type[Launcher] = Launcher) -> Launcher:
        """A launcher whose time begins now."""
        return kind(self.client, uid, time.monotonic() + self.timeout, self.listener)


class _Work:
    """One step while it is done, and what is to be reported on it."""

    def __init__(self, executor: Executor, step: Step) -> None:
        self.executor = executor
        self.client, self.record, self.listener = executor.client, executor.record, executor.listener
        self.step = step
        self.action, self.reason = step.action, step.reason
        self.changed = False
        self.model: Optional[Mapping[str, Any]] = None
        self.attempts: List[Attempt] = []
        self.chosen: Optional[Choice] = None
        self.why, self.fault = (step.instead.why, step.instead.fault) if step.instead else ("", "")

    def do(self) -> None:
        """Do it. Raises Failed, LaunchFailed or ServerError."""
        if self.step.action in ("terminate", "cleanup"):
            self._remove()
        elif self.step.action in ("keep", "adopt"):
            self._keep()
        else:
            self._launch(self.step)

    # -- ending and keeping

    def _remove(self) -> None:
        if self.step.action == "terminate":
            self._stop(self.step.seen)
        self.executor.write(self.record.forget, self.step.uid)
        self.changed = True

    def _keep(self) -> None:
        """Take a model as it is, after waiting for it where it is still being launched."""
        step, found = self.step, self.step.seen
        if found is None or not step.tries:
            raise ValueError(f"a step that keeps {step.uid} needs what it is and what runs")
        known = step.tries[0]
        if found.state != "ready":
            self.listener(step.uid, "wait")
            found = self.executor.launcher(step.uid).follow()
            drift = visible_drift(known.spec, found) if step.action == "adopt" else []
            if drift:
                why = f"launched by somebody else meanwhile, and differs: {'; '.join(drift)}"
                self.action, self.reason = "relaunch", why
                self._launch(replace(step, action="relaunch", reason=why, seen=found, tries=step.every_choice()))
                return
        self.model, self.chosen = found.model, known
        self.executor.write(self.record.settle, known.spec, found, step.instead)
        self.changed = step.action == "adopt"

    def _stop(self, seen: Optional[Running]) -> None:
        self.listener(self.step.uid, "terminate")
        self.executor.launcher(self.step.uid).stop(seen)
        self.executor.freed = True

    # -- launching

    def _launch(self, step: Step) -> None:
        """Launch the first of the step's choices that works, in the place of what serves."""
        if step.spec is None or not step.tries:
            raise ValueError(f"a step that launches {step.uid} needs something to launch")
        tries: Tuple[Choice, ...] = step.tries
        if step.action == "relaunch":
            if step.beside:
                tries = self._proven(step)
                if not tries:
                    return
            # Nothing is ended that could not be noted: whoever comes next would end what was launched in its place.
            if not (self.record.lenient and self._harmless(step)):
                self.executor.write(self.record.rewrite)
            self._stop(step.seen)
            self.changed = True
        elif step.seen and step.seen.state == "stopping":
            self.executor.launcher(step.uid).await_gone()
        failures: List[Failed] = []
        for choice in tries:
            try:
                self._serve(choice, step.previous)
                return
            except Failed as failure:
                failures.append(failure)
                self._note(choice, failure)
                if failure.final:
                    break
        raise self._brought_back(step, failures)

    def _harmless(self, step: Step) -> bool:
        """Whether a model may be relaunched though nothing can be noted: it failed, or is launched as it was noted.

        So a model that died, and is still listed, comes back on a full disk too.
        """
        seen, noted, choice = step.seen, self.record.entries.get(step.uid), step.tries[0]
        if seen is None or seen.state == "failed":
            return True
        same = noted is not None and noted.fingerprint == choice.spec.fingerprint()
        return same and not visible_drift(choice.spec, seen)

    def _serve(self, choice: Choice, previous: Optional[Mapping[str, Any]]) -> None:
        """Launch a choice and note it. Raises Failed."""
        instead = self._instead(choice)
        running = self._attempt(choice, lambda: self.record.begin(choice.spec, instead, previous))
        self.model, self.chosen, self.changed = running.model, choice, True
        self.executor.write(self.record.settle, choice.spec, running, instead)
        self.listener(self.step.uid, f"ready{f' as {instead.words}' if instead else ''}")

    def _attempt(self, choice: Choice, begin: Callable[[], None], beside: bool = False) -> Running:
        """Launch a choice and wait until it serves; again where what was wrong may pass by itself. Raises Failed."""
        spec, turn = choice.spec, 0
        while True:
            start, since = time.monotonic(), time.time()
            named = f" {_which(choice.number)}" if choice.number else ""
            self.listener(self.step.uid, f"launch{named}{' beside what serves' if beside else ''}")
            self.executor.write(begin)
            failure: Failed
            try:
                running = self._try(spec, _Trial if beside else Launcher)
                if beside:
                    self._ask(spec, running)
            except (ServerError, LaunchFailed) as error:
                failure = self.executor.explained(error, spec)
            except Failed as error:
                failure = error
            else:
                self._told(choice, start, beside)
                return running
            lines = self.executor.shown(failure, spec.uid, since)
            self._told(choice, start, beside, failure, lines)
            pause = self._pause(failure, turn)
            self.executor.freed = True
            if pause is None:
                raise failure
            self.listener(self.step.uid, f"failed, again in {pause:g} s: {short(failure.error, 200)}")
            time.sleep(pause)
            turn += 1

    def _try(self, spec: ModelSpec, kind: Type[Launcher]) -> Running:
        launcher = self.executor.launcher(spec.uid, kind)
        running = launcher.launch(spec.payload(self.client.features))
        # Only then: a server may show what we asked for in other words, which is no reason to distrust our own launch.
        drift = visible_drift(spec, running) if launcher.contested else []
        if drift:
            raise LaunchFailed(f"another model serves under this uid: {'; '.join(drift)}", diagnosis=RIVAL, final=True)
        return running

    def _pause(self, failure: Failed, turn: int) -> Optional[float]:
        """Seconds until the same launch is tried again; None when that is no use."""
        known = failure.diagnosis
        if failure.final or known is None or turn >= len(RETRY_PAUSES):
            return None
        # What was just ended may not have given its memory back; after one pause it has.
        late_memory = known.name in NO_ROOM and self.executor.freed and turn == 0
        return RETRY_PAUSES[turn] if known.heals or late_memory else None

    def _told(
        self, choice: Choice, start: float, beside: bool, failure: Optional[Failed] = None, lines: Sequence[str] = ()
    ) -> None:
        error, diagnosis = (short(failure.error), failure.diagnosis) if failure else ("", None)
        taken, words = time.monotonic() - start, choice.spec.words
        self.attempts.append(Attempt(choice.number, words, error, diagnosis, taken, beside, tuple(lines)))

    def _note(self, choice: Choice, failure: Failed) -> None:
        """Remember why the first choice does not serve."""
        if choice.number == 0:
            self.why = short(failure.diagnosis.cause if failure.diagnosis else failure.error, 300)
            self.fault = failure.diagnosis.name if failure.diagnosis else ""

    def _instead(self, choice: Choice) -> Optional[Instead]:
        """What the record says of a choice that is not the first."""
        if choice.number == 0 or self.step.spec is None:
            return None
        return Instead(choice.number, self.step.spec.fingerprint(), self.why, self.fault)

    def _brought_back(self, step: Step, failures: List[Failed]) -> Failed:
        """Launch again what was ended for nothing. Returns the failure to be reported."""
        error, first = self._all_errors(failures), failures[0]
        launched = {choice.spec.fingerprint() for choice in step.tries}
        if failures[-1].final:
            if not failures[-1].unknown:
                self.executor.write(self.record.forget, step.uid)
            return Failed(error, failures[-1].diagnosis, True)
        if step.previous is None or fingerprint(step.previous) in launched:
            self.executor.write(self.record.forget, step.uid)
            return Failed(error, first.diagnosis)
        try:
            self._serve(Choice(PREVIOUS, from_payload(step.previous)), step.previous)
        except Failed as failure:
            if not failure.unknown:
                self.executor.write(self.record.forget, step.uid)
            return Failed(f"{error}; what ran before could not be brought back: {failure.error}", first.diagnosis)
        return Failed(f"{error}; what ran before was brought back and serves", first.diagnosis)

    def _all_errors(self, failures: List[Failed]) -> str:
        """The errors of all choices, each said once."""
        failed = {one.choice: one for one in self.attempts if one.error}
        if len(failed) < 2:
            return failures[0].error
        return "; ".join(f"{_which(one.choice)} ({one.runs}): {one.error}" for one in failed.values())

    # -- beside

    def _proven(self, step: Step) -> Tuple[Choice, ...]:
        """The choices to launch in the place of what serves, after the first of them was seen to work beside it.

        All that are left when there is no room for two. None when what serves is the best that can be had; then it is
        noted that it serves instead, and when it is no alternative of the entry either, Failed is raised.
        """
        serves = fingerprint(step.previous) if step.previous else ""
        failures: List[Failed] = []
        for place, choice in enumerate(step.tries):
            if place and choice.spec.fingerprint() == serves and not self._altered(choice):
                self._stays(choice)
                return ()
            try:
                self._prove(choice)
                return step.tries[place:]
            except Failed as failure:
                if failure.final:
                    raise
                if failure.diagnosis and failure.diagnosis.name in NO_PLACE:
                    self.listener(step.uid, "no room beside what serves")
                    return step.tries[place:]
                failures.append(failure)
                self._note(choice, failure)
        if step.previous is not None:
            self._stays(Choice(PREVIOUS, from_payload(step.previous)))
        else:
            self.model = step.seen.model if step.seen else None
        raise Failed(f"{self._all_errors(failures)}; what ran before was not touched and serves", failures[0].diagnosis)

    def _altered(self, choice: Choice) -> bool:
        """Whether somebody changed what serves since we launched it."""
        return self.step.seen is not None and bool(visible_drift(choice.spec, self.step.seen))

    def _prove(self, choice: Choice) -> None:
        """Launch a choice under another uid, which is nobody's, ask it something, and end it. Raises Failed."""
        for turn in range(1, TRIALS + 1):
            trial, told = choice.spec.beside(turn), len(self.attempts)
            if not self._free(trial.uid):
                continue
            try:
                self._attempt(Choice(choice.number, trial), partial(self._begin_trial, trial), beside=True)
                self.listener(self.step.uid, "verified beside what serves")
                return
            except _Taken:
                # What has the uid is only ours where it was launched before, and seemed to fail; that is ended below.
                if len(self.attempts) <= told + 1 and self._is_ours(trial.uid):
                    self.executor.write(self.record.forget, trial.uid)
            finally:
                if self._is_ours(trial.uid):
                    self._clear(trial.uid)
        uids = ", ".join(choice.spec.beside(turn).uid for turn in range(1, TRIALS + 1))
        error = f"it cannot be tried beside what serves, because {uids} are taken; what serves was not touched"
        raise Failed(error, NO_UID, final=True)

    def _begin_trial(self, trial: ModelSpec) -> None:
        """Note that a trial starts. Raises _Taken where somebody was faster."""
        if trial.uid in self.record.entries and not self._is_ours(trial.uid):
            raise _Taken(f"another model is being launched as {trial.uid}", RIVAL, final=True)
        self.record.begin_trial(trial, self.step.uid)

    def _is_ours(self, uid: str) -> bool:
        """Whether the record has a trial of this model under a uid."""
        entry = self.record.entries.get(uid)
        return entry is not None and entry.trial_of == self.step.uid and not entry.ready

    def _free(self, uid: str) -> bool:
        """Whether a uid is nobody's. What an interrupted run left there of a trial of this model is ended first."""
        if uid in self.step.wanted:
            return False
        if self._is_ours(uid):
            return self._clear(uid)
        return uid not in self.record.entries and not _holds(look(self.client).get(uid))

    def _ask(self, spec: ModelSpec, running: Running) -> None:
        """Put a real request to a model. Raises Failed where the answer is not one of a working model."""
        entry = {"model_uid": spec.uid, "model_type": spec.type, "probe": spec.probe}
        result = probe(self.client, entry, running.model)
        if not result.ok:
            raise Failed(f"its probe failed: {result.error}", result.diagnosis or NO_PROOF)

    def _clear(self, uid: str) -> bool:
        """End a trial of this model and forget it, and tell whether nothing has its uid now."""
        entry, ours = self.record.entries[uid], True
        try:
            left = look(self.client).get(uid)
            if left is not None and _holds(left):
                ours = is_trial(left, entry)
                if ours:
                    self.executor.launcher(uid).stop(left)
                    self.executor.freed = True
        except (ServerError, LaunchFailed):
            return False  # It is in the record, so the next run ends it.
        self.executor.write(self.record.forget, uid)
        return ours

    def _stays(self, choice: Choice) -> None:
        """What serves goes on serving, and is not the first choice."""
        instead = self._instead(choice)
        self.chosen, self.model = choice, self.step.seen.model if self.step.seen else None
        if instead:
            self.executor.write(self.record.mark, self.step.uid, instead)


def _holds(seen: Optional[Running]) -> bool:
    """Whether what has a uid is more than what a failed launch left, which holds nothing and cannot be removed."""
    return seen is not None and (seen.model is not None or seen.state != "failed")


def _which(number: int) -> str:
    if number == 0:
        return "first choice"
    return "what ran before" if number == PREVIOUS else f"alternative {number}"
