# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives on the controller: names, which one is meant, what goes, and encryption by a real openssl."""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import (
    BackupError,
    Index,
    listed,
    pack,
    unpack,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils import archives
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_names import file_name
from ansible_collections.airgap.xinference.plugins.plugin_utils.unseen import unseen

CONTENTS = {"home/auth/auth.db": b"a database with the-secret-key in it" * 20}
TIME = "2026-11-20T20:15:00Z"
INDEX = Index("gpu-1", TIME, "4.1.0", "native", "/opt/x", "/opt/x/home", "0123456789ab", listed(CONTENTS))
ARCHIVE = pack(INDEX, CONTENTS)


def key_pair(place: Path, name: str, kind: str = "rsa:2048") -> tuple[Path, Path]:
    """A private key and a certificate for it, as docs/backup.md makes them."""
    key, certificate = place / f"{name}.key", place / f"{name}.pem"
    options = ["-pkeyopt", "ec_paramgen_curve:prime256v1"] if kind == "ec" else []
    command = ["openssl", "req", "-x509", "-newkey", kind, *options, "-nodes", "-days", "3650", "-subj", "/CN=backup"]
    done = subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return key, certificate


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return key_pair(tmp_path_factory.mktemp("keys"), "right")


def test_names_say_which_host_and_when() -> None:
    assert archives.name_of("gpu-1", TIME, False) == "gpu-1-20261120T201500Z.tar"
    assert re.fullmatch(r"2001_db8__1-\w{8}-20261120T201500Z\.tar\.cms", archives.name_of("2001:db8::1", TIME, True))
    assert archives.directory_of(Path("/b"), "..").parent == Path("/b")


def test_no_name_of_a_host_leads_elsewhere_and_no_two_share_a_file() -> None:
    hosts = ["gpu-1", "../../etc", "..", "", ".gpu-1", "a/b", "a_b", "köln-1", "käln-1", "2001:db8::1/../x"]
    names = [file_name(host) for host in hosts]
    assert len(set(names)) == len(hosts) and names[0] == "gpu-1"
    assert not [name for name in names if "/" in name or name.startswith(".") or not name.isascii()]


def test_only_this_user_can_read_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "new/gpu-1/gpu-1-x.tar"
    assert archives.write(path, ARCHIVE, None) == len(ARCHIVE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert archives.read(path, None) == ARCHIVE and [one.name for one in path.parent.iterdir()] == ["gpu-1-x.tar"]


def test_a_directory_of_archives_that_was_opened_is_closed_again(tmp_path: Path) -> None:
    path = tmp_path / "gpu-1/gpu-1-x.tar"
    path.parent.mkdir()
    path.parent.chmod(0o755)
    archives.write(path, ARCHIVE, None)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["rsa:2048", "ec"])
def test_an_encrypted_archive_opens_with_its_key_and_no_other(tmp_path: Path, kind: str) -> None:
    key, certificate = key_pair(tmp_path, "right", kind)
    other, _certificate = key_pair(tmp_path, "wrong", kind)
    assert list(archives.faults(tmp_path / "b/gpu-1", certificate, 3)) == []
    path = tmp_path / "b/gpu-1/gpu-1-x.tar.cms"
    archives.write(path, ARCHIVE, certificate)
    assert b"the-secret-key" not in path.read_bytes() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert unpack(archives.read(path, key)) == (INDEX, CONTENTS)
    with pytest.raises(BackupError, match=r"is encrypted. Name the private key"):
        archives.read(path, None)
    with pytest.raises(BackupError, match="is not there"):
        archives.read(path, tmp_path / "nowhere")
    # With an RSA key that is not the right one, openssl may give noise on purpose.
    with pytest.raises(BackupError):
        unpack(archives.read(path, other))


def test_a_changed_byte_of_an_encrypted_archive_changes_nothing_that_is_restored(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """The names in the envelope are not what is restored; whatever is, is refused when it is another."""
    key, certificate = keys
    path = tmp_path / "b/gpu-1/gpu-1-x.tar.cms"
    archives.write(path, ARCHIVE, certificate)
    good, source, refused = path.read_bytes(), random.Random(6), 0
    for place in sorted(source.sample(range(len(good)), 40)):
        changed = bytearray(good)
        changed[place] ^= 1 << source.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            assert unpack(archives.read(path, key)) == (INDEX, CONTENTS)
        except BackupError:
            refused += 1
    assert refused >= 35


def test_a_key_with_a_passphrase_is_an_error_and_no_question(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    key, certificate = keys
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:abcd", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    path = tmp_path / "b/gpu-1/gpu-1-x.tar.cms"
    archives.write(path, ARCHIVE, certificate)
    with pytest.raises(BackupError, match="the key has a passphrase"):
        archives.read(path, locked)


def test_a_recipient_that_is_none_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    assert "is not there. Name a certificate" in "".join(archives.faults(tmp_path, wrong, 0))
    wrong.write_text("no certificate")
    assert re.match(r".*Nothing can be encrypted for .*openssl says", "".join(archives.faults(tmp_path, wrong, 0)))
    with pytest.raises(BackupError):
        archives.write(tmp_path / "b/gpu-1/x.tar.cms", ARCHIVE, wrong)
    assert not list((tmp_path / "b/gpu-1").iterdir())


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no directory")
    told = list(archives.faults(file / "gpu-1", tmp_path / "none.pem", -1))
    assert [line.split()[0] for line in told] == [
        "xinference_backup_directory:",
        "xinference_backup_keep",
        "xinference_backup_recipient:",
    ]


def test_what_killed_runs_began_to_write_goes_with_the_next_archive(tmp_path: Path) -> None:
    directory = tmp_path / "b/gpu-1"
    old, new = (f".{archives.name_of('gpu-1', TIME, yes)}.abcd1234" for yes in (True, False))
    others = [new, f".{archives.name_of('gpu-2', TIME, True)}.abcd1234", ".notes.tar.gz"]
    archive_names(directory, old, *others)
    (directory / ".odd.tar.d").mkdir()
    for path in directory.iterdir():
        if path.name != new:
            os.utime(path, (0, 0))
    archives.write(directory / archives.name_of("gpu-1", TIME, False), ARCHIVE, None)
    names = {path.name for path in directory.iterdir()}
    assert names == {*others, ".odd.tar.d", archives.name_of("gpu-1", TIME, False)}


def test_a_controller_without_openssl_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[Path, Path]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = "".join(archives.faults(tmp_path, keys[1], 0))
    assert "openssl, which encrypts archives, is not on this controller" in told


def archive_names(directory: Path, *names: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("x")


def test_the_newest_of_the_host_is_chosen(tmp_path: Path) -> None:
    own = tmp_path / "gpu-1"
    archive_names(own, "gpu-1-20261119T000000Z.tar", "gpu-1-20261120T000000Z.tar.cms", "gpu-1-20261118T235959Z.tar")
    archive_names(own, ".gpu-1-20261121T000000Z.tar.x1", "gpu-11-20261122T000000Z.tar", "notes.txt")
    assert archives.chosen(tmp_path, "gpu-1").name == "gpu-1-20261120T000000Z.tar.cms"
    assert archives.chosen(own, "gpu-1").name == "gpu-1-20261120T000000Z.tar.cms"
    file = own / "gpu-1-20261119T000000Z.tar"
    assert archives.chosen(file, "gpu-2") == file
    with pytest.raises(BackupError, match=r"no archive of gpu-2 .*xinference_restore_from"):
        archives.chosen(tmp_path, "gpu-2")
    with pytest.raises(BackupError, match="is not there"):
        archives.chosen(tmp_path / "nowhere", "gpu-1")


def test_old_archives_of_the_host_go_and_nothing_else(tmp_path: Path) -> None:
    names = [f"gpu-1-2026112{day}T000000Z.tar{'.cms' if day % 2 else ''}" for day in range(5)]
    archive_names(tmp_path, *names, "gpu-11-20200101T000000Z.tar", "gpu-1-notes.tar")
    assert archives.remove_old(tmp_path, "gpu-1", 0) == []
    assert archives.remove_old(tmp_path, "gpu-1", 5) == []
    assert [path.name for path in archives.remove_old(tmp_path, "gpu-1", 2)] == names[:3]
    left = {*names[3:], "gpu-11-20200101T000000Z.tar", "gpu-1-notes.tar"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_what_a_host_says_is_not_shown_meanwhile() -> None:
    context = SimpleNamespace(no_log=False)
    action = SimpleNamespace(_play_context=context, _connection=SimpleNamespace(_play_context=context))
    with pytest.raises(ValueError, match="x"), unseen(action):
        assert context.no_log is True
        raise ValueError("x")
    assert context.no_log is False
