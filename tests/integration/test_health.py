# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_health against real servers: starting ones, healthy ones, failed launches."""

from __future__ import annotations

import time
from typing import Callable

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from doors import run_module
from servers import NEW, OLD, READY_LIMIT, Server, free_port


@pytest.mark.parametrize("version", [NEW, OLD])
def test_a_server_is_waited_for_while_it_starts(version: str) -> None:
    try:
        server = servers.start(version, wait=False)
    except servers.Missing as error:
        pytest.skip(str(error))
    try:
        result, _seconds = run_module("xinference_health", {"endpoint": server.endpoint, "wait_timeout": 300})
        assert result.get("failed") is None, result
        assert result["healthy"] and result["version"] == version and result["supported"]
        assert result["waited_s"] > 1
        (worker,) = result["workers"]
        assert worker["gpu_count"] == 0 and worker["memory_available"] > 0
    finally:
        server.stop()
    assert server.pids() == []


def test_the_wait_has_an_end() -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    result, _seconds = run_module("xinference_health", {"endpoint": endpoint, "wait_timeout": 3, "wait_sleep": 0.5})
    assert result["failed"] and not result["reachable"]
    assert f"No Xinference answers at {endpoint}: " in result["msg"] and "the limit is 3 s" in result["msg"]


def test_fail_false_only_reports() -> None:
    result, _seconds = run_module("xinference_health", {"endpoint": f"http://127.0.0.1:{free_port()}", "fail": False})
    assert not result.get("failed") and result["healthy"] is False and result["problems"]


def test_a_failed_launch_is_explained_at_once(server: Server, models: Callable[[str], str]) -> None:
    client = server.client()
    payload = {"model_uid": "broken", "model_name": "bce-embeding-base", "model_type": "embedding"}
    try:
        client.launch({**payload, "model_path": models("minilm")}, timeout=60)
    except ServerError:
        pass  # 1.8.1 tells at once
    limit = time.monotonic() + READY_LIMIT
    while client.instances("broken")[0]["status"] != "ERROR":
        assert time.monotonic() < limit
        time.sleep(0.2)
    result, _seconds = run_module(
        "xinference_health",
        {"endpoint": server.endpoint, "models": [{"model_uid": "broken"}], "wait_timeout": READY_LIMIT},
    )
    assert result["failed"] and "The launch of model broken failed" in result["msg"]
    assert result["waited_s"] < READY_LIMIT
    if server.version == NEW:
        assert "bce-embedding-base_v1" in result["diagnosis"]["cure"]
