# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A restore: what is in its way, what it does to a real directory, and that a kill anywhere loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import backup, held, restore_place
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import BackupError, Index
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup_take import take
from ansible_collections.airgap.xinference.plugins.module_utils.host.guarded import GIVEN
from ansible_collections.airgap.xinference.plugins.module_utils.host.restore import Mark, Plan, Standing, plan
from ansible_collections.airgap.xinference.plugins.module_utils.host.restore_place import (
    look,
    place,
    read_mark,
    receive,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import from_payload
from backups import BackedUp

NAMES = ("home/auth/auth.db", "home/auth/encryption_key", "state/launched.json", "release/models.json")
FILES = backup.listed({name: name.encode() for name in NAMES})
INDEX = Index("gpu-1", "2026-11-20T20:15:00Z", "4.1.0", "native", "/opt/x", "/opt/x/home", "0123456789ab", FILES)
HERE = Standing("/opt/x", "/opt/x/home", "native", "4.1.0")
Backup = Tuple[Index, Dict[str, bytes]]


def standing(**more: Any) -> Standing:
    return Standing(**{**HERE.__dict__, **more})


# What is in the way


def test_an_empty_host_gets_everything_but_the_configuration() -> None:
    found = plan(INDEX, HERE)
    assert [(row.file.name, row.action) for row in found.rows] == [(name, "new") for name in NAMES[:3]]
    assert found.changed and not found.problems


def test_a_host_that_serves_nothing_is_refused() -> None:
    assert "Ship and serve the host first" in plan(INDEX, standing(backend="")).problems[0]


@pytest.mark.parametrize(
    ("users", "keys", "administrator", "words"),
    [
        ((), 0, "", None),
        (("admin",), 0, "admin", None),
        (("admin",), 0, "", "the account admin of its own"),
        (("admin", "ada"), 0, "admin", "the account ada of its own"),
        (("admin", "ada", "bob"), 0, "admin", "the accounts ada, bob of its own"),
        (("admin",), 1, "admin", "1 API key of its own"),
        (("admin", "ada"), 2, "admin", "the account ada and 2 API keys of its own"),
        (None, 0, "admin", "accounts that cannot be read"),
    ],
)
def test_accounts_of_the_host_are_not_lost_unasked(
    users: Optional[Tuple[str, ...]], keys: int, administrator: str, words: Optional[str]
) -> None:
    there = standing(users=users, keys=keys, digests={"home/auth/auth.db": ""})
    problems = plan(INDEX, there, administrator=administrator).problems
    assert len(problems) == (words is not None) and (words is None or words in problems[0])
    assert not plan(INDEX, there, replace=True, administrator=administrator).problems


@pytest.mark.parametrize(
    ("made", "there", "refused"),
    [
        ("4.1.0", "4.1.0", False),
        ("4.1.0", "4.2.0", False),
        ("4.1.0", "4.0.9", True),
        ("4.10.0", "4.9.0", True),
        ("4.1.0", "1.8.1", True),
        ("", "4.1.0", False),
        ("4.1.0", "", False),
    ],
)
def test_a_database_of_a_later_server_is_refused(made: str, there: str, refused: bool) -> None:
    index = Index(**{**INDEX.__dict__, "server_version": made})
    problems = plan(index, standing(version=there)).problems
    assert bool(problems) is refused
    assert not refused or f"serves {there}, which does not know databases of later versions" in problems[0]


def test_all_that_is_wrong_is_told_at_once() -> None:
    there = standing(version="3.0.0", users=("ada",), links=("/opt/x/home/auth",))
    assert len(plan(INDEX, there).problems) == 3


def test_a_record_of_another_backend_stays_behind() -> None:
    found = plan(INDEX, standing(backend="docker"))
    assert [row.file.name for row in found.rows] == list(NAMES[:2]) and "serves with docker" in found.notes[0]


def test_what_is_there_already_is_kept() -> None:
    digests = {"home/auth/encryption_key": FILES[1].sha256, "home/auth/auth.db": "", "state/launched.json": "other"}
    actions = [row.action for row in plan(INDEX, standing(digests=digests)).rows]
    assert actions == ["replace", "keep", "replace"]
    # Below another root its content would be another.
    elsewhere = standing(root="/srv", home="/srv/home", digests=digests)
    assert [row.action for row in plan(INDEX, elsewhere).rows] == ["replace", "replace", "replace"]


def test_other_configuration_is_told_and_left() -> None:
    digests = {"release/models.json": "other", "release/keeper.json": "x"}
    (note,) = plan(INDEX, standing(digests=digests)).notes
    assert "keeper.json, models.json" in note
    assert plan(INDEX, standing(digests={"release/models.json": FILES[2].sha256})).notes == []
    assert plan(INDEX, standing(root="/srv", digests=digests)).notes == []


def test_what_was_restored_is_not_restored_again_unless_it_is_gone() -> None:
    mark = Mark(INDEX.identity, "gpu-1", "then", True, "before-restore-x")
    digests = dict.fromkeys(NAMES, "what the server made of it")
    there = standing(mark=mark, digests=digests, users=("ada",), keys=3)
    assert not plan(INDEX, there).changed and not plan(INDEX, there).problems
    gone = standing(mark=mark, digests={"state/launched.json": "x"})
    assert plan(INDEX, gone).changed
    other = standing(mark=Mark("0" * 64, "gpu-1", "then", True), digests=digests, users=("ada",))
    assert plan(INDEX, other).changed and plan(INDEX, other).problems


def test_an_interrupted_restore_goes_on_although_its_own_accounts_are_there() -> None:
    mark = Mark(INDEX.identity, "gpu-1", "then", False, "before-restore-x")
    there = standing(mark=mark, digests={"home/auth/auth.db": ""}, users=("ada",), keys=3)
    found = plan(INDEX, there)
    assert found.resumed and found.changed and not found.problems
    # Of another backup it does not know that.
    assert plan(INDEX, standing(mark=Mark("0" * 64, "", "", False), users=("ada",))).problems


# On a real directory


@pytest.fixture
def archive(tmp_path: Path) -> Backup:
    """The backup of another host."""
    other = BackedUp(tmp_path / "other", ["admin", "ada"], ["key-of-ada"]).fill()
    return take(other.root, other.home, "gpu-1", "2026-11-20T20:15:00Z")


@pytest.fixture
def host(tmp_path: Path) -> BackedUp:
    """A fresh host, below another root."""
    return BackedUp(tmp_path / "fresh", ["admin"])


def restore(host: BackedUp, archive: Backup, replace: bool = False) -> Plan:
    index, contents = archive
    todo = plan(index, look(host.root, host.home, index), replace, "admin")
    assert not todo.problems, todo.problems
    if todo.changed:
        place(host.root, host.home, index, contents, todo, "20261120T203000Z")
    return todo


def everything(host: BackedUp) -> Dict[str, bytes]:
    paths = [path for top in (host.home, host.root / "state") for path in top.rglob("*") if path.is_file()]
    return {str(path.relative_to(host.root)): path.read_bytes() for path in paths}


def test_the_keys_work_on_another_host_and_paths_follow(host: BackedUp, archive: Backup) -> None:
    old = archive[0].root
    restore(host, archive)
    assert host.keys == ["key-of-ada"]
    assert (host.home / "auth/encryption_key").read_text() == "e" * 64
    where = f"{host.root}/models/minilm/0123456789ab"
    entry = Record(host.root / "state/launched.json", writable=False).entries["minilm"]
    assert entry.payload["model_path"] == where
    assert entry.fingerprint == from_payload(entry.payload).fingerprint()
    registration = json.loads((host.home / "model/v2/embedding/mine.json").read_text())
    assert registration["model_uri"] == f"file://{where}"
    ((data, python),) = host.rows("launch_history.db", "SELECT data, python FROM launch_history")
    assert json.loads(data) == {"model_path": where, "elsewhere": f"/mnt{old}/x"} and python == f"{host.root}/p"
    assert not (host.home / "logs/xinference.log").exists()


def test_nobody_else_can_read_it_and_nothing_lies_about(host: BackedUp, archive: Backup) -> None:
    host.write("auth/auth.db-wal", "of the database that was here")
    restore(host, archive)
    for name in ("home/auth/auth.db", "home/auth/encryption_key", "home/launch_history.db", "state/launched.json"):
        assert stat.S_IMODE((host.root / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE((host.home / "model/v2/embedding/mine.json").stat().st_mode) == 0o640
    aside = host.root / "state/before-restore-20261120T203000Z"
    assert stat.S_IMODE(aside.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in aside.rglob("*") if path.is_file())
    names = [path.name for top in (host.home, host.root / "state") for path in top.rglob("*")]
    assert [name for name in names if name.startswith((".restoring", ".keeping", ".backup", ".arriving"))] == []
    assert not (host.home / "auth/auth.db-wal").exists()


def test_files_belong_to_the_owner_of_the_home(host: BackedUp, archive: Backup) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in (host.home, *host.home.rglob("*")):
        os.chown(str(path), 4711, 4712)
    restore(host, archive)
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (host.home / "auth", *host.home.rglob("*.json"))}
    assert (host.home / "auth/auth.db").stat().st_uid == 4711
    assert owners - {(0, 0)} == {(4711, 4712)}
    assert (host.root / "state/launched.json").stat().st_uid == 0


def test_keys_that_serving_makes_hinder_no_restore(host: BackedUp, archive: Backup) -> None:
    """A new host has those that are given before it listens, and has them again when it starts after the restore."""
    host.run("auth/auth.db", f"INSERT INTO api_keys (user_id, key_hash, description) VALUES (1, 'given', '{GIVEN}')")
    restore(host, archive)
    assert host.keys == ["key-of-ada"]
    host.run("auth/auth.db", "INSERT INTO api_keys (user_id, key_hash, description) VALUES (1, 'own', '')")
    assert look(host.root, host.home, archive[0]).keys == 2


def test_the_second_run_changes_nothing_whatever_the_server_did_since(host: BackedUp, archive: Backup) -> None:
    restore(host, archive)
    host.run("auth/auth.db", "INSERT INTO api_keys (user_id, key_hash) VALUES (1, 'since')")
    before = everything(host)
    assert not restore(host, archive).changed
    assert everything(host) == before


def test_a_home_that_was_made_anew_is_restored_again(host: BackedUp, archive: Backup) -> None:
    restore(host, archive)
    for path in (host.home / "auth").iterdir():
        path.unlink()
    assert restore(host, archive, replace=True).changed and host.keys == ["key-of-ada"]


def test_what_was_there_is_kept_aside_with_what_was_only_in_its_log(host: BackedUp, archive: Backup) -> None:
    writing = sqlite3.connect(str(host.home / "auth/auth.db"))
    writing.execute("PRAGMA wal_autocheckpoint=0")
    with writing:
        writing.execute("INSERT INTO api_keys (user_id, key_hash) VALUES (1, 'only in the log')")
    log = {side: (host.home / f"auth/auth.db{side}").read_bytes() for side in ("-wal", "-shm")}
    database = (host.home / "auth/auth.db").read_bytes()
    writing.close()
    # As a server leaves it that was killed.
    (host.home / "auth/auth.db").write_bytes(database)
    for side, content in log.items():
        (host.home / f"auth/auth.db{side}").write_bytes(content)
    restore(host, archive, replace=True)
    aside = host.root / "state/before-restore-20261120T203000Z/home/auth/auth.db"
    with contextlib.closing(sqlite3.connect(str(aside))) as kept:
        assert kept.execute("SELECT key_hash FROM api_keys").fetchall() == [("only in the log",)]
    assert host.keys == ["key-of-ada"]


def test_a_database_that_cannot_be_read_is_kept_aside_as_it_is(host: BackedUp, archive: Backup) -> None:
    host.write("auth/auth.db", "no database")
    host.write("auth/auth.db-wal", "its log")
    restore(host, archive, replace=True)
    aside = host.root / "state/before-restore-20261120T203000Z/home/auth"
    assert (aside / "auth.db").read_text() == "no database" and (aside / "auth.db-wal").read_text() == "its log"


def test_a_second_restore_keeps_what_the_first_put_aside(host: BackedUp, archive: Backup, tmp_path: Path) -> None:
    restore(host, archive)
    third = BackedUp(tmp_path / "third", ["admin"], ["another"])
    restore(host, take(third.root, third.home, "gpu-3", "2026-11-21T00:00:00Z"), replace=True)
    assert host.keys == ["another"]
    asides = sorted(path.name for path in (host.root / "state").glob("before-restore-*"))
    assert asides == ["before-restore-20261120T203000Z", "before-restore-20261120T203000Z-2"]


def test_a_server_that_runs_is_not_written_under(host: BackedUp, archive: Backup) -> None:
    before = everything(host)
    with (host.home / "auth/auth.db").open("rb") as database:
        server = subprocess.Popen(["sleep", "60"], stdin=database)
    try:
        with pytest.raises(BackupError, match=rf"auth.db is open by process {server.pid} \(sleep\)\. End that process"):
            restore(host, archive)
    finally:
        server.kill()
        server.wait()
    after = everything(host)
    after.pop("state/service.lock")
    assert {name: after[name] for name in before} == before
    restore(host, archive)


def test_a_link_in_the_way_is_refused(host: BackedUp, archive: Backup, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (host.home / "model/v2/embedding").rmdir()
    (host.home / "model/v2/embedding").symlink_to(tmp_path / "theirs")
    index = archive[0]
    problems = plan(index, look(host.root, host.home, index), False, "admin").problems
    assert "model/v2/embedding is a link" in problems[0]


def swap(path: Path, theirs: Path) -> None:
    """What the owner of a directory may do at any moment: a link in the place of something in it."""
    path.rename(path.with_name(f"{path.name}.moved"))
    path.symlink_to(theirs)


def test_a_scratch_that_is_exchanged_for_another_directory_is_left_alone(
    host: BackedUp, archive: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the home may put a directory of root's there that he can move but not read."""
    theirs = host.home / "theirs"
    theirs.mkdir(mode=0o700)
    (theirs / "precious").write_text("root's")
    real = os.mkdir

    def mkdir(name: Any, *more: Any, **options: Any) -> None:
        real(name, *more, **options)
        if str(name).startswith(".restoring-") and theirs.exists():
            (host.home / name).rename(host.home / "moved")
            theirs.rename(host.home / name)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(BackupError, match="was exchanged as soon as it was made"):
        restore(host, archive)
    assert [path.read_text() for path in host.home.glob(".restoring-*/precious")] == ["root's"]


def test_a_scratch_that_is_exchanged_for_a_link_leads_nowhere(
    host: BackedUp, archive: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    real = restore_place._write

    def write(name: str, directory: int, content: bytes, target: Path) -> None:
        for scratch in host.home.glob(".restoring-*"):
            if not scratch.is_symlink() and not scratch.name.endswith(".moved"):
                swap(scratch, theirs)
        real(name, directory, content, target)

    monkeypatch.setattr(restore_place, "_write", write)
    restore(host, archive)
    assert list(theirs.iterdir()) == [] and host.keys == ["key-of-ada"]


def test_a_directory_that_becomes_a_link_meanwhile_is_not_written_through(
    host: BackedUp, archive: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "auth.db-wal").write_text("another's")
    real = restore_place._note

    def note(home: Path, mark: Mark) -> None:
        real(home, mark)
        swap(host.home / "auth", theirs)

    monkeypatch.setattr(restore_place, "_note", note)
    with pytest.raises(BackupError, match="home/auth is not a directory, or is a link"):
        restore(host, archive)
    assert [path.name for path in theirs.iterdir()] == ["auth.db-wal"]


class Killed(BaseException):
    """What a kill does to the process, as far as the disk can tell."""


def steps(monkeypatch: pytest.MonkeyPatch, count: int) -> List[str]:
    """Have the process end at its `count`-th change of a name on the disk; returns the changes so far."""
    seen: List[str] = []
    replace, unlink = Path.replace, Path.unlink

    def change(real: Any) -> Any:
        def do(path: Path, *more: Any, **options: Any) -> Any:
            if len(seen) == count:
                raise Killed
            seen.append(str(path))
            return real(path, *more, **options)

        return do

    monkeypatch.setattr(Path, "replace", change(replace))
    monkeypatch.setattr(Path, "unlink", change(unlink))
    monkeypatch.setattr(held, "move", change(held.move))
    monkeypatch.setattr(held, "drop", change(held.drop))
    # A process that is killed cleans nothing up.
    monkeypatch.setattr(restore_place, "scratch", abandoned)
    monkeypatch.setattr(held, "private", abandoned_private)
    return seen


@contextlib.contextmanager
def abandoned(directory: Path, prefix: str) -> Any:
    path = directory / f"{prefix}killed"
    path.mkdir(exist_ok=True)
    yield path


@contextlib.contextmanager
def abandoned_private(directory: Path, prefix: str) -> Any:
    with abandoned(directory, prefix) as path, held.entered(path) as inner:
        yield inner


def test_a_kill_anywhere_loses_nothing_and_the_second_run_completes_it(archive: Backup, tmp_path: Path) -> None:
    interrupted = 0
    for count in range(100):
        host = BackedUp(tmp_path / str(count), ["admin"], ["own"])
        with pytest.MonkeyPatch.context() as patch:
            steps(patch, count)
            try:
                restore(host, archive, replace=True)
                break
            except Killed:
                interrupted += 1
        asides = list((host.root / "state").glob("before-restore-*/home/auth/auth.db"))
        old = asides[0] if asides else host.home / "auth/auth.db"
        with contextlib.closing(sqlite3.connect(str(old))) as database:
            assert database.execute("SELECT key_hash FROM api_keys").fetchall() == [("own",)]
        # Once files are being exchanged it goes on by itself; before that nothing has changed.
        mark = read_mark(host.home)
        assert restore(host, archive, replace=mark is None).changed
        assert host.keys == ["key-of-ada"] and not restore(host, archive).changed
        kept = list((host.root / "state").glob("before-restore-*/home/auth/auth.db"))
        assert len(kept) in (1, 2)
        names = [path.name for top in (host.home, host.root / "state") for path in top.rglob("*")]
        assert [name for name in names if name.startswith((".restoring", ".keeping"))] == []
    assert interrupted > 8


def test_a_full_disk_changes_nothing(host: BackedUp, archive: Backup, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(host)
    real, written = restore_place._write, []

    def write(name: str, directory: int, content: bytes, target: Path) -> None:
        written.append(name)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        real(name, directory, content, target)

    monkeypatch.setattr(restore_place, "_write", write)
    with pytest.raises(OSError, match="No space left"):
        restore(host, archive)
    monkeypatch.undo()
    after = everything(host)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) <= {"state/service.lock", "home/auth/auth.db-shm", "home/auth/auth.db-wal"}


def test_what_comes_from_the_controller_is_removed_at_once(tmp_path: Path) -> None:
    for name in (".arriving-1", ".arriving-of-a-killed-run", "launched.json"):
        (tmp_path / name).write_text("x")
    assert receive(tmp_path / ".arriving-1") == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["launched.json"]
