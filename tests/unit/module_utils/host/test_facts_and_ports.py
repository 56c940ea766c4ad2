# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host says about itself, read from a made-up /proc and from the machine the tests run on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import facts, ports

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = "   0: {address}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid} 0 {inode} 1\n"


@pytest.fixture
def proc(tmp_path):
    """A /proc on which programs can be made to listen."""
    (tmp_path / "net").mkdir()

    def listen(address, port=9997, pid=7, command="nginx -g", uid=0, state="0A", **links):
        name = "tcp6" if len(address) > 8 else "tcp"
        table = tmp_path / "net" / name
        inode = 1000 + pid
        text = table.read_text() if table.exists() else HEADER
        table.write_text(text + LINE.format(address=address, port=port, state=state, uid=uid, inode=inode))
        place = tmp_path / str(pid)
        (place / "fd").mkdir(parents=True)
        (place / "fd" / "3").symlink_to(f"socket:[{inode}]")
        (place / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
        (place / "environ").write_bytes(links.pop("environ", "").encode() + b"\0")
        for link, target in links.items():
            (place / link).symlink_to(target)

    return tmp_path, listen


@pytest.mark.parametrize(
    ("bound", "wanted", "clash"),
    [
        ("0100007F", "127.0.0.1", True),
        ("00000000", "127.0.0.1", True),
        ("0100000A", "127.0.0.1", False),
        ("0100000A", "0.0.0.0", True),
        ("00000000000000000000000000000000", "127.0.0.1", True),
        ("00000000000000000000000001000000", "127.0.0.1", False),
        ("0000000000000000FFFF00000100007F", "127.0.0.1", True),
        ("0100000A", "no.such.host.invalid", True),
    ],
)
@pytest.mark.skipif(sys.byteorder == "big", reason="the addresses are written for little-endian machines")
def test_addresses_that_take_the_port_from_the_server(proc, bound, wanted, clash):
    root, listen = proc
    listen(bound)
    assert bool(ports.listeners(9997, wanted, "/opt/x", str(root))) is clash


def test_only_listening_sockets_on_the_port_count(proc):
    root, listen = proc
    listen("0100007F", port=9998)
    listen("0100007F", pid=8, state="01")
    assert ports.listeners(9997, "127.0.0.1", "/opt/x", str(root)) == []


@pytest.mark.parametrize(
    ("traces", "ours"),
    [
        ({}, False),
        ({"command": "/opt/x/venvs/a/bin/python server"}, True),
        ({"command": "/opt/xyz/bin/python server"}, False),
        ({"cwd": "/opt/x/run"}, True),
        ({"exe": "/opt/x/venvs/a/bin/python"}, True),
        ({"environ": "A=1\0XINFERENCE_SITE_ROOT=/opt/x\0B=2"}, True),
        ({"environ": "XINFERENCE_SITE_ROOT=/opt/other"}, False),
    ],
)
def test_a_server_of_ours_is_recognised(proc, traces, ours):
    root, listen = proc
    listen("0100007F", **traces)
    (found,) = ports.listeners(9997, "127.0.0.1", "/opt/x/", str(root))
    assert found["ours"] is ours and found["pid"] == 7


def test_a_program_that_cannot_be_seen_is_named_by_its_user(proc):
    root, listen = proc
    listen("0100007F", uid=4242424)
    (root / "7" / "fd" / "3").unlink()
    (found,) = ports.listeners(9997, "127.0.0.1", "/opt/x", str(root))
    assert (found["pid"], found["program"], found["user"], found["ours"]) == (None, None, "4242424", False)


def test_a_real_listener_is_found(tmp_path):
    code = "import socket,time; s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); print(s.getsockname()[1]); "
    command = [sys.executable, "-u", "-c", code + "time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=str(tmp_path)) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            (found,) = ports.listeners(port, "127.0.0.1", "/nowhere")
            assert found["pid"] == process.pid and "s.listen()" in found["program"] and not found["ours"]
            assert ports.listeners(port, "127.0.0.1", str(tmp_path))[0]["ours"]
        finally:
            process.kill()
    deadline = time.monotonic() + 60
    while ports.listeners(port, "127.0.0.1", "/nowhere") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ports.listeners(port, "127.0.0.1", "/nowhere") == []
    assert socket.socket().fileno() >= 0


def test_a_root_that_is_not_there_yet_is_judged_by_what_is_above_it(tmp_path):
    found = facts.place(str(tmp_path / "a/b/c"))
    assert found["existing"] == str(tmp_path) and found["writable"] and found["free_bytes"] > 0
    (tmp_path / "a").write_text("")
    assert facts.place(str(tmp_path / "a/b/c"))["obstacle"] == str(tmp_path / "a")


@pytest.mark.parametrize("mark", facts.MARKS)
def test_what_others_made_below_the_root(tmp_path, mark):
    assert facts.place(str(tmp_path))["foreign"] == []
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "models").mkdir()
    assert facts.place(str(tmp_path))["foreign"] == ["models"]
    (tmp_path / mark).mkdir(parents=True)
    assert facts.place(str(tmp_path))["foreign"] == []


def test_contents_are_blobs_parts_and_finished_directories(tmp_path):
    name = "0" * 64
    for directory in ("blobs/sha256", "partial", "venvs/half", "venvs/whole", "lib/abc"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "blobs/sha256" / name).write_bytes(b"12345")
    (tmp_path / "blobs/sha256/not-a-digest").write_bytes(b"")
    (tmp_path / "partial" / name).symlink_to("/etc/passwd")
    marker = '{"path": "p", "python": "q", "tool": "uv", "seconds": 1.0}'
    (tmp_path / "venvs/whole/.complete").write_text(marker)
    (tmp_path / "venvs/whole/bin").mkdir()
    (tmp_path / "venvs/whole/bin/python").symlink_to(sys.executable)
    found = facts.contents(str(tmp_path))
    assert found == {"blobs": {f"sha256:{name}": 5}, "partial": {}, "venvs": ["whole"], "lib": ["abc"]}
    assert facts.contents(str(tmp_path / "absent")) == {"blobs": {}, "partial": {}, "venvs": [], "lib": []}


def simulated_nvidia_smi(directory, text, status=0):
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    program.chmod(0o755)


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    simulated_nvidia_smi(tmp_path, "0, GPU-a-b, 580.65.06, NVIDIA L40S\n1, GPU-c, 580.65.06, NVIDIA L4, odd")
    assert facts.gpus() == {
        "list": [
            {"index": 0, "name": "NVIDIA L40S", "uuid": "GPU-a-b", "driver": "580.65.06"},
            {"index": 1, "name": "NVIDIA L4, odd", "uuid": "GPU-c", "driver": "580.65.06"},
        ],
        "problem": "",
    }
    simulated_nvidia_smi(tmp_path, "NVIDIA-SMI has failed", 9)
    assert "status 9: NVIDIA-SMI has failed" in facts.gpus()["problem"]
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert "no nvidia-smi" in facts.gpus()["problem"]


def test_the_interpreter_is_the_one_the_server_would_get():
    own = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert facts.interpreter(own, None)["problem"] == ""
    assert "3.99" in facts.interpreter("cp399", None)["problem"]


def test_an_address_of_another_host_cannot_be_listened_on():
    assert ports.cannot_listen("127.0.0.1") == ports.cannot_listen("0.0.0.0") == ""
    assert ports.cannot_listen("192.0.2.1").startswith("192.0.2.1: ")
