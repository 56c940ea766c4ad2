# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers that start closed, with a stranger at the door from the beginning, and the keys of their clients."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plays
import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.host import guarding
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import AccessRefused
from doors import Recorder, run_module
from servers import NEW, OLD, Server
from sieges import ADMIN, GIVEN_KEY, SECRET, besieged, guard_in, listening_to, nobody_got_in


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A 4.1.0 server that was closed from the beginning."""
    keys = [{"name": "given", "key": GIVEN_KEY}]
    with besieged(NEW, tmp_path_factory.mktemp("closed"), api_keys=keys) as found:
        yield found


def test_nobody_gets_in_while_it_starts(closed: tuple[Server, dict[str, Any]]) -> None:
    server, report = closed
    nobody_got_in(report)
    assert [one["username"] for one in server.client(**ADMIN).users()] == [ADMIN["username"]]
    assert "Setup token" not in server.log
    assert server.client(api_key=GIVEN_KEY).models() == {}


def test_secrets_reach_the_server_and_not_the_environment_that_it_was_started_with(
    closed: tuple[Server, dict[str, Any]],
) -> None:
    server, _report = closed
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in server.pids()}
    assert SECRET.encode() not in environments[server.process.pid]
    assert any(f"SITE_WORD={SECRET}".encode() in one for one in environments.values())
    words = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in environments)
    assert SECRET.encode() not in words + server.log.encode() and ADMIN["password"].encode() not in words


def test_its_processes_hear_each_other_alone(closed: tuple[Server, dict[str, Any]]) -> None:
    server, _report = closed
    assert listening_to(server) == []
    assert listening_to(server, guarding.derived("seed", "actors")) != []


def test_before_3_0_it_is_a_file(tmp_path: Path) -> None:
    with besieged(OLD, tmp_path, api_keys=[{"name": "rag", "key": GIVEN_KEY}]) as (server, report):
        nobody_got_in(report)
        assert server.client(**ADMIN).version() == OLD
        assert listening_to(server) == []
        assert listening_to(server, guarding.derived("seed", "actors")) != []
        assert server.client(api_key=GIVEN_KEY).models() == {}
        with pytest.raises(AccessRefused):
            server.client(api_key=GIVEN_KEY).launch({"model_uid": "a", "model_name": "b", "model_type": "embedding"})


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Starts a small program in the place of the server, by its own interpreter; returns its code and what it said."""
    try:
        venv = servers.environment(NEW)
    except servers.Missing as error:
        pytest.skip(str(error))
    program = tmp_path / "bin/xinference-local"
    program.parent.mkdir()
    program.write_text(f"#!{venv}/bin/python\nimport os, sys\nprint('started', sys.argv[1:], sorted(os.environ))\n")
    program.chmod(0o755)

    def begin(**accounts: Any) -> tuple[int, str]:
        place = guard_in(tmp_path / "release", **accounts)
        environment = {"XINFERENCE_HOME": str(tmp_path / "home"), "PATH": f"{program.parent}:/usr/bin:/bin"}
        command = [sys.executable, str(place / "bin/guarded.py"), "xinference-local", "--port", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return begin


def passwords(home: Path, *tried: str) -> list[bool]:
    """Which passwords the administrator has, by the server's own code."""
    script = f"""
import sys
from xinference.api.oauth2.advanced.database import Database
from xinference.api.oauth2.advanced.crypto import verify_password
user = Database({str(home / "auth/auth.db")!r}).get_user_by_username({ADMIN["username"]!r})
print([verify_password(word, user["password_hash"]) for word in sys.argv[1:]])
"""
    command = [str(servers.environment(NEW) / "bin/python"), "-c", script, *tried]
    return list(json.loads(subprocess.run(command, capture_output=True, check=True).stdout.lower()))


def test_the_account_is_made_once_reset_when_asked_for_and_made_again_after_a_loss(
    start: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, said = start()
    assert code == 0 and "Made the administrator" in said and "started ['--port', '1']" in said
    assert "'SITE_WORD'" in said and SECRET not in said and ADMIN["password"] not in said
    assert (tmp_path / "home/auth").stat().st_mode & 0o777 == 0o700
    code, said = start(password="another-pass-3")
    assert code == 0 and "administrator" not in said
    assert passwords(tmp_path / "home", ADMIN["password"], "another-pass-3") == [True, False]
    assert "Reset the administrator" in start(password="another-pass-3", reset=True)[1]
    assert passwords(tmp_path / "home", ADMIN["password"], "another-pass-3") == [False, True]
    assert "administrator" not in start(password="another-pass-3", reset=True)[1]
    shutil.rmtree(tmp_path / "home")
    assert "Made the administrator" in start()[1]


def test_what_cannot_be_closed_is_not_started(start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/auth").write_text("no directory")
    code, said = start()
    assert code == 1 and "started" not in said.replace("was not started", "")
    assert "The server was not started, as it would not be closed: the accounts cannot be made" in said


def test_accounts_are_made_changed_and_removed_and_the_last_administrator_stays(
    closed: tuple[Server, dict[str, Any]],
) -> None:
    server, _report = closed

    def ask(check: bool = False, **options: Any) -> dict[str, Any]:
        return run_module("xinference_account", {"endpoint": server.endpoint, **ADMIN, **options}, check)[0]

    assert "needs new_password" in ask(name="viewer")["msg"]
    assert "8 characters" in ask(name="viewer", new_password="short")["msg"]
    assert ask(name="viewer", new_password="first-word-4")["action"] == "create"
    assert ask(name="viewer", new_password="first-word-4")["changed"] is False
    assert ask(name="viewer", permissions=["models:list"])["changes"] == ["permissions"]
    second: dict[str, Any] = {
        "name": "viewer",
        "permissions": ["models:list"],
        "new_password": "second-word-5",
        "reset": True,
    }
    assert ask(check=True, **second)["changes"] == ["password"] == ask(**second)["changes"]
    again = ask(**second)
    assert again["changed"] is False and again["diff"]["before"] == again["diff"]["after"]
    # Wrong ones are tried once each, in a row of runs that bans nobody.
    for word in ("third-word-6", "fourth-word-7", "second-word-5"):
        assert ask(**{**second, "new_password": word})["changed"]
    assert server.client(username="viewer", password="second-word-5").models() == {}
    for wanted in ({"state": "absent"}, {"permissions": ["models:list"]}):
        assert "last administrator" in ask(name=ADMIN["username"], **wanted)["msg"]
    assert ask(name="viewer", state="absent")["action"] == "remove"
    assert ask(name="viewer", state="absent")["changed"] is False


class Site:
    """The playbook that gives clients their keys, run against a server."""

    def __init__(self, server: Server, place: Path) -> None:
        self.server, self.place, self.files = server, place, place / "keys/one"
        self.said = ""

    def play(self, *more: str, expect: int = 0, **variables: Any) -> int:
        """Run the playbook; returns how many tasks changed something. What it printed is in `said`."""
        settings = {
            "xinference_endpoint": self.server.endpoint,
            "xinference_auth": True,
            "xinference_username": ADMIN["username"],
            "xinference_password": ADMIN["password"],
            "xinference_api_key_directory": str(self.place / "keys"),
            **variables,
        }
        inventory = {"xinference": {"hosts": {"one": {"ansible_connection": "local", **settings}}}}
        (self.place / "hosts.json").write_text(json.dumps(inventory))
        words = ["-vvv", "--diff", *more, "-i", str(self.place / "hosts.json"), "playbooks/access.yml"]
        done = plays.run(*words, environment={"ANSIBLE_PYTHON_INTERPRETER": sys.executable})
        self.said = done.stdout
        assert done.returncode == expect, self.said
        return self.said.count("\nchanged: [one]")

    def key(self, name: str) -> str:
        path = self.files / name
        assert path.stat().st_mode & 0o777 == 0o600
        return path.read_text().strip()

    def opens(self, value: str) -> bool:
        """Whether a key is accepted."""
        try:
            return self.server.client(api_key=value).models() == {}
        except AccessRefused:
            return False


def test_clients_get_keys_that_are_rotated_and_revoked_by_name(
    closed: tuple[Server, dict[str, Any]], tmp_path: Path
) -> None:
    site = Site(closed[0], tmp_path)
    wanted: list[Any] = ["rag", {"name": "chat"}]
    assert site.play("--check", xinference_api_keys=wanted, expect=0) == 0 and not site.files.exists()
    assert site.play(xinference_api_keys=wanted) == 2
    rag, chat = site.key("rag"), site.key("chat")
    assert site.opens(rag) and site.opens(chat) and rag not in site.said and chat not in site.said
    assert ADMIN["password"] not in site.said
    assert site.play(xinference_api_keys=wanted) == 0
    (site.files / "chat").unlink()
    assert site.play(xinference_api_keys=wanted) == 1 and site.key("chat") == chat
    assert site.play(xinference_api_keys=wanted, xinference_rotate_keys="rag") == 1
    other = site.key("rag")
    assert site.opens(other) and not site.opens(rag) and site.opens(chat) and other not in site.said
    gone = ["rag", {"name": "chat", "state": "absent"}]
    assert site.play(xinference_api_keys=gone) == 1
    assert not site.opens(chat) and site.opens(other) and not (site.files / "chat").exists()
    found, _seconds = run_module("xinference_api_key_info", {"endpoint": site.server.endpoint, **ADMIN})
    assert [one["name"] for one in found["keys"]] == ["given", "rag"] and other not in json.dumps(found)


def test_a_wrong_password_is_tried_once_for_all_keys(closed: tuple[Server, dict[str, Any]], tmp_path: Path) -> None:
    site = Site(closed[0], tmp_path)
    with Recorder(site.server.endpoint) as recorder:
        wrong = {"xinference_endpoint": recorder.endpoint, "xinference_password": "not-this-one"}
        site.play(xinference_api_keys=["a", "b", "c"], expect=2, **wrong)
        assert [line for line in recorder.lines if line.endswith((" 401", " 403"))] == ["POST /token 401"]
    assert "refused the login" in site.said and "not-this-one" not in site.said


def test_what_cannot_be_done_is_refused_at_once(closed: tuple[Server, dict[str, Any]], tmp_path: Path) -> None:
    site = Site(closed[0], tmp_path)
    wrong = {"xinference_api_keys": ["../up", "a", "a"], "xinference_rotate_keys": ["b"], "xinference_password": ""}
    site.play(expect=2, **wrong)
    for part in (
        "letters and digits",
        "names a key twice",
        "not in `xinference_api_keys`: b",
        "(`xinference_auth`) needs",
    ):
        assert part in site.said
