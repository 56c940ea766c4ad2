# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Launches that fail on real servers: each with its cause and cure, none in the way of another, nothing left behind."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, Callable, Dict, Set

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client
from ansible_collections.airgap.xinference.plugins.module_utils.server.converge import converge
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from conftest import ADMIN
from doors import Recorder, run_module
from servers import NEW, Server

EMBEDDING = {
    "model_name": "bce-embedding-base_v1",
    "model_type": "embedding",
    "model_engine": "sentence_transformers",
}
LLM = {"model_name": "qwen2.5-instruct", "model_engine": "transformers", "model_format": "pytorch"}

# Python reads it when a process starts. Loading then hangs in its thread, as it does on a dead network disk.
HANG = """
import sys
import time


def hang(event, arguments):
    if event == "open" and str(arguments[0]).endswith("modules.json"):
        time.sleep(3600)


sys.addaudithook(hang)
"""

# uid: (entry, what the error or the cause must say, what the cure must say; "" where only 4.1.0 tells)
FAILURES: Dict[str, Any] = {
    "name": ({**EMBEDDING, "model_name": "bce-embeding-base"}, "no embedding model named", "bce-embedding-base_v1"),
    "rerank-name": (
        {**EMBEDDING, "model_type": "rerank", "model_name": "bge-reranker-bas"},
        "no rerank model named",
        "bge-reranker-base",
    ),
    "audio-name": (
        {"model_type": "audio", "model_name": "whisper-tiney"},
        "no audio model named",
        "whisper-tiny",
    ),
    "llm-name": ({**LLM, "model_name": "qwen2.5-instrukt"}, "no LLM model named", "qwen2.5-instruct"),
    "type": ({**EMBEDDING, "model_name": "whisper-tiny"}, "no embedding model named whisper-tiny", "audio"),
    "engine-name": ({**EMBEDDING, "model_engine": "sentence_transformer"}, "sentence_transformer", "Usable here"),
    "engine": ({**LLM, "model_engine": "vLLM", "model_size_in_billions": 0.5}, "vLLM", "Usable here: Transformers"),
    "size": ({**LLM, "model_size_in_billions": 99}, "model_size_in_billions 99", "0_5"),
    "quantization": (
        {**LLM, "model_size_in_billions": 0.5, "model_format": "gptq", "quantization": "Int3"},
        "Int3",
        "Int4",
    ),
    "path": ({**EMBEDDING, "model_path": "/nowhere/at/all"}, "/nowhere/at/all", ""),
    "gpu": ({**EMBEDDING, "gpus": [3]}, "GPU", ""),
    "download": (EMBEDDING, "Failed to download", ""),
}


def descendants(pid: int) -> Set[int]:
    """All processes below `pid`, by what the kernel says of their parents."""
    children: Dict[int, Set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), set()).add(int(stat.parent.name))
    found, unseen = set(), [pid]
    while unseen:
        for child in children.get(unseen.pop(), set()):
            found.add(child)
            unseen.append(child)
    return found


def test_every_failure_is_explained_beside_models_that_work(
    server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    entries = [{"model_path": models("minilm"), **entry, "model_uid": uid} for uid, (entry, *_rest) in FAILURES.items()]
    del next(entry for entry in entries if entry["model_uid"] == "download")["model_path"]
    good = [{**EMBEDDING, "model_uid": f"good-{number}", "model_path": models("minilm")} for number in range(2)]
    client = server.client()
    specs = parse(entries + good, server_gpus=range(4))

    applied = apply(client, specs, tmp_path, limit=len(specs))

    rows = {row["model_uid"]: row for row in applied.models}
    assert applied.message.startswith(f"{len(FAILURES)} of {len(specs)} models failed on {server.endpoint}:\n- ")
    assert [uid for uid, row in rows.items() if not row["error"]] == ["good-0", "good-1"]
    for uid, (_entry, said, cure) in FAILURES.items():
        row = rows[uid]
        diagnosis = row["diagnosis"]
        assert diagnosis, row
        assert said in f"{row['error']} {diagnosis['cause']}", row
        assert cure in diagnosis["cure"] and diagnosis["cure"], row
        assert "address=" not in row["error"] and len(row["error"]) <= 500, row
        assert row["error"][:40] in applied.message and diagnosis["cure"] in applied.message
    if server.version == NEW:
        assert "No module named 'vllm'" in rows["engine"]["diagnosis"]["cause"]
    assert set(client.models()) == {"good-0", "good-1"}
    assert set(Record(tmp_path / "state" / "launched.json").entries) == {"good-0", "good-1"}


def test_a_failed_launch_is_tried_again_and_succeeds(
    server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    entry = {**EMBEDDING, "model_uid": "small", "model_path": "/nowhere"}
    client = server.client()
    assert apply(client, parse([entry]), tmp_path).failures
    applied = apply(client, parse([{**entry, "model_path": models("minilm")}]), tmp_path)
    assert not applied.failures and "its last launch failed" in applied.models[0]["reason"]


def test_a_launch_that_hangs_is_cancelled_and_leaves_no_process(
    server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANG)
    entry = {**EMBEDDING, "model_uid": "stuck", "model_path": models("minilm"), "envs": {"PYTHONPATH": str(tmp_path)}}
    good = {**EMBEDDING, "model_uid": "good", "model_path": models("minilm")}
    client = server.client()
    assert not apply(client, parse([good]), tmp_path).failures
    before = descendants(server.process.pid)

    began = time.monotonic()
    # Long enough for the process to have begun to load, which is when a server can cancel.
    applied = apply(client, parse([entry, good]), tmp_path, timeout=30)
    assert time.monotonic() - began >= 30

    rows = {row["model_uid"]: row for row in applied.models}
    assert rows["good"]["error"] == ""
    assert "not ready after 3" in rows["stuck"]["error"] and "cancelled" in rows["stuck"]["error"]
    assert "wait_timeout" in rows["stuck"]["diagnosis"]["cure"]
    assert set(client.models()) == {"good"}
    assert descendants(server.process.pid) <= before
    again = apply(client, parse([{**entry, "envs": {}}, good]), tmp_path)
    assert not again.failures and set(client.models()) == {"good", "stuck"}


def test_a_uid_taken_since_the_look_is_not_launched_twice(
    server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    entry = {**EMBEDDING, "model_uid": "small", "model_path": models("minilm")}
    client, record = server.client(), Record(tmp_path / "launched.json")
    steps = plan(parse([entry]), {}, {})
    servers.launch(client, entry)
    created = client.instances("small")[0]["instance_created_ts"]
    (outcome,) = converge(client, steps, record)
    assert outcome.ok and client.instances("small")[0]["instance_created_ts"] == created
    assert record.entries["small"].ready

    (outcome,) = converge(client, plan(parse([{**entry, "model_name": "bge-base-en"}]), {}, {}), record)
    assert not outcome.ok and "another model serves under this uid" in outcome.error
    assert set(client.models()) == {"small"}


def test_a_wrong_key_is_tried_once(guarded_server: Server, models: Callable[[str], str], tmp_path: Path) -> None:
    entry = {**EMBEDDING, "model_uid": "small", "model_path": models("minilm")}
    for wrong in ({"api_key": "sk-wrong"}, {"username": ADMIN["username"], "password": "not the password"}):
        with Recorder(guarded_server.endpoint) as recorder:
            result, _seconds = run_module(
                "xinference_model_set",
                {"models": [entry], "endpoint": recorder.endpoint, "root": str(tmp_path), **wrong},
            )
            refused = [line for line in recorder.lines if line.endswith((" 401", " 403"))]
            assert result["failed"] and len(refused) == 1, (result, recorder.lines)
            assert len([line for line in recorder.lines if not line.startswith("GET /v1/cluster/")]) == 1
    assert not (tmp_path / "state" / "launched.json").exists()


def test_mistakes_in_the_list_reach_no_server(tmp_path: Path) -> None:
    mistakes = [
        {**EMBEDDING, "model_uid": "a/b"},
        {**EMBEDDING, "model_uid": "x", "model_enginee": "y"},
        {**EMBEDDING, "model_uid": "x", "gpus": [5]},
    ]
    with Recorder("http://127.0.0.1:9") as recorder:
        result, _seconds = run_module(
            "xinference_model_set", {"models": mistakes, "endpoint": recorder.endpoint, "root": str(tmp_path)}
        )
        assert recorder.lines == []
    for words in ('"/"', "did you mean model_engine?", "GPU 5 is not one of the server's", "same model_uid"):
        assert words in result["msg"]
    assert result["failed"] and list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{servers.free_port()}"
    entry = {**EMBEDDING, "model_uid": "x", "model_path": "/m"}
    result, _seconds = run_module("xinference_model", {**entry, "endpoint": nobody, "root": str(tmp_path)})
    assert result["failed"] and "127.0.0.1" in result["msg"] and "Traceback" not in str(result)


@pytest.mark.parametrize("missing", [{"model_path": "/m"}, {}])
def test_the_specification_of_a_gpu_is_checked_against_the_host(missing: Dict[str, str], tmp_path: Path) -> None:
    client = Client(f"http://127.0.0.1:{servers.free_port()}")
    with pytest.raises(ValueError, match="it has none"):
        specs_from(client, [{**EMBEDDING, "model_uid": "m", "gpus": [0], **missing}], [], tmp_path)
