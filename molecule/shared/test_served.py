# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every site with Docker has to be like when `site.yml` is through, asked of engine, hook, server and network.

Nothing here reads what the collection wrote to say what it did, except to see that a secret is not in it.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from conftest import Run, Site, as_root
from expected import MODELS, SECRET, SITES, VERSION

ROOT = "/opt/xinference"
OUTSIDE = "import socket; socket.create_connection(('192.0.2.1', 443), 3)"
MOUNTS = {
    "/root/.xinference": True,
    "/models": False,
    "/root/.cache/huggingface": True,
    "/root/.cache/modelscope": True,
    "/root/.cache/vllm": True,
    "/root/.cache/flashinfer": True,
    "/root/.triton": True,
}
"""Directories the container needs from the host, and whether it may write there."""


def docker(host: Any, arguments: str) -> str:
    return as_root(host, f"docker {arguments}")


@pytest.fixture
def containers(host: Any) -> dict[str, dict[str, Any]]:
    """All containers there are, as the engine of the host shows them, by their service."""
    identities = " ".join(docker(host, "ps --all --quiet --no-trunc").split())
    found = json.loads(docker(host, f"inspect {identities}"))
    named = {entry["Config"]["Labels"]["com.docker.compose.service"]: dict(entry) for entry in found}
    assert len(named) == len(found) and set(named) == {"server", "keeper"}
    return named


@pytest.fixture
def container(containers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The server's container."""
    return containers["server"]


@pytest.fixture
def asked(site: Site) -> dict[str, Any]:
    """What this host was asked for."""
    return SITES[site.name]


def test_the_container_is_healthy_and_comes_back_after_a_restart(host: Any, container: dict[str, Any]) -> None:
    assert container["State"]["Health"]["Status"] == "healthy" and container["RestartCount"] == 0
    assert container["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert container["HostConfig"]["LogConfig"]["Config"]["max-size"]


def test_the_keeper_runs_beside_it_and_may_do_no_more_than_it_must(containers: dict[str, dict[str, Any]]) -> None:
    keeper, settings = containers["keeper"], containers["keeper"]["HostConfig"]
    assert keeper["State"]["Running"] and keeper["RestartCount"] == 0
    assert keeper["Image"] == containers["server"]["Image"]
    assert settings["RestartPolicy"]["Name"] == "unless-stopped" and settings["LogConfig"]["Config"]["max-size"]
    assert settings["ReadonlyRootfs"] and not settings["DeviceRequests"] and not settings["PortBindings"]
    assert [mount["Destination"] for mount in keeper["Mounts"] if mount["RW"]] == [f"{ROOT}/state"]


def test_the_image_is_the_one_that_was_asked_for(host: Any, container: dict[str, Any]) -> None:
    wanted = docker(host, f"image inspect --format '{{{{.Id}}}}' testbed/xinference:{VERSION}-cpu").strip()
    assert container["Image"] == wanted and container["Config"]["Image"] == wanted


def test_devices_were_requested_as_a_list_and_the_hook_gave_them(
    host: Any, container: dict[str, Any], asked: dict[str, Any], bed: dict[str, Any], site: Site
) -> None:
    (request,) = container["HostConfig"]["DeviceRequests"]
    assert request["Driver"] == "nvidia" and request["Capabilities"] == [["gpu"]]
    assert sorted(request["DeviceIDs"]) == sorted(asked["device_ids"])
    seen = [entry for entry in bed[site.name].gpu_requests() if entry["container"] == container["Id"]][-1]
    assert sorted(gpu["index"] for gpu in seen["gpus"]) == asked["host_gpus"] and seen["refused"] == []
    inside = docker(host, f"exec {container['Id']} nvidia-smi -L").splitlines()
    assert len(inside) == len(asked["host_gpus"])


def test_directories_are_mounted_and_models_cannot_be_written(host: Any, container: dict[str, Any]) -> None:
    mounted = {mount["Destination"]: mount for mount in container["Mounts"]}
    assert {target: mounted[target]["RW"] for target in MOUNTS} == MOUNTS
    assert all(mounted[target]["Source"].startswith(f"{ROOT}/") for target in MOUNTS)
    answer = as_root(host, f"docker exec {container['Id']} touch /models/x 2>&1 || true")
    assert "Read-only file system" in answer


def test_the_project_is_valid_for_compose(host: Any) -> None:
    docker(host, f"compose --file {ROOT}/current/compose.yaml config --quiet")


def test_the_server_is_of_the_right_version_and_offline(host: Any, site: Site, container: dict[str, Any]) -> None:
    assert site.get("/v1/cluster/version")["version"].startswith(VERSION)
    variables = dict(entry.partition("=")[::2] for entry in container["Config"]["Env"])
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
    }
    assert {name: variables.get(name) for name in wanted} == wanted


def test_every_model_is_ready_on_its_gpu_and_no_other_model_is_there(site: Site, asked: dict[str, Any]) -> None:
    instances = {entry["model_uid"]: entry for entry in site.get("/v1/models/instances")}
    assert {uid: entry["status"] for uid, entry in instances.items()} == dict.fromkeys(MODELS, "READY")
    shown = {entry["id"]: entry for entry in site.get("/v1/models")["data"]}
    assert {uid: list(map(int, entry["accelerators"])) for uid, entry in shown.items()} == asked["placement"]
    for uid, entry in instances.items():
        for replica in entry.get("replica_statuses") or []:
            assert replica["status"] == "READY" and replica["gpu_idx"] in (None, asked["placement"][uid])


def cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def test_a_client_outside_of_the_host_gets_embeddings_that_mean_something(site: Site) -> None:
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose by a quarter point."]
    answer = site.post("/v1/embeddings", model="minilm", input=texts)
    cat, kitten, rates = (entry["embedding"] for entry in answer["data"])
    assert len(cat) == 384 and cosine(cat, kitten) > cosine(cat, rates) + 0.2


def test_a_client_outside_of_the_host_gets_ranks_and_words(site: Site) -> None:
    answer = site.post("/v1/rerank", model="rerank", query="cat", documents=["dog", "cat"])
    assert sorted(entry["index"] for entry in answer["results"]) == [0, 1]
    talk = [{"role": "user", "content": "one two three"}]
    answer = site.post("/v1/chat/completions", model="chat", messages=talk, max_tokens=8)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_there_is_no_way_out_for_the_host_and_its_containers(host: Any, containers: dict[str, dict[str, Any]]) -> None:
    assert as_root(host, "ip route show default") == ""
    for command in ("", *(f"docker exec {container['Id']} " for container in containers.values())):
        answer = as_root(host, f'{command}python3 -c "{OUTSIDE}" 2>&1 || true')
        assert "unreachable" in answer, answer


def test_what_is_secret_reaches_the_server_and_nobody_else(host: Any, containers: dict[str, dict[str, Any]]) -> None:
    for container in containers.values():
        assert SECRET not in json.dumps(container) + docker(host, f"exec {container['Id']} env")
    look = "sh -c 'cat /proc/[0-9]*/environ 2>/dev/null; true' | tr '\\0' '\\n'"
    given = {name: docker(host, f"exec {container['Id']} {look}") for name, container in containers.items()}
    assert f"HF_TOKEN={SECRET}" in given["server"].splitlines() and SECRET not in given["keeper"]
    search = f"grep -rslF {SECRET} {ROOT} /etc /home /tmp /var /usr/local 2>/dev/null || true"
    holders = as_root(host, search).split()
    assert any(path.startswith(f"{ROOT}/releases/") for path in holders)
    assert as_root(host, f"su plain -c '{search}'") == "", holders
    readable = as_root(host, f"find {' '.join(holders)} -maxdepth 0 -perm /o=r")
    assert readable.split() == []


@pytest.mark.parametrize("again", [1])
def test_running_site_again_changes_nothing(again: int, playbook: Any, site: Site) -> None:
    if site.name != min(SITES):
        pytest.skip("one run is for all hosts")
    run: Run = playbook("site")
    assert run.status == 0, run.output[-4000:]
    assert {name: run.recap(name)["changed"] for name in SITES} == dict.fromkeys(SITES, 0)
    print(f"\nsite.yml again: {len(SITES)} hosts, {run.tasks} tasks, {run.seconds:.1f} s, changed=0")
