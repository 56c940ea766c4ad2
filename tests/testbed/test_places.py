# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A secret planted on purpose is found in each kind of place where a run leaves something, on a real host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest

from . import engine, images
from .hosts import Host, Testbed
from .leaks import Leak, Private, Search
from .places import Watch, of_host
from .spec import HostSpec

NAME = f"places-{os.getpid()}"
SECRET = "planted-Zx81/on purpose"
SEARCH = Search({"it": SECRET})
# Not that one, which processes on the host have.
TOLD = f"told-to-process-{os.getpid()}-only"
TOLD_TO_PROCESSES = Search({"it": TOLD})
FILES = ["/root/.ansible/tmp/it", "/tmp/it", "/var/log/it", "/run/it", "/dev/shm/it", "/opt/xinference/it", "/root/it"]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def leaks() -> Iterator[List[Leak]]:
    """What is found on a host where the secret was planted everywhere."""
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    engine.ensure()
    base = images.base()
    bed = Testbed(NAME)
    try:
        host = bed.up([HostSpec("gpu-1", gpus=0)])["gpu-1"]
        host.give_image(base)
        assert of_host(SEARCH, host) == []
        plant(host, base)
        yield of_host(SEARCH, host, [Private("gpu-1:/root/it")])
    finally:
        bed.down()


def plant(host: Host, image: str) -> None:
    for path in FILES:
        host.exec("sh", "-c", f"mkdir -p $(dirname {path}); umask 077; echo '{SECRET}' > {path}")
    host.docker("network", "create", "--label", f"it={SECRET}", "network")
    host.docker("volume", "create", "--label", f"it={SECRET}", "volume")
    clean = ["run", "--detach", "--network", "none"]
    host.docker(*clean, "--name", "labelled", "--label", f"it={SECRET}", image, "sleep", "600")
    host.docker(*clean, "--name", "environment", "--env", f"TOKEN={SECRET}", image, "sleep", "600")
    mounts = ["--tmpfs", "/memory", "--volume", "volume:/volume"]
    host.docker(*clean, "--name", "written", *mounts, image, "sleep", "600")
    for path in ("/layer", "/memory/it", "/volume/it"):
        host.docker("exec", "written", "sh", "-c", f"echo '{SECRET}' > {path}")
    host.docker("run", "--network", "none", "--name", "talking", image, "sh", "-c", f"echo '{SECRET}' | rev | rev >&2")
    host.docker("create", "--name", "clean", image, "true")
    host.docker("commit", "--change", f'LABEL it="{SECRET}"', "clean", "labelled-image")


def test_files_of_the_host_are_found_and_private_ones_are_not(leaks: List[Leak]) -> None:
    found = {leak.place for leak in leaks}
    assert {f"gpu-1:{path}" for path in FILES} - found == {"gpu-1:/root/it"}


@pytest.mark.parametrize(
    "place",
    [
        "gpu-1: docker container inspect",
        "gpu-1: docker image inspect",
        "gpu-1: docker volume inspect",
        "gpu-1: docker network inspect",
        "gpu-1: docker logs ",
        "gpu-1:/var/lib/docker/containers/*/config.v2.json",
        "gpu-1:/var/lib/docker/containers/*-json.log",
        "gpu-1:/var/lib/docker/overlay2/*/diff/layer",
        "gpu-1:/var/lib/docker/volumes/volume/_data/it",
        "gpu-1:/written:/memory/it",
    ],
)
def test_what_engine_and_containers_keep_is_found(leaks: List[Leak], place: str) -> None:
    start, _star, end = place.partition("*")
    assert [leak for leak in leaks if leak.place.startswith(start) and leak.place.endswith(end)]


def test_a_process_is_found_by_its_command_line_and_its_environment() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Watch(TOLD_TO_PROCESSES, may_know={"*may know*": ["it"], "*": ["another"]}) as watch:
        running = [
            subprocess.Popen([*sleep, f"--password={TOLD}"]),
            subprocess.Popen(sleep, env={**os.environ, "TOKEN": TOLD}),
            subprocess.Popen([*sleep, "may know"], env={**os.environ, "TOKEN": TOLD}),
        ]
        try:
            until(lambda: len(watch.leaks) >= 2)
        finally:
            for process in running:
                process.kill()
                process.wait()
    whys: Dict[int, str] = {int(leak.place.split()[1]): leak.why for leak in watch.leaks}
    assert whys == {running[0].pid: "its command line", running[1].pid: "its environment, TOKEN"}
    assert watch.processes > 2


def test_a_process_that_becomes_another_program_is_looked_at_again() -> None:
    with Watch(TOLD_TO_PROCESSES) as watch:
        script = f"sleep 0.3; exec env 'it={TOLD}' sleep 600"
        # The shell knows it as well, so the name of the program tells.
        process = subprocess.Popen(["bash", "-c", script])
        try:
            until(lambda: any("(sleep)" in leak.place for leak in watch.leaks))
        finally:
            process.kill()
            process.wait()


def test_the_watch_of_another_process_ends_with_the_file_of_secrets(tmp_path: Path) -> None:
    secrets, report = tmp_path / "secrets.json", tmp_path / "report.json"
    secrets.write_text(json.dumps({"secrets": {"it": TOLD}, "may_know": {"*may know*": ["it"]}}))
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "testbed.places", str(secrets), str(report)]
    running = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tests)}),
        subprocess.Popen(["sleep", "600"], env={"TOKEN": TOLD}),
    ]
    try:
        until(lambda: report.exists() and json.loads(report.read_text())["leaks"])
        assert not json.loads(report.read_text())["ended"]
        secrets.unlink()
        assert running[0].wait(60) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    found = json.loads(report.read_text())
    assert [leak["place"] for leak in found["leaks"]] == [f"process {running[1].pid} (sleep)"]
    assert found["ended"] and found["processes"] > 1
