# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Custom models on real servers: registered in either form, compared, replaced, used, removed."""

from __future__ import annotations

from typing import Any, Callable, Dict

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.probe import probe
from doors import Recorder, run_module
from servers import Server

NAME = "all-MiniLM-L6-v2"
DEFINITION = {
    "model_name": NAME,
    "dimensions": 384,
    "max_tokens": 256,
    "language": ["en"],
    "model_specs": [
        {"model_format": "pytorch", "model_id": "sentence-transformers/all-MiniLM-L6-v2", "quantization": "none"}
    ],
}
FLAT = {
    **{name: value for name, value in DEFINITION.items() if name != "model_specs"},
    "model_id": "sentence-transformers/all-MiniLM-L6-v2",
}


def register(endpoint: str, check: bool = False, **options: Any) -> Dict[str, Any]:
    """The result of the module for an embedding model."""
    params = {"endpoint": endpoint, "model_type": "embedding", **options}
    result, _seconds = run_module("xinference_registration", params, check)
    return result


def test_its_whole_life(server: Server, models: Callable[[str], str]) -> None:
    client = server.client()
    planned = register(server.endpoint, check=True, definition=DEFINITION)
    assert (planned["changed"], planned["action"]) == (True, "register")
    assert planned["diff"]["before"] == {} and planned["diff"]["after"]["dimensions"] == 384
    assert client.registration("embedding", NAME) is None

    made = register(server.endpoint, definition=DEFINITION)
    assert (made["changed"], made["action"]) == (True, "register")
    assert made["definition"]["model_name"] == NAME
    for form in (DEFINITION, FLAT, {**DEFINITION, "version": 2}):
        kept = register(server.endpoint, definition=form)
        assert (kept["changed"], kept["action"], kept["differences"]) == (False, "keep", []), kept

    payload = {"model_uid": "custom", "model_name": NAME, "model_type": "embedding", "model_path": models("minilm")}
    servers.launch(client, {**payload, "model_engine": "sentence_transformers", "model_format": "pytorch"})
    # Nothing is relaxed: a registration with the right dimensions makes the default probe pass.
    passed = probe(client, payload)
    assert passed.state == "passed", passed

    replaced = register(server.endpoint, definition={**DEFINITION, "max_tokens": 128})
    assert (replaced["action"], replaced["differences"]) == (
        "replace",
        [{"field": "max_tokens", "before": 256, "after": 128}],
    )
    assert "custom" in client.models()
    assert (client.registration("embedding", NAME) or {})["max_tokens"] == 128

    for changed in (True, False):
        gone = register(server.endpoint, state="absent", model_name=NAME)
        assert gone["changed"] is changed
    assert client.registration("embedding", NAME) is None


def test_a_check_writes_nothing(server: Server) -> None:
    with Recorder(server.endpoint) as recorder:
        register(recorder.endpoint, check=True, definition=DEFINITION)
        register(recorder.endpoint, check=True, state="absent", model_name=NAME)
        assert recorder.lines and all(line.startswith("GET ") for line in recorder.lines)


def test_a_kept_registration_costs_few_requests(server: Server) -> None:
    register(server.endpoint, definition=DEFINITION)
    assert register(server.endpoint, definition=DEFINITION)["requests"] <= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"definition": {"model_name": "bge-m3"}}, "names a built-in model of Xinference"),
        ({"state": "absent", "model_name": "bge-m3"}, "cannot be removed"),
        ({"definition": {"model_name": "half", "model_id": "a/b"}}, "field required"),
        ({"definition": {**DEFINITION, "model_name": "not / good"}}, "Invalid model name"),
    ],
)
def test_what_cannot_be(server: Server, options: dict, words: str) -> None:
    result = register(server.endpoint, **options)
    assert result["failed"] and words in result["msg"], result
    assert any(one["model_name"] == "bge-m3" for one in server.client().registrations("embedding"))


def test_a_rerank_model(server: Server) -> None:
    definition = {"model_name": "my-rank", "language": ["en"], "type": "normal", "max_tokens": 512, "model_id": "a/b"}
    client = server.client()
    try:
        assert register(server.endpoint, model_type="rerank", definition=definition)["action"] == "register"
        assert register(server.endpoint, model_type="rerank", definition=definition)["action"] == "keep"
    finally:
        client.unregister("rerank", "my-rank")
