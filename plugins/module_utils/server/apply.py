# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a list of models to a server that runs them: look, plan, and unless it is a rehearsal, do.

The one way in for everyone who changes models: the modules for one model and for a set, and what runs on the host
without Ansible. All take the same lock and keep the same record, below the root directory of the installation.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Union

from ..alternatives import choices
from .client import Client, ServerError
from .converge import LIMIT, TIMEOUT, converge
from .execute import Listener
from .explain import NO_ENGINE, still_impossible
from .fields import REPLACE
from .log import Reader, files
from .outcome import Outcome
from .plan import Step, plan, standing
from .record import Entry, Record, lock
from .running import Running, look_twice
from .spec import ModelSpec, SpecError, parse, source_name
from .view import View

LOCK_WAIT = 600.0


@dataclass
class Applied:
    """What was found and done. `models` has a row for every model that was looked at, in the order of the steps."""

    endpoint: str
    models: List[Dict[str, Any]] = field(default_factory=list)
    changed: bool = False
    before: Dict[str, Any] = field(default_factory=dict)
    after: Dict[str, Any] = field(default_factory=dict)
    notices: List[str] = field(default_factory=list)
    failures: List[Outcome] = field(default_factory=list)

    @property
    def message(self) -> str:
        """All failures with cause and cure, a line each, below it what the server's log shows of it.

        Empty when there are none.
        """
        if not self.failures:
            return ""
        lines = [f"{len(self.failures)} of {len(self.models)} models failed on {self.endpoint}:"]
        for outcome in self.failures:
            lines += [f"- {outcome.sentence()}", *(f"  log: {line}" for line in outcome.shown_by())]
        return "\n".join(lines)


def apply(
    client: Client,
    desired: Sequence[ModelSpec],
    root: Union[str, Path],
    prune: str = "managed",
    relaunch: Collection[str] = (),
    only: Optional[str] = None,
    limit: int = LIMIT,
    timeout: float = TIMEOUT,
    lock_wait: float = LOCK_WAIT,
    rehearse: bool = False,
    first_choice: bool = True,
    how: str = REPLACE,
    who: str = "somebody",
    listener: Optional[Listener] = None,
    log: Optional[Reader] = None,
    lenient: bool = False,
) -> Applied:
    """Make the server run `desired`; `rehearse` tells what would happen, and changes no file and no model.

    `first_choice` is an operator's word that models which run as an alternative go back to their first choice; whoever
    only keeps models up leaves them (False). `how` a changed model takes the place of the one that serves, where its
    entry leaves that open, is `replace` or `beside`. `only` narrows everything to one uid: with an empty `desired` that
    model goes, whoever launched it. `log` reads what the server printed, by default from files below `root`. The other
    arguments are those of plan, converge, lock and Record. Raises ServerError when
    the server cannot be asked, LockHeld when somebody else does not finish within `lock_wait` seconds; failures of
    single models are in the result.
    """
    state = Path(root) / "state"
    with contextlib.nullcontext() if rehearse else lock(state / "lock", lock_wait, who):
        record = Record(state / "launched.json", not rehearse, who, lenient)
        running, entries = look_twice(client), dict(record.entries)
        if only is not None:
            running = {uid: one for uid, one in running.items() if uid == only}
            entries = {uid: one for uid, one in entries.items() if uid == only}
            prune = "all"
        hindered = _hindered(client, desired, running, entries) if first_choice else {}
        steps = plan(desired, running, entries, prune, relaunch, first_choice, hindered, how)
        if only is not None:
            steps = [replace(one, reason="absent was asked for") if one.spec is None else one for one in steps]
        if rehearse:
            outcomes = [_rehearsed(step) for step in steps]
        else:
            outcomes = converge(client, steps, record, limit, timeout, listener, log or files(root))
    return _applied(client, steps, outcomes, record)


def specs_from(
    client: Client,
    entries: Sequence[Mapping[str, Any]],
    server_gpus: Sequence[Any],
    root: Union[str, Path],
    rehearse: bool = False,
) -> List[ModelSpec]:
    """Specifications of the entries, with the paths that their sources have on this host.

    Where the host has the file that shipping leaves, a model must come from the bundle, from a given path, or from a
    registration of the server. Paths and GPUs are those that the server sees: what the release in force says about
    that comes before `server_gpus`. To `rehearse`, models that are not on this host count as shipped by then. Raises
    SpecError with every problem.
    """
    view = View.load(root)
    paths = shipped_paths(root, view)
    rows = [choice for entry in entries if isinstance(entry, Mapping) for choice in choices(entry)]
    if paths is None and any(entry.get("source") for entry in rows):
        paths = {}
    if rehearse and paths is not None:
        coming = {name for name in map(source_name, rows) if name}
        paths = {**{name: view.path(str(Path(root, "models", name, "to-come"))) for name in coming}, **paths}
    registrations: List[str] = []
    if paths is not None:
        pathless = [entry for entry in rows if not entry.get("source") and not entry.get("model_path")]
        for kind in sorted({str(entry.get("model_type") or "LLM") for entry in pathless}):
            registrations += _custom_names(client, kind)
    return parse(entries, server_gpus if view.gpus is None else view.gpus, paths, registrations)


def shipped_paths(root: Union[str, Path], view: Optional[View] = None) -> Optional[Dict[str, str]]:
    """Where the server finds the models of the bundle, by name; None when nothing was ever shipped here.

    Without a `view` these are their paths on this host.
    """
    path = Path(root) / "state" / "artifacts.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        paths = {name: str(artifact["path"]) for name, artifact in found.get("models", {}).items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SpecError([f"{path} does not list what was shipped ({error}); ship the bundle again"]) from error
    return {name: view.path(path) for name, path in paths.items()} if view else paths


def _hindered(
    client: Client, desired: Sequence[ModelSpec], running: Mapping[str, Running], entries: Mapping[str, Entry]
) -> Dict[str, str]:
    """Uids whose alternative serves because an engine could not be used, and which the server says still cannot be.

    To try them all the same would end what serves, for nothing.
    """
    found: Dict[str, str] = {}
    for spec in desired:
        entry, seen = entries.get(spec.uid), running.get(spec.uid)
        if entry is None or entry.instead is None or entry.instead.fault != NO_ENGINE:
            continue
        if seen is None or seen.state != "ready" or (standing(spec, entry) or 0) < 1:
            continue
        with contextlib.suppress(ServerError):
            reason = still_impossible(client, spec)
            if reason:
                found[spec.uid] = reason
    return found


def _custom_names(client: Client, kind: str) -> List[str]:
    """Names of custom models, whose definitions carry their own paths."""
    try:
        return [str(one["model_name"]) for one in client.registrations(kind) if not one.get("is_builtin", True)]
    except ServerError as error:
        if error.status == 400:  # Not a type of models this server has; the entry is refused for that.
            return []
        raise


def _rehearsed(step: Step) -> Outcome:
    model = step.seen.model if step.seen else None
    choice = step.tries[0] if step.tries else None
    return Outcome(
        step.uid,
        step.action,
        step.reason,
        True,
        step.changes,
        model,
        choice=choice.number if choice else 0,
        runs=choice.spec.words if choice else "",
        why=step.instead.why if choice and choice.number and step.instead else "",
    )


def _other_vectors(step: Step, outcome: Outcome) -> str:
    """A warning where one embedding model serves in the place of another."""
    spec = step.spec
    if not outcome.ok or not outcome.choice or spec is None or spec.type != "embedding":
        return ""
    name = spec.name
    if outcome.runs.split(" ")[0] == name:
        return ""
    return (
        f"{outcome.uid}: its vectors do not fit those that clients stored while {name} served. Let them embed their "
        f"texts anew, or bring {name} back before they ask."
    )


def _applied(client: Client, steps: Sequence[Step], outcomes: Sequence[Outcome], record: Record) -> Applied:
    result = Applied(client.endpoint, notices=[record.notice] if record.notice else [])
    for step, outcome in zip(steps, outcomes):
        result.models.append(outcome.row())
        result.notices += [text for text in (outcome.notice(), _other_vectors(step, outcome)) if text]
        result.changed = result.changed or outcome.changed
        if not outcome.ok:
            result.failures.append(outcome)
        if outcome.action != "keep":
            if step.before is not None:
                result.before[step.uid] = step.before
            if step.after is not None:
                result.after[step.uid] = step.after
    return result
