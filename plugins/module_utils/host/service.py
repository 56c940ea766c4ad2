# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring the native server of a host into the state asked for, and wait until it answers.

What counts is what runs, not what happened earlier in this play: a server that was started from another definition
than the release in force is restarted, even when the run that should have done it was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

from . import native_run
from .native_ctl import Native, ServiceError, State

POLL = 0.25
SHOWN_LINES = 40
"""Lines of the log that a failure shows."""


class NotHealthy(ServiceError):
    """A server that did not come up; `log` is the end of what it printed."""

    def __init__(self, message: str, log: str) -> None:
        self.log = log
        super().__init__(f"{message}\nThe end of its log:\n{log.strip() or '(empty)'}")


@dataclass(frozen=True)
class Plan:
    """What to do (`start`, `restart`, `stop` or `none`) and why; `running` says whether the server shall run then.

    `keeper` is what is done to the keeper alone, `start`, `stop` or `none`; it comes and goes with the server anyway.
    """

    action: str
    reason: str
    running: bool = True
    keeper: str = "none"

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.action != "none" or self.keeper != "none"


def plan(native: Native, wanted: str, now: State, definition: str, keeps: Optional[bool] = None) -> Plan:
    """Compare the server that runs with what is wanted (`started`, `restarted`, `stopped`).

    `definition` is the digest of the definition a server started now would have; `keeps` is whether there is to be a
    keeper, by default what the release in force says.
    """
    if wanted == "stopped":
        there = now.active or _anything(native)
        return Plan("stop", "asked for", running=False) if there else Plan("none", "not running", running=False)
    if not now.active:
        return Plan("start", "not running")
    if wanted == "restarted":
        return Plan("restart", "asked for")
    managers = native.managers
    if managers != 1:
        return Plan("restart", "several managers look after it" if managers else "nothing looks after it any more")
    if now.digest != definition:
        return Plan("restart", f"{', '.join(changed_keys(native, now))} changed")
    keeps = native.keeps if keeps is None else keeps
    if keeps == bool(native.keepers()):
        return Plan("none", "running as defined")
    if not native.controllable:
        return Plan("restart", "the keeper comes or goes, and supervisord has no socket below so long a path")
    return Plan(
        "none", "the keeper does not run" if keeps else "no keeper is wanted", True, "start" if keeps else "stop"
    )


def changed_keys(native: Native, now: State) -> List[str]:
    """What differs between the definition a server was started from and the one in force, in words."""
    path = native.root / "releases" / str(now.release) / "service.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["definition"]
    names = [key for key in native.service if key != "environment" and old.get(key) != native.service[key]]
    before, after = old.get("environment", {}), native.service["environment"]
    names += [f"environment {key}" for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return names or ["the definition"]


def carry_out(native: Native, step: Plan, timeout: float) -> None:
    """Do what was planned and wait for a server that shall run; raises ServiceError, NotHealthy with the log."""
    started = time.time()
    if step.action != "none":
        native.stop()
    if step.action in ("start", "restart"):
        native.start()
    if step.keeper == "start":
        native.start_keeper()
    elif step.keeper == "stop":
        native.stop_keeper()
    if step.running:
        wait(native, timeout, since=started)


def wait(native: Native, timeout: float, since: float) -> None:
    """Wait until the server answers on its own port; ends early when it died after `since` (seconds of the clock)."""
    deadline = time.monotonic() + timeout
    url = endpoint(native.service) + "/status"
    while True:
        end = native.last_exit()
        if end.get("ended", 0) > since and not end.get("asked"):
            message = f"{native.name} ended with code {end['code']} after {end['lived']} s"
            raise NotHealthy(message, native.logs(SHOWN_LINES))
        if owns(native, int(native.service["port"])) and answers(url):
            return
        if time.monotonic() > deadline:
            message = f"{native.name} does not answer on {url} after {timeout:.0f} s"
            raise NotHealthy(message, native.logs(SHOWN_LINES))
        time.sleep(POLL)


def endpoint(service: Dict[str, Any]) -> str:
    """Where the host itself reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(service["host"]), str(service["host"]))
    return f"http://{f'[{host}]' if ':' in host else host}:{service['port']}"


def answers(url: str) -> bool:
    """Whether something speaks HTTP there; a refusal is an answer too, an internal error is not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def owns(native: Native, port: int) -> bool:
    """Whether it is our server that listens on a port, not another program that took it."""
    inodes = listeners(port)
    for pid in native_run.family(native.root):
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(str(entry)) in inodes:
                        return True
    return False


def listeners(port: int) -> Set[str]:
    """The sockets that listen on a TCP port, as links in /proc name them."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _anything(native: Native) -> bool:
    """Whether anything of a server is there, if only leftovers or a manager that tries again."""
    return (
        native.managed
        or bool(native.runners())
        or bool(native.keepers())
        or next(native_run.family(native.root), None) is not None
    )


def describe(native: Native) -> Dict[str, Optional[Any]]:
    """The server as it is now, for a module's result."""
    now = native.state()
    return {"active": now.active, "pid": now.pid, "release": now.release, "manager": native.manager}
