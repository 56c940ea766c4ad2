# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Accounts of a server: what to do so that one is there with its rights, or is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .client import Client

ADMIN = "admin"
SHORTEST = 8
"""Characters that the server wants of a password."""
LOCAL = "local"


class AccountProblem(Exception):
    """An account that cannot be as it is wanted; the text says what to do instead."""


@dataclass(frozen=True)
class AccountPlan:
    """`action` is `keep`, `create`, `change` or `remove`.

    `before` is the server's account or None, `permissions` those it is to have, `changes` what differs: `permissions`,
    `enabled`, `password`.
    """

    name: str
    action: str
    before: Optional[Mapping[str, Any]] = None
    permissions: Tuple[str, ...] = ()
    changes: Tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether there is something to do."""
        return self.action != "keep"

    def diff(self) -> Dict[str, Any]:
        """`before` and `after` of Ansible's diff mode, without passwords."""
        before = shown(self.before) if self.before else {}
        wanted = {"name": self.name, "enabled": True, "permissions": sorted(self.permissions)}
        after = {"keep": before, "remove": {}}.get(self.action, wanted)
        if "password" in self.changes:
            before, after = {**before, "password": "(another)"}, {**after, "password": "(new_password)"}
        return {"before_header": self.name, "after_header": self.name, "before": before, "after": after}


def shown(user: Mapping[str, Any]) -> Dict[str, Any]:
    """What may be told of an account."""
    return {
        "name": user["username"],
        "enabled": bool(user.get("enabled")),
        "permissions": sorted(user.get("permissions") or []),
    }


def plan(
    users: Sequence[Mapping[str, Any]], name: str, state: str, permissions: Sequence[str], reset: bool = False
) -> AccountPlan:
    """What to do about the local account `name`, given all accounts; `state` is `present` or `absent`.

    `reset` says that the account has another password than it is to have.

    Raises AccountProblem for what would leave the server without an administrator: its next start finds nobody who may
    log in.
    """
    locals_ = _locals(users)
    before = _named(locals_, name)
    wanted = () if state == "absent" else tuple(sorted(permissions))
    if before is not None and ADMIN not in wanted and _administrators(locals_) == [name]:
        raise AccountProblem(
            f"{name} is the last administrator of the server, and nobody could manage it then. Make another first."
        )
    if state == "absent":
        return AccountPlan(name, "remove" if before else "keep", before)
    if before is None:
        return AccountPlan(name, "create", None, wanted)
    differs = {
        "permissions": set(before.get("permissions") or []) != set(wanted),
        "enabled": not before.get("enabled"),
        "password": reset,
    }
    changes = tuple(field for field, different in differs.items() if different)
    return AccountPlan(name, "change" if changes else "keep", before, wanted, changes)


def other_password(client: Client, users: Sequence[Mapping[str, Any]], name: str, password: str) -> bool:
    """Whether the account `name` is there with another password than this one, which only a login tells: one request.

    Of an account that may not log in, or has to change its password first, it cannot be told, so it is given one.
    """
    account = _named(_locals(users), name)
    if account is None:
        return False
    if not account.get("enabled") or account.get("must_change_password"):
        return True
    return not client.accepts(name, password)


def apply(client: Client, todo: AccountPlan, password: str) -> None:
    """Carry a plan out; `password` is for an account that is made or gets another one."""
    if todo.action == "create":
        client.make_user(todo.name, password, list(todo.permissions))
    if todo.before is None:
        return
    user = int(todo.before["id"])
    if todo.action == "remove":
        client.delete_user(user)
    fields = {"permissions": list(todo.permissions), "enabled": True}
    changed = {field: value for field, value in fields.items() if field in todo.changes}
    if changed:
        client.change_user(user, **changed)
    # Last, as it ends the sessions of the account, which may be the one that is used.
    if "password" in todo.changes:
        client.set_password(user, password)


def password_problem(password: str) -> str:
    """What is wrong with a new password, empty for nothing."""
    return "" if len(password) >= SHORTEST else f"a password needs {SHORTEST} characters at least"


def _locals(users: Sequence[Mapping[str, Any]]) -> List[Mapping[str, Any]]:
    """The accounts whose passwords the server has; others come from a directory of the site."""
    return [user for user in users if user.get("source", LOCAL) == LOCAL]


def _named(users: Sequence[Mapping[str, Any]], name: str) -> Optional[Mapping[str, Any]]:
    return next((user for user in users if user["username"] == name), None)


def _administrators(users: Sequence[Mapping[str, Any]]) -> List[str]:
    """The accounts that may do everything."""
    return [str(user["username"]) for user in users if user.get("enabled") and ADMIN in (user.get("permissions") or [])]
