# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real servers whose first choice cannot run: alternatives, what ran before, models proven beside others, hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import launch as launching
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import Applied, apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import PREVIOUS, read
from doors import run_module
from servers import NEW, OLD, Server, running
from test_failures import HANG, descendants

Entry = Dict[str, Any]
EMBEDDING: Entry = {"model_uid": "m", "model_type": "embedding", "model_engine": "sentence_transformers"}
FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.fixture
def minilm(models: Callable[[str], str]) -> Entry:
    """An entry that works: real embeddings, of another model than its name says."""
    expect = {"expect": {"dimensions": 384}}
    return {**EMBEDDING, "model_name": "bce-embedding-base_v1", "model_path": models("minilm"), "probe": expect}


def converge(server: Server, root: Path, entry: Entry, **options: Any) -> Applied:
    client = server.client()
    return apply(client, specs_from(client, [entry], [], root), root, **options)


def served(server: Server, uid: str = "m") -> Any:
    """The name of what serves under a uid, after it has answered a real request."""
    client = server.client()
    model = client.models()[uid]
    if model["model_type"] == "embedding":
        answer = client.post("/v1/embeddings", json={"model": uid, "input": "a word"})
        assert len(answer["data"][0]["embedding"]) == 384
    elif model["model_type"] == "rerank":
        question = {"model": uid, "query": "a b", "documents": ["a b", "c d"]}
        assert len(client.post("/v1/rerank", json=question)["results"]) == 2
    else:
        chat = {"model": uid, "messages": [{"role": "user", "content": "one two"}], "max_tokens": 4}
        assert client.post("/v1/chat/completions", json=chat)["choices"]
    return model["model_name"]


def created(server: Server, uid: str = "m") -> int:
    """When the server created what serves."""
    (instance,) = server.client().instances(uid)
    return int(instance["instance_created_ts"])


def model_processes(server: Server) -> List[int]:
    """The processes that serve or load a model; the server gives them a name."""
    found = []
    for pid in descendants(server.process.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("Model: m"):
                found.append(pid)
    return found


@pytest.fixture(params=[NEW, OLD])
def breakable(request: pytest.FixtureRequest, server_of: Callable[[str], Server]) -> Iterator[Server]:
    """A server of each version in turn whose models' processes may be killed, which breaks 1.8.1."""
    shared = server_of(request.param)
    if request.param == OLD:
        with running(OLD) as own:
            yield own
        return
    shared.clear()
    yield shared
    shared.clear()


@dataclass
class Clients:
    """What clients of a model saw: the longest time without an answer, in seconds, and requests that failed."""

    longest: float = 0.0
    failures: List[str] = field(default_factory=list)


@contextlib.contextmanager
def clients(server: Server, uid: str = "m") -> Iterator[Clients]:
    """Ask a model again and again until the end of the block."""
    saw = Clients()
    over, client = threading.Event(), server.client(timeout=120)
    body = {"model": uid, "input": "a word"}

    def ask() -> None:
        last = time.monotonic()
        while not over.is_set():
            try:
                client.post("/v1/embeddings", json=body)
                saw.longest, last = max(saw.longest, time.monotonic() - last), time.monotonic()
            except ServerError as error:
                saw.failures.append(str(error))
            time.sleep(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield saw
        time.sleep(0.5)
    finally:
        over.set()
        asking.join()


def test_the_alternative_serves_and_the_next_deploy_without_the_cause_goes_back(
    new_server: Server, minilm: Entry, tmp_path: Path
) -> None:
    """Through the doors that Ansible uses; the cause is a directory that is not there yet."""
    weights = tmp_path / "weights"
    entry = {
        **minilm,
        "model_path": str(weights),
        "fallbacks": [{"model_name": "bge-base-en", "model_path": minilm["model_path"]}],
    }
    common = {"endpoint": new_server.endpoint, "root": str(tmp_path)}

    first, _seconds = run_module("xinference_model_set", {"models": [entry], **common})
    assert first["changed"] and not first.get("failed"), first
    (row,) = first["models"]
    assert (row["choice"], row["runs"], row["error"]) == (1, "bge-base-en on sentence_transformers", "")
    assert str(weights) in row["attempts"][0]["error"] and "finds nothing at" in row["why"]
    assert served(new_server) == "bge-base-en"
    assert "m: alternative 1 serves (bge-base-en" in str(first["warnings"])
    launched = created(new_server)

    info, _seconds = run_module("xinference_model_info", common)
    (model,) = info["models"]
    assert (model["launched"]["choice"], model["launched"]["why"]) == (1, row["why"])
    health, _seconds = run_module("xinference_health", {"models": [entry], "probe": True, **common})
    assert health["models"]["m"]["launched"]["choice"] == 1 and health["probes"]["m"]["state"] == "passed"

    # Nobody goes back without an operator's word, and an operator may say not to.
    assert not converge(new_server, tmp_path, entry, first_choice=False, who="the keeper").changed
    left, _seconds = run_module("xinference_model_set", {"models": [entry], "first_choice": False, **common})
    assert not left["changed"] and created(new_server) == launched

    # The cause is still there: it is tried, and the alternative comes back.
    again, _seconds = run_module("xinference_model", {**entry, **common})
    assert again["changed"] and again["models"][0]["choice"] == 1 and served(new_server) == "bge-base-en"

    weights.symlink_to(minilm["model_path"])
    foretold, _seconds = run_module("xinference_model_set", {"models": [entry], **common}, check=True)
    assert "the first choice is tried again" in foretold["models"][0]["reason"] and served(new_server) == "bge-base-en"
    back, _seconds = run_module("xinference_model_set", {"models": [entry], **common})
    assert back["changed"] and (back["models"][0]["choice"], back["models"][0]["why"]) == (0, "")
    assert served(new_server) == "bce-embedding-base_v1" and read(tmp_path)["m"].instead is None
    still, _seconds = run_module("xinference_model_set", {"models": [entry], **common})
    assert not still["changed"] and "warnings" not in still


def test_an_engine_that_is_missing_gives_way_and_is_not_tried_in_vain(
    server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    """Rerank on vLLM, then on transformers' own engine; 1.8.1 has no choice of engine there, so a chat model."""
    entry: Entry = {
        "model_uid": "reranker",
        "model_name": "bge-reranker-v2-m3",
        "model_type": "rerank",
        "model_engine": "vLLM",
        "model_path": models("rerank"),
        "options": {"gpu_memory_utilization": 0.2},
        "fallbacks": [
            {
                "model_name": "bge-reranker-base",
                "model_engine": "sentence_transformers",
                "model_path": models("rerank"),
            }
        ],
    }
    smaller = "bge-reranker-base"
    if server.version == OLD:
        chat = {"model_name": "qwen2.5-instruct", "model_size_in_billions": 0.5, "model_format": "pytorch"}
        entry = {"model_uid": "reranker", "model_engine": "vLLM", "model_path": models("chat"), **chat}
        entry["fallbacks"] = [{"model_engine": "transformers"}]
        smaller = "qwen2.5-instruct"
    applied = converge(server, tmp_path, entry)
    assert applied.message == "" and applied.models[0]["choice"] == 1, applied
    assert served(server, "reranker") == smaller
    if server.version == NEW:
        assert "No module named 'vllm'" in applied.models[0]["why"]
    launched = created(server, "reranker")

    again = converge(server, tmp_path, entry)
    assert not again.changed and "the first choice still cannot run" in again.models[0]["reason"], again.models
    assert created(server, "reranker") == launched and "alternative 1 serves" in again.notices[0]


def test_a_relaunch_that_fails_brings_back_what_ran_and_one_beside_what_serves_never_ends_it(
    new_server: Server, minilm: Entry, tmp_path: Path
) -> None:
    converge(new_server, tmp_path, minilm)
    worse = {**minilm, "model_path": "/nowhere/at/all"}
    applied = converge(new_server, tmp_path, worse)
    (row,) = applied.models
    assert "what ran before was brought back and serves" in applied.message and row["choice"] == PREVIOUS
    assert served(new_server) == "bce-embedding-base_v1" and row["model"]["id"] == "m"
    launched = created(new_server)
    # Whoever only keeps models up leaves that alone, and brings it back itself after a restart of the server.
    assert not converge(new_server, tmp_path, worse, first_choice=False).changed and created(new_server) == launched
    new_server.client().terminate("m")
    kept = converge(new_server, tmp_path, worse, first_choice=False)
    assert kept.message == "" and kept.models[0]["choice"] == PREVIOUS and served(new_server)
    fixed = {**minilm, "request_limits": 5}
    applied = converge(new_server, tmp_path, fixed)
    assert applied.models[0]["choice"] == 0 and read(tmp_path)["m"].instead is None

    launched = created(new_server)
    with clients(new_server) as untouched:
        applied = converge(new_server, tmp_path, {**fixed, "model_path": "/nowhere", "relaunch": "beside"})
    assert "what ran before was not touched and serves" in applied.message and not applied.changed
    assert created(new_server) == launched and set(new_server.client().models()) == {"m"}

    wrong = {"expect": {"dimensions": 17}}
    applied = converge(new_server, tmp_path, {**minilm, "request_limits": 6, "relaunch": "beside", "probe": wrong})
    assert "its probe failed" in applied.message and created(new_server) == launched

    told: List[str] = []
    with clients(new_server) as proven:
        changed = {**minilm, "request_limits": 6}
        applied = converge(new_server, tmp_path, changed, how="beside", listener=lambda uid, event: told.append(event))
    assert applied.message == "" and applied.models[0]["choice"] == 0 and created(new_server) > launched
    assert [one["beside"] for one in applied.models[0]["attempts"]] == [True, False]
    assert told.index("verified beside what serves") < told.index("terminate")
    assert set(new_server.client().models()) == {"m"} and set(read(tmp_path)) == {"m"}
    with clients(new_server) as replaced:
        assert converge(new_server, tmp_path, {**minilm, "request_limits": 7}).message == ""
    print(
        f"\n{new_server.version}: without an answer {untouched.longest:.1f} s where the new one does not work, "
        f"{proven.longest:.1f} s beside, {replaced.longest:.1f} s replaced"
    )
    assert untouched.failures == [] and untouched.longest > 0, "what did not work cost no client anything"
    assert replaced.failures, "who replaces without a proof beside is missed meanwhile"


def test_a_killed_process_leaves_a_ghost_that_is_cleared_away_where_that_is_safe(
    breakable: Server, minilm: Entry, tmp_path: Path
) -> None:
    """A worker before 2.1 crashes when it is to end what is dead, and takes every model along; so it is not asked."""
    other = {**minilm, "model_uid": "other"}
    client = breakable.client()
    assert apply(client, specs_from(client, [minilm, other], [], tmp_path), tmp_path).message == ""
    (pid,) = model_processes(breakable)
    os.kill(pid, signal.SIGKILL)
    limit = time.monotonic() + 300
    while "READY" in [one["status"] for one in client.instances("m")]:
        assert time.monotonic() < limit
        time.sleep(0.5)
    applied = apply(client, specs_from(client, [minilm, other], [], tmp_path), tmp_path)
    if breakable.version == NEW:
        assert applied.message == "" and served(breakable) == "bce-embedding-base_v1", applied
    else:
        (row,) = [row for row in applied.models if row["error"]]
        assert (row["model_uid"], row["diagnosis"]["name"]) == ("m", "dead"), applied
    assert served(breakable, "other") == "bce-embedding-base_v1"


def test_a_hang_that_survives_its_cancel_is_said_to_hold_the_uid(
    server: Server, minilm: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen process cannot be killed, like one that waits for a dead disk; nothing else is tried in vain then."""
    if not os.access(FREEZER / "cgroup.procs", os.W_OK):
        pytest.skip("no freezer of cgroup v1 that this user may use")
    monkeypatch.setattr(launching, "CANCEL_LIMIT", 15.0)
    monkeypatch.setattr(launching, "UNWIND_LIMIT", 5.0)
    (tmp_path / "sitecustomize.py").write_text(HANG)
    other = {"model_name": "bge-base-en", "model_path": minilm["model_path"], "envs": None}
    stuck = {**minilm, "envs": {"PYTHONPATH": str(tmp_path)}, "fallbacks": [other]}
    cell = FREEZER / f"airgap-xinference-{os.getpid()}-{server.version}"
    cell.mkdir()
    launchers: List[Any] = []
    make = launching.Launcher.__init__

    def remember(launcher: Any, *arguments: Any) -> None:
        make(launcher, *arguments)
        launchers.append(launcher)

    monkeypatch.setattr(launching.Launcher, "__init__", remember)

    def freeze() -> None:
        limit = time.monotonic() + 300
        while time.monotonic() < limit:
            for pid in model_processes(server):
                (cell / "cgroup.procs").write_text(str(pid))
                time.sleep(3)  # until it loads
                (cell / "freezer.state").write_text("FROZEN")
                # Whoever follows the launch has waited long enough now; one answer that is waited for has its own time.
                launchers[0].deadline = time.monotonic()
                return
            time.sleep(0.2)

    freezing = threading.Thread(target=freeze)
    freezing.start()
    try:
        applied = converge(server, tmp_path, stuck, timeout=300 if server.version == NEW else 60)
        (row,) = applied.models
        assert row["diagnosis"]["name"] == "held" and "restart the server" in row["diagnosis"]["cure"], row
        assert "Model: <uid>" in applied.message
        if server.version == NEW:
            assert "does not let go of it" in row["error"] and len(row["attempts"]) == 1
        else:
            # It does not tell that a cancelled launch is still there; the next one finds out.
            assert "m-0 is running" in row["error"] and len(row["attempts"]) == 2
        assert server.client().models() == {}
    finally:
        freezing.join()
        (cell / "freezer.state").write_text("THAWED")
    monkeypatch.undo()
    # The process has ended with the frost, and the uid is free again without a restart.
    applied = converge(server, tmp_path, {**minilm, "envs": {}})
    assert applied.message == "" and served(server) == "bce-embedding-base_v1"
    cell.rmdir()
