# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper's process does for an order, on a server that does as it is told; and the process itself."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_work as working
from ansible_collections.airgap.xinference.plugins.module_utils.server import registration
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import AccessRefused, Unreachable
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_job import Job
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_release import Release, Settings
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_work import (
    Order,
    register,
    specs_of,
    work,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record, lock
from ansible_collections.airgap.xinference.plugins.module_utils.server.registration import DefinitionError
from scripted import Scripted

ENTRIES = tuple(
    {"model_uid": uid, "model_name": "bce", "model_type": "embedding", "model_path": f"/{uid}"} for uid in ("a", "b")
)
RELEASE = Release("one", None, Settings("http://127.0.0.1:9997"), ENTRIES)  # type: ignore[arg-type]


def a_server() -> Any:
    """A server that does as it is told, as a client."""
    scripted: Any = Scripted()
    scripted.refusal = None
    return scripted


@pytest.fixture
def server(monkeypatch):
    """A server, the release in force, and the client that the work uses."""
    scripted = a_server()
    monkeypatch.setattr(working, "load", lambda root: RELEASE)
    monkeypatch.setattr(working, "client_of", lambda release: scripted)
    return scripted


def do(root, *uids, release="one", relaunch=()):
    said: List[Any] = []
    return work(root, Order(release, uids, relaunch), said.append), said


def test_it_launches_what_it_is_told_and_touches_nothing_else(tmp_path, server):
    server.put("theirs")
    outcome, said = do(tmp_path, "a")
    assert outcome["outcome"] == "done" and [row["action"] for row in outcome["models"]] == ["launch"]
    assert sorted(server.live) == ["a", "theirs"]
    assert Record(tmp_path / "state/launched.json").entries["a"].by == "the keeper"
    assert {"uid": "a", "event": "ready"} in said
    outcome, said = do(tmp_path, "b")
    assert sorted(server.live) == ["a", "b", "theirs"] and len(outcome["models"]) == 1


def test_what_was_not_asked_for_is_never_ended(tmp_path, server):
    do(tmp_path, "a", "b")
    outcome, _said = do(tmp_path)
    assert outcome["models"] == [] and sorted(server.live) == ["a", "b"]


def test_a_dead_model_is_launched_anew(tmp_path, server):
    do(tmp_path, "a")
    outcome, _said = do(tmp_path, "a", relaunch=("a",))
    assert [row["action"] for row in outcome["models"]] == ["relaunch"]


def test_a_failure_is_told_with_what_is_known_of_it(tmp_path, server):
    server.behaviour["a"] = "Model not found, name: bce"
    outcome, _said = do(tmp_path, "a", "b")
    rows = {row["model_uid"]: row["error"] for row in outcome["models"]}
    assert "not found" in rows["a"] and rows["b"] == "" and "b" in server.live


def test_it_does_not_wait_for_whoever_is_at_it(tmp_path, server):
    with lock(tmp_path / "state/lock", 0, "Ansible"):
        started = time.monotonic()
        assert do(tmp_path, "a")[0] == {"outcome": "busy"}
        assert time.monotonic() - started < 60 and server.live == {}


def test_an_order_for_another_release_is_not_carried_out(tmp_path, server):
    assert do(tmp_path, "a", release="two")[0] == {"outcome": "stale"} and server.log == []


@pytest.mark.parametrize(
    "error, word",
    [
        (AccessRefused("wrong password", 401), "refused"),
        (Unreachable("nobody there"), "server"),
        (OSError(28, "full"), "disk"),
    ],
)
def test_what_stands_in_the_way_has_a_name(tmp_path, server, monkeypatch, error, word):
    def fail(*told):
        raise error

    monkeypatch.setattr(server, "models", fail)
    outcome, _said = do(tmp_path, "a")
    assert outcome["outcome"] == word and outcome["said"]


def test_one_wrong_entry_is_left_out_and_named(tmp_path):
    wrong = [{"model_uid": "x", "model_nam": "?"}, {"model_uid": "a", "model_name": "twice", "model_path": "/"}, {}]
    specs, problems = specs_of(a_server(), [*ENTRIES, *wrong], tmp_path)
    assert [spec.uid for spec in specs] == ["a", "b"]
    assert sorted(problems) == ["a", "entry 5", "x"] and "unknown field model_nam" in problems["x"]


def test_custom_models_that_the_server_lost_are_registered(monkeypatch):
    rows = tuple(
        {"model_type": "embedding", "definition": {"model_name": name}} for name in ("new", "there", "bad", "odd")
    )
    done = []

    def plan(client, kind, state, definition):
        if definition["model_name"] == "bad":
            raise DefinitionError("it names a built-in model")
        action = {"new": "register", "there": "keep", "odd": "replace"}[definition["model_name"]]
        return type("Plan", (), {"action": action, "name": definition["model_name"]})

    monkeypatch.setattr(registration, "plan", plan)
    monkeypatch.setattr(registration, "apply", lambda client, todo: done.append(todo.name))
    release = Release("one", None, Settings("http://x"), (), rows)  # type: ignore[arg-type]
    said = register(a_server(), release)
    assert done == ["new"] and len(said) == 2
    assert "registered the custom model new" in said[0] and "cannot register the custom model bad" in said[1]


# -- the process


def process(script):
    return Job([sys.executable, "-c", script], Order("one", ("a",)))


def ended(job):
    end = time.monotonic() + 10
    said = []
    while job.code is None:
        said += job.news()
        assert time.monotonic() < end
        time.sleep(0.02)
    return said + job.news()


def test_a_job_gets_its_order_and_is_heard():
    said = ended(
        process("import json, sys; o = json.load(sys.stdin); print(json.dumps({'log': o['uids']})); print('noise')")
    )
    assert said == [{"log": ["a"]}]


def test_a_job_that_says_a_lot_or_nothing_never_blocks_the_keeper():
    job = process(
        "import sys, time; sys.stdin.read(); print('{\"a\": \"' + 'x' * 300000 + '\"}', flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    said: List[Any] = []
    while not said:
        said += job.news()
        assert time.monotonic() - started < 50
    assert len(said[0]["a"]) == 300000
    job.end()
    assert job.code is not None


def test_a_job_that_ignores_the_signal_is_killed(monkeypatch):
    monkeypatch.setattr("ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_job.END_LIMIT", 0.3)
    job = process(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('{}', flush=True); time.sleep(60)"
    )
    while not job.news():
        time.sleep(0.02)
    job.end()
    assert job.code == -9


def test_a_job_that_cannot_begin_is_seen_to_have_ended():
    job = process("raise SystemExit(3)")
    assert ended(job) == [] and job.code == 3


def test_the_program_reads_its_order_and_says_what_came_of_it(tmp_path, server, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"release": "one", "uids": ["a"], "relaunch": []})))
    assert working.main(tmp_path) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["outcome"] == "done" and "a" in server.live
