# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client against real servers."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client, ServerError, Unreachable
from servers import Server, free_port


def test_facts(server: Server) -> None:
    client = server.client()
    assert client.version() == server.version
    assert client.features.version == server.version
    assert client.auth_enabled() is False
    assert client.status()["uptime"] >= 0
    assert {node["node_type"] for node in client.cluster_info()} == {"Supervisor", "Worker"}
    assert client.models() == {}
    assert isinstance(client.instances(), list)
    assert b"requests_total_counter" in client.get_bytes("/metrics")


def test_engines(server: Server) -> None:
    client = server.client()
    assert "Transformers" in client.engines("LLM", "qwen2.5-instruct")
    assert "sentence_transformers" in client.engines("embedding", "bce-embedding-base_v1")
    assert isinstance(client.engines("rerank", "bce-reranker-base_v1"), dict)
    assert client.engines("embedding", "no-such-model") == {}


def test_the_server_s_words_are_kept(server: Server) -> None:
    client = server.client()
    with pytest.raises(ServerError) as caught:
        client.terminate("nobody")
    assert caught.value.status == 400
    assert caught.value.detail.startswith("Model not found in the model list, uid: nobody")
    assert caught.value.method == "DELETE"
    assert "nobody" in str(caught.value)


def test_nobody_answers() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}", timeout=3)
    with pytest.raises(Unreachable, match=r"No Xinference answers at http://127.0.0.1:.*Connection refused"):
        client.models()
    assert client.requests_made == 3
    with pytest.raises(Unreachable):
        client.terminate("x")
    assert client.requests_made == 4


def test_https_to_a_plain_server(server: Server) -> None:
    client = Client(server.endpoint.replace("http:", "https:"))
    with pytest.raises(Unreachable, match="does not speak TLS"):
        client.version()
