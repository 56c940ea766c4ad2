# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program that becomes the server, with small programs and a small Xinference in the place of the real ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    definition,
    guarded,
    guarding,
    native_run,
    release,
)

ADMIN = {"username": "root", "password": "verysecret-1"}
PROGRAM = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
# Keeps its accounts in a JSON file; the same calls as Xinference 3.0 and later.
DATABASE = """
import json
from pathlib import Path
class Database:
    def __init__(self, path):
        self.path = Path(path)
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else []
    def save(self):
        self.path.write_text(json.dumps(self.rows))
    def get_user_by_username(self, name, source):
        return next((row for row in self.rows if row["username"] == name), None)
    def list_users(self):
        return self.rows
    def create_first_user(self, name, hashed, granted):
        return None if self.rows else self.create_user(name, hashed, permissions=granted)
    def create_user(self, name, hashed, permissions):
        made = {"id": len(self.rows) + 1, "username": name, "password_hash": hashed, "enabled": 1}
        self.rows.append({**made, "permissions": permissions})
        self.save()
        return made["id"]
    @property
    def keys(self):
        return self.path.with_name("keys.json")
    def list_api_keys(self):
        return json.loads(self.keys.read_text()) if self.keys.exists() else []
    def delete_api_key(self, number):
        self.keys.write_text(json.dumps([key for key in self.list_api_keys() if key["id"] != number]))
    def create_api_key(self, **fields):
        found = self.list_api_keys()
        for key in found:
            assert key["key_hash"] != fields["key_hash"] and (key["name"] or "").lower() != fields["name"].lower()
        number = 1 + max([key["id"] for key in found], default=0)
        self.keys.write_text(json.dumps([*found, {"id": number, **fields}]))
    def set_user_permissions(self, number, permissions):
        self.rows[number - 1]["permissions"] = permissions
        self.save()
    def update_user(self, number, **fields):
        self.rows[number - 1].update(fields)
        self.save()
    def update_password_and_revoke_tokens(self, number, hashed):
        self.update_user(number, password_hash=hashed)
"""
CRYPTO = """
def sha256_hex(word):
    return "#" + word
def derive_encryption_key(word):
    return word
def aes_encrypt(word, key):
    return (key + word[::-1]).encode()
def get_password_hash(word):
    return word[::-1]
def verify_password(word, hashed):
    return word[::-1] == hashed
"""


class Place:
    """A release's private files, a program, and a Xinference."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.packages, self.home = directory, directory / "packages", directory / "home"
        self.program = directory / "serve"
        self.program.write_text(PROGRAM)
        self.program.chmod(0o755)

    def package(self, files: Dict[str, str]) -> None:
        """Put modules into the Xinference."""
        for name, text in {"__init__.py": "", **files}.items():
            path = self.packages / "xinference" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def with_database(self) -> None:
        own = "api/oauth2/advanced"
        constants = f"XINFERENCE_AUTH_DB_PATH = {str(self.home / 'auth/auth.db')!r}\n"
        constants += "def get_auth_encryption_key(): return 'k'\n"
        service = "INITIAL_ADMIN_PERMISSIONS = ['admin', 'models:read']\n"
        found = {"database.py": DATABASE, "crypto.py": CRYPTO, "auth_service.py": service}
        inits = {f"{place}/__init__.py": "" for place in ("api", "api/oauth2", own)}
        self.package({"constants.py": constants, **inits, **{f"{own}/{name}": text for name, text in found.items()}})

    def accounts(self) -> Any:
        return json.loads((self.home / "auth/auth.db").read_text())

    def start(self, secrets: Optional[Dict[str, str]] = None, **accounts: Any) -> Tuple[int, str]:
        """The code and the output of the program, started through `guarded`."""
        files = guarding.files(secrets or {}, {**ADMIN, **accounts} if accounts != {"none": True} else {}, "seed")
        for name, entry in files.items():
            path = self.directory / "release" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(entry.text)
            path.chmod(entry.mode)
        command = [sys.executable, str(self.directory / "release/bin/guarded.py"), str(self.program), "--port", "1"]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.packages), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        return done.returncode, done.stdout.decode()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_program_gets_secrets_whatever_is_in_them(place: Place) -> None:
    odd = {"A_WORD": 'it\'s $5\n"x" \\ \u00fc', "B": ""}
    code, said = place.start(odd, none=True)
    arguments, environment = json.loads(said)
    assert code == 0 and arguments == ["--port", "1"]
    assert {name: environment[name] for name in odd} == odd


def test_a_server_with_a_database_has_its_administrator_before_it_runs(place: Place) -> None:
    place.with_database()
    code, said = place.start(reset=False)
    made, started = said.splitlines()
    assert code == 0 and made == "Made the administrator root"
    assert json.loads(started)[1][guarded.ADVANCED] == "1" and "--auth-config" not in started
    assert place.accounts()[0]["permissions"] == ["admin", "models:read"]
    assert (place.home / "auth").stat().st_mode & 0o777 == 0o700
    assert place.start(reset=False)[1].count("\n") == 1


def test_a_password_is_reset_when_that_is_asked_for(place: Place) -> None:
    place.with_database()
    place.start(reset=False)
    place.start(password="verysecret-2")
    assert place.accounts()[0]["password_hash"] == "1-tercesyrev"
    assert place.start(password="verysecret-2", reset=True)[1].startswith("Reset the administrator root: password\n")
    assert place.accounts()[0]["password_hash"] == "2-tercesyrev"
    assert "Reset" not in place.start(password="verysecret-2", reset=True)[1]


def test_an_administrator_who_lost_his_rights_gets_them_back_by_a_reset_only(place: Place) -> None:
    place.with_database()
    place.start(reset=False)
    rows = place.accounts()
    rows[0].update(permissions=["models:read"], enabled=0)
    (place.home / "auth/auth.db").write_text(json.dumps(rows))
    code, said = place.start(reset=False)
    assert code == 1 and "xinference_reset_password: true makes root one" in said and "--port" not in said
    code, said = place.start(reset=True)
    assert code == 0 and said.startswith("Reset the administrator root: rights, use\n")


def test_keys_that_are_given_are_put_in_force_and_taken_away(place: Place) -> None:
    place.with_database()

    def keys() -> Dict[str, str]:
        found = json.loads((place.home / "auth/keys.json").read_text())
        return {key["name"]: key["key_hash"] for key in found}

    given = [{"name": "rag-1", "key": "sk-1"}, {"name": "chat", "key": "sk-2"}]
    assert "Made the key rag-1\nMade the key chat\n" in place.start(api_keys=given)[1]
    assert keys() == {"rag-1": "#sk-1", "chat": "#sk-2"}
    assert "key" not in place.start(api_keys=given)[1].partition("[[")[0]
    path = place.home / "auth/keys.json"
    own = {"id": 9, "name": "own", "key_hash": "#o", "description": "by hand"}
    path.write_text(json.dumps([*json.loads(path.read_text()), own]))
    code, said = place.start(api_keys=[{"name": "chat", "key": "sk-3"}])
    assert code == 0 and said.startswith("Revoked the key rag-1\nRevoked the key chat\nMade the key chat\n")
    assert keys() == {"own": "#o", "chat": "#sk-3"}
    code, said = place.start(api_keys=[{"name": "OWN", "key": "sk-3"}])
    assert code == 0 and said.startswith("Revoked the key own\nRevoked the key chat\nMade the key OWN\n")
    assert keys() == {"OWN": "#sk-3"}


def test_keys_without_names_of_their_own_hinder_no_start(place: Place) -> None:
    """Xinference 3.0 makes several keys of one name, and keys without any."""
    place.with_database()
    place.start(api_keys=[{"name": "rag", "key": "sk-1"}])
    path = place.home / "auth/keys.json"
    others: List[Dict[str, Any]] = [
        {"id": 8, "name": None, "key_hash": "#n"},
        {"id": 9, "name": "rag", "key_hash": "#o"},
    ]
    path.write_text(json.dumps([*json.loads(path.read_text()), *({**one, "description": ""} for one in others)]))
    assert place.start(api_keys=[{"name": "rag", "key": "sk-1"}])[1].startswith("Revoked the key rag\n[[")
    assert [key["key_hash"] for key in json.loads(path.read_text())] == ["#sk-1", "#n"]
    path.write_text(json.dumps([*json.loads(path.read_text()), {**others[1], "description": ""}]))
    said = place.start(api_keys=[{"name": "rag", "key": "sk-2"}, {"name": "none", "key": "sk-3"}])[1]
    assert said.startswith("Revoked the key rag\nRevoked the key rag\nMade the key rag\nMade the key none\n[[")
    assert [key["key_hash"] for key in json.loads(path.read_text())] == ["#n", "#sk-2", "#sk-3"]


def signing_key(files: Dict[str, release.Entry]) -> str:
    return str(json.loads(files[guarded.ACCOUNTS].text)["auth_config"]["secret_key"])


def test_before_3_0_sessions_of_an_old_password_end() -> None:
    # Its tokens never expire (api/oauth2/auth_service.py of 1.8.1: verify_exp is false).
    first = signing_key(guarding.files({}, ADMIN, "seed"))
    assert first == signing_key(guarding.files({}, {**ADMIN, "api_keys": [{"name": "a", "key": "b"}]}, "seed"))
    assert first != signing_key(guarding.files({}, {**ADMIN, "password": "verysecret-2"}, "seed"))
    assert first != signing_key(guarding.files({}, ADMIN, "other"))


def test_a_server_with_a_file_is_given_it(place: Place) -> None:
    place.package({"api/oauth2/auth_service.py": ""})
    code, said = place.start(api_keys=[{"name": "rag", "key": "sk-0123456789abc"}])
    arguments, environment = json.loads(said)
    path = place.directory / "release/accounts.json"
    assert code == 0 and arguments == ["--port", "1", "--auth-config", str(path)]
    assert environment[guarded.ADVANCED] == "0"
    first, second = json.loads(path.read_text())["user_config"]
    assert first == {**ADMIN, "permissions": ["admin"], "api_keys": []}
    assert second["api_keys"] == ["sk-0123456789abc"] and "admin" not in second["permissions"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda place: None, "has no Xinference"),
        (lambda place: place.package({}), "cannot be made \\(ModuleNotFoundError"),
        (lambda place: (place.with_database(), place.home.write_text("")), "cannot be made \\(NotADirectoryError"),
    ],
)
def test_what_cannot_be_closed_is_not_started(place: Place, spoil: Any, told: str) -> None:
    place.home.parent.mkdir(exist_ok=True)
    spoil(place)
    code, said = place.start(reset=False)
    assert code == 1 and "[[" not in said
    assert said.startswith("The server was not started, as it would not be closed: ")
    assert re.search(told, said), said


def test_files_that_make_no_sense_start_nothing(tmp_path: Path) -> None:
    (tmp_path / guarded.ACCOUNTS).write_text('{"user_config": [{"username": "root", "password": ""}]}')
    with pytest.raises(guarded.Closed, match="names no administrator"):
        guarded.accounts(tmp_path)
    (tmp_path / guarded.SECRETS).write_text("A=plain\n")
    with pytest.raises(guarded.Closed, match="damaged"):
        guarded.secrets(tmp_path)


@pytest.mark.parametrize(
    ("first", "python"),
    [
        ("#!/opt/venv/bin/python3.11\nimport sys\n", "/opt/venv/bin/python3.11"),
        ("#!/bin/sh\n'''exec' \"/a long/bin/python\" \"$0\" \"$@\"\n' '''\n", "/a long/bin/python"),
        ("#!/usr/bin/env python3\n", ""),
        ("#!/bin/bash\nexec x\n", ""),
    ],
)
def test_the_servers_own_interpreter_is_read_from_its_program(tmp_path: Path, first: str, python: str) -> None:
    (tmp_path / "program").write_text(first)
    assert guarded.interpreter(str(tmp_path / "program")) == python


def test_the_seed_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    assert len(guarding.seed(tmp_path, make=False)) == 64 and not list(tmp_path.iterdir())
    first = guarding.seed(tmp_path)
    assert len(first) == 64 and guarding.seed(tmp_path) == first
    assert (tmp_path / guarding.SEED).stat().st_mode & 0o777 == 0o600
    files = guarding.files({"A": "b"}, ADMIN, first)
    assert guarding.mark(files, first) != guarding.mark(guarding.files({"A": "c"}, ADMIN, first), first)
    assert guarding.mark(files, first) != guarding.mark(files, "other")
    assert guarding.files({}, ADMIN, first) == guarding.files({}, ADMIN, first)


def test_a_native_release_starts_through_it_where_there_is_something_to_guard(tmp_path: Path) -> None:
    service = {"command": ["/v/bin/python", "/v/bin/serve"], "environment": {"LANG": "C"}}
    plain = definition.files(tmp_path, service, [], {})
    assert json.loads(plain["service.json"].text)["command"] == service["command"]
    guard = guarding.files({"A_WORD": "verysecret-3"}, ADMIN, "seed")
    files = definition.files(tmp_path, service, [], {}, (), None, guard)
    program = str(tmp_path / "current/bin/guarded.py")
    command = ["/v/bin/python", program, "--closed", "/v/bin/serve"]
    assert json.loads(files["service.json"].text)["command"] == command
    holders = [name for name, entry in files.items() if "verysecret" in entry.text]
    assert sorted(holders) == ["accounts.json", "server.env"]
    assert all(files[name].mode == 0o400 for name in holders)
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    assert native_run.digest(tmp_path) == definition.digest(files) != definition.digest(plain)


@pytest.mark.parametrize("accounts", [{}, ADMIN])
def test_a_short_secret_cannot_be_guessed_from_what_others_see_of_a_release(
    tmp_path: Path, accounts: Dict[str, Any]
) -> None:
    service = {"command": ["/v/bin/python", "/v/bin/serve"], "environment": {"LANG": "C"}}

    def told(pin: str, seed: str) -> Tuple[str, str]:
        guard = guarding.files({"PIN": pin}, accounts, seed)
        files = definition.files(tmp_path, service, [], {}, (), None, guard)
        return definition.digest(files), release.identity(files)

    own = told("1234", "own")
    # The same at every run; somebody who tries all secrets and has another seed finds none that fits.
    assert own == told("1234", "own")
    assert not any({*own} & {*told(pin, "another")} for pin in ("1234", "0000"))
    assert not {*own} & {*told("1235", "own")}


def test_the_runner_of_a_release_starts_the_server_through_it(tmp_path: Path) -> None:
    program = tmp_path / "serve"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    wanted = {"command": [sys.executable, str(program), "--port", "1"], "environment": {"PATH": os.environ["PATH"]}}
    service = {**wanted, "directory": str(tmp_path), "stop_timeout": 5}
    files = definition.files(tmp_path, service, [], {}, (), None, guarding.files({"A_WORD": "verysecret-3"}, {}, "s"))
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    (tmp_path / "run").mkdir()
    done = subprocess.run([str(tmp_path / "current/bin/run"), str(tmp_path)], stdout=subprocess.PIPE, check=False)
    arguments, environment = json.loads(done.stdout.splitlines()[0])
    assert arguments == ["--port", "1"] and environment["A_WORD"] == "verysecret-3"
    assert environment[native_run.MARK] == str(tmp_path)


def test_a_server_that_is_to_be_closed_does_not_start_from_a_release_without_accounts(tmp_path: Path) -> None:
    # It was being started from one release, and another one, without authentication, was put in force meanwhile.
    program = tmp_path / "serve"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    service = {"command": [sys.executable, str(program), "--host", "0.0.0.0"], "environment": {}}
    closed = definition.files(tmp_path, service, [], {}, (), None, guarding.files({}, ADMIN, "seed"))
    later = definition.files(tmp_path, service, [], {}, (), None, guarding.files({}, {}, "seed"))
    release.make(tmp_path, later)
    release.switch(tmp_path, release.identity(later))
    command = json.loads(closed["service.json"].text)["command"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 1 and b"--host" not in done.stdout
    assert b"not started, as it would not be closed: there is no " in done.stdout


def test_a_difference_shows_no_secret() -> None:
    files = guarding.files({"A_WORD": "verysecret-3"}, {**ADMIN, "api_keys": [{"name": "a", "key": "sk-x"}]}, "seed")
    shown = json.dumps(release.difference({}, {name: entry.text for name, entry in files.items()}))
    for secret in ("verysecret", "sk-x", signing_key(files)):
        assert secret not in shown


def test_another_user_reads_private_files_by_the_group_of_the_release() -> None:
    files = guarding.files({"A_WORD": "x"}, ADMIN, "seed", shared=True)
    assert [files[name].mode for name in guarding.FILES] == [0o444, 0o440, 0o440]
    assert [entry.mode for entry in guarding.files({"A_WORD": "x"}, ADMIN, "seed").values()] == [0o444, 0o400, 0o400]


def test_with_authentication_the_processes_of_a_server_hear_each_other_alone(place: Place) -> None:
    place.package({"api/oauth2/auth_service.py": ""})
    told = json.loads(place.start()[1])[1][guarding.ACTORS]
    assert told == guarding.derived("seed", "actors") and len(told) == 64
    assert json.loads(place.start({guarding.ACTORS: ""})[1])[1][guarding.ACTORS] == ""
    assert (
        guarding.files({}, ADMIN, "other")[guarded.SECRETS].text != guarding.files({}, ADMIN, "s")[guarded.SECRETS].text
    )
    assert guarded.SECRETS not in guarding.files({}, {}, "seed")
    # The digest of a native server's definition is in results, and covers this file.
    one, other = (guarding.files({"PIN": "1234"}, {}, seed)[guarded.SECRETS].text for seed in "ab")
    assert one != other


@pytest.mark.parametrize("name", ["", "A B", "A=B", "A\nB", "1A"])
def test_what_no_environment_can_hold_is_refused_before_a_server_would_not_start(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be in an environment") as told:
        guarding.files({"GOOD": "a", name: "s3cret-value"}, {}, "5" * 64)
    assert "s3cret" not in str(told.value)
    with pytest.raises(ValueError, match="'ZERO' cannot"):
        guarding.files({"ZERO": "s3cret\0value"}, {}, "5" * 64)
