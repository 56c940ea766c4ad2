# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts for a diagnosis are gathered whatever state a host is in, and no secret is among them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import examine as examining
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    examine_files,
    examine_server,
    release,
    server_log,
    standing,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.definition import json_text
from ansible_collections.airgap.xinference.plugins.module_utils.host.deployed import Deployed, deployed
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Answer, DockerError
from ansible_collections.airgap.xinference.plugins.module_utils.host.examine import examine
from ansible_collections.airgap.xinference.plugins.module_utils.host.known_secrets import known_secrets
from ansible_collections.airgap.xinference.plugins.module_utils.host.release import Entry
from ansible_collections.airgap.xinference.plugins.module_utils.host.yaml_text import plain_data, yaml_text
from ansible_collections.airgap.xinference.plugins.module_utils.server.log import startup

COMPOSE = Path(__file__).parent / "compose"
SECRET = "pl4nted-secret"


def native(root: Path, **environment: str) -> Deployed:
    service = {
        "name": "xinference",
        "manager": "supervisord",
        "command": ["/nowhere/bin/python", "--auth-config", "/etc/accounts.json"],
        "environment": {"XINFERENCE_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", **environment},
        "directory": str(root / "home"),
        "host": "127.0.0.1",
        "port": 9,
        "stop_timeout": 5,
    }
    files = {
        "service.json": Entry(json_text(service), 0o400),
        "server.json": Entry(json_text({"backend": "native", "gpus": []})),
        "models.json": Entry("[]\n", 0o400),
        "artifacts.json": Entry(json_text({"models": {}})),
    }
    release.make(root, files)
    release.switch(root, release.identity(files))
    (root / "home").mkdir(exist_ok=True)
    (root / "partial").mkdir(exist_ok=True)
    return deployed(root)


@pytest.mark.parametrize("name", sorted(path.stem for path in COMPOSE.glob("*.yaml")))
def test_a_compose_file_is_read_as_it_was_written(name: str) -> None:
    text = (COMPOSE / f"{name}.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert yaml_text(plain_data(text)).splitlines() == lines


@pytest.mark.parametrize("text", ["a: &x 1\n", "a:\n    b: 1\n", "- 1\nb: 2\n", "a b: c\n"])
def test_other_yaml_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        plain_data(text)


def test_a_container_is_known_by_its_project(tmp_path: Path) -> None:
    text = yaml_text(
        {
            "name": "x",
            "services": {
                "server": {
                    "environment": {"COST": "$$5", "XINFERENCE_HOME": "/root/.xinference"},
                    "ports": [{"target": 9997, "published": "8000", "host_ip": "10.0.0.1", "protocol": "tcp"}],
                    "volumes": [{"type": "bind", "source": "/data/home", "target": "/root/.xinference"}],
                }
            },
        }
    )
    (tmp_path / "current").mkdir()
    (tmp_path / "current/compose.yaml").write_text(text)
    view = {"backend": "docker", "endpoint": "http://127.0.0.1:8000", "gpus": [{"names": ["0", "GPU-a"]}]}
    (tmp_path / "current/server.json").write_text(json.dumps(view))
    seen = deployed(tmp_path)
    assert (seen.backend, seen.home, seen.addresses, seen.port) == ("docker", "/data/home", ["10.0.0.1"], 8000)
    assert seen.environment == {"COST": "$5", "XINFERENCE_HOME": "/root/.xinference"} and seen.gpus == [["0", "GPU-a"]]


def test_a_host_on_which_nothing_was_installed(tmp_path: Path) -> None:
    told = examine(tmp_path / "none")
    assert told["installed"] is False and told["problems"] == {}
    assert not (tmp_path / "none").exists()
    assert examine(tmp_path)["shipped"] is False


def test_a_server_that_never_ran(tmp_path: Path) -> None:
    native(tmp_path)
    told = examine(tmp_path)
    assert told["problems"] == {} and told["server"]["state"] == "stopped" and told["process"]["pid"] is None
    assert told["switches"] == {"release": {"HF_HUB_OFFLINE": "1"}, "running": None}
    assert told["port"]["answers"] is False and told["access"]["auth"] is None
    json.dumps(told)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("current/server.json", "not json"),
        ("current/service.json", "{}"),
        ("current/artifacts.json", "[1]"),
        ("state/launched.json", "nonsense"),
        ("run/server.json", "[]"),
        ("state/keeper.json", "{"),
    ],
)
def test_what_cannot_be_read_keeps_nothing_else_from_being_told(tmp_path: Path, name: str, content: str) -> None:
    native(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.chmod(0o600)
    path.write_text(content)
    told = examine(tmp_path)
    assert {"volumes", "integrity", "log", "port", "permissions", "models"} <= set(told)
    json.dumps(told)


def test_a_release_that_is_gone(tmp_path: Path) -> None:
    native(tmp_path)
    shutil.rmtree(tmp_path / "releases")
    told = examine(tmp_path)
    assert told["integrity"]["dangling"] and told["deployed"]["backend"] == ""


def test_no_secret_is_among_the_facts(tmp_path: Path) -> None:
    native(tmp_path, MY_PASSWORD=SECRET)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/server.log").write_text(f"Traceback (most recent call last):\nRuntimeError: {SECRET} is wrong\n")
    told = examine(tmp_path)
    assert "RuntimeError: (hidden) is wrong" in told["log"]["errors"]
    assert SECRET not in json.dumps(told)


def modes(rows: List[Dict[str, Any]]) -> Dict[str, str]:
    return {Path(row["path"]).name: row["mode"] for row in rows}


def test_rights_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_files, "_reached", lambda _place: True)
    seen = native(tmp_path)
    (tmp_path / "home").chmod(0o750)
    assert not examine_files.permissions(tmp_path, seen, os.geteuid())["readable"]
    auth = tmp_path / "home/auth"
    auth.mkdir(mode=0o700)
    for name, mode in (("auth.db", 0o644), ("jwt_secret_key", 0o600)):
        (auth / name).write_text("x")
        (auth / name).chmod(mode)
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "state").chmod(0o777)
    (tmp_path / "home").chmod(0o050)
    told = examine_files.permissions(tmp_path, seen, os.geteuid())
    assert modes(told["readable"]) == ({"auth.db": "0644"} if os.geteuid() == 0 else {})
    assert modes(told["writable"]) == {"state": "0777"} and modes(told["closed"]) == {"home": "0050"}
    assert told["home"] == "0050" and told["strangers"] == []
    (tmp_path / "home").chmod(0o750)
    others = examine_files.permissions(tmp_path, seen, os.geteuid() + 1)
    assert "home" in modes(others["strangers"]) and len(others["strangers"]) <= examine_files.TOLD


def test_a_secret_in_a_closed_directory_is_not_read_by_others(tmp_path: Path) -> None:
    seen = native(tmp_path)
    (tmp_path / "current/service.json").chmod(0o444)
    # pytest's own directories are for their owner only.
    assert examine_files.permissions(tmp_path, seen, None)["readable"] == []


def test_denials_are_those_of_the_server_and_of_a_day(tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    line = 'type=AVC msg=audit({when}.1:2): avc:  denied  {{ read }} for pid={pid} comm="{comm}" path="{path}"\n'
    log.write_text(
        line.format(when=90_000, pid=1, comm="x", path="/opt/x/models/a")
        + line.format(when=200_000, pid=1, comm="x", path="/srv/other")
        + line.format(when=200_001, pid=1, comm="x", path="/opt/x/models/a")
        + line.format(when=200_002, pid=77, comm="python", path="/etc/it")
        + line.format(when=200_003, pid=1, comm="x", path="/opt/x/models/b").replace("avc:  denied", "granted")
    )
    told = examine_files.denials(Path("/opt/x"), [77], log, now=200_010.0)
    assert told["count"] == 2 and "pid=77" in told["last"]
    assert examine_files.denials(Path("/opt/x"), [], tmp_path / "none") == {"count": 0, "last": ""}


@pytest.mark.parametrize(
    ("command", "volumes", "expected"),
    [
        (["x"], [], ""),
        (["x", "--auth-config", "/etc/a.json"], [], "/etc/a.json"),
        (["x", "--auth-config=/etc/a.json"], [], "/etc/a.json"),
        (["x", "--auth-config", "/in/a.json"], [{"source": "/out", "target": "/in"}], "/out/a.json"),
        (["x", "--auth-config", "/in.json"], [{"source": "/out.json", "target": "/in.json"}], "/out.json"),
        (["x", "--auth-config", "/elsewhere"], [{"source": "/out", "target": "/in"}], ""),
        (["x", "--auth-config"], [], ""),
    ],
)
def test_the_file_of_accounts(command: List[str], volumes: List[Dict[str, str]], expected: str) -> None:
    assert examine_server.auth_config(Deployed(command=command, volumes=volumes)) == expected


def test_accounts_of_the_manual_are_known(tmp_path: Path) -> None:
    config = tmp_path / "auth.json"
    content: Dict[str, Any] = {
        "auth_config": {"algorithm": "HS256", "secret_key": "own", "token_expire_in_minutes": 30},
        "user_config": [{"username": "u", "password": "secret1", "permissions": ["admin"], "api_keys": ["sk-mine"]}],
    }
    config.write_text(json.dumps(content))
    seen = Deployed(command=["x", "--auth-config", str(config)])
    assert examine_server.access(seen)["example"] is True
    assert known_secrets(tmp_path, seen) == {"own", "secret1", "sk-mine"}
    content["user_config"][0]["password"] = "another one"
    config.write_text(json.dumps(content))
    assert examine_server.access(seen)["example"] is False


LOG = """2026-11-20 10:08:48,054 xinference.core.worker 12 INFO    Starting
2026-11-20 10:08:49,054 xinference.core.worker 12 ERROR   Cannot do it, kwargs: {'token': 'x'}
2026-11-20 10:08:49,060 xinference.core.worker 12 ERROR   Cannot do it
Traceback (most recent call last):
OSError: [Errno 28] No space left on device
2026-11-20 10:08:50,054 uvicorn 12 INFO    Uvicorn running on http://127.0.0.1:9997
2026-11-20 10:09:50,054 xinference.core.worker 12 ERROR   a request was wrong
"""


def test_errors_of_the_start_and_not_those_of_requests() -> None:
    told = startup(LOG)
    assert told["up"] and "No space left" in told["errors"]
    assert "a request was wrong" not in told["errors"] and "kwargs" not in told["errors"]
    down = startup(LOG.replace("Uvicorn running", "Uvicorn walking"))
    assert not down["up"] and "a request was wrong" in down["errors"]


def test_only_the_last_start_counts() -> None:
    before = LOG + "The server ended with code -9 after 90.9 s\n"
    ended = "The server ended with code 3 after 12.2 s\n"
    told = startup(f"{before}[Errno 98] Address already in use\n{ended}")
    assert told == {"errors": "[Errno 98] Address already in use", "up": False}
    assert startup(f"{before}Starting\n{ended}") == {"errors": "", "up": False}
    assert "No space left" in startup(f"{ended}{LOG}")["errors"]


def test_a_program_that_dies_before_it_can_log() -> None:
    text = "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'xinference'\n"
    assert "No module named" in startup(text)["errors"]
    assert startup("Starting\nall is well\n") == {"errors": "", "up": False}


INSPECTED: Dict[str, Any] = {
    "Id": "c0ffee" * 10,
    "Name": "/x-server-1",
    "RestartCount": 0,
    "State": {
        "Status": "running",
        "Running": True,
        "Pid": 1,
        "StartedAt": "2026-11-20T10:08:11.75Z",
        "Health": {"Status": "healthy", "Log": []},
    },
    "Config": {"Env": ["HF_HUB_OFFLINE=0", f"SITE_TOKEN={SECRET}"]},
    "NetworkSettings": {"Ports": {"9997/tcp": [{"HostIp": "0.0.0.0", "HostPort": "9"}]}},
}


class FakeDocker:
    """An engine that answers as a recorded one did; `answers` go over what it says."""

    answers: Dict[str, Answer] = {}
    inspected: Any = INSPECTED

    def __init__(self, _address: Any = None) -> None:
        pass

    def container(self, _labels: Any) -> Any:
        return self.inspected

    def info(self) -> Dict[str, Any]:
        return {"DockerRootDir": "/"}

    def image_id(self, names: List[str]) -> Any:
        return names[0] if "image" not in self.answers else None

    def ask(self, *words: str, **_options: Any) -> Answer:
        return self.answers.get(words[0], Answer(0, "", ""))

    def inside(self, _container: str, *words: str) -> Answer:
        return self.answers.get(words[0], Answer(0, "", ""))


@pytest.fixture
def containered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose server runs in a container of the fake engine."""
    for module in (examining, standing, server_log):
        monkeypatch.setattr(module, "Docker", FakeDocker)
    monkeypatch.setattr(FakeDocker, "answers", {})
    monkeypatch.setattr(FakeDocker, "inspected", INSPECTED)
    for name in ("partial", "models/bge-m3", "home"):
        (tmp_path / name).mkdir(parents=True)
    server = {
        "environment": {"HF_HUB_OFFLINE": "1", "XINFERENCE_HOME": "/root/.xinference"},
        "ports": [{"target": 9997, "published": "9", "host_ip": "0.0.0.0"}],
        "volumes": [
            {"type": "bind", "source": str(tmp_path / "home"), "target": "/root/.xinference"},
            {"type": "bind", "source": str(tmp_path / "models"), "target": "/models", "read_only": True},
        ],
    }
    view: Dict[str, Any] = {"backend": "docker", "project": "x", "service": "server", "image": "sha256:1"}
    view.update(endpoint="http://127.0.0.1:9", gpus=[{"index": 0, "names": ["0", "GPU-a"]}])
    files = {
        "compose.yaml": Entry(yaml_text({"name": "x", "services": {"server": server}})),
        "server.json": Entry(json_text(view)),
        "models.json": Entry("[]\n", 0o400),
        "artifacts.json": Entry(json_text({"models": {}})),
    }
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    return tmp_path


def test_a_container_is_looked_at(containered: Path) -> None:
    FakeDocker.answers["nvidia-smi"] = Answer(0, "GPU 0: NVIDIA L40S (UUID: GPU-a)\n", "")
    told = examine(containered)
    assert told["problems"] == {} and told["container"] and told["image"] and told["unseen"] == []
    assert told["server"]["state"] == "running" and told["process"]["pid"] == 1 and told["process"]["status"] == ""
    assert told["switches"] == {"release": {"HF_HUB_OFFLINE": "1"}, "running": {"HF_HUB_OFFLINE": "0"}}
    assert told["port"]["bound"] == ["0.0.0.0"] and told["gpus"]["lost"] == []
    assert SECRET not in json.dumps(told)


def test_a_container_that_lost_its_gpus_and_its_models(containered: Path) -> None:
    FakeDocker.answers["nvidia-smi"] = Answer(255, "", "Failed to initialize NVML: Unknown Error")
    FakeDocker.answers["sh"] = Answer(0, "/models/bge-m3\n", "")
    FakeDocker.answers["image"] = Answer(1, "", "")
    told = examine(containered)
    assert told["gpus"]["lost"] == ["0"] and "NVML" in told["gpus"]["problem"]
    assert told["unseen"] == ["/models/bge-m3"] and told["image"] is False


def test_a_container_that_ended_tells_why(containered: Path) -> None:
    state = {"Status": "exited", "Running": False, "ExitCode": 137, "OOMKilled": True}
    FakeDocker.inspected = {**INSPECTED, "State": state}
    FakeDocker.answers["logs"] = Answer(0, "Traceback (most recent call last):\nRuntimeError: odd\n", "")
    told = examine(containered)
    assert told["process"]["pid"] is None and "killed for want of memory" in told["process"]["status"]
    assert "RuntimeError: odd" in told["log"]["errors"]
    assert told["switches"]["running"] is None and told["unseen"] == []


def test_an_engine_that_is_down_is_told(containered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(_self: Any, _labels: Any) -> Any:
        raise DockerError("The Docker Engine cannot be asked for its containers: Cannot connect")

    monkeypatch.setattr(FakeDocker, "container", down)
    told = examine(containered)
    assert "Cannot connect" in told["problems"]["container"] and not told["container"]
    assert told["deployed"]["backend"] == "docker" and told["volumes"]


def test_files_that_somebody_changed_are_named(tmp_path: Path) -> None:
    native(tmp_path)
    (tmp_path / "current/models.json").chmod(0o600)
    (tmp_path / "current/models.json").write_text('["another"]')
    told = examine(tmp_path)
    assert any(one.startswith("models.json has 11 bytes instead of") for one in told["integrity"]["changed"])
