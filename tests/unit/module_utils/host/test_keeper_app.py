# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper's program: whole, the same every time, and able to run without this checkout."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import keeper_app, release
from ansible_collections.airgap.xinference.plugins.module_utils.host.definition import json_text

TOLD = {"policy": "restore", "interval": 5}


def put(root: Path, models: List[object]) -> str:
    files = {
        "models.json": release.Entry(json_text(models)),
        "server.json": release.Entry(json_text({"backend": "native"})),
        **keeper_app.files(TOLD, "http://127.0.0.1:9", [], {}, json_text),
    }
    release.make(root, files)
    release.switch(root, release.identity(files))
    return release.identity(files)


def run(root: Path, *arguments: str, order: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-E", "-s", str(root / "current/bin/keeper.pyz"), "--root", str(root), *arguments]
    return subprocess.run(command, input=order, capture_output=True, text=True, check=False, cwd="/", timeout=60)


def test_the_same_modules_make_the_same_bytes() -> None:
    assert keeper_app.program() == keeper_app.program()
    with zipfile.ZipFile(io.BytesIO(keeper_app.program())) as archive:
        names = archive.namelist()
        assert all(member.date_time[0] == 1980 for member in archive.infolist())
    assert names == sorted(names) and "__main__.py" in names and "keeper/server/keeper.py" in names
    assert "keeper/masking.py" in names and "keeper/server/__init__.py" in names and "keeper/__init__.py" in names


def test_it_holds_all_that_the_modules_import_and_nothing_of_ansible_or_the_other_wings() -> None:
    names = {name[len(keeper_app.BASE) + 1 :] for name in keeper_app.modules()}
    assert {"server.apply", "server.transport", "server.probe", "companions"} <= names
    assert not [name for name in names if name.startswith(("bundle", "host", "_"))]


def test_it_is_made_part_of_a_release_that_stays_whole(tmp_path: Path) -> None:
    one = put(tmp_path, [])
    path = tmp_path / "current/bin/keeper.pyz"
    assert path.read_bytes() == keeper_app.program() and path.stat().st_mode & 0o777 == 0o440
    assert put(tmp_path, []) == one and put(tmp_path, [{"model_uid": "m"}]) != one
    told = json.loads((tmp_path / "current/keeper.json").read_text())
    assert told == {"endpoint": "http://127.0.0.1:9", **TOLD}
    files = {"bin/keeper.pyz": release.Entry(data=b"\x00\xff"), "a": release.Entry("text")}
    assert release.make(tmp_path, files) and release.whole(tmp_path, files) and not release.make(tmp_path, files)
    damaged = tmp_path / "releases" / release.identity(files) / "bin/keeper.pyz"
    damaged.chmod(0o600)
    damaged.write_bytes(b"\x00\xfe")
    assert not release.whole(tmp_path, files)


def test_credentials_and_registrations_are_private_and_only_there_when_given() -> None:
    files = keeper_app.files(TOLD, "http://x", [{"model_type": "LLM"}], {"username": "u", "password": "p"}, json_text)
    assert files["credentials.json"].mode == files["registrations.json"].mode == 0o400
    assert "password" not in files["keeper.json"].text
    bare = keeper_app.files(TOLD, "http://x", [], {"username": "", "password": None}, json_text)
    assert sorted(bare) == ["bin/keeper.pyz", "keeper.json"]


def test_it_runs_by_itself_from_the_release(tmp_path: Path) -> None:
    pytest.importorskip("requests")
    put(tmp_path, [])
    shown = run(tmp_path)
    assert shown.returncode == 0 and shown.stdout == "keeper: absent\n", shown.stderr
    order = json.dumps({"release": "another", "uids": [], "relaunch": []})
    done = run(tmp_path, "work", order=order)
    assert json.loads(done.stdout) == {"outcome": "stale"}, done.stderr
    name = release.current(tmp_path)
    done = run(tmp_path, "work", order=json.dumps({"release": name, "uids": [], "relaunch": []}))
    assert json.loads(done.stdout)["outcome"] == "server", done.stderr


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path: Path) -> None:
    put(tmp_path, [])
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-E", "-s", str(tmp_path / "current/bin/keeper.pyz"), "--root", str(tmp_path), "status"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, cwd="/", timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_it_ends_when_told_to_and_says_so_in_its_file(tmp_path: Path) -> None:
    pytest.importorskip("requests")
    put(tmp_path, [{"model_uid": "m", "model_name": "bce", "model_type": "embedding", "model_path": "/m"}])
    command = [sys.executable, "-E", "-s", str(tmp_path / "current/bin/keeper.pyz"), "--root", str(tmp_path), "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout
    lines = [process.stdout.readline() for _line in range(2)]
    assert "looks after release" in lines[0] and "the server is down" in lines[1]
    process.terminate()
    assert process.wait(20) == 0
    told = json.loads((tmp_path / "state/keeper.json").read_text())
    assert told["doing"] == "ended" and told["server"]["state"] == "down"


def test_it_goes_on_as_the_program_of_another_release(tmp_path: Path) -> None:
    pytest.importorskip("requests")
    put(tmp_path, [])
    command = [sys.executable, "-E", "-s", str(tmp_path / "current/bin/keeper.pyz"), "--root", str(tmp_path), "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout and "looks after" in process.stdout.readline()
    memory = io.BytesIO(keeper_app.program())
    with zipfile.ZipFile(memory, "a") as archive:
        archive.writestr("keeper/later.py", "")
    files = {
        "models.json": release.Entry("[]"),
        "server.json": release.Entry("{}"),
        "keeper.json": release.Entry(json_text({"endpoint": "http://127.0.0.1:9", "interval": 1})),
        "bin/keeper.pyz": release.Entry(data=memory.getvalue()),
    }
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    said = ""
    while release.identity(files) not in said:
        said = process.stdout.readline()
        assert said
    cmdline = Path(f"/proc/{process.pid}/cmdline").read_text()
    process.terminate()
    assert process.wait(20) == 0
    assert f"releases/{release.identity(files)}/bin/keeper.pyz" in cmdline


RIGHT = {"policy": "restore", "interval": 5.0, "grace": 0.0, "wait_timeout": 1.0, "parallel": 1, "verify": 0.0}


@pytest.mark.parametrize("told", [{}, RIGHT, {**RIGHT, "interval": 1.0}, {**RIGHT, "interval": 60.0, "verify": 9e9}])
def test_settings_that_the_keeper_can_go_by_are_taken(told: Dict[str, Any]) -> None:
    keeper_app.refuse_faults(told)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("interval", 0.5, "xinference_keeper_interval is 0.5, and has to be from 1 to 60"),
        ("interval", 61.0, "xinference_keeper_interval is 61, and has to be from 1 to 60"),
        ("interval", float("nan"), "xinference_keeper_interval is nan, and has to be from 1 to 60"),
        ("grace", -1.0, "xinference_server_keeper_grace is -1, and has to be 0 or more"),
        ("wait_timeout", 0.0, "xinference_server_keeper_wait_timeout is 0, and has to be 1 or more"),
        ("wait_timeout", float("inf"), "keeper_wait_timeout is inf, and has to be 1 or more, and finite"),
        ("parallel", 0, "xinference_server_keeper_parallel is 0, and has to be 1 or more"),
        ("verify", -600.0, "xinference_server_keeper_verify is -600, and has to be 0 or more"),
    ],
)
def test_a_number_that_it_cannot_go_by_is_refused_by_its_variable(setting: str, value: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        keeper_app.refuse_faults({**RIGHT, setting: value})


def test_all_such_numbers_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"interval is 90.*grace is -1.*parallel is 0"):
        keeper_app.refuse_faults({**RIGHT, "interval": 90.0, "grace": -1.0, "parallel": 0})
