# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting for a server: what ends the wait, what is reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import AccessRefused, Unreachable
from ansible_collections.airgap.xinference.plugins.module_utils.server.health import (
    Health,
    look_at,
    probe_all,
    wait_healthy,
)
from fakes import VERSIONS, recorded


class Told:
    """Stands for a client whose server answers as recorded, with what a test changes."""

    endpoint = "http://recorded"
    has_credentials = False

    def __init__(self, of: str = "4.1.0", **changes: Any) -> None:
        self.answers: Dict[str, Any] = {
            "status": recorded(of, "status"),
            "auth_enabled": False,
            "version": of,
            "cluster_info": recorded(of, "cluster_info"),
            "models": {one["id"]: one for one in recorded(of, "models")["data"]},
            "instances": recorded(of, "instances"),
            **changes,
        }
        self.asked: List[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            self.asked.append(name)
            answer = self.answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def told(*arguments: Any, **changes: Any) -> Any:
    """A `Told` that passes for a client."""
    return Told(*arguments, **changes)


class Clock:
    """Time that only passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


UNREACHABLE = Unreachable("No Xinference answers at http://recorded")
REFUSED = AccessRefused("refused", 401, "Could not validate credentials")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_server_is_healthy(version):
    health = look_at(told(version), ["embedding", "chat"])
    assert health.healthy and health.problems == []
    result = health.result()
    assert (result["version"], result["supported"], result["auth"]) == (version, True, False)
    (worker,) = result["workers"]
    assert worker["gpu_count"] == 0 and worker["memory_total"] > 0
    assert result["models"]["embedding"]["state"] == "ready"
    assert result["models"]["embedding"]["model"]["model_type"] == "embedding"
    assert "hopeless" not in result


@pytest.mark.parametrize("version", VERSIONS)
def test_a_failed_launch_is_a_problem_only_when_the_model_is_required(version):
    (failed,) = [one["model_uid"] for one in recorded(version, "instances") if one["model_uid"] == "unknown-embedding"]
    assert look_at(told(version)).healthy
    health = look_at(told(version), [failed])
    assert health.hopeless and len(health.problems) == 1
    assert "The launch of model unknown-embedding failed" in health.problems[0]
    if version == "4.1.0":
        assert health.diagnosis is not None and health.diagnosis.name == "unknown-name"


def test_a_model_that_is_unknown():
    health = look_at(told(), ["nobody"])
    assert not health.healthy and not health.hopeless
    assert "Model nobody is not on the server. It knows: " in health.problems[0]


def test_every_problem_is_reported():
    health = look_at(told(), ["nobody", "unknown-rerank"], workers=2)
    assert len(health.problems) == 3
    assert health.problems[0] == "1 of 2 workers have joined http://recorded."


def test_a_server_that_does_not_answer_is_waited_for():
    clock, server = Clock(), told(status=UNREACHABLE)
    health = wait_healthy(server, timeout=10, pause=2, clock=clock, sleep=clock.sleep)
    assert clock.now == 10
    assert not health.reachable and health.waited_s == 10
    assert health.problems == [
        "No Xinference answers at http://recorded",
        "That was so for 10 s, the limit is 10 s.",
    ]


def test_the_wait_ends_when_it_is_well():
    clock, server = Clock(), told(status=UNREACHABLE)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now >= 4:
            server.answers["status"] = recorded("4.1.0", "status")

    health = wait_healthy(server, timeout=60, pause=2, clock=clock, sleep=sleep)
    assert health.healthy and health.waited_s == 4


def test_one_look_without_a_limit():
    server = told(status=UNREACHABLE)
    health = wait_healthy(server)
    assert server.asked == ["status"] and len(health.problems) == 1


def test_a_refused_key_ends_the_wait():
    clock, server = Clock(), told(auth_enabled=True, version=REFUSED)
    server.has_credentials = True
    health = wait_healthy(server, timeout=60, clock=clock, sleep=clock.sleep)
    assert clock.now == 0 and server.asked.count("version") == 1
    assert health.reachable and not health.healthy
    assert health.diagnosis is not None and health.diagnosis.name == "wrong-credentials"
    assert health.listed is False and look_at(told()).listed is True


def test_a_guarded_server_can_be_waited_for_from_outside():
    server = told(auth_enabled=True, version=REFUSED)
    health = look_at(server)
    assert health.healthy and health.auth is True and health.version is None
    assert server.asked == ["status", "auth_enabled"]
    assert not look_at(server, ["embedding"]).healthy


def test_a_failed_launch_ends_the_wait():
    clock = Clock()
    wait_healthy(told(), ["unknown-rerank"], timeout=60, clock=clock, sleep=clock.sleep)
    assert clock.now == 0


def test_probes_are_counted_among_the_problems():
    server = told(post={"data": []})
    health = look_at(server, ["embedding"])
    results = probe_all(server, [{"model_uid": "embedding"}, {"model_uid": "chat", "probe": False}], health)
    assert (results["embedding"].state, results["chat"].state) == ("failed", "skipped")
    assert health.problems[0].startswith("Model embedding does not pass its probe: 3 vectors were wanted")


def test_nothing_is_wrong_with_nothing():
    assert Health("x").healthy
    assert replace(Health("x"), problems=["y"]).healthy is False
