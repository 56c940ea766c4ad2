# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Become the server, with its secrets in its environment and its administrator made before anything listens.

A server without an account belongs to whoever comes first (Xinference 3.0 to 4.0) or reads its log (4.1). So the
account is made here, at every start and by the server's own code, in the process that then becomes the server. When it
cannot be made, the process ends and nothing ever listens.

Usage: guarded.py [--closed] PROGRAM [ARGUMENT ...]. Part of every release; needs Python's own library and the server's
packages. It reads two private files in the directory above its own; either may be missing, the second not with
`--closed`, which whoever has a server started that must not run without authentication says:

`server.env`: a secret variable a line, NAME=VALUE with the value as JSON.
`accounts.json`: asks for authentication. It is the file that `--auth-config` of Xinference before 3.0 takes, whose
first user is the administrator and whose others have a key each, with one more field: `reset`, whether an existing
account gets the password in it.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

SECRETS = "server.env"
ACCOUNTS = "accounts.json"
ADVANCED = "XINFERENCE_AUTH_ADVANCED"
"""Switches on accounts in a database: the only ones from 3.0 on, an addition to the file in 2.9 to 2.12."""
GIVEN = "Given in the inventory (airgap.xinference)"
"""Description of keys that are made here, by which those are known that are given no more."""
OWN = "--in-own-interpreter"
CLOSED = "--closed"
"""The files are read after the command was, and meanwhile another release may be in force, or a file be lost."""
_SHEBANG = re.compile(r"\A#!(/\S*python[\d.]*)\s*\n|\A#!/bin/sh\n'''exec' \"?(/.*?python[\d.]*)\"? ")


class Closed(Exception):
    """The server must not start; the text says why."""


def secrets(place: Path) -> Dict[str, str]:
    """The secret variables. Raises Closed when the file is there and makes no sense."""
    try:
        lines = (place / SECRETS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    try:
        return {name: str(json.loads(value)) for name, _equals, value in (line.partition("=") for line in lines)}
    except ValueError:
        raise Closed(f"{place / SECRETS} is damaged") from None


def accounts(place: Path) -> Dict[str, Any]:
    """The accounts that are asked for; empty without authentication. Raises Closed when they make no sense."""
    try:
        text = (place / ACCOUNTS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        found: Dict[str, Any] = json.loads(text)
        if all(found["user_config"][0][name] for name in ("username", "password")):
            return found
    except (ValueError, LookupError, TypeError):
        pass
    raise Closed(f"{place / ACCOUNTS} names no administrator")


def takes_a_file(package: Path) -> bool:
    """Whether the Xinference in this directory gets its accounts from a file (`--auth-config`, before 3.0)."""
    return (package / "api" / "oauth2" / "auth_service.py").exists()


def make_accounts(users: Sequence[Mapping[str, Any]], reset: bool) -> List[str]:
    """See that the database has the administrator, who is first of `users`, and the keys of the others.

    Returns what was done. The password of an account that is there changes with `reset` only. Raises Closed when
    afterwards there is nobody who could administer.
    """
    own = "xinference.api.oauth2.advanced"
    path = Path(importlib.import_module("xinference.constants").XINFERENCE_AUTH_DB_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # Of a directory that belongs to another user.
        path.parent.chmod(0o700)  # Beside the database are the keys that all tokens are signed with.
    crypto = importlib.import_module(f"{own}.crypto")
    store = _store(own, path)
    name, password = users[0]["username"], users[0]["password"]
    there = store.get_user_by_username(name, "local")
    if there is None:
        hashed = crypto.get_password_hash(password)
        granted = list(importlib.import_module(f"{own}.auth_service").INITIAL_ADMIN_PERMISSIONS)
        if store.create_first_user(name, hashed, granted) is None:
            store.create_user(name, hashed, permissions=granted)
        done = f"Made the administrator {name}"
    elif reset:
        done = _reset(store, crypto, there, password)
    else:
        done = ""
    if not any(user["enabled"] and "admin" in user["permissions"] for user in store.list_users()):
        cure = f"xinference_reset_password: true makes {name} one"
        raise Closed(f"none of the accounts in {path} is an administrator; {cure}")
    keys = {user["username"].partition("-")[2]: user["api_keys"][0] for user in users[1:]}
    owner = store.get_user_by_username(name, "local")["id"]
    return [*([done] if done else []), *_make_keys(store, crypto, owner, keys)]


def _make_keys(store: Any, crypto: Any, owner: int, keys: Mapping[str, str]) -> List[str]:
    """Put the keys that are given in force, by name, and take away those that were given before.

    The server takes no two keys with one value. Later ones than 3.0 take no two with names that differ in case or in
    spaces around them only either; 3.0 has several keys of one name, and keys without any.
    """
    done, there = [], set()
    hashes = {_plain(name): crypto.sha256_hex(value) for name, value in keys.items()}
    for key in store.list_api_keys():
        name = _plain(key["name"] or "")
        if hashes.get(name) == key["key_hash"]:
            there.add(name)
        elif name in hashes or key["key_hash"] in hashes.values() or key["description"] == GIVEN:
            store.delete_api_key(key["id"])
            done.append(f"Revoked the key {key['name']}")
    for name, value in keys.items():
        if _plain(name) not in there:
            secret = importlib.import_module("xinference.constants").get_auth_encryption_key()
            sealed = crypto.aes_encrypt(value, crypto.derive_encryption_key(secret))
            store.create_api_key(
                user_id=owner,
                key_hash=hashes[_plain(name)],
                key_encrypted=base64.b64encode(sealed).decode("ascii"),
                key_prefix=value[:7],
                name=name,
                description=GIVEN,
                model_permissions=[{"permission_type": "all", "permission_value": None}],
            )
            done.append(f"Made the key {name}")
    return done


def _plain(name: str) -> str:
    return name.strip().lower()


def _store(own: str, path: Path) -> Any:
    """The server's own door to its accounts."""
    if importlib.util.find_spec(f"{own}.auth_store"):
        return importlib.import_module(f"{own}.auth_store").create_auth_store(str(path))
    return importlib.import_module(f"{own}.database").Database(str(path))


def _reset(store: Any, crypto: Any, there: Mapping[str, Any], password: str) -> str:
    """Give an existing account the password and an administrator's rights, unless it has them."""
    done = []
    if "admin" not in there["permissions"]:
        store.set_user_permissions(there["id"], ["admin", *there["permissions"]])
        done.append("rights")
    if not there["enabled"]:
        store.update_user(there["id"], enabled=1)
        done.append("use")
    if not crypto.verify_password(password, there["password_hash"] or ""):
        store.update_password_and_revoke_tokens(there["id"], crypto.get_password_hash(password))
        done.append("password")
    return f"Reset the administrator {there['username']}: {', '.join(done)}" if done else ""


def close(place: Path, command: List[str], needed: bool = False) -> List[str]:
    """Put authentication in force where it is asked for; returns the command with what it needs for that.

    Raises Closed when it is `needed` and nothing asks for it.
    """
    wanted = accounts(place)
    if not wanted and needed:
        raise Closed(f"there is no {place / ACCOUNTS}, and this server is to have authentication")
    if not wanted:
        return command
    spec = importlib.util.find_spec("xinference")
    if spec is None or not spec.submodule_search_locations:
        raise Closed(f"{sys.executable} has no Xinference, so no administrator can be made")
    if takes_a_file(Path(next(iter(spec.submodule_search_locations)))):
        os.environ[ADVANCED] = "0"
        return [*command, "--auth-config", str(place / ACCOUNTS)]
    os.environ[ADVANCED] = "1"
    try:
        done = make_accounts(wanted["user_config"], bool(wanted.get("reset")))
    except Closed:
        raise
    except Exception as error:  # Whatever the server's own code raises.
        raise Closed(f"the accounts cannot be made ({type(error).__name__}: {error})") from error
    for line in done:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    return command


def interpreter(program: str) -> str:
    """The Python that a program of a Python package runs in, by its first lines; empty when they do not say."""
    with open(program, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        found = _SHEBANG.match(file.read(4096))
    return str(found.group(1) or found.group(2)) if found else ""


def main(arguments: List[str]) -> None:
    """Become the program, or raise Closed."""
    place = Path(os.path.abspath(__file__)).parent.parent  # noqa: PTH100
    told = list(itertools.takewhile((OWN, CLOSED).__contains__, arguments))
    command = arguments[len(told) :]
    program = shutil.which(command[0])
    if not program:
        raise Closed(f"there is no program {command[0]}")
    python = interpreter(program)
    if python and python != sys.executable and OWN not in told:
        os.execv(python, [python, __file__, OWN, *arguments])
    # Before anything of the server is imported: much of it reads its variables then.
    os.environ.update(secrets(place))
    command = close(place, command, CLOSED in told)
    sys.argv = [program, *command[1:]]
    sys.path.pop(0)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Closed as error:
        raise SystemExit(f"The server was not started, as it would not be closed: {error}.") from None
