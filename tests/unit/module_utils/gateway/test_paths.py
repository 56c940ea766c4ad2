# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which requests are a client's: read in the servers' sources, matched as they were received."""

from __future__ import annotations

import re

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.paths import ADMINISTRATION, GET, POST, kinds


def kind(line: str, *more: str) -> str:
    """The kind of a request, as nginx finds it: by the first expression that matches."""
    return next((found for expression, found in kinds(more) if re.search(expression, line)), ADMINISTRATION)


@pytest.mark.parametrize("path", POST)
def test_what_asks_a_model_is_a_clients_by_one_method_only(path: str) -> None:
    assert kind(f"POST {path}") == kind(f"POST {path}?stream=1") == "client"
    for other in (f"GET {path}", f"DELETE {path}", f"post {path}", f"POST {path}/", f"POST {path}x", f"POST /x{path}"):
        assert kind(other) == ADMINISTRATION


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("GET /v1/models", "client"),
        ("GET /v1/models?x=1", "client"),
        ("GET /v1/models/bge-m3", "client"),
        ("GET /v1/models/instances-of-mine", "client"),
        ("GET /v1/realtime?model=a", "socket"),
        ("GET /status", "health"),
        ("HEAD /status", "health"),
        ("GET /v1/cluster/auth", "login"),
        ("GET /metrics", "metrics"),
    ],
)
def test_what_is_not_administration(line: str, found: str) -> None:
    assert kind(line) == found


@pytest.mark.parametrize(
    "line",
    [
        "POST /v1/models",
        "DELETE /v1/models/a",
        "GET /v1/models/instances",
        "GET /v1/models/instances?model_uid=a",
        "GET /v1/models/families",
        "GET /v1/models/vllm-supported",
        "GET /v1/models/a/events",
        "GET /v1/models/../token",
        "GET /v1/models/%61",
        "GET /v1/models? HTTP/1.1",
        "GET /v1/cluster/info",
        "POST /token",
        "GET /",
    ],
)
def test_everything_else_is(line: str) -> None:
    assert kind(line) == ADMINISTRATION


def test_a_site_can_add_a_path_and_nothing_that_only_begins_so() -> None:
    assert kind("POST /sdapi/v1/txt2img") == ADMINISTRATION
    assert kind("POST /sdapi/v1/txt2img", "POST /sdapi/v1/txt2img") == "client"
    assert kind("POST /sdapi/v1/txt2imgs", "POST /sdapi/v1/txt2img") == ADMINISTRATION
    assert kind("POST /sdapi/v1xtxt2img", "POST /sdapi/v1.txt2img") == ADMINISTRATION


def test_no_expression_can_leave_the_quotes_of_the_configuration() -> None:
    assert not any(set('"\n$') & set(expression[:-1]) - {"$"} for expression, _kind in kinds()) and GET


def test_nothing_that_is_listed_lies_where_servers_are_administered() -> None:
    listed = [*POST, *(re.sub(r"[\\(?].*", "", expression) for expression in GET)]
    places = {"/".join(path.split("/")[:3]).replace("/anthropic", "") for path in listed}
    closed = [
        "admin",
        "cluster",
        "clusters",
        "cache",
        "engines",
        "launch_history",
        "model_registrations",
        "ui",
        "virtualenvs",
    ]
    assert not places & {f"/v1/{name}" for name in closed}
    assert [path for path in POST if path.startswith("/v1/models")] == []
    assert all(path.startswith(("/v1/", "/anthropic/v1/")) for path in listed)
