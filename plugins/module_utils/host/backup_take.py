# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading a host for its backup, while its server runs.

Databases are copied by SQLite itself, which gives the state of one moment whatever is being written. JSON files that
the server writes in place are read again when they are caught half written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Dict, Iterator, List, Mapping, Optional, Tuple
from urllib.parse import quote

from ..bundle.places import remove
from .backends import backend_in_force
from .backup import BackupError, Index, is_database, kind_of, listed
from .deployed import deployed
from .docker_release import VIEW, image_version
from .guarded import GIVEN, Closed, secrets
from .native_ctl import locked
from .native_run import SERVICE
from .release import current

LIMIT = 256 << 20
"""Bytes a backup may have; it goes through memory. One of a real site has a few hundred KiB."""
BUSY_SECONDS = 30.0
_TRIES = 5
_SCRATCH = ".backup-"
# Files that a site may have put elsewhere, and where a backup looks for them in the home (constants.py of 4.1.0).
_PLACES = {
    "XINFERENCE_HOME": "",
    "XINFERENCE_AUTH_DB_PATH": "auth/auth.db",
    "XINFERENCE_LAUNCH_HISTORY_DB_PATH": "launch_history.db",
    "XINFERENCE_MONITOR_CONFIG_DB_PATH": "monitor_config.db",
    "XINFERENCE_SYSTEM_SETTINGS_PATH": "system-settings.json",
    "XINFERENCE_TOKEN_ROUTER_DB_PATH": "token_routers.db",
}


def take(root: Path, home: Path, host: str, when: str) -> Tuple[Index, Dict[str, bytes]]:
    """The backup of a host: its index, and the content of its files. Raises BackupError, ServiceError, OSError."""
    paths = belonging(root, home)
    with locked(root), scratch(root / "state", _SCRATCH) as place:
        contents = {name: content_of(path, place) for name, path in paths.items()}
    return index_of(root, home, host, when, contents), contents


def index_of(root: Path, home: Path, host: str, when: str, contents: Mapping[str, bytes]) -> Index:
    """The index of a backup of this host with these files."""
    version, backend = server_version(root), backend_in_force(root)
    return Index(host, when, version, backend, str(root), str(home), str(current(root)), listed(contents))


def belonging(root: Path, home: Path) -> Dict[str, Path]:
    """The files that belong to a backup, by their name in it.

    Raises BackupError where nothing is served below `root`, or something lies elsewhere or is too large to be carried.
    """
    if current(root) is None:
        raise BackupError(
            f"No release is in force below {root}, so there is nothing to back up. Name the root directory that the "
            "inventory of site.yml names, or run playbooks/serve.yml."
        )
    elsewhere = _elsewhere(root, home)
    if elsewhere:
        raise BackupError(
            f"The server keeps {', '.join(elsewhere)}, which is not its place in {home}, so a backup would miss it. "
            "Take the variable, or the mount over it, out of the inventory, or set xinference_server_home to the "
            "directory that has them all."
        )
    found: Dict[str, Path] = {}
    for area, directory in (("home", home), ("state", root / "state"), ("release", (root / "current").resolve())):
        for path in _files(directory, area):
            name = f"{area}/{path.relative_to(directory).as_posix()}"
            if kind_of(name) is None:
                continue
            if path.is_symlink():
                raise BackupError(f"{path} is a link; a backup has only files of the server's own. Put the file there.")
            found[name] = path
    total = sum(path.stat().st_size for path in found.values())
    if total > LIMIT:
        largest = max(found.values(), key=lambda path: path.stat().st_size)
        raise BackupError(
            f"The files of a backup have {total >> 20} MiB together, more than the {LIMIT >> 20} MiB that it may have; "
            f"{largest} is the largest."
        )
    return dict(sorted(found.items()))


def _files(directory: Path, area: str) -> Iterator[Path]:
    """The files, and links, in which something of a backup may be; caches and logs are not walked through."""
    wanted = ("auth", "model") if area == "home" else ()
    for place, directories, names in os.walk(str(directory)):
        here = Path(place)
        if here == directory:
            links = [name for name in directories if name in wanted and (here / name).is_symlink()]
            if links:
                raise BackupError(f"{here / links[0]} is a link; a backup has only files of the server's own.")
            directories[:] = [name for name in directories if name in wanted]
        yield from (path for path in (here / name for name in names) if path.is_file() or path.is_symlink())


def content_of(path: Path, place: Path) -> bytes:
    """What is in a file; a database as it is at this moment. `place` is a directory for what lies about meanwhile."""
    if is_database(path.name):
        copy = place / "copy.db"
        try:
            snapshot(path, copy)
            return copy.read_bytes()
        finally:
            with contextlib.suppress(FileNotFoundError):
                copy.unlink()
    for _try in range(_TRIES):
        content = path.read_bytes()
        with contextlib.suppress(ValueError):
            if path.suffix == ".json":
                json.loads(content.decode("utf-8"))
            return content
        time.sleep(0.1)
    return content  # It is broken, and not being written. The server says so at every start.


def snapshot(source: Path, target: Path) -> None:
    """Copy a database while it is in use, as one file that needs no other. Raises BackupError for a damaged one."""
    try:
        with contextlib.closing(_reading(source)) as original, contextlib.closing(sqlite3.connect(str(target))) as copy:
            target.chmod(0o600)
            original.backup(copy)
            # The copy has no log of its own to be lost.
            copy.execute("PRAGMA journal_mode=DELETE").fetchone()
            (answer,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise BackupError(f"The database {source} cannot be read ({error}); look at the server's log.") from error
    if answer != "ok":
        raise BackupError(f"The database {source} is damaged ({answer}); a backup of it would be of no use.")


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_SECONDS)


def accounts(path: Path) -> Optional[Tuple[List[str], int]]:
    """The names of the accounts in a server's database, and how many keys it has; None where that cannot be told.

    Keys that are given are not counted: the inventory has them, and every start makes them.
    """
    if not path.is_file():
        return [], 0
    try:
        with contextlib.closing(_reading(path)) as database:
            users = [str(name) for (name,) in database.execute("SELECT username FROM users ORDER BY username")]
            given = "SELECT count(*) FROM api_keys WHERE description IS NOT ?"
            (keys,) = database.execute(given, (GIVEN,)).fetchone()
    except sqlite3.Error:
        return None
    return users, int(keys)


@contextlib.contextmanager
def scratch(directory: Path, prefix: str) -> Iterator[Path]:
    """A directory that only this user can enter, gone afterwards, with those that killed runs left behind."""
    for leftover in directory.glob(f"{prefix}*"):
        remove(leftover)
    place = Path(tempfile.mkdtemp(prefix=prefix, dir=str(directory)))
    try:
        yield place
    finally:
        shutil.rmtree(str(place), ignore_errors=True)


def server_version(root: Path) -> str:
    """The version of the server of the release in force, from its files; empty where they do not tell."""
    try:
        if backend_in_force(root) == "docker":
            view = json.loads((root / "current" / VIEW).read_text(encoding="utf-8"))
            artifacts = json.loads((root / "current" / "artifacts.json").read_text(encoding="utf-8"))
            return image_version(artifacts, view["image"])
        service = json.loads((root / SERVICE).read_text(encoding="utf-8"))
        environment = Path(service["command"][0]).parent.parent
        found = sorted(environment.glob("lib/python3*/site-packages/xinference-*.dist-info"))
        return found[0].name[len("xinference-") : -len(".dist-info")] if found else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _elsewhere(root: Path, home: Path) -> List[str]:
    """The variables of what the server has elsewhere than in its place in `home`; values of secret ones stay out."""
    try:
        seen, hidden = deployed(root), secrets(root / "current")
    except (OSError, ValueError, KeyError, Closed) as error:
        raise BackupError(
            f"The release in force below {root} cannot be read ({type(error).__name__}: {error}), so nobody can tell "
            "where its server keeps its accounts. Run playbooks/serve.yml, which makes it anew."
        ) from error
    told = {**seen.environment, **hidden}
    top = PurePosixPath(told.get("XINFERENCE_HOME") or str(home))
    found = {name: told.get(name) or str(top / place) for name, place in _PLACES.items()}
    wrong = [name for name, path in found.items() if seen.on_host(path) != home / _PLACES[name]]
    # With the whole home elsewhere so is all that is in it.
    named = wrong[:1] if "XINFERENCE_HOME" in wrong else wrong
    return [name if name in hidden else f"{name}={found[name]}" for name in named]
