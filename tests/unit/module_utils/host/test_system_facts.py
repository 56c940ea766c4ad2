# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host says about its memory, SELinux, file systems, way out and Docker Engine."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import engine_facts, system_facts


def test_memory_is_in_bytes(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 600 kB\nSwapTotal: 50 kB\nSwapFree: 20 kB\n")
    found = system_facts.memory(str(tmp_path))
    assert found == {"total": 1024000, "available": 614400, "swap_total": 51200, "swap_free": 20480}
    assert system_facts.memory()["total"] > 0 and abs(system_facts.clock() - time.time()) < 5


def test_a_volume_is_that_of_the_nearest_directory_there_is(tmp_path):
    found = system_facts.volume(str(tmp_path / "not" / "yet"))
    assert found["path"] == str(tmp_path) and found["device"] == tmp_path.stat().st_dev and found["free_bytes"] > 0


@pytest.mark.parametrize(
    ("enforce", "options", "expected"),
    [
        ("1", "rw,seclabel,relatime", {"mode": "enforcing", "labels": True}),
        ("1", "rw,relatime", {"mode": "enforcing", "labels": False}),
        ("0", "rw,seclabel", {"mode": "permissive", "labels": True}),
        (None, "rw", {"mode": "disabled", "labels": True}),
    ],
)
def test_selinux_and_the_labels_of_the_file_system(tmp_path, enforce, options, expected):
    (tmp_path / "self").mkdir()
    lines = [f"/dev/sda1 / ext4 {options} 0 0", "nfs:/x /data nfs4 rw 0 0", f"tmpfs /dat tmpfs {options} 0 0"]
    (tmp_path / "self" / "mounts").write_text("\n".join(lines) + "\n")
    if enforce is not None:
        (tmp_path / "enforce").write_text(enforce)
    assert system_facts.selinux("/opt/xinference", str(tmp_path), str(tmp_path)) == expected
    if enforce == "1":
        assert not system_facts.selinux("/data/xinference", str(tmp_path), str(tmp_path))["labels"]


def test_only_addresses_that_answer_are_reached_and_nobody_waits_for_the_rest():
    with socket.socket() as there, socket.socket() as gone:
        for each in (there, gone):
            each.bind(("127.0.0.1", 0))
        there.listen()
        open_one, closed = (f"127.0.0.1:{each.getsockname()[1]}" for each in (there, gone))
        began = time.monotonic()
        found = system_facts.reached([closed, open_one, "no-port", "192.0.2.1:9", "name.invalid:1"], 1.0)
    assert found == [open_one] and time.monotonic() - began < 15
    assert system_facts.reached([], 1.0) == []


CLIENT = """#!/bin/sh
case "$1" in
  info) cat {place}/info; [ -s {place}/info ] || {{ echo "Cannot connect to the Docker daemon" >&2; exit 1; }} ;;
  compose) echo 2.26.1-4 ;;
  image) [ "$2" = ls ] && printf 'sha256:a\\nsha256:a\\nsha256:b\\n' || cat {place}/images ;;
  ps) cat {place}/ps ;;
esac
"""


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A client of Docker that answers from files."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "docker").write_text(CLIENT.format(place=place))
    (place / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setattr(engine_facts, "_PLACES", str(place))
    info = {"ServerVersion": "20.10.24", "DockerRootDir": str(tmp_path), "Runtimes": {"runc": {}, "nvidia": {}}}
    (place / "info").write_text(json.dumps({**info, "CDISpecDirs": [str(place)], "SecurityOptions": ["name=selinux"]}))
    images = [{"Id": "sha256:a", "RepoTags": ["x:1"], "RootFS": {"Layers": ["sha256:l"]}}, {"Id": "sha256:b"}]
    (place / "images").write_text(json.dumps(images))
    (place / "ps").write_text("one\tx:1\t/opt/x/current\nother\ty:2\t/opt/xyz\nplain\tz:3\t\n")
    return place


def test_an_engine_is_described(docker, tmp_path):
    found = engine_facts.look("/opt/x", 9997)
    assert (found["version"], found["problem"], found["containerd"]) == ("20.10.24", "", False)
    assert found["compose"]["v2"] == "2.26.1" and found["data"]["path"] == str(tmp_path)
    assert found["nvidia"]["runtime"] and found["nvidia"]["cdi"] == [] and found["security"] == ["name=selinux"]
    assert [image["layers"] for image in found["images"]] == [["sha256:l"], []]
    assert [one["ours"] for one in found["publishers"]] == [True, False, False]


def test_an_engine_that_is_down_says_so(docker):
    (docker / "info").write_text("")
    found = engine_facts.look("/opt/x", 9997)
    assert found["problem"] == "Cannot connect to the Docker daemon" and found["images"] == [] and not found["data"]
    errors = {"ServerErrors": ["permission denied"], "ServerVersion": ""}
    (docker / "info").write_text(json.dumps(errors))
    assert engine_facts.look("/opt/x", None)["problem"] == "permission denied"


def test_an_engine_that_keeps_images_in_containerd(docker):
    info = json.loads((docker / "info").read_text())
    info["DriverStatus"] = [["driver-type", engine_facts.SNAPSHOTTER]]
    (docker / "info").write_text(json.dumps(info))
    assert engine_facts.look("/opt/x", None)["containerd"]


def test_compose_v1_is_recognised_and_a_newer_one_of_its_own_is_not_the_plugin(docker):
    program = docker / "docker-compose"
    program.write_text("#!/bin/sh\necho docker-compose version 1.29.2, build 5becea4c\n")
    program.chmod(0o755)
    assert engine_facts.compose(str(docker / "docker")) == {"v2": "2.26.1", "v1": "1.29.2"}
    program.write_text("#!/bin/sh\necho Docker Compose version v2.26.1\n")
    assert engine_facts.compose("") == {"v2": "", "v1": ""}


def test_descriptions_of_gpus_count_and_others_do_not(tmp_path):
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n")
    (tmp_path / "other.json").write_text('{"kind": "vendor.com/net"}')
    assert engine_facts.nvidia({"CDISpecDirs": [str(tmp_path)]})["cdi"] == [str(tmp_path / "nvidia.yaml")]


def test_gpus_are_asked_for_by_description_only_where_nothing_else_leads_to_them(docker, tmp_path):
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\n")
    described = {"CDISpecDirs": [str(tmp_path)]}
    assert (engine_facts.gpu_driver({}), engine_facts.gpu_driver(described)) == ("nvidia", "cdi")
    (docker / engine_facts.NVIDIA_HOOK).write_text("#!/bin/sh\n")
    (docker / engine_facts.NVIDIA_HOOK).chmod(0o755)
    assert engine_facts.gpu_driver(described) == "nvidia"


def test_a_host_without_docker(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine_facts, "_PLACES", str(tmp_path))
    found = engine_facts.look("/opt/x", 9997)
    assert "no docker" in found["problem"] and found["compose"] == {"v2": "", "v1": ""} and not found["publishers"]


def test_the_processor_says_whether_it_computes_aes(tmp_path):
    for said, answer in (
        ("flags\t\t: fpu aes avx2\n", True),
        ("Features\t: fp asimd aes pmull\n", True),
        ("model name\t: aes\nflags\t\t: fpu vaes\n", False),
    ):
        (tmp_path / "cpuinfo").write_text(said)
        assert system_facts.aes(str(tmp_path)) is answer
    assert system_facts.aes(str(tmp_path / "nowhere")) is False
