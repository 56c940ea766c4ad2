# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real servers brought to run a list of models: launched, kept, changed, pruned, taken over."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import Applied, apply, specs_from
from servers import Server

Entry = Dict[str, Any]
NAMES = {
    "minilm": ("bce-embedding-base_v1", "embedding", "sentence_transformers"),
    "rerank": ("bce-reranker-base_v1", "rerank", "sentence_transformers"),
}


@pytest.fixture
def entry(models: Callable[[str], str]) -> Callable[..., Entry]:
    """A function that makes an entry of the list: a kind of model, its uid, and more fields."""

    def make(kind: str, uid: str, **fields: Any) -> Entry:
        if kind == "chat":
            launch = {
                "model_name": "qwen2.5-instruct",
                "model_engine": "transformers",
                "model_format": "pytorch",
                "model_size_in_billions": 0.5,
            }
        else:
            launch = dict(zip(("model_name", "model_type", "model_engine"), NAMES[kind]))
        return {"model_uid": uid, **launch, "model_path": models(kind), **fields}

    return make


def converge(server: Server, root: Path, entries: List[Entry], **options: Any) -> Applied:
    client = server.client()
    return apply(client, specs_from(client, entries, [], root), root, **options)


def actions(applied: Applied) -> Dict[str, str]:
    assert applied.message == ""
    return {row["model_uid"]: row["action"] for row in applied.models}


def dimension(server: Server, uid: str) -> int:
    answer = server.client().post("/v1/embeddings", json={"model": uid, "input": "a word"})
    return len(answer["data"][0]["embedding"])


def test_the_life_of_a_set(server: Server, entry: Callable[..., Entry], tmp_path: Path) -> None:
    small, judge, talk = entry("minilm", "small"), entry("rerank", "judge"), entry("chat", "talk")

    first = converge(server, tmp_path, [talk, judge, small])
    assert actions(first) == {"small": "launch", "judge": "launch", "talk": "launch"} and first.changed
    assert [row["model_uid"] for row in first.models] == ["small", "judge", "talk"]
    assert {row["model"]["id"] for row in first.models} == {"small", "judge", "talk"}
    assert dimension(server, "small") == 384
    chat = {"model": "talk", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 4}
    assert server.client().post("/v1/chat/completions", json=chat)["choices"]

    client = server.client()
    second = apply(client, specs_from(client, [talk, judge, small], [], tmp_path), tmp_path)
    assert set(actions(second).values()) == {"keep"} and not second.changed
    assert client.requests_made == 2

    launched = {one["model_uid"]: one["instance_created_ts"] for one in client.instances()}
    third = converge(server, tmp_path, [talk, {**judge, "request_limits": 7}, small])
    assert actions(third) == {"small": "keep", "judge": "relaunch", "talk": "keep"}
    assert "request_limits 7 is new" in third.models[1]["reason"]
    now = {one["model_uid"]: one["instance_created_ts"] for one in client.instances()}
    assert {uid for uid in now if now[uid] != launched[uid]} == {"judge"}

    servers.launch(client, {**entry("minilm", "theirs"), "model_type": "embedding"})
    fourth = converge(server, tmp_path, [small])
    assert actions(fourth) == {"judge": "terminate", "talk": "terminate", "small": "keep"}
    assert set(client.models()) == {"small", "theirs"}

    assert actions(converge(server, tmp_path, [], prune="none")) == {}
    fifth = converge(server, tmp_path, [small], prune="all")
    assert actions(fifth) == {"theirs": "terminate", "small": "keep"}
    assert actions(converge(server, tmp_path, [], only="small")) == {"small": "terminate"}
    assert client.models() == {} and not converge(server, tmp_path, []).changed
    assert json.loads((tmp_path / "state" / "launched.json").read_text())["models"] == {}


def test_what_others_launch_is_taken_over_and_what_they_change_is_seen(
    server: Server, entry: Callable[..., Entry], tmp_path: Path
) -> None:
    client, small = server.client(), entry("minilm", "small")
    servers.launch(client, small)
    taken = converge(server, tmp_path, [small])
    assert actions(taken) == {"small": "adopt"} and taken.changed
    assert actions(converge(server, tmp_path, [small])) == {"small": "keep"}

    client.terminate("small")
    servers.launch(client, {**small, "model_name": "bge-base-en"})
    other = converge(server, tmp_path, [small])
    assert actions(other) == {"small": "relaunch"} and "model_name" in other.models[0]["reason"]
    assert client.models()["small"]["model_name"] == "bce-embedding-base_v1"

    client.terminate("small")
    back = converge(server, tmp_path, [small])
    assert actions(back) == {"small": "launch"} and "gone from the server since" in back.models[0]["reason"]

    (tmp_path / "state" / "launched.json").write_text("{torn")
    lost = converge(server, tmp_path, [small])
    assert actions(lost) == {"small": "adopt"} and "set aside" in lost.notices[0]


def test_a_launch_under_way_is_waited_for_not_doubled(
    server: Server, entry: Callable[..., Entry], tmp_path: Path
) -> None:
    small = entry("minilm", "small")
    theirs = threading.Thread(target=server.client().launch, args=(small,), kwargs={"timeout": servers.READY_LIMIT})
    theirs.start()
    watcher, limit = server.client(), time.monotonic() + servers.READY_LIMIT
    while not watcher.instances("small"):
        assert time.monotonic() < limit
    applied = converge(server, tmp_path, [small])
    theirs.join()
    assert actions(applied) == {"small": "adopt"}
    assert "waited for" in applied.models[0]["reason"] and dimension(server, "small") == 384
    assert actions(converge(server, tmp_path, [small])) == {"small": "keep"}


def test_two_runs_at_once_launch_one_model(server: Server, entry: Callable[..., Entry], tmp_path: Path) -> None:
    small, found = entry("minilm", "small"), []

    def one() -> None:
        found.append(actions(converge(server, tmp_path, [small]))["small"])

    runs = [threading.Thread(target=one) for _number in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(found) == ["keep", "launch"]
