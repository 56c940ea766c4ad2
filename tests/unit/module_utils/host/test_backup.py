# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What belongs to a backup, that it is of one moment, and that an archive with any byte changed is refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import sqlite3
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Dict, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import backup, backup_take, release
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import (
    BackupError,
    Damaged,
    Index,
    kind_of,
    moved,
    numbers,
    pack,
    unpack,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup_take import belonging, take
from backups import BackedUp

TIME = "2026-11-20T20:15:00Z"


@pytest.fixture
def host(tmp_path: Path) -> BackedUp:
    return BackedUp(tmp_path, ["admin", "ada"], ["key-of-ada"]).fill()


def taken(host: BackedUp) -> Tuple[Index, Dict[str, bytes]]:
    return take(host.root, host.home, "gpu-1", TIME)


def small() -> Tuple[Index, Dict[str, bytes]]:
    contents = {"home/auth/auth.db": b"database", "state/launched.json": b"{}", "release/models.json": b"[]"}
    index = Index("gpu-1", TIME, "4.1.0", "native", "/opt/x", "/opt/x/home", "0123456789ab", backup.listed(contents))
    return index, contents


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("home/auth/auth.db", "accounts"),
        ("home/auth/encryption_key", "accounts"),
        ("home/auth/jwt_secret_key", "accounts"),
        ("home/model/v2/llm/mine.json", "registrations"),
        ("home/model/embedding/mine.json", "registrations"),
        ("home/model/v2/builtin/llm/llm_models.json", "registrations"),
        ("home/launch_history.db", "records"),
        ("home/monitor_config.db", "records"),
        ("home/token_routers.db", "records"),
        ("home/system-settings.json", "records"),
        ("state/launched.json", "records"),
        ("release/service.json", "configuration"),
        ("release/server.env", "configuration"),
        ("release/keeper.json", "configuration"),
        ("home/auth/auth.db-wal", None),
        ("home/auth/auth.db-shm", None),
        ("home/auth/.auth.db.swp", None),
        ("home/download_tasks.db", None),
        ("home/worker-relaunches.json", None),
        ("home/logs/local_1/xinference.log", None),
        ("home/cache/v2/x/model.safetensors", None),
        ("home/model/v2/llm/weights.bin", None),
        ("home/tiktoken/9b5ad716", None),
        ("home/.restored.json", None),
        ("state/keeper.json", None),
        ("state/store.lock", None),
        ("release/bin/run", None),
        ("release/keeper.pyz", None),
        ("blobs/sha256/0", None),
        ("home/auth/../../../etc/passwd", None),
        ("home/model/../auth/x.json", None),
        ("home/model/v2/./x.json", None),
        ("/home/auth/auth.db", None),
        ("../home/auth/auth.db", None),
        ("home//auth/auth.db", None),
        ("home/auth/", None),
        ("home/auth/a\\b", None),
        ("home/auth/a\0b", None),
        ("index.json", None),
        ("", None),
    ],
)
def test_what_belongs(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_host_is_backed_up_as_a_whole_and_nothing_beside(host: BackedUp) -> None:
    index, contents = taken(host)
    assert [file.name for file in index.files] == [
        "home/auth/auth.db",
        "home/auth/encryption_key",
        "home/auth/jwt_secret_key",
        "home/launch_history.db",
        "home/model/v2/embedding/mine.json",
        "release/models.json",
        "release/server.json",
        "release/service.json",
        "state/launched.json",
    ]
    assert (index.host, index.time, index.server_version, index.backend) == ("gpu-1", TIME, "4.1.0", "native")
    assert (index.root, index.home) == (str(host.root), str(host.home))
    assert {file.kind for file in index.files} == set(backup.KINDS)
    again, found = unpack(pack(index, contents))
    assert again == index and found == contents
    assert sorted(path.name for path in (host.root / "state").iterdir()) == [
        "keeper.json",
        "launched.json",
        "release.json",
        "service.lock",
    ]


def test_a_database_is_of_one_moment_while_it_is_written(host: BackedUp, tmp_path: Path) -> None:
    """What is only in the log of a database belongs to it, and a half transaction does not."""
    writing = sqlite3.connect(str(host.home / "auth/auth.db"))
    writing.execute("PRAGMA wal_autocheckpoint=0")
    with writing:
        writing.execute("INSERT INTO api_keys (user_id, key_hash) VALUES (1, 'in the log')")
    writing.execute("INSERT INTO api_keys (user_id, key_hash) VALUES (1, 'not yet')")
    assert b"in the log" not in (host.home / "auth/auth.db").read_bytes()
    _index, contents = taken(host)
    writing.rollback()
    writing.close()
    copy = tmp_path / "copy.db"
    copy.write_bytes(contents["home/auth/auth.db"])
    with contextlib.closing(sqlite3.connect(str(copy))) as database:
        keys = [key for (key,) in database.execute("SELECT key_hash FROM api_keys ORDER BY id")]
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert keys == ["key-of-ada", "in the log"]


def test_a_busy_server_is_backed_up_consistently(host: BackedUp, tmp_path: Path) -> None:
    """Every transaction writes a user and a key; no backup has one without the other."""
    over = threading.Event()

    def write() -> None:
        with contextlib.closing(sqlite3.connect(str(host.home / "auth/auth.db"), timeout=30)) as database:
            while not over.is_set():
                with database:
                    database.execute("INSERT INTO users (username) VALUES ('x')")
                    database.execute("INSERT INTO api_keys (user_id, key_hash) VALUES (2, 'x')")

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for number in range(5):
            copy = tmp_path / f"{number}.db"
            copy.write_bytes(taken(host)[1]["home/auth/auth.db"])
            with contextlib.closing(sqlite3.connect(str(copy))) as database:
                (users,) = database.execute("SELECT count(*) FROM users WHERE username = 'x'").fetchone()
                (keys,) = database.execute("SELECT count(*) FROM api_keys WHERE key_hash = 'x'").fetchone()
            assert users == keys
    finally:
        over.set()
        writing.join()


def test_a_damaged_database_is_no_backup(host: BackedUp) -> None:
    (host.home / "launch_history.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    with pytest.raises(BackupError, match=r"launch_history.db (cannot be read|is damaged)"):
        taken(host)
    assert not list((host.root / "state").glob(".backup-*"))


def test_what_a_killed_run_left_is_removed(host: BackedUp) -> None:
    leftover = host.root / "state/.backup-killed"
    leftover.mkdir()
    (leftover / "copy.db").write_text("secret")
    taken(host)
    assert not leftover.exists()


def test_a_registration_that_is_being_written_is_read_when_it_is_whole(
    host: BackedUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = host.write("model/v2/embedding/mine.json", '{"model_na')
    monkeypatch.setattr(time, "sleep", lambda _seconds: path.write_text('{"model_name": "whole"}'))
    assert json.loads(taken(host)[1]["home/model/v2/embedding/mine.json"]) == {"model_name": "whole"}


def test_a_registration_that_is_broken_for_good_does_not_keep_the_rest_from_being_saved(host: BackedUp) -> None:
    host.write("model/v2/embedding/mine.json", '{"model_na')
    assert taken(host)[1]["home/model/v2/embedding/mine.json"] == b'{"model_na'


def test_nothing_to_back_up_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="No release is in force below"):
        belonging(tmp_path, tmp_path / "home")


@pytest.mark.parametrize("name", ["XINFERENCE_AUTH_DB_PATH", "XINFERENCE_HOME", "XINFERENCE_TOKEN_ROUTER_DB_PATH"])
def test_what_lies_elsewhere_is_not_missed_silently(host: BackedUp, name: str) -> None:
    host.serve(**{name: "/var/lib/elsewhere"})
    with pytest.raises(BackupError, match=f"{name}=/var/lib/elsewhere"):
        belonging(host.root, host.home)
    host.serve(**{name: str(host.home / "other/place")})
    with pytest.raises(BackupError, match="not its place"):
        belonging(host.root, host.home)
    host.serve(**{name: str(host.home / backup_take._PLACES[name])})
    assert belonging(host.root, host.home)


@pytest.mark.parametrize(
    ("mounts", "secrets", "environment", "told"),
    [
        ({"/models": "/srv/models", "/root/.xinference/nltk_data": "/srv/nltk"}, {"A_WORD": "x"}, {}, ""),
        ({}, {}, {"XINFERENCE_AUTH_DB_PATH": "/root/.xinference/auth/auth.db"}, ""),
        ({}, {}, {"XINFERENCE_AUTH_DB_PATH": "/data/auth.db"}, "XINFERENCE_AUTH_DB_PATH=/data/auth.db,"),
        ({"/data": "/srv"}, {}, {"XINFERENCE_AUTH_DB_PATH": "/data/auth.db"}, "XINFERENCE_AUTH_DB_PATH=/data/auth.db,"),
        ({}, {"XINFERENCE_AUTH_DB_PATH": "/data/auth.db"}, {}, "keeps XINFERENCE_AUTH_DB_PATH,"),
        ({"/root/.xinference/auth": "/srv"}, {}, {}, "XINFERENCE_AUTH_DB_PATH=/root/.xinference/auth/auth.db,"),
        ({}, {}, {"XINFERENCE_HOME": "/data"}, "keeps XINFERENCE_HOME=/data, which is not its place"),
    ],
)
def test_what_a_container_has_elsewhere_is_not_missed_silently(
    host: BackedUp, mounts: Dict[str, str], secrets: Dict[str, str], environment: Dict[str, str], told: str
) -> None:
    host.serve_with_docker(mounts, secrets, **environment)
    if not told:
        assert "home/auth/auth.db" in belonging(host.root, host.home)
        return
    with pytest.raises(BackupError, match=told):
        belonging(host.root, host.home)


def test_a_release_that_cannot_be_read_is_not_backed_up_as_if_nothing_lay_elsewhere(host: BackedUp) -> None:
    (host.root / "current/service.json").chmod(0o600)
    (host.root / "current/service.json").write_text("{}")
    with pytest.raises(BackupError, match=r"cannot be read .*playbooks/serve.yml"):
        belonging(host.root, host.home)


@pytest.mark.parametrize("name", ["auth/more", "model/v2/llm.json", "auth"])
def test_a_link_is_not_followed(host: BackedUp, tmp_path: Path, name: str) -> None:
    path = host.home / name
    if path.exists():
        path.rename(tmp_path / "aside")
    path.symlink_to("/etc" if name == "auth" else "/etc/passwd")
    with pytest.raises(BackupError, match="is a link"):
        belonging(host.root, host.home)


def test_what_is_too_large_is_named(host: BackedUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup_take, "LIMIT", 1 << 20)
    host.write("monitor_config.db", "x" * (2 << 20))
    with pytest.raises(BackupError, match=r"monitor_config\.db is the largest"):
        belonging(host.root, host.home)


def test_a_changed_byte_is_found_wherever_it_is() -> None:
    data = pack(*small())
    source = random.Random(6)
    # All that says anything, and some of what only fills.
    for place in [place for place in range(len(data)) if data[place] or place % 16 == 0]:
        changed = bytearray(data)
        changed[place] ^= 1 << source.randrange(8)
        with pytest.raises(BackupError):
            unpack(bytes(changed))


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 1024, 4000, -1])
def test_an_archive_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(Damaged):
        unpack(pack(*small())[:cut])


def test_more_at_the_end_is_refused() -> None:
    with pytest.raises(Damaged, match="bytes are not as they were"):
        unpack(pack(*small()) + b"\0" * 10240)


def sealed(index_text: bytes, members: Dict[str, tarfile.TarInfo]) -> bytes:
    """An archive that somebody else made with care: the index has its seal."""
    target = io.BytesIO()
    seal = f"{hashlib.sha256(index_text).hexdigest()}  {backup.INDEX}\n".encode()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in ((backup.INDEX, index_text), (backup.SEAL, seal)):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o600
            archive.addfile(member, io.BytesIO(content))
        for member in members.values():
            archive.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
    return target.getvalue()


@pytest.mark.parametrize(
    "name", ["../../etc/cron.d/x", "/etc/passwd", "home/auth/../../../x", "home/../x", "state/x", "home/.bashrc"]
)
def test_a_path_that_leads_out_is_refused(name: str) -> None:
    contents = {name: b"x"}
    index = replace(small()[0], files=backup.listed(contents))
    member = tarfile.TarInfo(name)
    member.size = 1
    with pytest.raises(Damaged, match="which no backup of this collection has"):
        unpack(sealed(index.text(), {name: member}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_no_plain_file_is_refused(kind: bytes) -> None:
    name = "home/auth/auth.db"
    index = replace(small()[0], files=backup.listed({name: b""}))
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(Damaged, match="no plain file"):
        unpack(sealed(index.text(), {name: member}))


def test_a_later_format_is_refused_as_such() -> None:
    told = {**json.loads(small()[0].text()), "format": 2}
    with pytest.raises(BackupError, match="another version of this collection"):
        unpack(sealed(json.dumps(told).encode(), {}))


@pytest.mark.parametrize(
    "change", [{"host": 1}, {"more": ""}, {"files": [{"name": "x"}]}, {"files": 1}, {"root": None}]
)
def test_an_index_that_we_did_not_write_is_refused(change: Dict[str, object]) -> None:
    told = {**json.loads(small()[0].text()), **change}
    with pytest.raises(Damaged, match="index"):
        unpack(sealed(json.dumps(told).encode(), {}))


@pytest.mark.parametrize(("text", "found"), [("4.1.0", (4, 1, 0)), ("v3.2.0rc1", (3, 2, 0)), ("", ()), ("main", ())])
def test_versions_are_compared_by_their_numbers(text: str, found: Tuple[int, ...]) -> None:
    assert numbers(text) == found


def test_paths_follow_to_another_root() -> None:
    places = {"/opt/x": "/srv/y", "/data/home": "/srv/y/home"}
    before = {
        "a": "/opt/x/models/m",
        "b": ["file:///opt/x/m", "/opt/xy/m", "see /opt/x/m", "/opt/x"],
        "c": {"/opt/x": "/data/home/m"},
        "d": 1,
    }
    after = json.loads(moved("state/launched.json", json.dumps(before).encode(), places))
    assert after == {
        "a": "/srv/y/models/m",
        "b": ["file:///srv/y/m", "/opt/xy/m", "see /opt/x/m", "/srv/y"],
        "c": {"/opt/x": "/srv/y/home/m"},
        "d": 1,
    }
    assert moved("x.json", b"{ broken /opt/x/", places) == b"{ broken /opt/x/"
    assert moved("x.json", b'{"a":   "/elsewhere"}', places) == b'{"a":   "/elsewhere"}'
    assert moved("x.json", b'{"a": "/opt/x/m"}', {"/opt/x": "/opt/x"}) == b'{"a": "/opt/x/m"}'


@pytest.mark.parametrize(
    ("reference", "version"),
    [("xprobe/xinference:v4.1.0", "4.1.0"), ("xprobe/xinference:v3.2.0-cpu", "3.2.0"), ("site/xinference:mine", "")],
)
def test_the_version_in_a_container_is_told_by_its_image(tmp_path: Path, reference: str, version: str) -> None:
    image = {"reference": reference, "image_id": "sha256:1", "digest": "sha256:2"}
    other = {"reference": "other:v9.9", "image_id": "sha256:3", "digest": "sha256:4"}
    files = {
        "server.json": release.Entry(json.dumps({"backend": "docker", "image": "sha256:1"})),
        "artifacts.json": release.Entry(json.dumps({"images": {"a": other, "b": image}})),
    }
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    assert backup_take.server_version(tmp_path) == version


def test_a_version_that_cannot_be_told_is_none(host: BackedUp) -> None:
    (host.root / "current/service.json").chmod(0o600)
    (host.root / "current/service.json").write_text("{}")
    assert backup_take.server_version(host.root) == ""
