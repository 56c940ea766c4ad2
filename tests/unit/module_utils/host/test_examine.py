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
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    compose,
    examine_files,
    examine_server,
    release,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.definition import json_text
from ansible_collections.airgap.xinference.plugins.module_utils.host.deployed import Deployed, deployed
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
                    "environment": {"COST": "$$5"},
                    "ports": [{"target": 9997, "published": "8000", "host_ip": "10.0.0.1", "protocol": "tcp"}],
                    "volumes": [{"type": "bind", "source": "/data/home", "target": compose.HOME}],
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
    assert seen.environment == {"COST": "$5"} and seen.gpus == [["0", "GPU-a"]]


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


def test_a_program_that_dies_before_it_can_log() -> None:
    text = "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'xinference'\n"
    assert "No module named" in startup(text)["errors"]
    assert startup("Starting\nall is well\n") == {"errors": "", "up": False}
