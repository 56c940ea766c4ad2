# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Putting a backup in its place on a host whose server is stopped.

The order makes a kill harmless anywhere. First everything new is written beside its place, and everything old is
copied aside; then a mark says that files are being exchanged; then each is exchanged by a rename; then the mark says
that it is done. Before the mark nothing has changed. After it the same restore goes on, and what is aside stays.

The home belongs to the server's user, of whom a process may be left. So nothing is written there by its path (`held`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from ..server.spec import fingerprint
from . import held
from .backends import backend_in_force
from .backup import HISTORY, LAUNCHED, BackupError, Index, is_database, moved
from .backup_take import accounts, belonging, scratch, server_version, snapshot
from .native_ctl import locked
from .release import current
from .restore import Mark, Plan, Standing

MARK = ".restored.json"
ASIDE = "before-restore-"
ARRIVING = ".arriving-"
SIDES = ("-wal", "-shm", "-journal")
_STAGE = ".restoring-"
_MARKING = f"{_STAGE}mark-"
_KEEPING = ".keeping-"


def look(root: Path, home: Path, index: Index) -> Standing:
    """How a host stands before a restore. Raises BackupError where its own files cannot be told."""
    if current(root) is None:
        return Standing(str(root), str(home))
    there = belonging(root, home)
    users = accounts(home / "auth" / "auth.db")
    return Standing(
        str(root),
        str(home),
        backend_in_force(root),
        server_version(root),
        {name: "" if is_database(name) else _digest(path) for name, path in there.items()},
        None if users is None else tuple(users[0]),
        0 if users is None else users[1],
        tuple(sorted(set(_links(root, home, index)))),
        read_mark(home),
    )


def place(root: Path, home: Path, index: Index, contents: Mapping[str, bytes], plan: Plan, when: str) -> Mark:
    """Put the files of a plan in place; returns the mark that is left. `when` is in the name of what is kept aside.

    Raises BackupError when somebody has a database open, OSError, ServiceError. The server must not run.
    """
    wanted = [row.file.name for row in plan.rows if row.action != "keep" or plan.resumed]
    targets = {name: _target(root, home, name) for name in wanted}
    places = {index.root: str(root), index.home: str(home)}
    home.mkdir(mode=0o750, exist_ok=True)
    state = root / "state"
    with locked(root), scratch(state, _KEEPING) as keeping:
        _refuse_open([path for name, path in targets.items() if is_database(name)])
        with held.private(home, _STAGE) as in_home, held.private(state, _STAGE) as in_state:
            staged = {}
            for number, name in enumerate(sorted(targets)):
                content = adapted(name, contents[name], places)
                if name == HISTORY:
                    content = _history(content, places, keeping)
                staged[name] = (str(number), in_home if name.startswith("home/") else in_state)
                _write(*staged[name], content, targets[name])
            mark = read_mark(home)
            if mark is None or mark.identity != index.identity or mark.done:
                aside = keep_aside(keeping, {name: path for name, path in targets.items() if path.is_file()}, when)
                mark = Mark(index.identity, index.host, index.time, False, aside)
                _note(home, mark)
            for name, path in targets.items():
                _exchange(*staged[name], home if name.startswith("home/") else state, path)
        mark = Mark(**{**asdict(mark), "done": True})
        _note(home, mark)
    return mark


def receive(archive: Path) -> bytes:
    """What came from the controller. It is removed at once, with what runs that were killed left behind."""
    data = archive.read_bytes()
    for path in (archive, *archive.parent.glob(f"{ARRIVING}*")):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return data


def keep_aside(keeping: Path, there: Mapping[str, Path], when: str) -> str:
    """Copy files into a new directory beside `keeping`, in which it is made; returns its name, empty without files."""
    if not there:
        return ""
    state = keeping.parent
    name = next(name for name in _names(f"{ASIDE}{when}") if not (state / name).exists())
    (keeping / name).mkdir(mode=0o700)
    for one, path in there.items():
        copy = keeping / name / one
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _copy(path, copy)
    (keeping / name).replace(state / name)
    _sync(state)
    return name


def _names(first: str) -> Iterator[str]:
    yield first
    number = 2
    while True:
        yield f"{first}-{number}"
        number += 1


def _copy(path: Path, copy: Path) -> None:
    """A database is copied by SQLite; one that SQLite cannot read with all that is beside it."""
    with contextlib.suppress(BackupError):
        if is_database(path.name):
            snapshot(path, copy)
            return
    for side in ("", *(SIDES if is_database(path.name) else ())):
        source = path.with_name(path.name + side)
        if source.is_file():
            target = copy.with_name(copy.name + side)
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            target.touch(mode=0o600)
            target.write_bytes(source.read_bytes())


def adapted(name: str, content: bytes, places: Mapping[str, str]) -> bytes:
    """A file of a backup for directories of these names. The record tells of each launch by a hash of it, too."""
    after = moved(name, content, places)
    if name != LAUNCHED or after == content:
        return after
    told = json.loads(after.decode("utf-8"))
    for entry in told.get("models", {}).values():
        if isinstance(entry, dict) and isinstance(entry.get("payload"), dict) and entry["payload"]:
            entry["fingerprint"] = fingerprint(entry["payload"])
    return (json.dumps(told, indent=1) + "\n").encode("utf-8")


def _history(content: bytes, places: Mapping[str, str], place: Path) -> bytes:
    """What the server remembers of launches, for directories of these names; `place` is for what lies about meanwhile.

    Paths of models stand in it in JSON, those of programs as text.
    """
    path = place / "history.db"
    try:
        path.write_bytes(content)
        _move_history(path, places)
        return path.read_bytes()
    finally:
        path.unlink()


def _move_history(path: Path, places: Mapping[str, str]) -> None:
    """Exchange the names of directories, which are `places`' keys, in every text of a database."""
    with contextlib.closing(sqlite3.connect(str(path))) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = database.execute(f'PRAGMA table_info("{table}")').fetchall()
            for column in [row[1] for row in columns if str(row[2]).upper() == "TEXT"]:
                for old, new in places.items():
                    if old != new:
                        database.execute(
                            f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)',
                            (f'"{old}/', f'"{new}/', f'"{old}/'),
                        )
                        database.execute(
                            f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?) '
                            f'WHERE substr("{column}", 1, ?) = ?',
                            (f"{new}/", len(old) + 2, len(old) + 1, f"{old}/"),
                        )
        database.commit()


def _target(root: Path, home: Path, name: str) -> Path:
    area, _slash, rest = name.partition("/")
    return (home if area == "home" else root / area) / rest


def _write(name: str, directory: int, content: bytes, target: Path) -> None:
    """Write a new file that is to become `target`."""
    secret = is_database(target.name) or target.parent.name in ("auth", "state")
    held.write(name, content, 0o600 if secret else 0o640, directory)


def _exchange(name: str, directory: int, top: Path, path: Path) -> None:
    """Put a file in its place below `top`, with nothing beside it that belongs to the one before."""
    with held.entered(top, path.relative_to(top).parts[:-1], make=True) as place:
        for side in SIDES if is_database(path.name) else ():
            held.drop(path.name + side, place)
        held.move(name, directory, path.name, place)


def read_mark(home: Path) -> Optional[Mark]:
    """The mark that a restore left in a home; None when there is none that can be read."""
    try:
        return Mark(**json.loads((home / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _note(home: Path, mark: Mark) -> None:
    content = (json.dumps(asdict(mark), indent=1) + "\n").encode("utf-8")
    with held.private(home, _MARKING) as place, held.entered(home) as top:
        held.write(MARK, content, 0o600, place)
        held.move(MARK, place, MARK, top)


def _sync(directory: Path) -> None:
    handle = os.open(str(directory), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _links(root: Path, home: Path, index: Index) -> Iterator[str]:
    """Links in the way to where files of a backup go, below the home and the directory of records."""
    for file in index.files:
        top = home if file.name.startswith("home/") else root / "state"
        path = _target(root, home, file.name)
        for one in (path, *path.parents):
            if one == top:
                break
            if one.is_symlink():
                yield str(one)


def _refuse_open(paths: List[Path]) -> None:
    """Raise BackupError when a process has one of these files open: it would go on writing into what is replaced."""
    files: Dict[Tuple[int, int], Path] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files[status.st_dev, status.st_ino] = path
    for process in Path("/proc").iterdir() if files else ():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    status = handle.stat()
                    if (status.st_dev, status.st_ino) in files:
                        name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                        raise BackupError(
                            f"{files[status.st_dev, status.st_ino]} is open by process {process.name} ({name}). End "
                            "that process (playbooks/stop.yml where it is the server), then restore."
                        )
