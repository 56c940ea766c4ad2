# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keys of clients, by name: what to do so that one is there, is another one, or is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from .client import Client

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a key may be called; its file is named after it."""
DESCRIPTION = "Managed by airgap.xinference"
WITH_KEYS = ("first-caller", "setup-token")
"""`features.auth` of servers that make keys themselves."""


class KeyProblem(Exception):
    """A key that cannot be managed; the text says what to do instead."""


@dataclass(frozen=True)
class KeyPlan:
    """`action` is `keep`, `create`, `rotate` or `revoke`; `before` are the server's keys of that name."""

    name: str
    action: str
    before: Tuple[Mapping[str, Any], ...] = ()

    @property
    def changed(self) -> bool:
        """Whether there is something to do."""
        return self.action != "keep"

    def diff(self) -> Dict[str, Any]:
        """`before` and `after` of Ansible's diff mode; values of keys are in neither."""
        before = [shown(key) for key in self.before]
        after = {"revoke": [], "keep": before}.get(self.action, [{"name": self.name, "enabled": True}])
        # Ansible shows mappings, and no lists.
        lists = {"before": {"keys": before}, "after": {"keys": after}}
        return {"before_header": self.name, "after_header": self.name, **lists}


def shown(key: Mapping[str, Any]) -> Dict[str, Any]:
    """What may be told of a key."""
    fields = ("name", "key_prefix", "owner_username", "enabled", "expires_at", "created_at")
    return {name: key.get(name) for name in fields}


def same(one: Any, other: str) -> bool:
    """Whether two names are the same for the server, which takes no notice of spaces around them and of case."""
    return str(one or "").strip().lower() == other.strip().lower()


def plan(keys: Sequence[Mapping[str, Any]], name: str, state: str, rotate: bool = False) -> KeyPlan:
    """What to do about the key `name`, given all keys of the server; `state` is `present` or `absent`.

    One that somebody switched off is replaced: a client that has it is refused.
    """
    before = tuple(key for key in keys if same(key.get("name"), name))
    if state == "absent":
        return KeyPlan(name, "revoke" if before else "keep", before)
    if not before:
        return KeyPlan(name, "create")
    usable = any(key.get("enabled", True) for key in before)
    return KeyPlan(name, "rotate" if rotate or not usable else "keep", before)


def apply(client: Client, todo: KeyPlan) -> str:
    """Carry a plan out; returns the value of the key that is there then, empty when there is none to be read."""
    if todo.action == "keep":
        usable: List[Mapping[str, Any]] = [key for key in todo.before if key.get("enabled", True)]
        return client.key_value(usable[0]["id"]) if usable else ""
    # First of all: names are unique, and a run that ends in between leaves no key that was to go.
    for key in todo.before:
        client.delete_key(key["id"])
    return "" if todo.action == "revoke" else str(client.make_key(todo.name, DESCRIPTION)["key"])


def check(client: Client) -> None:
    """Raise KeyProblem when the server makes no keys."""
    if not client.auth_enabled():
        raise KeyProblem(f"{client.endpoint} asks for no keys: authentication is off there. Set xinference_auth: true.")
    if client.features.auth not in WITH_KEYS:
        raise KeyProblem(
            f"Xinference {client.version()} makes no keys and accounts while it runs. Give the entry in "
            "xinference_api_keys a `key` and run playbooks/serve.yml, or put the gateway before the server."
        )


def masked(value: str, mask: str) -> str:
    """A value as it may cross a connection that prints what it carries: combined with `mask`, which both sides know.

    Both are texts; `mask` is hexadecimal, random, used once, and at least as long in bytes as the value.
    """
    pad = bytes.fromhex(mask)
    if len(value) > len(pad):
        raise ValueError("the mask is shorter than the value")
    return bytes(one ^ other for one, other in zip(value.encode("ascii"), pad)).hex()


def unmasked(text: str, mask: str) -> str:
    """The value again."""
    return bytes(one ^ other for one, other in zip(bytes.fromhex(text), bytes.fromhex(mask))).decode("ascii")
