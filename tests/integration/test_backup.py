# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backup, wipe, restore on another host: a real 4.1.0 with authentication, whose clients notice nothing but a pause."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import sqlite3
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import AccessRefused, Client
from conftest import ADMIN
from native_hosts import ServedHost
from servers import Missing

TEXT = "a sentence that was embedded before"
READY_LIMIT = 600.0
GIVEN = "sk-backupsgiven0"
MODEL = {
    "model_uid": "minilm",
    "model_name": "bce-embedding-base_v1",
    "model_type": "embedding",
    "model_engine": "sentence_transformers",
    "probe": {"expect": {"dimensions": 384}},
    "source": {"path": "/srv/models/minilm", "name": "minilm"},
}
BY_HAND = {
    "version": 2,
    "model_name": "registered-by-hand",
    "dimensions": 384,
    "max_tokens": 256,
    "language": ["en"],
    "model_specs": [
        {"model_format": "pytorch", "model_hub": "huggingface", "model_id": "a/b", "quantization": "none"},
    ],
}


@pytest.fixture
def hosts(tmp_path: Path, models: Callable[[str], str]) -> Iterator[Callable[[str], ServedHost]]:
    """A function from a name to a host that is shipped to and not served yet; all are stopped at the end."""
    made: List[ServedHost] = []
    variables: Dict[str, Any] = {
        "xinference_server_auth": True,
        "xinference_username": ADMIN["username"],
        "xinference_password": ADMIN["password"],
        "xinference_api_keys": [{"name": "given", "key": GIVEN}],
        "xinference_models": [MODEL],
        "xinference_backup_directory": str(tmp_path / "backups"),
        "xinference_server_environment": {"OMP_NUM_THREADS": "2"},
    }

    def make(name: str) -> ServedHost:
        try:
            made.append(ServedHost(tmp_path / name, {"minilm": models("minilm")}, variables, name=name))
        except Missing as error:
            pytest.skip(str(error))
        return made[-1]

    yield make
    for host in made:
        if (host.root / "current").exists():
            host.play("stop")


def serve(host: ServedHost) -> None:
    """Serve, with an administrator."""
    host.play("serve")
    with contextlib.closing(sqlite3.connect(host.root / "home/auth/auth.db")) as database:
        (accounts,) = database.execute("SELECT count(*) FROM users").fetchone()
        token = database.execute("SELECT value FROM system_config WHERE key = 'setup_token'").fetchone()
    if not accounts:
        Client(host.endpoint, timeout=60.0).setup_admin(str(token[0]), **ADMIN)


def embedding(host: ServedHost, key: str) -> List[float]:
    """What a client gets who has nothing but a key; it waits for the model as clients do."""
    client, limit = Client(host.endpoint, api_key=key, timeout=60.0), time.monotonic() + READY_LIMIT
    while "minilm" not in client.models():
        assert time.monotonic() < limit
        time.sleep(0.5)
    return list(client.post("/v1/embeddings", json={"model": "minilm", "input": TEXT})["data"][0]["embedding"])


def key_pair(place: Path, name: str) -> Path:
    """A private key, and beside it a certificate for it, as docs/backup.md has them made."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", "/CN=backup"]
    subprocess.run(
        [*command, "-keyout", str(place / f"{name}.key"), "-out", str(place / f"{name}.pem")],
        check=True,
        capture_output=True,
    )
    return place / f"{name}.key"


def lasting(host: ServedHost) -> List[Path]:
    """The files of accounts, without those that a database has only while somebody writes."""
    return sorted(path for path in (host.root / "home").rglob("auth/*") if not path.name.endswith(("-wal", "-shm")))


def words(output: str) -> str:
    """An output without its line breaks."""
    return " ".join(output.split())


def check_unseen(output: str, host: ServedHost, *secrets: str) -> None:
    """No secret stands in what a playbook printed, and nothing of the databases either."""
    files = [(host.root / "home/auth" / name).read_text() for name in ("encryption_key", "jwt_secret_key")]
    for secret in (*secrets, ADMIN["password"], *files):
        assert secret not in output
        for shift in range(3):
            # As it stands in the middle of base64, whatever comes before.
            middle = base64.b64encode(b"x" * shift + secret.encode())[4:-4].decode()
            assert middle not in output


def test_the_same_key_fetches_the_same_embedding_from_another_host(
    hosts: Callable[[str], ServedHost], tmp_path: Path
) -> None:
    right, wrong = key_pair(tmp_path, "right"), key_pair(tmp_path, "wrong")
    old = hosts("gpu-1")
    serve(old)
    old.play("models")
    admin = Client(old.endpoint, timeout=60.0, **ADMIN)
    key = str(admin.post("/v1/admin/keys", json={"name": "site"})["key"])
    admin.register("embedding", BY_HAND)
    before = embedding(old, key)

    # While it runs, encrypted, and telling nobody what is in it.
    recipient: Dict[str, Any] = {
        "xinference_backup_recipient": str(right.with_suffix(".pem")),
        "xinference_backup_keep": 1,
    }
    old.play("backup", "--check", **recipient)
    assert not (tmp_path / "backups").exists()
    check_unseen(old.play("backup", "-vvv", "--diff", **recipient), old, key, GIVEN)
    old.play("backup", **recipient)
    (archive,) = (tmp_path / "backups").rglob("*.*")
    assert archive.match("gpu-1/gpu-1-*.tar.cms")
    assert re.search(r"gpu-1-\S+\.tar\.cms, [\d.]+ KiB: accounts", words(old.output))
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600 and stat.S_IMODE(archive.parent.stat().st_mode) == 0o700
    assert b"SQLite" not in archive.read_bytes() and embedding(old, key) == pytest.approx(before, abs=1e-5)
    old.play("stop")
    secrets = [(old.root / "home/auth" / name).read_text() for name in ("encryption_key", "jwt_secret_key")]
    shutil.rmtree(old.root)

    # Another host, below another root, with an administrator as serving makes one.
    new = hosts("gpu-2")
    serve(new)
    with pytest.raises(AccessRefused):
        Client(new.endpoint, api_key=key, timeout=60.0).models()
    restoring: Dict[str, Any] = {"xinference_restore_from": str(archive), "xinference_restore_key": str(right)}
    home = lasting(new)
    refused = words(new.play("restore", expect=2, **{**restoring, "xinference_restore_key": str(wrong)}))
    assert ("cannot be" in refused and "wrong.key" in refused) or "cannot be restored" in refused
    foretold = new.play("restore", "--check", "--diff", "--tags", "xinference_restore", **restoring)
    assert "+replace home/auth/auth.db" in foretold and "would be put in place" in words(foretold)
    assert lasting(new) == home
    with pytest.raises(AccessRefused):
        Client(new.endpoint, api_key=key, timeout=60.0).models()

    output = new.play("restore", "-vvv", "--diff", **restoring)
    check_unseen(output, new, key, GIVEN, *secrets)
    assert embedding(new, key) == embedding(new, GIVEN) == pytest.approx(before, abs=1e-5)
    admin = Client(new.endpoint, timeout=60.0, **ADMIN)
    assert admin.registration("embedding", "registered-by-hand") is not None
    record = json.loads((new.root / "state/launched.json").read_text())["models"]["minilm"]
    assert record["payload"]["model_path"].startswith(str(new.root))
    aside = list((new.root / "state").glob("before-restore-*/home/auth/auth.db"))
    assert len(aside) == 1 and stat.S_IMODE(aside[0].parent.stat().st_mode) == 0o700

    # Again it changes nothing, and the server goes on.
    pid = json.loads((new.root / "run/server.json").read_text())["pid"]
    again = new.play("restore", **restoring)
    assert re.findall(r"changed=(\d+)", again) and set(re.findall(r"changed=(\d+)", again)) == {"0"}, again
    assert json.loads((new.root / "run/server.json").read_text())["pid"] == pid
    names = [path.name for path in (new.root / "state").iterdir()]
    assert not [name for name in names if name.startswith((".arriving", ".restoring", ".keeping", ".backup"))]
