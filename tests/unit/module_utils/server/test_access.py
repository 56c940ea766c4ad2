# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is to be done about keys and accounts, planned on what a server tells of them."""

from __future__ import annotations

import json
import secrets
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import accounts, keys
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import features

KEYS: List[Dict[str, Any]] = [
    {"id": 1, "name": "rag", "enabled": True, "key_prefix": "xf-abcd"},
    {"id": 2, "name": "Chat ", "enabled": False, "key_prefix": "xf-efgh"},
]
USERS: List[Dict[str, Any]] = [
    {"id": 1, "username": "root", "source": "local", "enabled": True, "permissions": ["admin"]},
    {"id": 2, "username": "viewer", "source": "local", "enabled": False, "permissions": ["models:list"]},
    {"id": 3, "username": "other", "source": "oidc", "enabled": True, "permissions": ["admin"]},
]


class Server:
    """Writes down what a plan does; stands for the client."""

    def __init__(self, version: str = "4.1.0", auth: bool = True) -> None:
        self.did: List[Any] = []
        self.endpoint, self._version, self._auth = "http://h", version, auth

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **fields: Any) -> Any:
            self.did.append((name, *arguments, *([fields] if fields else [])))
            return {"key": "xf-new"} if name == "make_key" else "xf-old"

        return call

    @property
    def features(self) -> Any:
        return features(self._version)

    def version(self) -> str:
        return self._version

    def auth_enabled(self) -> bool:
        return self._auth


@pytest.mark.parametrize(
    ("name", "state", "rotate", "action", "value", "did"),
    [
        ("rag", "present", False, "keep", "xf-old", [("key_value", 1)]),
        ("new", "present", False, "create", "xf-new", [("make_key", "new", keys.DESCRIPTION)]),
        ("rag", "present", True, "rotate", "xf-new", [("delete_key", 1), ("make_key", "rag", keys.DESCRIPTION)]),
        ("chat", "present", False, "rotate", "xf-new", [("delete_key", 2), ("make_key", "chat", keys.DESCRIPTION)]),
        ("new", "present", True, "create", "xf-new", [("make_key", "new", keys.DESCRIPTION)]),
        ("RAG", "absent", False, "revoke", "", [("delete_key", 1)]),
        ("new", "absent", True, "keep", "", []),
    ],
)
def test_keys_are_made_replaced_and_revoked_by_name(
    name: str, state: str, rotate: bool, action: str, value: str, did: List[Any]
) -> None:
    server: Any = Server()
    todo = keys.plan(KEYS, name, state, rotate)
    assert (todo.action, todo.changed) == (action, action != "keep")
    assert keys.apply(server, todo) == value and server.did == did
    diff = todo.diff()
    assert all(isinstance(diff[side], dict) for side in ("before", "after")), "Ansible shows nothing else"
    assert (diff["before"] != diff["after"]) is (action in ("create", "revoke") or action == "rotate")
    assert "xf-new" not in json.dumps(diff)


@pytest.mark.parametrize(("version", "auth", "told"), [("1.8.1", True, "1.8.1 makes no keys"), ("4.1.0", False, "off")])
def test_a_server_that_makes_no_keys_says_what_to_do(version: str, auth: bool, told: str) -> None:
    server: Any = Server(version, auth)
    with pytest.raises(keys.KeyProblem, match=told):
        keys.check(server)
    good: Any = Server("3.0.0")
    keys.check(good)


def test_a_value_crosses_masked_and_comes_out_the_same() -> None:
    mask = secrets.token_hex(256)
    crossed = keys.masked("xf-abcdefgh", mask)
    assert "abc" not in crossed and keys.unmasked(crossed, mask) == "xf-abcdefgh"
    with pytest.raises(ValueError, match="shorter"):
        keys.masked("xf-abcdefgh", "00")


@pytest.mark.parametrize(
    ("name", "state", "permissions", "reset", "action", "did"),
    [
        ("root", "present", ["admin"], False, "keep", []),
        ("new", "present", ["b", "a"], False, "create", [("make_user", "new", "a-password", ["a", "b"])]),
        ("root", "present", ["admin"], True, "change", [("set_password", 1, "a-password")]),
        (
            "viewer",
            "present",
            ["models:read"],
            True,
            "change",
            [
                ("change_user", 2, {"permissions": ["models:read"], "enabled": True}),
                ("set_password", 2, "a-password"),
            ],
        ),
        ("viewer", "absent", [], False, "remove", [("delete_user", 2)]),
        ("nobody", "absent", [], False, "keep", []),
        ("other", "present", ["a"], False, "create", [("make_user", "other", "a-password", ["a"])]),
    ],
)
def test_accounts_are_made_changed_and_removed(
    name: str, state: str, permissions: List[str], reset: bool, action: str, did: List[Any]
) -> None:
    server: Any = Server()
    todo = accounts.plan(USERS, name, state, permissions, reset)
    assert (todo.action, todo.changed) == (action, action != "keep")
    accounts.apply(server, todo, "a-password")
    assert server.did == did and "a-password" not in json.dumps(todo.diff())


@pytest.mark.parametrize(
    ("name", "more", "accepted", "differs", "asked"),
    [
        ("root", {}, True, False, 1),
        ("root", {}, False, True, 1),
        ("root", {"must_change_password": True}, True, True, 0),
        ("viewer", {}, True, True, 0),  # may not log in
        ("other", {}, True, False, 0),  # not the server's own
        ("nobody", {}, True, False, 0),
    ],
)
def test_one_login_tells_whether_a_password_is_another(
    name: str, more: Dict[str, Any], accepted: bool, differs: bool, asked: int
) -> None:
    server: Any = Server()
    server.accepts = lambda *words: server.did.append(words) or accepted
    users = [{**user, **(more if user["username"] == name else {})} for user in USERS]
    assert accounts.other_password(server, users, name, "a-password") is differs
    assert server.did == [(name, "a-password")] * asked


def test_another_password_is_in_the_diff_without_a_word_of_it() -> None:
    diff = accounts.plan(USERS, "root", "present", ["admin"], True).diff()
    assert diff["before"] != diff["after"] and diff["before"]["password"] == "(another)"
    diff = accounts.plan(USERS, "root", "present", ["admin"], False).diff()
    assert diff["before"] == diff["after"] and "password" not in diff["before"]


@pytest.mark.parametrize(("state", "permissions"), [("absent", []), ("present", ["models:read"])])
def test_the_last_administrator_stays(state: str, permissions: List[str]) -> None:
    with pytest.raises(accounts.AccountProblem, match="last administrator"):
        accounts.plan(USERS, "root", state, permissions)
    second = {"id": 4, "username": "second", "source": "local", "enabled": True, "permissions": ["admin"]}
    assert accounts.plan([*USERS, second], "root", state, permissions).changed


def test_short_passwords_are_told() -> None:
    assert accounts.password_problem("1234567") and not accounts.password_problem("12345678")
