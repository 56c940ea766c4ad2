# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The secrets that a host keeps for its server, so that they can be taken out of whatever leaves the host.

They are read where they are meant to stand: files of releases that only their owner may read, what the server made for
itself, accounts in a file, and the container's environment. Reads only.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Set

from ..masking import NO_SECRETS, OURS, is_secret, secrets_in
from . import release
from .deployed import Deployed
from .examine_server import auth_config
from .guarded import ACCOUNTS, SECRETS

LARGEST = 256 * 1024
"""Bytes of a file that may hold secrets; what is larger is no key."""
PUBLIC = ("username", "permissions", "algorithm", "token_expire_in_minutes", "name", "id")
"""What a document of accounts says beside its secrets."""
_VARIABLE = re.compile(r"^\s*(?:export\s+)?([A-Za-z_][\w.-]*)\s*=\s*(.*)$")
_HARMLESS = re.compile(r"\A(?:true|false|none|null|yes|no|on|off|\d{1,5}(?:\.\d+)?|[a-z]{2}_[A-Z]{2}\.UTF-8)\Z", re.I)


def known_secrets(root: Path, seen: Deployed, inside: Optional[Mapping[str, Any]] = None) -> Set[str]:
    """All of them. `inside` is the server's container as `docker inspect` shows it."""
    found: Set[str] = set()
    for name in release.history(root):
        found |= set(_of_release(root / release.RELEASES / name))
    for path in (root / "secrets").rglob("*") if (root / "secrets").is_dir() else ():
        found |= set(_of_any(path))
    if seen.home:
        auth = Path(seen.home) / "auth"
        for path in auth.glob("*") if auth.is_dir() else ():
            if path.suffix == ".db":
                found |= set(_of_database(path))
            elif ".db-" not in path.name:
                found |= set(_of_any(path))
    config = auth_config(seen)
    if config:
        found |= set(_of_any(Path(config)))
    variables = (word.partition("=") for word in ((inside or {}).get("Config") or {}).get("Env") or [])
    found |= set(_of_environment({name: value for name, _mark, value in variables}))
    return {text for text in found if text.strip() and not _HARMLESS.match(text.strip())}


def _of_release(directory: Path) -> Iterator[str]:
    """Secrets of a release: all that its private files of variables and accounts have, and named ones elsewhere."""
    yield from _of_variables(_text(directory / SECRETS))
    yield from _leaves(_data(directory / ACCOUNTS))
    login = _data(directory / "credentials.json")
    if isinstance(login, Mapping):
        yield from (str(value) for name, value in login.items() if name != "username" and value)
    for name in ("models.json", "registrations.json", "keeper.json", "server.json"):
        yield from secrets_in(_data(directory / name))
    service = _data(directory / "service.json")
    if isinstance(service, Mapping):
        yield from _of_environment(service.get("environment") or {})
        yield from secrets_in(service)


def _of_environment(variables: Mapping[str, Any]) -> Iterator[str]:
    """Values of secrets in an environment, by their names and looks."""
    for name, value in variables.items():
        if (name not in NO_SECRETS and is_secret(name) and not OURS.fullmatch(str(name))) or (
            name not in NO_SECRETS and re.search(r"(?:KEY|TOKEN|SECRET|PASSWORD)\Z", str(name))
        ):
            yield str(value)
    yield from secrets_in({"environment": dict(variables)})


def _of_variables(text: str) -> Iterator[str]:
    """All values of a file of variables, as Compose reads it."""
    for line in text.splitlines():
        match = _VARIABLE.match(line)
        if match:
            value = match.group(2).strip()
            if value[:1] == value[-1:] == '"' and len(value) > 1:
                with contextlib.suppress(ValueError):
                    yield json.loads(value.replace("\\$", "$"))
            yield value.strip("'\"")


def _of_any(path: Path) -> Iterator[str]:
    """All that a file of secrets may mean: texts of a document, values of variables, or its lines."""
    text = _text(path)
    try:
        yield from _leaves(json.loads(text))
        return
    except ValueError:
        pass
    yield from _of_variables(text)
    # A key file is one line or a few; the lines of a certificate are no secrets and harm nobody.
    yield from (line.strip() for line in text.splitlines() if len(line.strip()) >= 8)


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    """Texts in a document of accounts, without what says who and may what."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, name)
    elif isinstance(value, (str, int)) and not isinstance(value, bool) and name not in PUBLIC:
        yield str(value)


def _of_database(path: Path) -> Iterator[str]:
    """The server's own secrets in its database of accounts; nothing is locked, made or changed."""
    with contextlib.suppress(sqlite3.Error, OSError), contextlib.closing(
        sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, timeout=1)
    ) as database:
        for _key, value in database.execute("SELECT key, value FROM system_config"):
            yield str(value)
    wal = Path(f"{path}-wal")
    if wal.is_file():
        # What was written last is not in the database yet, and to read that properly would make a file.
        content = wal.read_bytes()[-4 * LARGEST :]
        for match in re.finditer(rb"setup_token([A-Za-z0-9_-]{43})", content):
            yield match.group(1).decode()


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size <= LARGEST:
            return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        pass
    return ""


def _data(path: Path) -> Any:
    try:
        found: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None
