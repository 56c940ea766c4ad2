# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Definitions of custom models: their form by version, their differences, the plan."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import Features, features
from ansible_collections.airgap.xinference.plugins.module_utils.server.registration import (
    DefinitionError,
    adapt,
    apply,
    differences,
    plan,
)
from fakes import VERSIONS, recorded

FLAT = {"model_name": "mini", "dimensions": 384, "max_tokens": 256, "language": ["en"], "model_id": "a/b"}
SPEC = {"model_format": "pytorch", "quantization": "none", "model_id": "a/b"}
SPECS = {"model_name": "mini", "dimensions": 384, "max_tokens": 256, "language": ["en"], "model_specs": [SPEC]}
LLM_SPEC = {"model_format": "gptq", "model_size_in_billions": 7, "model_id": "a/b"}


@pytest.mark.parametrize("given", [FLAT, SPECS, {**SPECS, "version": 2, "is_builtin": False}])
@pytest.mark.parametrize("version", ["1.8.1", "2.5.0", "4.1.0"])
def test_embedding_definitions_of_today(version, given):
    assert adapt("embedding", given, features(version)) == {**SPECS, "version": 2}


@pytest.mark.parametrize("given", [FLAT, SPECS])
def test_embedding_definitions_of_old(given):
    assert adapt("embedding", given, features("1.7.0")) == FLAT


def test_what_a_spec_may_leave_out():
    given = {**SPECS, "model_specs": [{"model_id": "a/b"}]}
    assert adapt("embedding", given, features("4.1.0"))["model_specs"] == [SPEC]


def test_rerank_is_flat_until_1_9():
    given = {"model_name": "r", "language": ["en"], "model_specs": [SPEC]}
    assert adapt("rerank", given, features("1.8.1")) == {
        "model_name": "r",
        "language": ["en"],
        "model_id": "a/b",
        "version": 2,
    }
    assert adapt("rerank", given, features("1.9.0"))["model_specs"] == [SPEC]


def test_one_source_where_only_one_is_taken():
    given = {"model_name": "r", "model_specs": [SPEC, SPEC]}
    with pytest.raises(DefinitionError, match="takes one source for a model of type rerank, and model_specs has 2"):
        adapt("rerank", given, features("1.8.1"))


def test_llm_quantizations_are_split_and_joined():
    old = {"version": 1, "model_name": "x", "model_specs": [{**LLM_SPEC, "quantizations": ["Int4", "Int8"]}]}
    new = {
        "version": 2,
        "model_name": "x",
        "model_specs": [{**LLM_SPEC, "quantization": "Int4"}, {**LLM_SPEC, "quantization": "Int8"}],
    }
    assert adapt("LLM", old, features("4.1.0")) == new
    assert adapt("LLM", new, features("1.7.0")) == old
    assert adapt("LLM", new, features("4.1.0")) == new
    assert adapt("LLM", old, features("1.7.0")) == old


@pytest.mark.parametrize("specs", [None, [], "x", ["x"]])
def test_specs_must_be_a_list(specs):
    if specs is None:
        return
    with pytest.raises(DefinitionError, match="model_specs must be a list"):
        adapt("embedding", {**SPECS, "model_specs": specs}, features("4.1.0"))


def test_only_named_fields_are_compared():
    assert differences({"a": 1}, {"a": 1, "b": 2}) == []
    assert differences({"a": None}, {}) == []
    assert differences({"size": 7}, {"size": "7"}) == []
    assert differences({"a": True}, {"a": "True"}) == [("a", "True", True)]
    assert differences({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1, "c": 3}]}) == [("a[0].c", 3, 2)]
    assert differences({"a": [1, 2]}, {"a": [1]}) == [("a", [1], [1, 2])]
    assert differences({"a": {"b": 1}}, {"a": None}) == [("a", None, {"b": 1})]


class Told:
    """Stands for a client with these registrations, and keeps what is done to them."""

    def __init__(self, version: str, known: Dict[str, Optional[Dict[str, Any]]], refuse: str = "") -> None:
        self._version, self.known, self.refuse = version, known, refuse
        self.done: List[str] = []

    def version(self) -> str:
        return self._version

    @property
    def features(self) -> Features:
        return features(self._version)

    def registrations(self, model_type: str) -> List[Dict[str, Any]]:
        return [{"model_name": name, "is_builtin": one is None} for name, one in self.known.items()]

    def registration(self, model_type: str, name: str) -> Optional[Dict[str, Any]]:
        return self.known[name]

    def register(self, model_type: str, definition: Dict[str, Any], persist: bool = True) -> None:
        self.done.append(f"register {definition['dimensions']} {persist}")
        if self.refuse:
            self.refuse, error = "", ServerError(self.refuse, 400)
            raise error

    def unregister(self, model_type: str, name: str) -> None:
        self.done.append(f"unregister {name}")


def told(*arguments: Any, **changes: Any) -> Any:
    """A `Told` that passes for a client."""
    return Told(*arguments, **changes)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_registration_is_kept(version):
    found = recorded(version, "registration_custom")
    wanted = {**FLAT, "model_name": found["model_name"], "model_id": "sentence-transformers/all-MiniLM-L6-v2"}
    server = told(version, {found["model_name"]: found})
    todo = plan(server, "embedding", "present", definition=wanted)
    assert (todo.action, todo.differences) == ("keep", [])
    diff = todo.diff()
    assert diff["before"] == diff["after"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_difference_replaces(version):
    found = recorded(version, "registration_custom")
    server = told(version, {found["model_name"]: found})
    todo = plan(server, "embedding", "present", definition={**found, "dimensions": 385})
    assert (todo.action, todo.differences) == ("replace", [("dimensions", 384, 385)])
    diff = todo.diff()
    assert (diff["before"]["dimensions"], diff["after"]["dimensions"]) == (384, 385)
    apply(server, todo)
    assert server.done == ["unregister all-MiniLM-L6-v2", "register 385 True"]


def test_a_refused_replacement_puts_the_old_one_back():
    found = recorded("4.1.0", "registration_custom")
    server = told("4.1.0", {found["model_name"]: found}, refuse="no")
    todo = plan(server, "embedding", "present", definition={**found, "dimensions": 385})
    with pytest.raises(ServerError, match="no"):
        apply(server, todo)
    assert server.done == ["unregister all-MiniLM-L6-v2", "register 385 True", "register 384 True"]


def test_new_and_gone():
    server = told("4.1.0", {})
    todo = plan(server, "embedding", "present", definition=FLAT)
    assert (todo.action, todo.before, todo.after) == ("register", None, {**SPECS, "version": 2})
    apply(server, todo, persist=False)
    assert server.done == ["register 384 False"]
    assert plan(server, "embedding", "absent", "mini").action == "keep"
    todo = plan(told("4.1.0", {"mini": SPECS}), "embedding", "absent", "mini")
    assert (todo.action, todo.after) == ("unregister", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("embedding", "present", None, {"dimensions": 3}), "A name is missing"),
        (("embedding", "present", "mini", None), "no definition to register mini from"),
        (("embedding", "present", "maxi", FLAT), "is of mini, and model_name says maxi"),
        (("embeding", "present", None, FLAT), "Models of type embeding cannot be registered; did you mean embedding"),
        (("embedding", "present", "bge-m3", {}), "names a built-in model of Xinference 4.1.0"),
        (("embedding", "absent", "bge-m3", None), "built into Xinference 4.1.0 and cannot be removed"),
    ],
)
def test_what_cannot_be(arguments, words):
    with pytest.raises(DefinitionError, match=words):
        plan(told("4.1.0", {"bge-m3": None}), *arguments)
