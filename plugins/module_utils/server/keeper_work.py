# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper does about what it found, in a process of its own: registrations, and `apply` for the models named.

A process, because it can be ended at any moment: the record is written before every launch, so whoever comes next finds
what is under way. The order comes on standard input, what happens goes to standard output, one JSON object a line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from . import registration
from .apply import apply, specs_from
from .client import AccessRefused, Client, ServerError, Unreachable
from .diagnose import diagnose
from .keeper_release import Release, Unreadable, load
from .record import LockHeld
from .registration import DefinitionError
from .spec import ModelSpec, SpecError

WHO = "the keeper"
FAILED = "failed: "
REQUEST_TIMEOUT = 30.0
Tell = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Order:
    """What is to be done: `uids` of the release `release`; those of `relaunch` also when they seem to run.

    `patience` is how many seconds a launch may take, None for what the release says.
    """

    release: str
    uids: Tuple[str, ...]
    relaunch: Tuple[str, ...] = ()
    patience: Optional[float] = None


def client_of(release: Release, timeout: float = REQUEST_TIMEOUT) -> Client:
    """The client of the release's server; sends nothing yet."""
    login = release.login
    return Client(
        release.settings.endpoint,
        api_key=login.get("api_key"),
        username=login.get("username"),
        password=login.get("password"),
        timeout=timeout,
    )


def specs_of(
    client: Client, entries: Sequence[Mapping[str, Any]], root: Path
) -> Tuple[List[ModelSpec], Dict[str, str]]:
    """Specifications of all entries that can be launched, and what is wrong with the others, by uid.

    One entry that is wrong must not keep the others from being served.
    """
    try:
        return specs_from(client, entries, [], root), {}
    except SpecError:
        pass
    specs: List[ModelSpec] = []
    problems: Dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        uid = str(entry.get("model_uid") or f"entry {number}")
        try:
            found = specs_from(client, [entry], [], root)
            if any(spec.uid == one.uid for spec in found for one in specs):
                raise SpecError([f"{uid}: several entries have this model_uid"])
            specs += found
        except SpecError as error:
            problems[uid] = "; ".join(error.problems)
    return specs, problems


def work(root: Path, order: Order, tell: Tell) -> Dict[str, Any]:
    """Carry an order out; returns `outcome` with what belongs to it.

    done: `models` as in `Applied`, of each of which there was news before. busy: somebody else changes the models.
    stale: another release is in force. refused, server, disk, release: with `said`.
    """
    try:
        release = load(root)
        if release.id != order.release:
            return {"outcome": "stale"}
        client = client_of(release)
        for text in register(client, release):
            tell({"log": text})
        specs, _problems = specs_of(client, release.entries, root)
        applied = apply(
            client,
            [spec for spec in specs if spec.uid in order.uids],
            root,
            prune="none",
            relaunch=order.relaunch,
            limit=release.settings.parallel,
            timeout=release.settings.wait_timeout if order.patience is None else order.patience,
            lock_wait=0,
            who=WHO,
            first_choice=False,
            lenient=True,
            listener=lambda uid, event: tell(news(uid, event)),
        )
    except LockHeld:
        return {"outcome": "busy"}
    except AccessRefused as error:
        return {"outcome": "refused", "said": error.message}
    except ServerError as error:
        return {"outcome": "server", "said": error.message}
    except (Unreadable, SpecError) as error:
        return {"outcome": "release", "said": str(error)}
    except OSError as error:
        return {"outcome": "disk", "said": str(error)}
    if client.refusal:
        return {"outcome": "refused", "said": client.refusal.message}
    return {"outcome": "done", "models": applied.models, "notices": applied.notices}


def news(uid: str, event: str) -> Dict[str, Any]:
    """What is told of a model while others are still at it; a failure with what is known of it."""
    if not event.startswith(FAILED):
        return {"uid": uid, "event": event}
    error = event[len(FAILED) :]
    known = diagnose(error)
    return {"uid": uid, "error": error, "diagnosis": asdict(known) if known else None}


def register(client: Client, release: Release) -> List[str]:
    """Register the custom models that the server lost with its home; returns what was done or failed.

    A definition that changed is left to Ansible.
    """
    said = []
    for row in release.registrations:
        kind, definition = str(row.get("model_type") or "LLM"), row.get("definition")
        name = str(definition.get("model_name")) if isinstance(definition, Mapping) else "without a name"
        try:
            todo = registration.plan(client, kind, "present", definition=definition)
            if todo.action == "register":
                registration.apply(client, todo)
                said.append(f"registered the custom model {name} ({kind}), which the server did not know")
        except (AccessRefused, Unreachable):
            raise
        except (DefinitionError, ServerError) as error:
            said.append(f"cannot register the custom model {name}: {error}")
    return said


def main(root: Path) -> int:
    """Read an order, carry it out, and tell."""

    def tell(what: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(what, default=str) + "\n")
        sys.stdout.flush()

    told = json.load(sys.stdin)
    order = Order(str(told["release"]), tuple(told["uids"]), tuple(told["relaunch"]), told.get("patience"))
    tell(work(root, order, tell))
    return 0
