# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers that start closed, as a release starts them, with a stranger at the door from before the start."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.host import guarding
from servers import Server
from testbed.strangers import attempts

STRANGERS = Path(__file__).resolve().parents[1] / "testbed/strangers.py"
ADMIN = {"username": "keeper-of-keys", "password": "planted-pass-1"}
GIVEN_KEY = "sk-A1b2C3d4E5f6G"
SECRET = "planted-word-2"
PATIENCE_S = 300.0
Report = dict[str, Any]
# A stranger who speaks to the processes of a server as they speak to each other.
ACTOR = """
import asyncio, contextlib, sys, cloudpickle, psutil, xoscar

class Stranger(xoscar.StatelessActor):
    def run(self):
        return "ran"

cloudpickle.register_pickle_by_value(sys.modules["__main__"])

async def heard(port):
    try:
        made = xoscar.create_actor(Stranger, address=f"127.0.0.1:{port}", uid=f"stranger-{port}")
        return await (await asyncio.wait_for(made, 10)).run() == "ran"
    except Exception:
        return False

async def main():
    api, *pids = map(int, sys.argv[1:])
    ports = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found = getattr(process, "net_connections", None) or process.connections
            ports |= {one.laddr.port for one in found("tcp") if one.status == "LISTEN"} - {api}
    print([port for port in sorted(ports) if await heard(port)])

asyncio.run(main())
"""


def guard_in(place: Path, **accounts: Any) -> Path:
    """A directory with what `guarded` reads, as a release has it."""
    shutil.rmtree(place, ignore_errors=True)
    for name, entry in guarding.files({"SITE_WORD": SECRET}, {**ADMIN, **accounts}, "seed").items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.content)
        path.chmod(entry.mode)
    return place


def listening_to(server: Server, key: str = "") -> list[int]:
    """The ports of a server's processes, beside that of its API, on which a stranger's code is run."""
    words = [str(servers.environment(server.version) / "bin/python"), "-c", ACTOR, server.endpoint.rpartition(":")[2]]
    environment = {**os.environ, guarding.ACTORS: key}
    command = [*words, *map(str, server.pids())]
    return list(json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout))


@contextlib.contextmanager
def stranger(endpoint: str, place: Path) -> Iterator[Callable[[], Report]]:
    """A stranger who tries to get into an endpoint where nobody listens yet.

    Gives a function that waits until everything was tried once with an answer, ends it, and returns what it found.
    """
    path = place / "report.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(STRANGERS), endpoint, "--seconds", "1800", "--report", str(path)]

    def until(condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not condition() and time.monotonic() < limit:
            time.sleep(0.2)

    with subprocess.Popen(command) as process:

        def verdict() -> Report:
            until(lambda: sum(json.loads(path.read_text())["answers"].values()) >= len(attempts()))
            process.terminate()
            process.wait(30)
            found: Report = json.loads(path.read_text())
            return found

        try:
            until(path.exists)
            yield verdict
        finally:
            process.kill()


@contextlib.contextmanager
def besieged(
    version: str, place: Path, env: Mapping[str, str] | None = None, **accounts: Any
) -> Iterator[tuple[Server, Report]]:
    """A server that was started while a stranger tried to get in, and what the stranger found."""
    port = servers.free_port()
    with contextlib.ExitStack() as at_the_end:
        verdict = at_the_end.enter_context(stranger(f"http://127.0.0.1:{port}", place))
        try:
            server = servers.start(version, guard=guard_in(place / "release", **accounts), port=port, env=env)
        except servers.Missing as error:
            pytest.skip(str(error))
        at_the_end.callback(server.stop)
        yield server, verdict()


def nobody_got_in(report: Report) -> None:
    """Fail when the stranger got in, or could not try."""
    assert report["open"] == []
    assert report["unreached"] > 0, "it was there before the server"
    assert report["first_answer"] is not None and sum(report["answers"].values()) >= len(attempts())
    assert report["answers"]["401"] >= 10
