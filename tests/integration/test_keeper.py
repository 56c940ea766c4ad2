# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper's program beside a real server: models come back, strangers stay, and idle it costs next to nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_release
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import held
from conftest import ADMIN
from doors import Recorder, run_module
from keepers import Kept, cpu_seconds, memory_mib
from servers import NEW, OLD, Missing, Server

Entry = Dict[str, Any]
# What comes back here the keeper brought back, and not the server itself; but of a model whose process died 1.8.1 never
# lets go, so there the server has to start it anew.
RECOVERIES_OF_OLD = "5"
IDLE_S = 40.0
# Several rounds of a keeper that looks every second.
QUIET_S = 5.0


@pytest.fixture(params=[NEW, OLD])
def own(request: pytest.FixtureRequest, server_of: Callable[[str], Server]) -> Iterator[Server]:
    """A server of each version in turn, which may be killed and started again."""
    if request.param == NEW:
        # It is as every other of this version.
        shared = server_of(NEW)
        shared.clear()
        yield shared
        shared.clear()
        return
    try:
        server = servers.start(OLD, env={"XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT": RECOVERIES_OF_OLD})
    except Missing as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture
def entries(models: Callable[[str], str]) -> Callable[..., List[Entry]]:
    """A function that makes entries of a tiny model, one for each uid."""

    def make(*uids: str) -> List[Entry]:
        known = {"model_name": "bce-reranker-base_v1", "model_type": "rerank", "model_engine": "sentence_transformers"}
        # Its weights are noise, so which document wins means nothing.
        probe = {"expect": {"best": None}}
        return [{"model_uid": uid, **known, "model_path": models("rerank"), "probe": probe} for uid in uids]

    return make


@contextlib.contextmanager
def keeping(server: Server, root: Path, entries: List[Entry], **settings: Any) -> Iterator[Kept]:
    """A keeper at work until the end of the block."""
    kept = Kept(server, root, **settings)
    kept.release(entries)
    try:
        kept.start()
        yield kept
    finally:
        kept.stop()


def process_of(uid: str) -> int:
    """The process of a model; a server names it after the model's replica."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_text().startswith(
                (f"Model: {uid}-", f"Model: {uid} ")
            ):
                return int(entry.name)
    raise AssertionError(f"no process of {uid}")


def answers(server: Server, uid: str) -> bool:
    body = {"model": uid, "query": "one", "documents": ["two", "three"]}
    return len(server.client().post("/v1/rerank", json=body)["results"]) == 2


def test_models_come_back_whatever_ends_them(own: Server, entries: Callable[..., List[Entry]], tmp_path: Path) -> None:
    wanted = entries("keep-a", "keep-b")
    with keeping(own, tmp_path, wanted) as kept:
        kept.until(lambda: kept.ready("keep-a", "keep-b") and not kept.told["doing"])
        assert kept.model("keep-a")["by"] == "the keeper"
        client = own.client(timeout=60)
        theirs = {**entries("keep-theirs")[0], "model_uid": "keep-theirs"}
        theirs.pop("probe")
        servers.launch(client, theirs)

        client.terminate("keep-a")
        kept.until(lambda: kept.model("keep-a")["restarts"] == 1 and kept.ready("keep-a"))
        assert "somebody stopped it" in kept.model("keep-a")["fault"]["what"] and answers(own, "keep-a")

        os.kill(process_of("keep-b"), signal.SIGKILL)
        kept.until(lambda: kept.model("keep-b")["restarts"] == 1 and kept.ready("keep-b"))
        assert answers(own, "keep-b")
        assert kept.told["foreign"] == ["keep-theirs"] and kept.model("keep-a")["restarts"] == 1

        own.kill()
        kept.until(lambda: kept.told["server"]["state"] == "down")
        own.run()
        kept.until(lambda: kept.told["server"]["restarts"] == 1 and kept.ready("keep-a", "keep-b"), 400)
        assert answers(own, "keep-a") and answers(own, "keep-b")
        assert set(own.client().models()) == {"keep-a", "keep-b"}
        assert "the server was started anew" in kept.model("keep-b")["fault"]["what"]
        assert kept.model("keep-b")["cure"]["what"] == "launched again by the keeper"
        applied = kept.converge(wanted)
        assert {row["action"] for row in applied.models} == {"keep"} and not applied.changed


def test_the_keeper_itself_may_be_killed_in_the_midst_of_a_launch_and_goes_by_another_policy(
    new_server: Server, entries: Callable[..., List[Entry]], tmp_path: Path
) -> None:
    wanted = entries("keep-a", "keep-b")
    with keeping(new_server, tmp_path, wanted) as kept:
        kept.until(lambda: len(new_server.client().instances()) == 2)
        kept.stop(signal.SIGKILL)
        kept.start()
        kept.until(lambda: kept.ready("keep-a", "keep-b") and not kept.told["doing"])
        assert sorted(new_server.client().models()) == ["keep-a", "keep-b"]
        applied = kept.converge(wanted)
        assert not applied.changed and not applied.message

        # What somebody stopped is left so by another policy; what died is not.
        kept.release(wanted, policy="report")
        kept.until(lambda: kept.told["policy"] == "report" and kept.ready("keep-a", "keep-b"))
        restarts = kept.model("keep-b")["restarts"]
        new_server.client().terminate("keep-a")
        os.kill(process_of("keep-b"), signal.SIGKILL)
        kept.until(lambda: kept.model("keep-b")["restarts"] == restarts + 1 and kept.ready("keep-b"))
        assert kept.model("keep-a")["kind"] == "stopped by hand" and "keep-a" not in new_server.client().models()


def test_ansible_and_the_keeper_at_once_launch_every_model_once_and_idle_it_costs_next_to_nothing(
    new_server: Server, entries: Callable[..., List[Entry]], tmp_path: Path
) -> None:
    wanted = entries("keep-a", "keep-b")
    with keeping(new_server, tmp_path, wanted) as kept:
        kept.until(lambda: held(tmp_path / "state/lock"))
        found: List[Any] = []
        ansible = threading.Thread(target=lambda: found.append(kept.converge(wanted)))
        ansible.start()
        ansible.join(300)
        assert found and found[0].message == ""
        kept.until(lambda: kept.ready("keep-a", "keep-b") and not kept.told["doing"])
        assert "somebody else wants to change models" in kept.log
        assert len(new_server.client().instances()) == 2 and not kept.converge(wanted).changed
    with Recorder(new_server.endpoint) as door:
        kept = Kept(new_server, tmp_path, interval=5)
        kept.endpoint = door.endpoint
        kept.release(wanted)
        kept.start()
        try:
            measure_idle(kept, door)
        finally:
            kept.stop()
    assert kept.told["doing"] == "ended"


def measure_idle(kept: Kept, door: Recorder) -> None:
    kept.until(lambda: kept.tells and all(proven(kept, uid) for uid in ("keep-a", "keep-b")))
    assert kept.process
    pid, began, asked = kept.process.pid, time.monotonic(), len(door.lines)
    before = cpu_seconds(pid)
    time.sleep(IDLE_S)
    took = time.monotonic() - began
    share, memory, requests = (cpu_seconds(pid) - before) / took, memory_mib(pid), len(door.lines) - asked
    print(f"\n{kept.server.version}: {share:.3%} of one core, {memory:.1f} MiB, {requests} requests in {took:.0f} s")
    assert share < 0.005 and memory < 60
    assert 0 < requests <= took / 5 + 2


def proven(kept: Kept, uid: str) -> bool:
    """Whether a model was verified since the keeper started."""
    return bool(kept.model(uid)["verified"]["at"] >= kept.told["started"])


def test_the_list_that_ansible_converges_to_is_put_in_force_when_it_is_right(
    new_server: Server, entries: Callable[..., List[Entry]], tmp_path: Path
) -> None:
    """Otherwise the keeper would take back what Ansible did; what is refused must not reach it."""
    kept = Kept(new_server, tmp_path)
    first = kept.release(entries("keep-a"))
    common = {"root": str(tmp_path), "endpoint": new_server.endpoint}
    wrong = [*entries("keep-a"), {"model_uid": "keep-b", "no_such_field": 1}]
    for check in (True, False):
        refused, _seconds = run_module("xinference_model_set", {"models": wrong, **common}, check)
        assert refused["failed"] and "keep-b" in refused["msg"]
        assert keeper_release.load(tmp_path).id == first and len(list((tmp_path / "releases").iterdir())) == 1
    wanted: Entry = {"models": entries("keep-b"), **common}
    foretold, _seconds = run_module("xinference_model_set", wanted, check=True)
    assert foretold["changed"] and keeper_release.load(tmp_path).id == first
    done, _seconds = run_module("xinference_model_set", wanted)
    assert done["changed"] and done["models"][0]["action"] == "launch", done
    release = keeper_release.load(tmp_path)
    assert [entry["model_uid"] for entry in release.entries] == ["keep-b"]
    assert release.settings.endpoint == new_server.endpoint
    again, _seconds = run_module("xinference_model_set", wanted)
    assert not again["changed"] and keeper_release.load(tmp_path).id == release.id
    # What is asked of a model for verification changes no model, and the keeper goes by it all the same.
    asked = {**wanted, "models": [{**wanted["models"][0], "probe": False}]}
    changed, _seconds = run_module("xinference_model_set", asked)
    assert changed["changed"] and [row["action"] for row in changed["models"]] == ["keep"], changed
    assert keeper_release.load(tmp_path).entry("keep-b")["probe"] is False


def test_a_model_that_can_never_be_launched_keeps_nobody_else_from_coming_back(
    new_server: Server, entries: Callable[..., List[Entry]], tmp_path: Path
) -> None:
    never = {**entries("keep-never")[0], "model_path": str(tmp_path / "nowhere")}
    with keeping(new_server, tmp_path, [never, *entries("keep-a")]) as kept:
        # What dies before its launch is done with is launched once more, and was never there.
        kept.until(lambda: kept.ready("keep-a") and kept.model("keep-never")["failures"] and not kept.told["doing"])
        assert kept.model("keep-never")["again"] > 0 and kept.model("keep-never")["fault"]["what"]
        os.kill(process_of("keep-a"), signal.SIGKILL)
        kept.until(lambda: kept.model("keep-a")["restarts"] == 1 and kept.ready("keep-a"))
        kept.release(entries("keep-never", "keep-a"))
        kept.until(lambda: kept.ready("keep-never", "keep-a"))


def test_a_refused_login_is_tried_once_and_the_right_one_of_another_release_at_once(
    guarded_server: Server, entries: Callable[..., List[Entry]], tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(Recorder(guarded_server.endpoint))
        kept = Kept(guarded_server, tmp_path)
        kept.endpoint = door.endpoint
        kept.login = {**ADMIN, "password": "not-the-right-one"}
        kept.release(entries("keep-a"))
        stack.callback(guarded_server.clear, **ADMIN)
        kept.start()
        stack.callback(kept.stop)
        kept.until(lambda: "refused the login" in kept.told["problem"])
        asked = list(door.lines)
        assert asked.count("POST /token 401") == 1
        time.sleep(QUIET_S)
        kept.stop()
        kept.start()
        kept.until(lambda: kept.tells)
        time.sleep(QUIET_S)
        assert door.lines == asked, "nothing at all is sent, by a keeper started anew neither"
        readable = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 0o044]
        assert not [path for path in readable if b"not-the-right-one" in path.read_bytes()]
        kept.login = dict(ADMIN)
        kept.release(entries("keep-a"))
        kept.until(lambda: kept.ready("keep-a"))
        assert kept.told["problem"] == "" and kept.told["refused"] is None
