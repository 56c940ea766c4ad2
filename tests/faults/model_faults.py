# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ends models, or keeps them from coming up: a table of faults, each done for real to a host under test.

A fault says which models fall and whether the server itself lives on, and does it. Who is hit, how hard and when is
random. That everything is right again afterwards is the same question for all of them, and asked in `keeping`.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Set

from faults.kept_host import BACKENDS, HANGS, NEVER, WANTED, Entry, KeptHost, NotSurvived, wait_until

MINUTE_S = 60.0
"""How long the API refuses connections."""


@dataclass
class Try:
    """One try of a fault.

    `fallen` are the models that have to be launched anew, `lives` is whether the server lives on and with it all that
    did not fall, `besides` are models that may or may not be there. `afterwards` is looked at when all is right again,
    `undo` is done at the end, whatever came of it.
    """

    kept: KeptHost
    random: random.Random
    minute: float = MINUTE_S
    fallen: Set[str] = field(default_factory=set)
    lives: bool = True
    besides: Set[str] = field(default_factory=set)
    began: float = 0.0
    told: str = ""
    afterwards: List[Callable[[], None]] = field(default_factory=list)
    undo: List[Callable[[], Any]] = field(default_factory=list)

    def begin(self, told: str = "") -> None:
        """The fault happens now."""
        self.told, self.began = told, time.monotonic()

    def all_fall(self) -> None:
        """The server ends, and every model with it."""
        self.fallen, self.lives = set(WANTED), False

    def one_falls(self) -> str:
        """One of the models falls; returns which."""
        uid = self.random.choice(WANTED)
        self.fallen = {uid}
        return uid


def server_restarted(attempt: Try) -> None:
    """The container is restarted; natively the server ends and is started again by its manager."""
    attempt.all_fall()
    attempt.begin()
    attempt.kept.restart_server()


def server_killed(attempt: Try) -> None:
    """The server's first process is killed, as the kernel does when memory is short."""
    attempt.all_fall()
    server = attempt.kept.server()
    attempt.begin()
    server.kill()


def down_and_up(attempt: Try) -> None:
    """`docker compose down` and `up`, natively `xinferencectl stop` and `start`, with a pause between."""
    attempt.all_fall()
    pause = attempt.random.uniform(0, 5)
    attempt.begin(f"down for {pause:.1f} s")
    attempt.kept.down()
    time.sleep(pause)
    attempt.kept.up()


def engine_restarted(attempt: Try) -> None:
    """The Docker Engine is restarted."""
    attempt.all_fall()
    attempt.begin()
    attempt.kept.host.exec("service", "docker", "restart")


def host_rebooted(attempt: Try) -> None:
    """The host is shut down, or its power is cut; then it is switched on.

    A host of the testbed has no systemd, so natively the line of the crontab that the README asks for is done here.
    """
    attempt.all_fall()
    hard = attempt.random.random() < 0.5
    attempt.begin("power cut" if hard else "shut down")
    (attempt.kept.host.kill if hard else attempt.kept.host.stop)()
    attempt.kept.host.start()
    if attempt.kept.backend == "native":
        attempt.kept.up()


def model_killed(attempt: Try) -> None:
    """The process of a model is killed."""
    uid = attempt.one_falls()
    (process,) = attempt.kept.models()[uid]
    attempt.begin(uid)
    process.kill()


def worker_killed(attempt: Try) -> None:
    """The process is killed that launches models and looks after them."""
    attempt.all_fall()
    worker = attempt.kept.worker()
    attempt.begin()
    worker.kill()


def model_terminated(attempt: Try) -> None:
    """Somebody stops a model through the API."""
    uid = attempt.one_falls()
    attempt.begin(uid)
    attempt.kept.client.terminate(uid)


def keeper_killed(attempt: Try) -> None:
    """The keeper is killed while it brings a model back, every other time without the process that launches it."""
    uid, wait = attempt.one_falls(), attempt.random.uniform(0, 8)
    alone = attempt.random.random() < 0.5
    attempt.begin(f"{uid}, after {wait:.1f} s, {'the keeper alone' if alone else 'and what it started'}")
    attempt.kept.client.terminate(uid)
    time.sleep(wait)
    keepers = attempt.kept.keepers()
    if not keepers:
        raise NotSurvived("no keeper runs")
    for process in keepers:
        if not alone or process.words[-1] == "run":
            process.kill()
    killed = {process.identity for process in keepers}

    def another() -> None:
        wait_until("another keeper", lambda: {one.identity for one in attempt.kept.keepers()} - killed)

    attempt.afterwards.append(another)


def keeper_and_ansible(attempt: Try) -> None:
    """All models are stopped, and Ansible launches them while the keeper does."""
    attempt.fallen = set(WANTED)
    wait = attempt.random.uniform(0, 8)
    failures: List[str] = []

    def converge() -> None:
        try:
            attempt.kept.play("models")
        except NotSurvived as error:
            failures.append(str(error))

    ansible = threading.Thread(target=converge)
    attempt.begin(f"Ansible after {wait:.1f} s")
    for uid in attempt.random.sample(WANTED, len(WANTED)):
        attempt.kept.client.terminate(uid)
    time.sleep(wait)
    ansible.start()

    def ended() -> None:
        ansible.join()
        if failures:
            raise NotSurvived(failures[0])

    attempt.undo.append(ansible.join)
    attempt.afterwards.append(ended)


def home_wiped(attempt: Try) -> None:
    """Everything below XINFERENCE_HOME is removed under the server, and that is restarted."""
    attempt.all_fall()
    attempt.begin()
    attempt.kept.host.exec("find", f"{attempt.kept.root}/home", "-mindepth", "1", "-delete")
    attempt.kept.restart_server()


def api_refuses(attempt: Try) -> None:
    """Nobody can connect to the API for a minute; the models are well, and must not be touched."""
    attempt.begin(f"{attempt.minute:.0f} s")
    with attempt.kept.refusing():
        time.sleep(attempt.minute)


def never_launches(attempt: Try) -> None:
    """Beside the three models there is one that can never be launched, and the server is killed."""
    kept = attempt.kept
    _beside(attempt, kept.never())
    wait_until("a failure of it", lambda: kept.told()["models"].get(NEVER, {}).get("failures"))
    server_killed(attempt)

    def held_back() -> None:
        model = kept.told()["models"].get(NEVER, {})
        if model.get("state") == "ready" or not model.get("fault") or model.get("launches", 0) > 20:
            raise NotSurvived(f"the keeper tells of the one that cannot be launched: {model}")

    attempt.afterwards.append(held_back)


def launch_hangs(attempt: Try) -> None:
    """The launch of a fourth model hangs, and the server, or the process of another model, is killed."""
    kept = attempt.kept
    over = threading.Event()

    def hold() -> None:
        # Nothing hangs like a process that is stopped; each that loads this model is, as soon as it is seen, and that
        # has to be before it has loaded, however busy the machine.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
        while not over.wait(0.05):
            for process in kept.models().get(HANGS, []):
                process.kill(signal.SIGSTOP)

    holder = threading.Thread(target=hold)
    holder.start()
    attempt.undo += [over.set, holder.join]
    _beside(attempt, kept.another(HANGS))
    wait_until("the launch that hangs", lambda: HANGS in kept.models())
    if attempt.random.random() < 0.5:
        server_killed(attempt)
        attempt.told = "the server killed"
    else:
        model_killed(attempt)
        attempt.told += " killed"

    def still() -> None:
        wait_until("the launch that hangs, again", lambda: HANGS in kept.models())
        if kept.told()["models"].get(HANGS, {}).get("state") == "ready":
            raise NotSurvived("the launch did not hang")

    attempt.afterwards.append(still)


def _beside(attempt: Try, entry: Entry) -> None:
    """Put a release with a model that does not come up in force, and take it back at the end."""
    kept = attempt.kept
    attempt.besides = {str(entry["model_uid"])}

    def take_back() -> None:
        kept.serve()
        # A launch that hangs cannot be ended on every version in another way.
        kept.server().kill()

    attempt.undo.append(take_back)
    kept.serve(entry)


@dataclass(frozen=True)
class Fault:
    """A fault, and the backends that know it."""

    name: str
    happen: Callable[[Try], None]
    backends: Any = BACKENDS


FAULTS: Dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("server restarted", server_restarted),
        Fault("model terminated", model_terminated),
        Fault("server killed", server_killed),
        Fault("worker killed", worker_killed),
        Fault("model killed", model_killed),
        Fault("down and up", down_and_up),
        Fault("engine restarted", engine_restarted, ("docker",)),
        Fault("keeper killed", keeper_killed),
        Fault("host rebooted", host_rebooted),
        Fault("keeper and Ansible", keeper_and_ansible),
        Fault("home wiped", home_wiped),
        Fault("API refuses", api_refuses),
        Fault("never launches", never_launches),
        Fault("launch hangs", launch_hangs),
    )
}
