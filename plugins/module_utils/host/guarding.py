# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a release holds so that its server starts closed: the program `guarded` and the private files that it reads."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets as random
from pathlib import Path
from typing import Any, Container, Dict, Iterable, List, Mapping

from . import guarded
from .release import Entry

PROGRAM = "bin/guarded.py"
FILES = (PROGRAM, guarded.SECRETS, guarded.ACCOUNTS)
"""Whatever of a release the server is started from through `guarded`."""
PUBLIC = 0o444
PRIVATE = 0o400
SHARED = 0o440
SEED = "state/seed"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\Z")
ACTORS = "XOSCAR_AUTH_KEY"
"""The processes of a server talk to each other on ports of its address, and do what anybody tells them there. With this
variable only who knows its value is heard (xoscar 0.12 and later, xoscar/serialization/_security.py; others ignore it).
"""
READING = ["models:list", "models:read"]
"""What a client may do on a server that gets its accounts from a file."""


def files(secrets: Mapping[str, str], accounts: Mapping[str, Any], seed: str, shared: bool = False) -> Dict[str, Entry]:
    """The files that `guarded` needs; the program is always among them.

    `secrets` are variables. `accounts` is empty without authentication, else it has `username`, `password`, `reset` and
    `api_keys`, a list of `name` and `key`. `seed` is this host's own. `shared`: the server runs as another user than
    the owner of the release, and reads these files by its group. Raises ValueError for what is no variable.
    """
    odd = sorted(name for name, value in secrets.items() if not _NAME.match(name) or "\0" in value)
    if odd:
        raise ValueError(
            f"xinference_server_secrets: {', '.join(map(repr, odd))} cannot be in an environment. Names are letters, "
            "digits and _, and values have no zero byte."
        )
    if accounts or secrets:
        # Others see ids and digests of a release, which are hashes of its files; with this in the file nobody can try
        # short secrets until one fits.
        secrets = {ACTORS: derived(seed, "actors"), **secrets}
    private = SHARED if shared else PRIVATE
    found = {PROGRAM: Entry(str(guarded.__loader__.get_source(guarded.__name__)), PUBLIC)}  # type: ignore[union-attr]
    if secrets:
        lines = (f"{name}={json.dumps(value)}\n" for name, value in sorted(secrets.items()))
        found[guarded.SECRETS] = Entry("".join(lines), private)
    if accounts:
        found[guarded.ACCOUNTS] = Entry(json.dumps(_accounts(accounts, seed), indent=2) + "\n", private)
    return found


def needed(release: Mapping[str, Any]) -> bool:
    """Whether a server of this release has to be started through `guarded`."""
    return guarded.SECRETS in release or guarded.ACCOUNTS in release


def command(place: str, names: Container[str], program: Iterable[str]) -> List[str]:
    """The program of a server, started through `guarded` of the release in `place`, which has files of these names."""
    return [f"{place}/{PROGRAM}", *([guarded.CLOSED] if guarded.ACCOUNTS in names else []), *program]


def mark(found: Mapping[str, Entry], seed: str) -> str:
    """A text that changes with what `guarded` reads, and of which nobody without the seed can tell what that is."""
    listing = json.dumps([[name, found[name].text] for name in FILES if name in found])
    return derived(seed, listing)


def derived(seed: str, purpose: str) -> str:
    """A secret of this host for one purpose: the same at every run, and known to nobody without the seed."""
    return hmac.new(seed.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def seed(root: Path, make: bool = True) -> str:
    """The seed of a host, made when it is not there; when `make` is not set, one like it that is not kept."""
    path = root / SEED
    if not path.exists():
        if not make:
            return random.token_hex(32)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".seed-{os.getpid()}")
        handle = os.open(str(new), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(random.token_hex(32))
        new.replace(path)
    return path.read_text(encoding="ascii")


def _accounts(accounts: Mapping[str, Any], seed: str) -> Dict[str, Any]:
    """The accounts as Xinference before 3.0 takes them, and whether to reset the administrator's password."""
    administrator = {
        "username": accounts["username"],
        "password": accounts["password"],
        "permissions": ["admin"],
        "api_keys": [],
    }
    clients = [
        # Nobody logs in as a client: it has a key.
        {
            "username": f"key-{one['name']}",
            "password": derived(seed, f"client {one['name']}")[:40],
            "permissions": READING,
            "api_keys": [one["key"]],
        }
        for one in accounts.get("api_keys") or []
    ]
    # These servers never let a token expire, so one of a password that was changed has to end with its key.
    signing = derived(seed, f"tokens {json.dumps([accounts['username'], accounts['password']])}")
    tokens = {"algorithm": "HS256", "secret_key": signing, "token_expire_in_minutes": 30}
    return {"auth_config": tokens, "user_config": [administrator, *clients], "reset": bool(accounts.get("reset"))}
