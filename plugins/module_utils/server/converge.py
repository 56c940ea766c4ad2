# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carry out planned steps on a live server: several at once, each to its own end, every outcome reported."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from .client import Client, ServerError
from .diagnose import Diagnosis
from .explain import explain
from .launch import Launcher, LaunchFailed
from .plan import Step, visible_drift
from .record import Record
from .running import Running
from .schedule import startable

LIMIT = 4
TIMEOUT = 1800.0
RIVAL = Diagnosis(
    cause="Somebody else launched a model under this uid at the same moment.",
    cure="Find out who; a run of this collection while nobody else launches puts the wanted model in its place.",
)
# uid, what happens to it, for a log: `launch`, `progress 40 %`, `ready`, `failed: ...`
Listener = Callable[[str, str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    `changed` is whether anything was done, on the server or in the record. `model` is the model as the server shows it
    now, None when it does not run. `duration` is in seconds. `error` is the server's own words, empty when all went
    well.
    """

    uid: str
    action: str
    reason: str
    ok: bool = True
    changed: bool = False
    model: Optional[Mapping[str, Any]] = None
    duration: float = 0.0
    error: str = ""
    diagnosis: Optional[Diagnosis] = None

    def sentence(self) -> str:
        """One line about a failure: which model, what happened, why, and what to do."""
        parts = [f"{self.uid}: {self.action} failed after {human(self.duration)}: {self.error.rstrip('.')}."]
        if self.diagnosis:
            parts.append(f"Cause: {self.diagnosis.cause}")
            parts.append(f"Cure: {self.diagnosis.cure}")
        return " ".join(parts)


def converge(
    client: Client,
    steps: Sequence[Step],
    record: Record,
    limit: int = LIMIT,
    timeout: float = TIMEOUT,
    listener: Optional[Listener] = None,
) -> List[Outcome]:
    """Do the steps, at most `limit` at once, and report on each, in their order.

    Removals go first. `timeout` is how many seconds one model may take to become ready; then its launch is cancelled.
    A step that fails never stops the others. The record is written as each step begins and ends, so whoever runs next
    after an interruption finds everything in it. Whoever calls holds the lock (see record.lock).
    """
    work = _Work(client, record, timeout, listener or (lambda uid, event: None))
    outcomes: Dict[str, Outcome] = {}
    waiting: List[Step] = []
    for step in steps:
        if step.action == "keep" and step.seen and step.seen.state == "ready":
            outcomes[step.uid] = work.outcome(step)
        else:
            waiting.append(step)
    gpus = _has_gpus(client) if sum(step.spec is not None for step in waiting) > 1 else True
    active: Dict[str, Step] = {}
    done: queue.Queue[Any] = queue.Queue()

    def run(step: Step) -> None:
        try:
            done.put((step.uid, work.outcome(step)))
        except BaseException as bug:
            done.put((step.uid, bug))

    bug: Optional[BaseException] = None
    while active or (waiting and not bug):
        for step in [] if bug else startable(waiting, list(active.values()), limit, gpus):
            waiting.remove(step)
            active[step.uid] = step
            threading.Thread(target=run, args=(step,), name=f"converge {step.uid}", daemon=True).start()
        uid, result = done.get()
        del active[uid]
        if isinstance(result, BaseException):
            bug = result
        else:
            outcomes[uid] = result
    if bug:
        raise bug
    return [outcomes[step.uid] for step in steps]


def _has_gpus(client: Client) -> bool:
    """Whether the server can see a GPU; where it does not tell, it may."""
    try:
        return any(node.get("gpu_count") for node in client.cluster_info())
    except ServerError:
        return True


class _Work:
    """Does single steps. Several threads use one; the record is written by one of them at a time."""

    def __init__(self, client: Client, record: Record, timeout: float, listener: Listener) -> None:
        self.client = client
        self.record = record
        self.timeout = timeout
        self.listener = listener
        self.writing = threading.Lock()

    def outcome(self, step: Step) -> Outcome:
        """Do a step and report on it. Only bugs are raised."""
        start = time.monotonic()
        done = _Done()
        error, diagnosis = "", None
        try:
            self._do(step, done)
        except LaunchFailed as failure:
            error = str(failure)
            diagnosis = failure.diagnosis
            if not diagnosis and step.spec:
                diagnosis = explain(self.client, step.spec, failure.said)
        except ServerError as failure:
            error = failure.message
            diagnosis = explain(self.client, step.spec, failure.detail or failure.message) if step.spec else None
        except OSError as failure:
            error = f"the record could not be written: {failure}"
        if error:
            self.listener(step.uid, f"failed: {error}")
        return Outcome(
            uid=step.uid,
            action=step.action if not done.instead else done.instead,
            reason=step.reason if not done.why else done.why,
            ok=not error,
            changed=done.changed,
            model=done.model,
            duration=time.monotonic() - start,
            error=_short(error),
            diagnosis=diagnosis,
        )

    def _do(self, step: Step, done: _Done) -> None:
        launcher = Launcher(self.client, step.uid, time.monotonic() + self.timeout, self.listener)
        if step.action in ("terminate", "cleanup"):
            self._remove(step, launcher, done)
        elif step.action in ("keep", "adopt"):
            self._keep(step, launcher, done)
        else:
            self._launch(step, launcher, done)

    def _remove(self, step: Step, launcher: Launcher, done: _Done) -> None:
        if step.action == "terminate":
            self.listener(step.uid, "terminate")
            launcher.stop(step.seen)
        self._write(self.record.forget, step.uid)
        done.changed = True

    def _keep(self, step: Step, launcher: Launcher, done: _Done) -> None:
        """Take a model as it is, after waiting for it where it is still being launched."""
        if step.spec is None or step.seen is None or not step.tries:
            raise ValueError(f"a step that keeps {step.uid} needs its specification and what runs")
        found = step.seen
        if found.state != "ready":
            self.listener(step.uid, "wait")
            found = launcher.follow()
            drift = visible_drift(step.tries[0].spec, found) if step.action == "adopt" else []
            if drift:
                why = f"launched by somebody else meanwhile, and differs: {'; '.join(drift)}"
                done.instead, done.why = "relaunch", why
                self._launch(Step("relaunch", step.uid, why, step.spec, found), launcher, done)
                return
        done.model = found.model
        self._write(self.record.settle, step.tries[0].spec, found, step.instead)
        done.changed = step.action == "adopt"

    def _launch(self, step: Step, launcher: Launcher, done: _Done) -> None:
        if step.spec is None:
            raise ValueError(f"a step that launches {step.uid} needs its specification")
        if step.action == "relaunch":
            self.listener(step.uid, "terminate")
            launcher.stop(step.seen)
            self._write(self.record.forget, step.uid)
            done.changed = True
        elif step.seen and step.seen.state == "stopping":
            launcher.await_gone()
        self.listener(step.uid, "launch")
        self._write(self.record.begin, step.spec)
        try:
            found: Running = launcher.launch(step.spec.payload(self.client.features))
        except (LaunchFailed, ServerError):
            self._write(self.record.forget, step.uid)
            raise
        # Only then: a server may show what we asked for in other words, which is no reason to distrust our own launch.
        drift = visible_drift(step.spec, found) if launcher.contested else []
        if drift:
            self._write(self.record.forget, step.uid)
            raise LaunchFailed(f"another model serves under this uid: {'; '.join(drift)}", diagnosis=RIVAL)
        done.changed = True
        done.model = found.model
        self._write(self.record.settle, step.spec, found)
        self.listener(step.uid, "ready")

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        with self.writing:
            write(*arguments)


class _Done:
    """What a step has done so far, for the report on it."""

    def __init__(self) -> None:
        self.changed = False
        self.model: Optional[Mapping[str, Any]] = None
        self.instead = ""
        self.why = ""


def human(seconds: float) -> str:
    """A duration for a message: `0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _short(text: str, limit: int = 500) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
