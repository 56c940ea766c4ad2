# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The testbed itself, for real: hosts come up, are cut off, run containers, survive a reboot, and leave nothing."""

from __future__ import annotations

import os
import time
import urllib.request
from pathlib import Path
from typing import Iterator

import pytest

from . import engine, hosts, images
from .engine import TestbedError, docker
from .hosts import Host, Testbed
from .spec import HostSpec, gpu_uuid

NAME = f"smoke-{os.getpid()}"
SPECS = [
    HostSpec("gpu-1", gpus=2),
    HostSpec("gpu-2", gpus=1, login="deploy", compose="v1"),
    # The control: what the others cannot reach can be reached.
    HostSpec("open", gpus=0, internet=True, engine=False, nvidia=False, compose="none"),
]
# Ways out: names and addresses, tried from Python because it is on every host.
TRY_OUT = """
import socket, sys
for host, port in [(sys.argv[1], 80), ("192.0.2.1", 443)]:
    try:
        socket.create_connection((host, port), timeout=4).close()
        print("reached", host)
    except OSError as error:
        print("failed", host, error)
"""


def mirror_host() -> str:
    """A name on the internet that this machine certainly reaches: apt's."""
    return engine.mirror().split("/")[2].split(":")[0]


def traces(name: str) -> str:
    """Whatever still belongs to a testbed."""
    label = f"label={hosts.LABEL}={name}"
    found = docker("ps", "--all", "--quiet", "--filter", label)
    for kind in ("volume", "network"):
        found += docker(kind, "ls", "--quiet", "--filter", label)
    cgroups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/testbed-{name}-*")]
    directories = [str(path) for path in engine.cache().glob(f"beds/{name}")]
    return found + "\n".join(cgroups + directories)


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    made = Testbed(NAME)
    engine.ensure()
    images.host()
    began = time.monotonic()
    made.up(SPECS)
    print(f"{len(SPECS)} hosts up in {time.monotonic() - began:.1f} s")
    yield made
    made.down()
    assert traces(NAME) == ""


@pytest.fixture(scope="module")
def gpu_host(bed: Testbed) -> Host:
    """A host whose engine has a small image, `base()`."""
    bed.hosts["gpu-1"].give_image(images.base())
    return bed.hosts["gpu-1"]


def test_everyone_logs_in_over_ssh(bed: Testbed) -> None:
    for host in bed.hosts.values():
        assert host.ssh("hostname").strip() == host.name
        assert host.ssh("id -un").strip() == host.spec.login
    deploy = bed.hosts["gpu-2"]
    assert deploy.ssh("sudo id -u").strip() == "0"
    with pytest.raises(TestbedError, match="password is required"):
        deploy.ssh("sudo --non-interactive true", user="plain")


def test_there_is_no_way_out(bed: Testbed) -> None:
    for name in ("gpu-1", "gpu-2"):
        host = bed.hosts[name]
        said = host.exec("python3", "-c", TRY_OUT, mirror_host())
        assert "reached" not in said
        assert said.count("failed") == 2
        assert "default" not in host.exec("ip", "route")
    assert f"reached {mirror_host()}" in bed.hosts["open"].exec("python3", "-c", TRY_OUT, mirror_host())


def test_hosts_reach_each_other(bed: Testbed) -> None:
    code = f"import socket; print(socket.create_connection(('{bed.hosts['gpu-2'].address}', 22), 5).recv(4))"
    assert "SSH-" in bed.hosts["gpu-1"].exec("python3", "-c", code)


def test_each_host_is_as_described(bed: Testbed) -> None:
    first, second, control = (bed.hosts[name] for name in ("gpu-1", "gpu-2", "open"))
    assert "2.26.1" in first.exec("docker", "compose", "version")
    assert "1.29.2" in second.exec("docker-compose", "version")
    with pytest.raises(TestbedError):
        second.exec("docker", "compose", "version")
    assert len(first.exec("nvidia-smi", "-L").splitlines()) == 2
    assert gpu_uuid(NAME, "gpu-2", 0) in second.ssh("nvidia-smi -L")
    with pytest.raises(TestbedError):
        control.exec("docker", "version")
    with pytest.raises(TestbedError):
        control.exec("which", "nvidia-smi")


def test_a_container_gets_the_gpus_it_asked_for(gpu_host: Host) -> None:
    wanted = gpu_uuid(NAME, "gpu-1", 1)
    said = gpu_host.docker("run", "--rm", "--gpus", '"device=1"', images.base(), "nvidia-smi", "-L")
    assert said == f"GPU 0: NVIDIA Simulated GPU (UUID: {wanted})\n"
    assert gpu_host.gpu_requests()[-1]["gpus"] == [{"index": 1, "uuid": wanted}]
    gpu_host.docker("run", "--rm", "--gpus", f'"device={wanted}"', images.base(), "true")
    assert gpu_host.gpu_requests()[-1]["visible_devices"] == wanted

    before = len(gpu_host.gpu_requests())
    gpu_host.docker("run", "--rm", images.base(), "true")
    assert len(gpu_host.gpu_requests()) == before
    with pytest.raises(TestbedError, match="unknown device"):
        gpu_host.docker("run", "--rm", "--gpus", '"device=7"', images.base(), "true")
    assert gpu_host.gpu_requests()[-1]["refused"] == ["7"]


def test_a_container_can_lose_its_gpus_until_its_next_start(gpu_host: Host) -> None:
    gpu_host.docker("run", "--detach", "--init", "--name", "loser", "--gpus", "all", images.base(), "sleep", "600")
    gpu_host.lose_gpus("loser")
    with pytest.raises(TestbedError, match="Unknown Error"):
        gpu_host.docker("exec", "loser", "nvidia-smi", "-L")
    gpu_host.docker("restart", "--time", "0", "loser")
    assert len(gpu_host.docker("exec", "loser", "nvidia-smi", "-L").splitlines()) == 2
    gpu_host.docker("rm", "--force", "loser")


def fetch(host: Host, limit: float = 90) -> str:
    """What port 8080 of the host says to this machine."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + limit
    while True:
        try:
            with direct.open(f"http://{host.address}:8080/etc/hostname", timeout=5) as answer:
                return answer.read().decode().strip()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.parametrize("way", ["reboot", "power cut"])
def test_a_published_port_is_reached_and_comes_back(gpu_host: Host, way: str) -> None:
    serve = ["python3", "-m", "http.server", "--directory", "/", "8080"]
    settings = [
        "--detach",
        "--init",
        "--name",
        "web",
        "--hostname",
        "inside",
        "--restart",
        "unless-stopped",
        "-p",
        "8080:8080",
    ]
    gpu_host.docker("run", *settings, images.base(), *serve)
    try:
        assert fetch(gpu_host) == "inside"
        started = docker("inspect", "--format", "{{.State.StartedAt}}", gpu_host.container)
        if way == "reboot":
            gpu_host.reboot()
        else:
            gpu_host.kill()
            gpu_host.start()
        assert docker("inspect", "--format", "{{.State.StartedAt}}", gpu_host.container) != started
        assert fetch(gpu_host) == "inside"
        assert gpu_host.ssh("hostname").strip() == "gpu-1"
        assert "default" not in gpu_host.exec("ip", "route")
    finally:
        gpu_host.docker("rm", "--force", "web")


def test_the_inventory_is_found_by_another_process(bed: Testbed) -> None:
    found = Testbed(NAME).load()
    assert {name: host.address for name, host in found.items()} == {h.name: h.address for h in bed.hosts.values()}
    assert found["gpu-2"].spec == SPECS[1]
    assert "gpu-2" in bed.inventory.read_text()


def test_two_testbeds_stand_side_by_side_and_the_end_of_one_leaves_the_other(bed: Testbed, tmp_path: Path) -> None:
    other = Testbed(f"{NAME}-b", tmp_path)
    small = HostSpec("gpu-1", gpus=0, engine_disk="64m", disk="32m")
    host = other.up([small])["gpu-1"]
    assert host.address != bed.hosts["gpu-1"].address
    assert host.exec("df", "--output=size", "/opt", "/var/lib/docker").split()[1:] == ["32768", "65536"]
    other.down()
    assert traces(other.name) == ""
    assert list(tmp_path.iterdir()) == []
    assert bed.hosts["gpu-1"].ssh("hostname").strip() == "gpu-1"


def test_a_failed_up_leaves_nothing(bed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "READY_LIMIT", 0.0)
    failing = Testbed(f"{NAME}-f")
    with pytest.raises(TestbedError, match="after 0 s"):
        failing.up([HostSpec("gpu-1")])
    assert traces(failing.name) == ""
