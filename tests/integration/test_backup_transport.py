# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a backup travels: over a real SSH server, as root and through sudo, seen by nobody, lying nowhere in between."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import release
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import unpack
from sites import Site, SshHost

SECRET = "planted-secret-" + "7" * 40


class Host:
    """What a server leaves below a root directory; no server runs."""

    def __init__(self, root: Path, secret: str = "") -> None:
        self.root, self.database = root, root / "home/auth/auth.db"
        self.database.parent.mkdir(parents=True)
        (root / "state").mkdir()
        place = {
            "directory": str(root / "home"),
            "environment": {},
            "host": "127.0.0.1",
            "port": 9997,
            "command": ["python"],
        }
        files = {
            "server.json": release.Entry('{"backend": "native"}'),
            "service.json": release.Entry(json.dumps(place)),
            "models.json": release.Entry("[]", 0o400),
        }
        release.make(root, files)
        release.switch(root, release.identity(files))
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE users (username TEXT)")
            database.execute("CREATE TABLE api_keys (key_encrypted TEXT, description TEXT)")
            if secret:
                database.execute("INSERT INTO api_keys VALUES (?, NULL)", (secret,))
            database.commit()
        (self.database.parent / "encryption_key").write_text(secret or "of the fresh host")

    @property
    def keys(self) -> List[str]:
        """The keys of the server."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            return [key for (key,) in database.execute("SELECT key_encrypted FROM api_keys")]

    def files(self) -> Dict[str, bytes]:
        """Everything that is there but locks and what SQLite makes of reading."""
        paths = [path for path in self.root.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    """An SSH server."""
    host = SshHost(tmp_path_factory.mktemp("ssh") / "sshd").start()
    yield host
    host.stop()


def unseen(output: str) -> bool:
    """Whether a secret stands nowhere in an output, also not in base64, whatever comes before it."""
    forms = [base64.b64encode(b"x" * shift + SECRET.encode())[4:-4].decode() for shift in range(3)]
    return not any(form in output for form in (SECRET, *forms))


def done(site: Site, action: str, options: Dict[str, Any], *arguments: str) -> Dict[str, Any]:
    result = site.run(action, options, *arguments)
    assert not result.get("failed"), result["msg"]
    return result


@pytest.mark.parametrize(
    ("variables", "environment"),
    [
        ({"ansible_become": True, "ansible_become_method": "sudo"}, {}),
        ({}, {"ANSIBLE_PIPELINING": "0", "ANSIBLE_SSH_PIPELINING": "0"}),
    ],
    ids=["sudo", "without pipelining"],
)
def test_an_archive_goes_from_host_to_host_and_nobody_sees_it(
    ssh: SshHost, tmp_path: Path, variables: Dict[str, Any], environment: Dict[str, str]
) -> None:
    site = Site(tmp_path, {**ssh.variables(), **variables}, environment)
    old, new = Host(tmp_path / "old", SECRET), Host(tmp_path / "new")
    options = {"root": str(old.root), "directory": str(tmp_path / "backups")}
    result = done(site, "xinference_backup", options, "-vvvv", "--diff")
    assert unseen(site.output) and "archive" not in result and "KiB: accounts 2 files" in result["msg"]
    archive = Path(result["path"])
    index, _contents = unpack(archive.read_bytes())
    assert index.host == "site1" and SECRET.encode() in archive.read_bytes()

    restoring = {"root": str(new.root), "from": str(archive)}
    before = new.files()
    result = done(site, "xinference_restore", restoring, "--check", "--diff")
    assert result["changed"] and "would be put in place" in result["msg"] and new.files() == before
    assert "replace home/auth/auth.db" in site.output

    result = done(site, "xinference_restore", restoring, "-vvvv", "--diff")
    assert unseen(site.output) and result["changed"] and new.keys == [SECRET]
    assert (Path(result["aside"]) / "home/auth/encryption_key").read_text() == "of the fresh host"
    assert [path.name for path in new.root.rglob("*") if path.name.startswith((".arriving", ".restoring"))] == []
    before = new.files()
    assert not done(site, "xinference_restore", restoring)["changed"] and new.files() == before


def test_what_cannot_be_restored_is_refused_and_nothing_changes(ssh: SshHost, tmp_path: Path) -> None:
    site = Site(tmp_path, ssh.variables())
    old, new = Host(tmp_path / "old", SECRET), Host(tmp_path / "new", "a key of its own")
    backups = {"root": str(old.root), "directory": str(tmp_path / "backups")}
    archive = Path(done(site, "xinference_backup", backups)["path"])
    before = new.files()

    def refused(**options: Any) -> str:
        result = site.run("xinference_restore", {"root": str(new.root), "from": str(archive), **options})
        assert result.get("failed") and new.files() == before, result
        return " ".join(str(result["msg"]).split())

    assert "1 API key of its own" in refused() and "xinference_restore_replace" in refused()
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(archive.read_bytes().replace(b"SQLite", b"SQLITE", 1))
    assert "home/auth/auth.db in it is not as it was written. Take another archive" in refused(
        **{"from": str(damaged), "replace": True}
    )
    result = site.run("xinference_backup", {**backups, "recipient": str(archive)})
    assert result.get("failed") and "Nothing can be encrypted for" in result["msg"]
    assert not site.run("xinference_restore", {"root": str(new.root), "from": str(archive), "replace": True}).get(
        "failed"
    )
    assert new.keys == [SECRET]


def test_an_archive_that_is_encrypted_lies_nowhere_in_plain(ssh: SshHost, tmp_path: Path) -> None:
    site = Site(tmp_path, ssh.variables())
    old, new = Host(tmp_path / "old", SECRET), Host(tmp_path / "new")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=backup"]
    key, certificate = tmp_path / "backup.key", tmp_path / "backup.pem"
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    options = {"root": str(old.root), "directory": str(tmp_path / "backups"), "recipient": str(certificate)}
    for _again in range(2):
        result = done(site, "xinference_backup", {**options, "keep": 1})
    assert "not encrypted" not in result["msg"]
    written = [path for path in (tmp_path / "backups").rglob("*") if path.is_file()]
    assert [str(path) for path in written] == [result["path"]] and SECRET.encode() not in written[0].read_bytes()
    restoring = {"root": str(new.root), "from": str(tmp_path / "backups")}
    assert "is encrypted. Name the private key" in " ".join(site.run("xinference_restore", restoring)["msg"].split())
    done(site, "xinference_restore", {**restoring, "key": str(key)})
    assert new.keys == [SECRET] and json.loads((new.root / "home/.restored.json").read_text())["done"] is True
