# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GPUs from the inventory to the container, and what is found of them inside."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import container
from ansible_collections.airgap.xinference.plugins.module_utils.host.gpus import GpuError, given

HOST = [{"index": number, "uuid": f"GPU-{letter}"} for number, letter in enumerate("abcd")]
GIVEN = [["0", "GPU-a"], ["2", "GPU-c"]]


def state(status: str = "running", health: Optional[str] = "healthy", restarts: int = 0, **more: Any) -> Dict[str, Any]:
    """What `docker inspect` shows of a container."""
    known = {"Status": health, "Log": [{"Output": "connection refused"}]} if health else None
    told = {"Status": status, "Running": status in ("running", "paused"), "ExitCode": 1, "Error": "", "Health": known}
    return {"Name": "/xinference-server-1", "RestartCount": restarts, "State": {**told, **more}}


def test_gpus_get_the_order_in_which_a_container_numbers_them() -> None:
    assert [(gpu.name, gpu.index, gpu.uuid) for gpu in given([3, "gpu-B"], HOST)] == [
        ("gpu-B", 1, "GPU-b"),
        ("3", 3, "GPU-d"),
    ]


def test_gpus_that_are_not_there_are_all_named() -> None:
    with pytest.raises(GpuError, match=r"GPU 7, GPU-z, and the host has 0 \(GPU-a\), 1 \(GPU-b\)"):
        given([0, 7, "GPU-z"], HOST)
    with pytest.raises(GpuError, match="the host has none: there is no nvidia-smi"):
        given(["GPU-a"], [], "there is no nvidia-smi")


def test_a_gpu_given_twice_under_two_names_is_refused() -> None:
    with pytest.raises(GpuError, match="GPU 1 more than once"):
        given([1, "GPU-b"], HOST)


def test_numbers_are_believed_where_the_host_tells_nothing() -> None:
    assert [gpu.names for gpu in given([2, 0], [])] == [["0"], ["2"]]


@pytest.mark.parametrize(
    ("seen", "count", "lost"),
    [
        (["GPU-a", "GPU-c"], 2, []),
        (["GPU-a"], 1, ["2"]),
        ([], 0, ["0", "2"]),
        (["GPU-a", "GPU-b"], 2, ["2"]),
        (None, 2, []),
        (None, None, []),
    ],
)
def test_lost_gpus_are_found(seen: Optional[List[str]], count: Optional[int], lost: List[str]) -> None:
    found = container.compare(GIVEN, seen, count)
    assert found.lost == lost and bool(found.problem) == bool(lost)


def test_without_uuids_the_number_decides() -> None:
    assert container.compare([["0"], ["2"]], ["GPU-x"], None).lost == ["2"]


def test_a_server_that_counts_fewer_has_not_lost_them() -> None:
    found = container.compare(GIVEN, ["GPU-a", "GPU-c"], 0)
    assert not found.lost and "driver" in found.problem


def test_the_reason_of_a_loss_is_told() -> None:
    found = container.compare(GIVEN, [], None, "Failed to initialize NVML: Unknown Error")
    assert found.problem == "The container has lost GPU 0, 2: Failed to initialize NVML: Unknown Error"


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (state(), ""),
        (state(health="starting"), ""),
        (state("restarting", restarts=0), ""),
        (state("exited"), "xinference-server-1 ended with code 1."),
        (state(restarts=1), "xinference-server-1 ended."),
        (state("restarting", restarts=1), "xinference-server-1 ended with code 1."),
        (state("exited", OOMKilled=True), "xinference-server-1 ended with code 1 (killed for want of memory)."),
        (
            state(health="unhealthy"),
            "xinference-server-1 runs and does not answer, so it is unhealthy. When its log tells no reason: docker "
            "restart xinference-server-1, then run again. It said: connection refused",
        ),
        (state(Health={"Status": "unhealthy", "Log": []}), "xinference-server-1 ended."),
        (state("paused"), "xinference-server-1 is paused; docker unpause xinference-server-1"),
    ],
)
def test_waiting_ends_where_it_is_in_vain(seen: Dict[str, Any], verdict: str) -> None:
    assert container.judge(seen, restarts=0) == verdict


def test_a_container_without_a_check_counts_as_healthy_when_it_runs() -> None:
    assert container.health(state(health=None)) == "none"
    assert container.health(state("created", health=None)) == "created"


class Engine:
    """Stands for the client: one container after the other, as if time went by."""

    def __init__(self, *states: Dict[str, Any]) -> None:
        self.states = list(states)

    def container(self, labels: Dict[str, str]) -> Dict[str, Any]:
        return {"Id": "c", **(self.states.pop(0) if len(self.states) > 1 else self.states[0])}

    def logs(self, name: str, lines: int) -> str:
        return "torch.OutOfMemoryError"


def test_the_container_of_the_service_is_meant_and_no_run_of_a_command() -> None:
    class Client(Engine):
        def container(self, labels: Dict[str, str]) -> Dict[str, Any]:
            assert labels == {
                "com.docker.compose.project": "xinference",
                "com.docker.compose.service": "server",
                "com.docker.compose.oneoff": "False",
            }
            return super().container(labels)

    client: Any = Client(state())
    assert container.find(client, VIEW)


VIEW = {"project": "xinference", "service": "server", "endpoint": "http://127.0.0.1:9", "gpus": []}


def test_a_container_that_is_restarted_while_waiting_fails_with_its_log() -> None:
    engine: Any = Engine(state(health="starting"), state("restarting", restarts=1))
    with pytest.raises(container.NotHealthy, match="ended with code 1") as caught:
        container.wait(engine, VIEW, 60, pause=lambda _seconds: None)
    assert caught.value.log == "torch.OutOfMemoryError"


def test_a_container_that_never_answers_fails_in_time() -> None:
    engine: Any = Engine(state(health="starting"))
    with pytest.raises(container.NotHealthy, match=r"is starting and does not answer on http://127.0.0.1:9 after 0 s"):
        container.wait(engine, VIEW, 0, pause=lambda _seconds: None)


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (state(), "no such option\nxinference-server-1 runs on as it was."),
        (state("paused"), "no such option\nxinference-server-1 is paused; docker unpause xinference-server-1"),
        (state("created", health=None), "no such option"),
        (state("exited"), "no such option\nThe end of its log:\ntorch.OutOfMemoryError"),
    ],
)
def test_a_start_that_failed_is_told_with_the_log_of_the_container_that_failed_only(seen: Dict, told: str) -> None:
    engine: Any = Engine(seen)
    failure = container.failed_start(engine, VIEW, "no such option\n")
    assert str(failure) == told and bool(failure.log) == ("log" in told)
