# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper's turns, on a clock and a server that do as they are told."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper as keeping
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_probe
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_state as states
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import (
    AccessRefused,
    ServerError,
    Unreachable,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import features
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper import Keeper
from ansible_collections.airgap.xinference.plugins.module_utils.server.probe import ProbeResult
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record, awaited, held, lock
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import Running
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse

ENTRIES = [
    {"model_uid": uid, "model_name": "bce", "model_type": "embedding", "model_path": f"/{uid}"} for uid in ("a", "b")
]


class FakeClock:
    """A clock for people and a steady one, both moved by hand."""

    def __init__(self) -> None:
        self.wall, self.tick = 1_800_000_000.0, 1000.0

    def now(self) -> float:
        return self.wall

    def steady(self) -> float:
        return self.tick

    def go(self, seconds: float) -> None:
        self.wall += seconds
        self.tick += seconds


class FakeServer:
    """A server as the keeper's client sees it. `trouble` is raised instead of an answer."""

    endpoint = "http://127.0.0.1:9997"
    features = features("4.1.0")
    refusal = None

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.boot = clock.now() - 100
        self.live: Dict[str, Dict[str, Any]] = {}
        self.trouble: Optional[Exception] = None
        self.workers: Dict[str, Any] = {"w": {}}
        self.asked: List[str] = []
        self.stamp = 100
        self.metrics = b""

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.trouble:
            raise self.trouble

    def status(self) -> Dict[str, Any]:
        self._ask("status")
        return {"uptime": self.clock.now() - self.boot, "workers": self.workers}

    def models(self) -> Dict[str, Any]:
        self._ask("models")
        return {uid: one["model"] for uid, one in self.live.items() if one["listed"]}

    def instances(self, uid: Optional[str] = None) -> List[Dict[str, Any]]:
        self._ask("instances")
        return [
            {"model_uid": uid, "status": one["status"], "instance_created_ts": one["since"]}
            for uid, one in self.live.items()
        ]

    def get_bytes(self, path: str) -> bytes:
        self._ask(path)
        return self.metrics

    def put(self, uid: str, status: str = "READY", listed: bool = True, name: str = "bce") -> Running:
        self.stamp += 1
        model = {"id": uid, "model_name": name, "model_type": "embedding", "replica": 1}
        self.live[uid] = {"model": model, "status": status, "since": self.stamp, "listed": listed}
        return Running(uid, model, status, self.stamp)

    def restart(self) -> None:
        self.live.clear()
        self.boot = self.clock.now()


class FakeJob:
    """A job that ends when it is told to; `report` is what it says then."""

    def __init__(self, order: Any) -> None:
        self.order = order
        self.code: Optional[int] = None
        self.said: List[Dict[str, Any]] = []
        self.ended = False

    def news(self) -> List[Dict[str, Any]]:
        said, self.said = self.said, []
        return said

    def end(self) -> None:
        self.ended = True


class World:
    """A host with a release, a server and a keeper."""

    def __init__(self, root: Path) -> None:
        self.root, self.clock = root, FakeClock()
        self.server = FakeServer(self.clock)
        self.jobs: List[FakeJob] = []
        self.log: List[str] = []
        self.renewed: List[Path] = []
        self.connected = 0
        self.probes: List[str] = []
        self.answers: Dict[str, ProbeResult] = {}
        self.login = {"username": "keeper", "password": "secret"}
        (root / "state").mkdir()
        self.record = Record(root / "state/launched.json", who="Ansible")
        self.release("one")
        self.keeper = self.make()

    def make(self) -> Keeper:
        return Keeper(self.root, self.log.append, self.clock, self.connect, self.start, self.renewed.append)

    def connect(self, release: Any, timeout: float) -> Any:
        self.connected += 1
        return self.server

    def start(self, own: Path, root: Path, order: Any) -> FakeJob:
        self.jobs.append(FakeJob(order))
        for spec in parse(ENTRIES):
            if spec.uid in order.uids:
                self.server.put(spec.uid, "CREATING", listed=False)
                Record(self.root / "state/launched.json", who="the keeper").begin(spec)
        return self.jobs[-1]

    def release(self, name: str, entries: Any = ENTRIES, **settings: Any) -> None:
        directory = self.root / "releases" / name
        (directory / "bin").mkdir(parents=True, exist_ok=True)
        (directory / "bin/keeper.pyz").write_text(name, encoding="utf-8")
        keeper = {"endpoint": "http://127.0.0.1:9997", "verify": 0, **settings}
        for file, content in (("keeper", keeper), ("models", entries), ("server", {"backend": "native"})):
            (directory / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        if self.login:
            (directory / "credentials.json").write_text(json.dumps(self.login), encoding="utf-8")
        link = self.root / "link"
        link.symlink_to(f"releases/{name}")
        link.replace(self.root / "current")

    def serve(self, *uids: str, entries: Any = ENTRIES) -> None:
        """Models that run as launched by Ansible, and the record of it."""
        for spec in parse(entries):
            if spec.uid in uids:
                self.record.begin(spec)
                self.record.settle(spec, self.server.put(spec.uid))

    def go(self, seconds: float) -> None:
        """Let time pass with the keeper at work."""
        end = self.clock.tick + seconds
        while self.clock.tick < end:
            self.clock.go(min(self.keeper.tick(), end - self.clock.tick))
        self.keeper.tick()

    def finish(self, error: str = "", action: str = "launch", **more: Any) -> None:
        """The job under way ends: its models run, or all of them failed."""
        job = self.jobs[-1]
        rows = []
        for uid in job.order.uids:
            diagnosis = more.get("diagnosis")
            rows.append({"model_uid": uid, "action": action, "duration": 2, "error": error, "diagnosis": diagnosis})
            self.server.live.pop(uid, None)
            if not error:
                keeper = Record(self.root / "state/launched.json", who="the keeper")
                (spec,) = [one for one in parse(ENTRIES) if one.uid == uid]
                keeper.begin(spec)
                keeper.entries[uid] = replace(keeper.entries[uid], launched_at=self.clock.wall)
                keeper.settle(spec, self.server.put(uid))
        if error:
            job.said = [{"uid": uid, "error": error, "diagnosis": more.get("diagnosis")} for uid in job.order.uids]
        job.said.append({"outcome": "done", "models": rows, "notices": []})
        job.code = 0
        self.keeper.tick()

    def launched(self) -> List[List[str]]:
        """The orders given so far."""
        return [sorted(job.order.uids) for job in self.jobs]

    def told(self, uid: str) -> Dict[str, Any]:
        """What the file says of a model."""
        models = json.loads((self.root / "state/keeper.json").read_text(encoding="utf-8"))["models"]
        (found,) = [one for one in models if one["uid"] == uid]
        return found

    @property
    def state(self) -> Dict[str, Any]:
        return json.loads((self.root / "state/keeper.json").read_text(encoding="utf-8"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def served(world):
    """Both models run, and the keeper has seen it."""
    world.serve("a", "b")
    world.go(150)
    assert not world.jobs
    return world


# -- when nothing happens


def test_idle_it_sends_one_request_every_interval_and_does_nothing(served):
    before = len(served.server.asked)
    served.go(600)
    asked = served.server.asked[before:]
    assert 119 <= len(asked) <= 122 and set(asked) == {"instances", "models"}
    assert served.connected == 1 and not served.jobs
    assert served.told("a")["by"] == "Ansible" and served.told("a")["state"] == "ready"


def test_idle_it_writes_only_to_show_that_it_lives(served, monkeypatch):
    written: List[Any] = []

    def save(*told):
        written.append(told)
        return ""

    monkeypatch.setattr(states, "save", save)
    served.go(300)
    assert 9 <= len(written) <= 11


# -- faults of the server


def test_a_server_that_was_started_anew_gets_its_models_back_at_once(served):
    served.server.restart()
    served.go(5)
    assert served.launched() == [["a", "b"]]
    served.finish()
    served.go(1)
    model = served.told("a")
    assert (model["state"], model["by"], model["restarts"], model["failures"]) == ("ready", "the keeper", 1, 0)
    assert "started anew" in model["fault"]["what"] and "launched again by the keeper" in model["cure"]["what"]
    assert served.state["server"]["restarts"] == 1
    served.go(3600)
    assert len(served.jobs) == 1


def test_a_server_that_does_not_answer_is_waited_for(served):
    served.server.trouble = Unreachable("connection refused")
    served.go(60)
    assert not served.jobs and served.state["server"]["state"] == "down"
    asked = len(served.server.asked)
    served.go(10)
    assert len(served.server.asked) - asked >= 9
    served.server.trouble = None
    served.go(2)
    assert not served.jobs and served.told("a")["restarts"] == 0 == served.told("a")["faults"]
    assert served.state["server"]["state"] == "up"


def test_a_server_without_a_worker_is_not_yet_up(served):
    served.server.restart()
    served.server.workers = {}
    served.go(30)
    assert not served.jobs and served.state["server"]["state"] == "starting"
    served.server.workers = {"w": {}}
    served.go(2)
    assert served.launched() == [["a", "b"]]


def test_half_answers_are_waited_out_without_a_storm(served):
    served.server.trouble = ServerError("was to be answered with a list, and this came: '<html>'")
    before = len(served.server.asked)
    served.go(60)
    assert not served.jobs and served.state["server"]["state"] == "in trouble"
    assert len(served.server.asked) - before <= 40
    served.server.trouble = None
    served.go(6)
    assert served.state["server"]["state"] == "up" and not served.jobs


def test_an_answer_that_nobody_foresaw_is_survived(served, monkeypatch):
    def odd(*told):
        raise KeyError("odd")

    monkeypatch.setattr(keeping, "combine", odd)
    served.server.put("c")
    served.go(20)
    assert "has a mistake and goes on: KeyError" in served.state["problem"]
    monkeypatch.undo()
    served.go(10)
    assert served.state["problem"] == "" and served.state["foreign"] == ["c"]


def test_an_upgrade_with_new_models_is_left_to_ansible_first(served):
    new = [ENTRIES[0], {**ENTRIES[1], "model_path": "/new"}]
    served.server.trouble = Unreachable("connection refused")
    served.release("two", new)
    served.go(200)
    served.server.trouble = None
    served.server.restart()
    served.go(5)
    assert served.launched() == [["a"]], "what the release did not change comes back at once"
    served.finish()
    served.go(40)
    assert served.launched() == [["a"]]
    served.go(30)
    assert served.launched() == [["a"], ["b"]]


def test_a_keeper_that_is_started_anew_leaves_what_is_new_to_ansible_as_well(served):
    served.release("two", [{**entry, "n_gpu": 1} for entry in ENTRIES])
    served.go(10)
    served.keeper.end()
    served.keeper = served.make()
    served.go(40)
    assert not served.jobs
    served.go(20)
    assert served.launched() == [["a", "b"]]


# -- faults of a model


def test_a_replica_that_the_server_gave_up_was_taken_away_by_nobody(tmp_path):
    entries: List[Dict[str, Any]] = [{**ENTRIES[0], "replica": 2}, ENTRIES[1]]
    world = World(tmp_path)
    world.release("one", entries, policy="report")
    for spec in parse(entries):
        world.record.begin(spec)
        running = world.server.put(spec.uid)
        world.server.live[spec.uid]["model"]["replica"] = spec.payload().get("replica", 1)
        world.record.settle(spec, running)
    world.go(150)
    assert not world.jobs
    world.server.live["a"]["model"]["replica"] = 1
    world.server.metrics = b'xinference:model_unexpected_termination{model_uid="a",replica_index="1"} 1.0\n'
    world.go(30)
    assert world.launched() == [["a"]] and "a process of it died" in world.told("a")["fault"]["what"]


def test_a_model_that_somebody_stopped_comes_back(served):
    del served.server.live["a"]
    served.go(6)
    assert served.launched() == [["a"]]
    assert "stopped" in served.told("a")["fault"]["what"]
    served.finish()
    assert served.told("a")["kind"] == "running" and served.told("b")["restarts"] == 0


@pytest.mark.parametrize("seen", [True, False])
def test_what_ansible_launches_anew_is_no_restart(served, seen):
    with lock(served.root / "state/lock", 0, "Ansible"):
        if seen:
            del served.server.live["a"]
            served.go(20)
        (spec,) = [one for one in parse(ENTRIES) if one.uid == "a"]
        served.record.begin(spec)
        served.record.entries["a"] = replace(served.record.entries["a"], launched_at=served.clock.wall)
        served.record.settle(spec, served.server.put("a"))
    served.go(20)
    assert served.told("a")["kind"] == "running" and served.told("a")["restarts"] == 0 == served.told("a")["faults"]
    served.server.put("a")
    served.go(6)
    assert served.told("a")["restarts"] == 1, "the server itself did that"


def test_a_model_that_is_seen_while_somebody_stops_it_was_stopped_by_hand(served):
    served.release("one", policy="report")
    served.keeper.release = None
    served.go(1)
    served.server.put("a", "TERMINATING")
    served.go(6)
    assert not served.told("a")["fault"]
    del served.server.live["a"]
    served.go(60)
    assert served.told("a")["kind"] == "stopped by hand" and "stopped it" in served.told("a")["fault"]["what"]
    assert not served.jobs


def test_a_model_that_somebody_altered_is_put_back_and_that_is_its_cure(served):
    served.server.put("a", name="other")
    served.go(6)
    assert served.launched() == [["a"]] and not served.told("a")["cure"]
    served.finish(action="relaunch")
    served.go(1)
    model = served.told("a")
    assert (model["kind"], model["by"], model["failures"]) == ("running", "the keeper", 0)
    assert "launched again by the keeper" in model["cure"]["what"]


@pytest.mark.parametrize("policy", ["report", "leave"])
def test_under_another_policy_it_stays_stopped_and_is_named(tmp_path, policy):
    world = World(tmp_path)
    world.release("one", policy=policy)
    world.serve("a", "b")
    world.go(6)
    del world.server.live["a"]
    world.server.put("b", name="other")
    world.go(900)
    assert not world.jobs
    assert world.told("a")["kind"] == "stopped by hand" and world.told("b")["kind"] == "altered by hand"
    assert sum("left so, because the policy" in line for line in world.log) == 2
    world.server.restart()
    world.go(6)
    assert world.launched() == [["b"]], "a restart is nobody's wish; what was stopped by hand stays so"
    world.keeper.end()
    world.keeper = world.make()
    world.go(6)
    assert world.told("a")["kind"] == "stopped by hand"


def test_the_server_may_start_a_model_anew_by_itself(served):
    served.server.put("a", "ERROR", listed=False)
    served.go(10)
    assert not served.jobs
    served.server.put("a")
    served.go(6)
    assert not [order for order in served.launched() if order != ["a"]]
    assert served.told("a")["restarts"] == 1


def test_it_steps_in_when_the_server_does_not(served):
    served.server.put("a", "ERROR", listed=False)
    served.go(30)
    assert served.launched() == [["a"]]


def test_a_model_that_cannot_be_launched_is_tried_less_and_less_and_keeps_nobody_waiting(served):
    served.server.restart()
    served.go(5)
    attempts = []
    for _turn in range(40):
        if served.keeper.job is not None:
            order = served.launched()[-1]
            if order == ["a", "b"]:
                served.jobs[-1].order = type(served.jobs[-1].order)("one", ("a",))
                served.finish("out of memory")
                served.serve("b")
            else:
                assert order == ["a"]
                served.finish("out of memory")
            attempts.append(served.clock.tick)
        served.go(60)
    gaps = [after - before for before, after in zip(attempts, attempts[1:])]
    assert 5 <= len(attempts) <= 12 and max(gaps) >= 600
    model = served.told("a")
    assert model["failures"] == len(attempts) and model["again"] > 0 and "out of memory" in model["fault"]["what"]
    assert served.told("b")["state"] == "ready"


def test_a_failure_that_cannot_heal_is_tried_seldom(served):
    served.server.restart()
    served.go(5)
    served.finish("unknown name", diagnosis={"cause": "No such name.", "cure": "Change it.", "heals": False})
    served.go(30)
    assert len(served.jobs) == 1 and "Cure: Change it." in served.told("a")["fault"]["what"]


def test_a_changed_entry_is_tried_at_once_however_often_the_old_one_failed(served):
    served.server.restart()
    for _turn in range(8):
        served.go(700)
        if served.keeper.job is not None:
            served.finish("out of memory")
    count = len(served.jobs)
    served.release("two", [{**entry, "n_gpu": 1} for entry in ENTRIES], grace=0)
    served.go(6)
    assert len(served.jobs) == count + 1


def test_a_model_that_dies_again_and_again_is_held_back(served):
    times = []
    for _turn in range(6):
        served.go(1)
        del served.server.live["a"]
        began = served.clock.tick
        while not (served.keeper.job and served.launched()[-1] == ["a"]):
            served.go(1)
            assert served.clock.tick - began < 400
        times.append(served.clock.tick - began)
        served.finish()
    assert times[0] <= 12 and times[-1] > 50 and served.told("a")["failures"] >= 5
    served.go(200)
    assert served.told("a")["failures"] == 0, "it served for a while"


def test_one_that_is_due_does_not_wait_for_one_that_hangs(served):
    del served.server.live["a"]
    served.go(6)
    assert served.launched() == [["a"]]
    served.go(600)
    assert len(served.jobs) == 1
    del served.server.live["b"]
    served.go(11)
    assert served.jobs[0].ended and served.launched() == [["a"], ["a", "b"]]


def test_one_that_serves_and_dies_does_not_wait_for_one_that_still_loads(served):
    served.server.restart()
    served.go(6)
    keeper = Record(served.root / "state/launched.json", who="the keeper")
    keeper.settle(parse(ENTRIES)[1], served.server.put("b"))
    served.jobs[-1].said = [{"uid": "b", "event": "ready"}]
    served.go(130)
    assert served.told("b")["state"] == "ready" and len(served.jobs) == 1
    del served.server.live["b"]
    served.go(11)
    assert served.jobs[0].ended and served.launched() == [["a", "b"], ["a", "b"]]


def test_a_model_that_serves_before_that_is_recorded_is_the_keepers(served):
    served.server.restart()
    served.go(6)
    served.server.put("b")
    served.go(6)
    assert served.told("b")["by"] == "the keeper" and served.told("b")["kind"] == "starting"
    assert len(served.jobs) == 1


def test_one_that_fails_is_tried_again_while_another_still_loads(served):
    served.server.restart()
    served.go(6)
    served.server.put("b", "ERROR", listed=False)
    served.jobs[-1].said = [{"uid": "b", "error": "out of memory", "diagnosis": None}]
    served.go(2)
    assert served.told("b")["failures"] == 1 and not served.jobs[0].ended
    served.go(30)
    assert served.launched() == [["a", "b"], ["a", "b"]]


def test_a_model_that_takes_the_server_with_it_is_launched_alone(served):
    served.server.restart()
    served.go(6)
    for _turn in range(2):
        assert served.launched()[-1] == ["a", "b"]
        served.server.restart()
        served.go(30)
    served.go(60)
    assert served.launched()[-1] != ["a", "b"] and "the server ended 2 times" in "\n".join(served.log)
    alone = served.launched()[-1]
    served.finish()
    served.go(60)
    assert served.launched()[-1] != alone and len(served.launched()[-1]) == 1


@pytest.mark.parametrize("late", [0.0, 4.0, 30.0])
def test_a_late_answer_is_no_restart(served, late):
    answer = served.server.status

    def status():
        """Asked at once, answered late; whole seconds, as servers tell."""
        told = answer()
        served.clock.go(late)
        return {**told, "uptime": int(told["uptime"])}

    served.server.status = status
    for _turn in range(5):
        served.server.put("stranger")
        served.go(7)
    assert not served.jobs and served.state["server"]["restarts"] == 0
    served.server.restart()
    served.go(70)
    assert served.state["server"]["restarts"] == 1 and served.launched() == [["a", "b"]]


@pytest.mark.parametrize("uptime", [None, "soon", float("nan"), float("inf")])
def test_a_server_that_does_not_tell_since_when_it_runs_was_not_started_anew(served, uptime):
    served.server.status = lambda: {"uptime": uptime, "workers": {"w": {}}}
    for _turn in range(3):
        served.server.put("stranger")
        served.go(7)
    assert not served.jobs and served.state["server"]["restarts"] == 0


def test_what_fails_because_the_server_ended_is_no_fault_of_the_model(served):
    served.server.restart()
    served.go(6)
    served.server.restart()
    served.finish("the server forgot the launch")
    served.go(1)
    assert served.told("a")["failures"] == 0 and served.launched() == [["a", "b"]] * 2


def test_what_cannot_be_settled_is_not_done_again_and_again(served):
    served.server.put("a", name="other")
    served.go(6)
    for _turn in range(40):
        if served.keeper.job is not None:
            served.finish(action="relaunch")
            served.server.put("a", name="other")  # whatever is done, the server shows something else
        served.go(30)
    assert 4 <= len(served.jobs) <= 12 and served.told("a")["failures"] >= 4


# -- others


def test_foreign_models_are_named_and_never_touched(served):
    served.server.put("theirs")
    served.go(30)
    assert served.state["foreign"] == ["theirs"] and not served.jobs
    served.server.restart()
    served.go(6)
    assert served.launched() == [["a", "b"]]


def test_while_ansible_changes_models_the_keeper_looks_on(served):
    with lock(served.root / "state/lock", 0, "Ansible"):
        served.server.live.clear()
        served.go(600)
        assert not served.jobs
        served.serve("a", "b")
    served.go(10)
    assert not served.jobs and served.told("a")["faults"] == 0


def test_it_gives_way_to_whoever_waits(served, monkeypatch):
    del served.server.live["a"]
    served.go(6)
    waiting = threading.Event()

    def wait():
        with lock(served.root / "state/lock", 20, "Ansible"):
            waiting.wait(20)

    with lock(served.root / "state/lock", 0, "the keeper's job"):
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not awaited(served.root / "state/lock"):
            pass
        served.keeper.tick()
        assert served.jobs[0].ended and served.keeper.job is None
        assert any("somebody else wants to change models" in line for line in served.log)
    while not held(served.root / "state/lock"):
        pass
    served.go(60)
    assert len(served.jobs) == 1
    waiting.set()
    waiter.join()
    served.go(6)
    assert len(served.jobs) == 2


# -- credentials


def test_a_refused_login_is_tried_once_in_an_hour_and_with_other_credentials_at_once(world):
    world.server.trouble = AccessRefused("wrong password", 401)
    world.go(3000)
    assert len(world.server.asked) == 1 and world.connected == 1
    assert "wrong password" in world.state["problem"] and world.state["server"]["state"] == "refuses"
    world.keeper.end()
    world.keeper = world.make()
    world.go(600)
    assert len(world.server.asked) == 1, "not even a keeper that was started anew"
    world.server.trouble = None
    world.serve("a", "b")
    world.release("two")
    world.go(6)
    assert world.state["problem"] == "" and world.told("a")["state"] == "ready"


def test_without_credentials_one_refusal_is_no_reason_to_be_silent_for_long(world):
    world.login = {}
    world.release("two")
    (world.root / "releases/two/credentials.json").unlink(missing_ok=True)
    world.serve("a", "b")
    world.go(5)
    world.server.trouble = AccessRefused("not authenticated", 401)
    world.server.live.clear()
    world.go(10)
    world.server.trouble = None
    world.go(keeping.CLOSED_PAUSE + 30)
    assert world.launched() == [["a", "b"]]


def test_a_refusal_of_the_job_counts_too(served):
    served.server.restart()
    served.go(5)
    served.jobs[-1].said = [{"outcome": "refused", "said": "no permission"}]
    asked = len(served.server.asked)
    served.go(1800)
    assert len(served.jobs) == 1 and len(served.server.asked) - asked <= 1


# -- the host


def test_a_broken_release_is_not_acted_upon(served):
    (served.root / "releases/bad").mkdir()
    (served.root / "link").symlink_to("releases/bad")
    (served.root / "link").replace(served.root / "current")
    served.server.live.clear()
    served.go(60)
    assert not served.jobs and "is missing; nothing is done" in served.state["problem"]
    served.release("one")
    served.go(10)
    assert served.launched() == [["a", "b"]] and served.state["problem"] == ""


def test_no_release_at_all_is_waited_for(tmp_path):
    world = World(tmp_path)
    (tmp_path / "current").unlink()
    world.go(60)
    assert "no release is in force" in world.state["problem"]
    world.serve("a", "b")
    world.release("one")
    world.go(10)
    assert world.told("b")["state"] == "ready"


def test_one_wrong_entry_keeps_nobody_else_from_being_served(tmp_path):
    world = World(tmp_path)
    world.release("one", [ENTRIES[0], {"model_uid": "x", "model_nam": "?"}], grace=0)
    world.go(6)
    assert world.launched() == [["a"]]
    assert world.told("x")["kind"] == "wrong" and "unknown field model_nam" in world.told("x")["text"]


def test_a_full_disk_costs_the_state_and_nothing_else(served, monkeypatch):
    monkeypatch.setattr(states, "save", lambda *told: "keeper.json cannot be written: No space left on device")
    served.server.restart()
    served.go(6)
    assert served.launched() == [["a", "b"]] and "No space left" in served.keeper.state.problem
    monkeypatch.undo()
    served.finish()
    served.go(40)
    assert served.state["problem"] == ""


def test_a_clock_that_jumps_changes_nothing(served):
    for jump in (86400.0, -2 * 86400.0, 3600.0):
        served.clock.wall += jump
        served.server.boot += jump  # a server's uptime is that of the same clock
        served.go(30)
    assert not served.jobs and served.told("a")["faults"] == 0


def test_a_job_that_dies_is_started_again_later(served):
    served.server.restart()
    for _turn in range(5):
        served.go(120)
        if served.keeper.job is not None:
            served.jobs[-1].code = -9
            served.keeper.tick()
    assert 3 <= len(served.jobs) <= 6 and "ended with code -9" in served.state["problem"]
    served.go(300)
    served.finish()
    assert served.state["problem"] == ""


def test_a_keeper_started_anew_goes_on_where_the_last_one_was(served):
    served.server.restart()
    served.go(5)
    served.finish("unknown name", diagnosis={"cause": "No such name.", "cure": "Change it.", "heals": False})
    served.go(3)
    before = served.told("a")
    assert before["failures"] == 1
    served.keeper.end()
    assert served.state["doing"] == "ended"
    served.keeper = served.make()
    served.go(1)
    assert served.told("a")["failures"] == 1 and served.told("a")["restarts"] == before["restarts"]
    assert len(served.jobs) == 1


def test_a_host_that_was_rebooted_gets_its_models_back_and_counts_it(served):
    served.keeper.end()
    served.clock.go(120)
    served.server.restart()
    served.keeper = served.make()
    served.go(2)
    assert served.launched() == [["a", "b"]]
    assert served.state["server"]["restarts"] == 1 and "started anew" in served.told("a")["fault"]["what"]


@pytest.mark.parametrize("seen", [True, False])
def test_a_server_that_somebody_started_anew_is_no_fault_and_the_next_end_of_it_is(served, seen):
    served.keeper.end()
    served.clock.go(60)
    (served.root / "state/asked.json").write_text(json.dumps({"at": served.clock.now()}))
    served.clock.go(60)
    served.server.restart()
    if not seen:
        served.keeper = served.make()
    served.go(2)
    assert served.launched() == [["a", "b"]]
    served.finish()
    served.go(1)
    model = served.told("a")
    assert (model["state"], model["fault"], model["cure"], model["faults"], model["restarts"]) == (
        *("ready", None, None),
        *(0, 0),
    )
    served.clock.go(300)
    served.server.restart()
    served.go(5)
    assert "started anew" in served.told("a")["fault"]["what"]


def test_the_program_of_another_release_takes_over(served):
    served.release("two")
    served.go(6)
    assert [path.parent.parent.name for path in served.renewed] == ["one", "two"]
    assert not served.jobs


# -- probes


@pytest.fixture
def probed(tmp_path, monkeypatch):
    world = World(tmp_path)
    world.release("one", verify=600)
    world.serve("a", "b")

    def answer(client, entry):
        world.probes.append(entry["model_uid"])
        return world.answers.get(entry["model_uid"], ProbeResult("passed", "embedding", 0.01, "384 dimensions"))

    class AtOnce:
        def __init__(self, target, **told):
            self.start = target

    monkeypatch.setattr(keeper_probe, "probe", answer)
    monkeypatch.setattr("threading.Thread", AtOnce)
    world.go(30)
    return world


def test_every_model_is_asked_once_it_serves_and_then_now_and_then(probed):
    assert sorted(probed.probes) == ["a", "b"]
    assert probed.told("a")["verified"]["ok"] is True
    probed.go(500)
    assert len(probed.probes) == 2
    probed.go(640)
    assert len(probed.probes) == 4


def test_a_model_that_is_listed_and_dead_is_launched_anew(probed):
    probed.answers["a"] = ProbeResult("failed", "embedding", error="answered with 500: Remote server unixsocket closed")
    probed.go(660)
    assert probed.launched() == [["a"]] and probed.jobs[0].order.relaunch == ("a",)
    assert "listed, but dead" in probed.told("a")["fault"]["what"]
    probed.answers.clear()
    probed.finish(action="relaunch")
    probed.go(10)
    assert probed.told("a")["verified"]["ok"] is True and probed.told("b")["faults"] == 0


def test_one_that_is_dead_and_could_not_be_ended_is_tried_again(probed):
    probed.answers["a"] = ProbeResult("failed", "embedding", error="answered with 500: Remote server unixsocket closed")

    def start(own: Path, root: Path, order: Any) -> FakeJob:
        """A job that comes to nothing before anything was ended: the same model is still listed."""
        job = FakeJob(order)
        error = {"uid": "a", "error": "answered DELETE /v1/models/a with 500: odd", "diagnosis": None}
        job.said = [error, {"outcome": "done", "models": [{**error, "model_uid": "a", "action": "relaunch"}]}]
        probed.jobs.append(job)
        times.append(probed.clock.tick)
        return job

    times: List[float] = []
    probed.keeper.start_job = start
    probed.go(2000)
    assert all(job.order.uids == job.order.relaunch == ("a",) for job in probed.jobs)
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert 5 <= len(times) <= 12 and gaps[-1] > 4 * gaps[0], "less and less often"
    assert sum("listed, but dead" in line for line in probed.log) == 1
    count = len(probed.jobs)
    probed.answers.clear()
    probed.go(2000)
    assert len(probed.jobs) == count and probed.told("a")["verified"]["ok"] is True, "it came back by itself"


def test_a_model_that_dies_beside_a_launch_that_hangs_is_launched_anew(probed):
    probed.server.put("b", "ERROR")
    probed.go(150)
    assert probed.launched() == [["b"]]
    probed.answers["a"] = ProbeResult("failed", "embedding", error="answered with 500: Remote server unixsocket closed")
    probed.go(180)
    # The launch of b goes on on the server; its job gave way to one that follows it and launches a.
    assert probed.launched() == [["b"], ["a", "b"]] and probed.jobs[-1].order.relaunch == ("a",)


@pytest.mark.parametrize(
    "error",
    [
        "http://h:1 answered POST /v1/embeddings with 500: [Errno 111] Connection refused",
        "http://h:1 answered POST /v1/x with 500: Internal Server Error: [Errno 111] Connect call failed ('h', 3)",
    ],
)
def test_what_servers_say_when_nothing_is_behind_a_model(error):
    assert keeper_probe._is_dead("a", error)
    assert not keeper_probe._is_dead("a", error.replace("answered", "did not answer").replace("with 500", "in 500 s"))


LORA = "answered POST /v1/x with 400: Model not found in the model list, uid: {}"


@pytest.mark.parametrize(("said", "dead"), [("a", True), ("a-rep0", True), ("a-lora", False), ("b", False)])
def test_what_the_server_says_of_another_name_is_not_said_of_the_model(probed, said, dead):
    probed.answers["a"] = ProbeResult("failed", "embedding", error=LORA.format(said))
    probed.go(1500)
    assert bool(probed.jobs) is dead


def test_one_that_never_passes_its_probe_is_held_back_more_and_more(probed):
    probed.answers["a"] = ProbeResult("failed", "embedding", error="answered with 500: Remote server socket closed")
    for _turn in range(6):
        count = len(probed.jobs)
        while len(probed.jobs) == count:
            probed.go(1)
        probed.finish(action="relaunch")
    assert probed.told("a")["failures"] >= 5, "to be listed for two minutes proves nothing"


REFUSED = ProbeResult("failed", "embedding", error="answered POST /v1/x with 500: [Errno 111] Connection refused")


@pytest.fixture
def starved(probed):
    """One hangs while it is launched, the other died meanwhile, and the server cannot bring it back."""
    probed.server.features = features("1.8.1")
    probed.server.put("b", "ERROR")
    probed.go(150)
    assert probed.launched() == [["b"]]
    probed.answers["a"] = REFUSED
    probed.go(120)
    assert len(probed.jobs) == 1 and "listed, but dead" in probed.told("a")["fault"]["what"]
    probed.go(120)
    return probed


def test_a_launch_that_keeps_another_from_coming_back_is_given_up(starved):
    assert starved.launched() == [["b"], ["b"]]
    assert [job.order.patience for job in starved.jobs] == [None, keeping.GIVE_UP]
    assert any("b: its launch has taken" in line and "keeps a from coming back" in line for line in starved.log)
    starved.finish("not ready after 1 s; the launch was cancelled", diagnosis={"name": "slow", "heals": False})
    assert "given up because it kept others" in starved.told("b")["fault"]["what"]
    starved.go(60)
    assert len(starved.jobs) == 2, "it waits until the other is back"
    starved.answers.clear()
    starved.go(70)
    assert starved.launched()[2:] == [["b"]] and starved.told("a")["verified"]["ok"] is True
    assert not any(job.order.relaunch for job in starved.jobs), "the server brought the other back itself"


def test_a_launch_is_given_up_once_for_each_that_is_missed(starved):
    starved.finish("not ready after 1 s; the launch was cancelled", diagnosis={"name": "slow", "heals": False})
    starved.go(2000)
    assert [job.order.patience for job in starved.jobs[2:]] == [None], "it was not what kept the other away"


@pytest.mark.parametrize("error", ["did not answer POST within 120 s", "expected 384 dimensions, got 3"])
def test_a_model_that_is_slow_or_answers_otherwise_is_only_told_of(probed, error):
    probed.answers["a"] = ProbeResult("failed", "embedding", error=error)
    probed.go(1500)
    assert not probed.jobs and probed.told("a")["verified"]["ok"] is False
    assert sum("does not pass its probe" in line for line in probed.log) == 1


# -- what the server tells beside its lists


METRICS = """# HELP xinference:model_unexpected_termination Replica currently down
xinference:model_unexpected_termination{model_name="bce",model_uid="a",replica_index="0"} 1.0
xinference:model_status{model_uid="b"} 1.0
"""


def test_a_model_that_the_server_gave_up_was_not_stopped_by_anybody(tmp_path):
    world = World(tmp_path)
    world.release("one", policy="report")
    world.serve("a", "b")
    world.go(150)
    world.server.live.clear()
    world.server.put("b", name="other")
    world.go(10)
    assert world.told("a")["kind"] == "stopped by hand" and not world.jobs
    world.server.metrics = METRICS.encode()
    world.go(30)
    assert world.launched() == [["a"]] and world.told("b")["kind"] == "altered by hand"


@pytest.mark.parametrize("mark", ["SITE=/here", "SITE=/elsewhere"])
@pytest.mark.parametrize(("said", "patience"), [("odd", 40), ("[Errno 111] Connection refused", 10)])
def test_a_native_server_that_is_half_dead_is_ended_and_nobody_else(tmp_path, mark, said, patience):
    world = World(tmp_path)
    pid_file = tmp_path / "server.pid"
    world.release("one", pid_file=str(pid_file), mark="SITE=/here")
    world.go(10)
    with subprocess.Popen(["/bin/sleep", "60"], env={"SITE": mark.split("=")[1]}) as sleeper:
        pid_file.write_text(json.dumps({"pid": sleeper.pid}))
        world.server.trouble = ServerError("it says", 500, said, "GET", "/status")
        world.go(patience)
        assert sleeper.poll() is None
        world.go(15)
        ended = mark == "SITE=/here"
        assert any("half dead" in line for line in world.log) is ended
        if ended:
            assert sleeper.wait(10) == -signal.SIGTERM
        else:
            world.go(300)
            assert sleeper.poll() is None
        sleeper.kill()


def test_a_server_that_only_starts_slowly_is_left_alone(tmp_path):
    world = World(tmp_path)
    world.release("one", pid_file=str(tmp_path / "server.pid"), mark="SITE=/here")
    (tmp_path / "server.pid").write_text(json.dumps({"pid": 1}))
    for trouble in (Unreachable("refused"), ServerError("odd answer", None, "", "GET", "/v1/models")):
        world.server.trouble = trouble
        world.go(300)
    assert not any("half dead" in line for line in world.log)
