# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Probes of real models: real weights for embedding, tiny random ones for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client, ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.probe import probe
from ansible_collections.airgap.xinference.plugins.module_utils.server.sound import tone
from doors import run_module
from servers import Server

Entry = Dict[str, Any]


def test_embedding(server: Server, models: Callable[[str], str]) -> None:
    """Also what else asks a model that serves: the client, and the modules that tell of it."""
    client = server.client()
    entry = {
        "model_uid": "emb",
        "model_name": "bce-embedding-base_v1",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
    }
    launched = {**entry, "model_path": models("minilm")}
    servers.launch(client, launched)
    probes_of(client, entry)
    told_by_modules(server, entry)

    assert client.models()["emb"]["model_name"] == "bce-embedding-base_v1"
    assert 0 <= client.progress("emb") <= 1
    answer = client.post("/v1/embeddings", json={"model": "emb", "input": "a word"})
    assert len(answer["data"][0]["embedding"]) == 384
    with pytest.raises(ServerError, match="already in the model list") as caught:
        client.launch(launched)
    assert caught.value.status == 400
    client.terminate("emb")
    assert client.models() == {}


def probes_of(client: Client, entry: Entry) -> None:
    passed = probe(client, {**entry, "probe": {"expect": {"dimensions": 384, "norm": 1}}})
    assert (passed.state, passed.kind) == ("passed", "embedding"), passed
    assert passed.detail.startswith("384 dimensions, length 1.000, related 0.")
    assert passed.latency_s is not None and passed.latency_s > 0
    strangers = ["Cats sleep.", "The bank raised its rates.", "A cat is asleep."]
    failed = probe(client, {**entry, "probe": {"input": strangers, "expect": {"dimensions": 384}}})
    assert failed.state == "failed" and "is no closer to" in failed.error
    registered = probe(client, entry)
    assert registered.state == "failed" and "registered with 768" in registered.error


def told_by_modules(server: Server, entry: Entry) -> None:
    asked = {"endpoint": server.endpoint, "probe": True}
    right = {**entry, "probe": {"expect": {"dimensions": 384}}}
    disabled = {"model_uid": "off", "enabled": False}
    result, _seconds = run_module("xinference_health", {**asked, "models": [right, disabled]})
    assert result["healthy"], result
    assert result["models"]["emb"]["state"] == "ready"
    assert result["probes"]["emb"]["state"] == "passed" and result["probes"]["emb"]["latency_s"] > 0
    result, _seconds = run_module("xinference_health", {**asked, "models": [entry]})
    assert result["failed"] and "have 384 dimensions, and the model is registered with 768" in result["msg"]
    listed, _seconds = run_module("xinference_model_info", {"endpoint": server.endpoint, "model_uid": "emb"})
    (model,) = listed["models"]
    assert model["state"] == "ready" and model["model"]["model_name"] == "bce-embedding-base_v1"
    assert listed["version"] == server.version and listed["changed"] is False


def test_rerank(server: Server, models: Callable[[str], str]) -> None:
    client = server.client()
    entry = {"model_uid": "rank", "model_name": "bce-reranker-base_v1", "model_type": "rerank"}
    servers.launch(client, {**entry, "model_path": models("rerank")})
    passed = probe(client, {**entry, "probe": {"expect": {"best": None}}})
    assert (passed.state, passed.kind) == ("passed", "rerank"), passed
    first = [probe(client, {**entry, "probe": {"expect": {"best": n}}}).state for n in (0, 1)]
    assert sorted(first) == ["failed", "passed"]


def test_chat(server: Server, models: Callable[[str], str]) -> None:
    client = server.client()
    entry = {
        "model_uid": "talk",
        "model_name": "qwen2.5-instruct",
        "model_type": "LLM",
        "model_engine": "transformers",
        "model_format": "pytorch",
        "model_size_in_billions": "0_5",
        "quantization": "none",
    }
    servers.launch(client, {**entry, "model_path": models("chat")})
    passed = probe(client, {**entry, "probe": {"expect": {"words": None}}})
    assert (passed.state, passed.kind) == ("passed", "chat"), passed
    failed = probe(client, {**entry, "probe": {"expect": {"words": None, "contains": "Paris, of course"}}})
    assert failed.state == "failed" and "was wanted in the answer" in failed.error


def test_transcription(server: Server, models: Callable[[str], str], tmp_path: Path) -> None:
    client = server.client()
    entry = {"model_uid": "ear", "model_name": "whisper-tiny", "model_type": "audio"}
    servers.launch(client, {**entry, "model_path": models("whisper")})
    passed = probe(client, entry)
    assert (passed.state, passed.kind) == ("passed", "transcription"), passed
    file = tmp_path / "said.wav"
    file.write_bytes(tone(2.0, 300.0))
    passed = probe(client, {**entry, "probe": {"input": str(file), "request": {"language": "en"}}})
    assert passed.state == "passed", passed
    # A model that hears does not speak: the server's error comes back, and nothing is raised.
    failed = probe(client, {**entry, "probe": {"kind": "speech"}})
    assert failed.state == "failed" and "500" in failed.error


def test_a_model_that_is_not_there(server: Server) -> None:
    failed = probe(server.client(), {"model_uid": "nobody", "model_type": "embedding"})
    assert failed.state == "failed" and "does not list a model nobody" in failed.error
