# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carry out planned steps on a live server: several at once, each to its own end, every outcome reported."""

from __future__ import annotations

import queue
import threading
from typing import Any, Dict, List, Optional, Sequence

from .client import Client, ServerError
from .execute import Executor, Listener
from .log import Reader
from .outcome import Outcome
from .plan import Step
from .record import Record
from .schedule import startable

LIMIT = 4
TIMEOUT = 1800.0


def converge(
    client: Client,
    steps: Sequence[Step],
    record: Record,
    limit: int = LIMIT,
    timeout: float = TIMEOUT,
    listener: Optional[Listener] = None,
    log: Optional[Reader] = None,
) -> List[Outcome]:
    """Do the steps, at most `limit` at once, and report on each, in their order.

    Removals go first. `timeout` is how many seconds one launch may take to become ready; then it is cancelled, and the
    next alternative has as long. A step that fails never stops the others. The record is written as each step begins
    and ends, so whoever runs next after an interruption finds everything in it. Whoever calls holds the lock (see
    record.lock).
    """
    work = Executor(client, record, timeout, listener or (lambda uid, event: None), log)
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
