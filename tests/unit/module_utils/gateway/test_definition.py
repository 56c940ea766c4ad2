# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a gateway is made of, and everything that is refused, at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import (
    Gateway,
    Route,
    endpoints,
    faults,
    gateway_of,
    key_faults,
    routes,
    shape_faults,
)

KEY = "sk-0123456789abcdef"
GOOD = Gateway("0.0.0.0", 443, ["models.bank.example", "10.0.0.5"], [Route("", ("127.0.0.1:9997",))], keys={"rag": KEY})


def test_a_good_one_has_no_faults() -> None:
    assert faults(GOOD) == []
    networks = ["10.0.0.0/8", "::1", "fd00::/8"]
    assert faults(dataclasses.replace(GOOD, host="::", names=["::1"], admin_from=networks, rate=0)) == []
    assert faults(dataclasses.replace(GOOD, keys={}, server_auth=True)) == []
    assert faults(dataclasses.replace(GOOD, keys={}, allow_open=True)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "gpu-1"}, "xinference_gateway_host is 'gpu-1'"),
        ({"port": 0}, "xinference_gateway_port is 0"),
        ({"port": 65536}, "xinference_gateway_port is 65536"),
        ({"host": "::1%lo; } #"}, "xinference_gateway_host is '::1%lo; } #'"),
        ({"names": ["::1%lo\n"]}, "xinference_gateway_names: '::1%lo"),
        ({"admin_from": ["::1%lo 1; } #"]}, "xinference_gateway_admin_from: '::1%lo 1; } #'"),
        ({"routes": [Route("", ("[::1%;}]:1",))]}, "'[::1%;}]:1' is not host:port"),
        ({"routes": [Route("", ("gpu-1:\u00b2",))]}, "is not host:port"),
        ({"names": []}, "xinference_gateway_names is empty"),
        ({"names": ["a b"]}, "xinference_gateway_names: 'a b'"),
        ({"names": ["a;}"]}, "xinference_gateway_names: 'a;}'"),
        ({"names": ["a\n"]}, "xinference_gateway_names"),
        ({"routes": []}, "xinference_gateway_servers is empty"),
        ({"routes": [Route("", ("gpu-1",))]}, "'gpu-1' is not host:port"),
        ({"routes": [Route("", ("gpu-1:0",))]}, "'gpu-1:0' is not host:port"),
        ({"routes": [Route("", ("gpu-1;x:80",))]}, "'gpu-1;x:80' is not host:port"),
        ({"routes": [Route("", ("[gpu]:80",))]}, "'[gpu]:80' is not host:port"),
        ({"routes": [Route("/models/a b", ("gpu-1:1",))]}, "'a b' cannot be part of an address"),
        ({"routes": [Route("/models/a/b", ("gpu-1:1",))]}, "'b' cannot be part of an address"),
        ({"admin_from": ["10.0.0.300"]}, "xinference_gateway_admin_from: '10.0.0.300'"),
        ({"admin_from": ["10.0.0.5/24"]}, "xinference_gateway_admin_from: '10.0.0.5/24'"),
        ({"metrics_from": ["prometheus"]}, "xinference_gateway_metrics_from: 'prometheus'"),
        ({"keys": {}}, "nobody would be asked for a key"),
        ({"server_auth": True}, "leave xinference_gateway_keys empty"),
        ({"keys": {"a b": KEY}}, "the name 'a b'"),
        ({"keys": {"a": "0123456789abcde"}}, "the key of a has 15 characters; 16 are needed"),
        ({"keys": {"a": 'sk-0123456789"; }'}}, "the key of a has characters"),
        ({"keys": {"a": "sk-0123456789abcdef\n"}}, "the key of a has characters"),
        ({"paths": ["/sdapi"]}, "'/sdapi' is not a method and a path"),
        ({"paths": ["POST /a/../b"]}, "another path"),
        ({"paths": ["POST /a//b"]}, "another path"),
        ({"paths": ["POST /a%2fb"]}, "is not a method and a path"),
        ({"body_size": "huge"}, "xinference_gateway_body_size is 'huge'"),
        ({"rate": -1}, "xinference_gateway_rate is -1"),
        ({"timeout": 0}, "xinference_gateway_timeout is 0"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    (fault,) = faults(dataclasses.replace(GOOD, **change))
    assert said in fault and KEY not in fault


def test_all_faults_are_told_at_once_and_never_a_key() -> None:
    wrong = dataclasses.replace(GOOD, port=0, names=["!"], keys={"a": "secret"}, admin_from=["x"], body_size="-")
    assert len(faults(wrong)) == 5 and "secret" not in str(faults(wrong))


def test_keys_are_each_for_one_client() -> None:
    assert key_faults([{"name": "a", "key": "1"}, {"name": "b", "key": "2"}]) == []
    assert key_faults([{"name": "a", "key": "1"}, {"name": "a", "key": "2"}]) == [
        "xinference_gateway_keys has the name a twice"
    ]
    (fault,) = key_faults([{"name": "a", "key": "1"}, {"name": "b", "key": "1"}])
    assert "the same key under two names" in fault


def test_servers_and_models_of_other_types_are_told_and_the_rest_is_judged() -> None:
    found, right = shape_faults({"a": 5, "b": "gpu-1:1"}, {"a": "llm", "b": ["llm"], "c": 5, "d": [1]})
    assert right == {"servers": {"b": "gpu-1:1"}, "models": {"b": ["llm"]}}
    assert [text.partition(" is ")[0].rpartition(" of ")[2] for text in found] == ["a", "a", "c", "d"]
    assert "xinference_gateway_models: 'llm' of a is no list of model uids" in found
    nothing = dataclasses.replace(GOOD, routes=[])
    assert faults(nothing) != [] and faults(nothing, routed=False) == []


def test_each_model_leads_to_the_hosts_that_serve_it() -> None:
    found = routes({"one": "1:1", "two": "2:2"}, {"one": ["a", "s"], "two": ["s"]})
    assert found == [
        Route("/models/a", ("1:1",)),
        Route("/models/s", ("1:1", "2:2")),
        Route("/hosts/one", ("1:1",)),
        Route("/hosts/two", ("2:2",)),
    ]


def test_hosts_that_serve_the_same_need_no_name_of_a_model() -> None:
    assert routes({"one": "1:1", "two": "2:2"}, {"one": ["a"], "two": ["a"]})[0] == Route("", ("1:1", "2:2"))
    assert routes({"one": "1:1"}, {})[0] == Route("", ("1:1",))
    assert routes({}, {}) == []


def test_clients_are_told_their_base_urls() -> None:
    assert endpoints(GOOD) == ["https://models.bank.example/v1"]
    split = [Route("/models/a", ("1:1",)), Route("/models/b", ("2:2",)), Route("/hosts/one", ("1:1",))]
    assert endpoints(dataclasses.replace(GOOD, routes=split, port=8443, names=["fd00::1"])) == [
        "https://[fd00::1]:8443/models/a/v1",
        "https://[fd00::1]:8443/models/b/v1",
    ]


def test_the_options_of_the_module_become_a_gateway() -> None:
    same = {"host": "::", "port": 1, "names": ["a"], "admin_from": [], "metrics_from": [], "body_size": "1m", "rate": 2}
    rest = {"timeout": 3, "server_auth": False, "allow_open": True, "client_paths": ["GET /x"]}
    made = gateway_of({**same, **rest, "servers": {"one": "1:1"}, "models": {}, "keys": [{"name": "n", "key": "k"}]})
    assert (made.keys, made.paths, made.routes[0]) == ({"n": "k"}, ["GET /x"], Route("", ("1:1",)))
    assert made.allow_open and made.rate == 2
