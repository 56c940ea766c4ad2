# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program that runs a native server, with a small program in the server's place, and the plans around it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    definition,
    native_ctl,
    native_run,
    native_unit,
    release,
    service,
)

# Like Xinference, it has a worker in a session of its own, which does not end with it.
SERVER = """
import os, subprocess, sys, time
print("environment:", sorted(os.environ), flush=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
time.sleep(float(os.environ["LIVES"]))
sys.exit(7)
"""
KEEPER = "import time; print('kept', flush=True); time.sleep(60)"


def until(condition: Callable[[], Any], limit: float = 60.0) -> Any:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def deploy(root: Path, keeper: bool = False, **environment: str) -> Dict[str, Any]:
    """Put a release in force whose server is the small program, and its keeper another one."""
    wanted = {
        "name": "xinference",
        "manager": "supervisord",
        "command": [sys.executable, "-c", SERVER],
        "environment": {"LANG": "C.UTF-8", "LIVES": "60", **environment},
        "directory": str(root),
        "host": "127.0.0.1",
        "port": 9,
        "stop_timeout": 5,
    }
    files = definition.files(root, wanted, [], {}, (), {"bin/keeper.pyz": release.Entry(KEEPER)} if keeper else None)
    release.make(root, files)
    release.switch(root, release.identity(files))
    (root / "run").mkdir(exist_ok=True)
    return wanted


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started = []

    def start() -> subprocess.Popen[bytes]:
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "run/server.json").unlink()
        command = [str(tmp_path / "current/bin/run"), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(process)
        until((tmp_path / "run/server.json").exists)
        until(lambda: len(list(native_run.family(tmp_path))) == 2)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
    native_run.sweep(tmp_path)


def test_the_server_gets_exactly_the_environment_of_its_release(tmp_path: Path, runner: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://nowhere:1")
    deploy(tmp_path, WANTED="1")
    process = runner()
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0].decode()
    assert f"environment: {['LANG', 'LIVES', 'WANTED', native_run.MARK, native_run.SOCKETS]}" in printed


def test_a_signal_ends_the_server_and_its_workers(tmp_path: Path, runner: Any) -> None:
    deploy(tmp_path)
    process = runner()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert list(native_run.family(tmp_path)) == []
    assert not list(Path("/tmp").glob(f"xinference-{hashlib.sha256(os.fsencode(tmp_path / 'run')).hexdigest()[:12]}"))
    assert native_ctl.Native(tmp_path).last_exit()["asked"] is True


def test_a_server_that_dies_takes_its_workers_along_and_counts_as_failed(tmp_path: Path, runner: Any) -> None:
    deploy(tmp_path)
    process = runner()
    os.kill(native_ctl.Native(tmp_path).state().pid or 0, signal.SIGKILL)
    assert process.wait(20) == 1
    assert list(native_run.family(tmp_path)) == []
    assert native_ctl.Native(tmp_path).last_exit()["code"] == -signal.SIGKILL


def test_what_an_earlier_server_left_is_ended_before_the_next_starts(tmp_path: Path, runner: Any) -> None:
    deploy(tmp_path)
    first = runner()
    first.kill()
    first.wait()
    left = set(native_run.family(tmp_path))
    assert len(left) == 2
    assert not native_ctl.Native(tmp_path).state().active
    runner()
    until(lambda: not left & set(native_run.family(tmp_path)))


@pytest.fixture
def supervisord(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Processes that look like our supervisord and do nothing."""
    started = []

    def start(config: str = "supervisord.conf") -> subprocess.Popen[bytes]:
        words = ["supervisor.supervisord", "-c", str(tmp_path / "run" / config)]
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
        started.append(process)
        until(lambda: b"supervisord" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_every_supervisord_of_ours_is_found_and_stopped_without_its_pid_file(tmp_path: Path, supervisord: Any) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    ours, other = [supervisord(), supervisord()], supervisord("other.conf")
    assert sorted(native.supervisors()) == sorted(process.pid for process in ours)
    with pytest.raises(native_ctl.ServiceError, match="already"):
        native.start()
    assert native.stop()
    assert [process.wait(5) for process in ours] == [-signal.SIGTERM] * 2
    assert not native.managed and other.poll() is None
    # The keeper learns that it was somebody's wish.
    noted = tmp_path / native_ctl.ASKED
    assert abs(json.loads(noted.read_text())["at"] - time.time()) < 60 and noted.stat().st_mode & 0o777 == 0o640


def test_stopping_ends_a_server_whose_manager_was_killed(tmp_path: Path, runner: Any) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    process = runner()
    assert native.runners() == [process.pid]
    step = service.plan(native, "started", native.state(), native.digest)
    assert (step.action, step.reason) == ("restart", "nothing looks after it any more")
    assert native.stop()
    assert process.wait(5) == 0 and not native.runners() and not list(native_run.family(tmp_path))


def test_a_server_with_two_managers_is_restarted(tmp_path: Path, runner: Any, supervisord: Any) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    runner()
    supervisord()
    assert service.plan(native, "started", native.state(), native.digest).action == "none"
    supervisord()
    assert service.plan(native, "started", native.state(), native.digest).action == "restart"


def test_whoever_comes_second_waits(tmp_path: Path) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    with native_ctl.locked(tmp_path):
        second = subprocess.Popen([str(tmp_path / "current/bin/xinferencectl"), "stop"])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.7)
        assert native.stop() is False  # the holder itself does not wait
    assert second.wait(10) == 0


def test_plans_follow_what_runs_and_not_what_happened(tmp_path: Path, runner: Any, supervisord: Any) -> None:
    deploy(tmp_path, ONE="1")
    supervisord()
    native = native_ctl.Native(tmp_path)
    assert service.plan(native, "started", native.state(), native.digest).action == "start"
    runner()
    assert service.plan(native, "started", native.state(), native.digest).action == "none"
    assert service.plan(native, "restarted", native.state(), native.digest).action == "restart"
    assert service.plan(native, "stopped", native.state(), native.digest).action == "stop"
    deploy(tmp_path, ONE="2")
    native = native_ctl.Native(tmp_path)
    step = service.plan(native, "started", native.state(), native.digest)
    assert (step.action, step.reason) == ("restart", "environment ONE changed")


def test_a_server_that_dies_while_it_is_waited_for_is_reported_with_its_log(tmp_path: Path, runner: Any) -> None:
    deploy(tmp_path, LIVES="0.5")
    native = native_ctl.Native(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/server.log").write_text("first\nthe reason\n")
    began = time.time()
    runner()
    with pytest.raises(service.NotHealthy, match="ended with code 7") as caught:
        service.wait(native, 20, since=began)
    assert caught.value.log == "first\nthe reason"


def test_stopping_what_does_not_run_does_nothing_and_waits_for_nothing(tmp_path: Path) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    step = service.plan(native, "stopped", native.state(), native.digest)
    began = time.monotonic()
    service.carry_out(native, step, 60)
    assert step.action == "none" and time.monotonic() - began < 20


def test_a_root_whose_path_only_begins_alike_is_another_server(tmp_path: Path) -> None:
    # Its environment shows only once it runs: it says so before we look.
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(30)"]
    environment = {native_run.MARK: f"{tmp_path}2"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        mine, other = list(native_run.family(tmp_path)), list(native_run.family(Path(f"{tmp_path}2")))
        process.kill()
    assert (mine, other) == ([], [process.pid])


def test_an_answer_of_another_program_is_not_waited_for(tmp_path: Path) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.05,))
        thread.start()
        native.service["port"] = other.server_port
        try:
            assert service.answers(service.endpoint(native.service) + "/status")
            with pytest.raises(service.NotHealthy, match="does not answer"):
                service.wait(native, 0.3, since=time.time())
        finally:
            other.shutdown()
            thread.join()


class Quiet(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_words: Any) -> None:
        """Say nothing."""


def test_another_program_on_the_port_does_not_pass_for_our_server(tmp_path: Path) -> None:
    wanted = deploy(tmp_path)
    assert not service.owns(native_ctl.Native(tmp_path), wanted["port"])


def test_without_a_release_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(native_ctl.ServiceError, match="no release in force"):
        native_ctl.Native(tmp_path)


def test_supervisord_gets_no_socket_where_its_path_would_be_too_long(tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    deploy(tmp_path)
    deploy(deep)
    assert len(str(tmp_path)) > 80 or "unix_http_server" in native_ctl.Native(tmp_path).supervisor_config()
    assert "unix_http_server" not in native_ctl.Native(deep).supervisor_config()


def test_sockets_get_a_private_place_that_is_short_enough(tmp_path: Path) -> None:
    assert native_run.socket_directory(Path("/opt/xinference")) == "/opt/xinference/run"
    deep = tmp_path / ("deep" * 30)
    place = Path(native_run.socket_directory(deep))
    assert len(str(place)) + native_run.SOCKETS_BELOW <= 107
    assert native_run.socket_directory(deep) == str(place)
    assert place.stat().st_mode & 0o777 == 0o700
    place.rmdir()


def test_the_keeper_is_a_program_of_its_own_for_both_managers(tmp_path: Path) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    assert (
        not native.keeps
        and "program:xinference-keeper" not in native.supervisor_config()
        and "bin/run" in native.unit()
    )
    before = native.digest
    deploy(tmp_path, keeper=True)
    native = native_ctl.Native(tmp_path)
    assert native.keeps and native.digest == before, "a server is not restarted for it"
    assert f'[program:xinference-keeper]\ncommand="{tmp_path}/current/bin/keeper" "run"' in native.supervisor_config()
    assert f'ExecStart="{tmp_path}/current/bin/keeper" "run"' in native.keeper_unit()
    assert "PartOf" not in native.keeper_unit() and "Restart=always" in native.keeper_unit()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started = []

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([str(tmp_path / "current/bin/keeper"), "run"], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout and process.stdout.readline() == b"kept\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_keeper_does_not_end_with_the_server_and_is_ended_when_all_is_stopped(
    tmp_path: Path, runner: Any, keeper: Any
) -> None:
    deploy(tmp_path, keeper=True)
    runner()
    kept = keeper()
    native = native_ctl.Native(tmp_path)
    assert native.keepers() == [kept.pid] and kept.pid not in native_run.family(tmp_path)
    native_run.sweep(tmp_path)
    assert kept.poll() is None
    assert native.stop() and kept.wait(10) == -signal.SIGTERM
    kept = keeper()
    assert service.plan(native, "stopped", native.state(), native.digest).action == "stop"
    assert native.stop() and kept.wait(10) == -signal.SIGTERM and not native.stop()


def test_the_keeper_comes_and_goes_without_a_restart_of_the_server(
    tmp_path: Path, runner: Any, supervisord: Any, keeper: Any, monkeypatch: Any
) -> None:
    deploy(tmp_path, keeper=True)
    supervisord()
    runner()
    native = native_ctl.Native(tmp_path)
    monkeypatch.setattr(native_ctl, "SOCKET_LIMIT", 1000)
    step = service.plan(native, "started", native.state(), native.digest)
    assert (step.action, step.keeper, step.changes) == ("none", "start", True)
    keeper()
    step = service.plan(native, "started", native.state(), native.digest)
    assert (step.action, step.keeper, step.changes) == ("none", "none", False)
    step = service.plan(native, "started", native.state(), native.digest, keeps=False)
    assert (step.action, step.keeper) == ("none", "stop")
    monkeypatch.setattr(native_ctl, "SOCKET_LIMIT", 10)
    step = service.plan(native, "started", native.state(), native.digest, keeps=False)
    assert step.action == "restart" and "no socket" in step.reason


def test_managers_get_paths_with_odd_characters_right(tmp_path: Path) -> None:
    root = tmp_path / "100% of it"
    root.mkdir()
    deploy(root)
    native = native_ctl.Native(root)
    assert f'"{root}/current/bin/run"'.replace("%", "%%") in native.unit()
    assert f'"{root}/current/bin/run"'.replace("%", "%%") in native.supervisor_config()


def test_a_server_under_systemd_is_confined(tmp_path: Path) -> None:
    deploy(tmp_path)
    native = native_ctl.Native(tmp_path)
    native.service.update(user="xinference", directory="/opt/x/home", writable=["/data/100% of it"], port=9997)
    unit = native.unit().splitlines()
    written = f'"/opt/x/home" "{tmp_path}/run" "/data/100%% of it"'
    assert "User=xinference" in unit and "CapabilityBoundingSet=" in unit and f"ReadWritePaths={written}" in unit
    assert f"ExecStartPre=+/bin/chown --recursive --no-dereference xinference: {written}" in unit
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "PrivateTmp=yes", "UMask=0027"):
        assert line in unit, line
    # GPUs are devices, and code is compiled while the server runs.
    for word in ("PrivateDevices", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"):
        assert word not in "".join(unit)
    keeper = native.keeper_unit().splitlines()
    assert "CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_KILL CAP_SYS_PTRACE" in keeper
    assert f'ReadWritePaths="{tmp_path}/state"' in keeper and "NoNewPrivileges=yes" in keeper
    native.service["port"] = 443
    assert "AmbientCapabilities=CAP_NET_BIND_SERVICE" in native.unit()
    del native.service["user"]
    assert "User=root" in native.unit()


def test_home_directories_are_hidden_unless_something_needed_lies_there() -> None:
    assert native_unit.home(["/opt/xinference/run", "/usr/bin/python3"]) == "ProtectHome=yes\n"
    assert native_unit.home(["/opt/xinference/run", "/root/.pyenv/bin/python"]) == "ProtectHome=read-only\n"
    assert native_unit.home(["/homework"]) == "ProtectHome=yes\n" and "read" in native_unit.home(["/home"])


def test_devices_of_gpus_are_made_before_the_server_starts() -> None:
    assert native_unit.devices("/usr/bin/nvidia-modprobe") == "ExecStartPre=+-/usr/bin/nvidia-modprobe -u -c=0\n"
    assert native_unit.devices("") == ""


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """It is read only; no systemd is started."""
    deploy(tmp_path, keeper=True)
    unit = tmp_path / "xinference.service"
    for text in (native_ctl.Native(tmp_path).unit(), native_ctl.Native(tmp_path).keeper_unit()):
        unit.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    assert native_ctl.tail(path, 2) == "line 998\nline 999"
    assert native_ctl.tail(path, 9, limit=9) == "line 999"
    assert native_ctl.tail(tmp_path / "none", 5) == ""


def test_the_program_answers_people(tmp_path: Path) -> None:
    deploy(tmp_path)
    asked = subprocess.run([str(tmp_path / "current/bin/xinferencectl"), "status"], stdout=subprocess.PIPE, check=False)
    assert (asked.returncode, asked.stdout) == (3, b"not running\n")


@pytest.mark.parametrize("verb", ["status", "logs"])
def test_a_reader_that_has_seen_enough_ends_the_program_quietly(tmp_path: Path, verb: str) -> None:
    deploy(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/server.log").write_text("a line\n" * 100)
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(tmp_path / "current/bin/xinferencectl"), verb]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_the_definition_is_json_that_people_can_read(tmp_path: Path) -> None:
    wanted = deploy(tmp_path)
    assert json.loads((tmp_path / "current/service.json").read_text()) == wanted
