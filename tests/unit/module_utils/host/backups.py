# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that a backup can be made of: a release, a home with real SQLite databases, a record."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

from ansible_collections.airgap.xinference.plugins.module_utils.host import guarding, release
from ansible_collections.airgap.xinference.plugins.module_utils.host.yaml_text import yaml_text
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import fingerprint

TABLES = """
CREATE TABLE users (id INTEGER PRIMARY KEY, username TEXT NOT NULL);
CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_hash TEXT, description TEXT);
"""
HISTORY = "CREATE TABLE launch_history (id INTEGER PRIMARY KEY, model_uid TEXT, data TEXT, python TEXT);"
REGISTRATION = {"version": 2, "model_name": "mine"}


class BackedUp:
    """A host below `place`, with what a server leaves there."""

    def __init__(
        self, place: Path, users: Sequence[str] = ("admin",), keys: Sequence[str] = (), version: str = "4.1.0"
    ):
        self.root, self.home = place / "root", place / "root/home"
        for path in (self.home / "auth", self.home / "model/v2/embedding", self.home / "logs", self.root / "state"):
            path.mkdir(parents=True)
        self.serve(version)
        self.database("auth/auth.db", TABLES)
        self.run("auth/auth.db", *[f"INSERT INTO users (username) VALUES ('{name}')" for name in users])
        self.run("auth/auth.db", *[f"INSERT INTO api_keys (user_id, key_hash) VALUES (1, '{key}')" for key in keys])
        self.write("auth/encryption_key", "e" * 64)
        self.write("auth/jwt_secret_key", "j" * 64)

    def fill(self) -> BackedUp:
        """Everything else that a server has after a while."""
        path = f"{self.root}/models/minilm/0123456789ab"
        payload = {"model_uid": "minilm", "model_name": "mine", "model_type": "embedding", "model_path": path}
        self.database("launch_history.db", HISTORY)
        row = json.dumps({"model_path": path, "elsewhere": f"/mnt{self.root}/x"})
        self.run("launch_history.db", f"INSERT INTO launch_history (data, python) VALUES ('{row}', '{self.root}/p')")
        self.database("download_tasks.db", "CREATE TABLE tasks (id INTEGER PRIMARY KEY);")
        self.write("model/v2/embedding/mine.json", json.dumps({**REGISTRATION, "model_uri": f"file://{path}"}))
        self.write("logs/xinference.log", "a line")
        self.write("worker-relaunches.json", "{}")
        entry = {"fingerprint": fingerprint(payload), "payload": payload, "ready": True}
        (self.root / "state/launched.json").write_text(json.dumps({"format": 1, "models": {"minilm": entry}}))
        (self.root / "state/keeper.json").write_text("{}")
        return self

    def serve(self, version: str = "4.1.0", **environment: str) -> None:
        """Put a release in force."""
        venv = self.root / "venvs/abc"
        (venv / f"lib/python3.11/site-packages/xinference-{version}.dist-info").mkdir(parents=True, exist_ok=True)
        service: Dict[str, Any] = {
            "command": [f"{venv}/bin/python"],
            "environment": {"XINFERENCE_HOME": str(self.home), **environment},
            "directory": str(self.home),
            "host": "127.0.0.1",
            "port": 9997,
        }
        files = {
            "service.json": release.Entry(json.dumps(service), 0o400),
            "server.json": release.Entry(json.dumps({"backend": "native"})),
            "models.json": release.Entry("[]", 0o400),
            "bin/run": release.Entry("#!/bin/sh\n", 0o555),
            "bin/keeper.pyz": release.Entry(data=b"PK", mode=0o444),
        }
        self.put(files)

    def serve_with_docker(self, mounts: Mapping[str, str], secrets: Mapping[str, str], **environment: str) -> None:
        """Put a release of a container in force; `mounts` are directories of the host by the place inside."""
        inside = "/root/.xinference"
        volumes = {inside: str(self.home), **mounts}
        server = {
            "environment": {"XINFERENCE_HOME": inside, **environment},
            "volumes": [{"type": "bind", "source": source, "target": target} for target, source in volumes.items()],
        }
        view = {"backend": "docker", "endpoint": "http://127.0.0.1:9997"}
        files = {
            "compose.yaml": release.Entry(yaml_text({"name": "x", "services": {"server": server}})),
            "server.json": release.Entry(json.dumps(view)),
        }
        self.put({**files, **guarding.files(secrets, {}, "seed")})

    def put(self, files: Mapping[str, release.Entry]) -> None:
        """Put these files in force."""
        release.make(self.root, files)
        release.switch(self.root, release.identity(files))

    def write(self, name: str, text: str) -> Path:
        """A file of the home."""
        path = self.home / name
        path.write_text(text)
        return path

    def database(self, name: str, script: str) -> None:
        """A database of the home, in the mode that the server sets."""
        with contextlib.closing(sqlite3.connect(str(self.home / name))) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(script)

    def run(self, name: str, *statements: str) -> None:
        """Change a database."""
        with contextlib.closing(sqlite3.connect(str(self.home / name))) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    def rows(self, name: str, query: str) -> list:
        """Read a database."""
        with contextlib.closing(sqlite3.connect(str(self.home / name))) as database:
            return database.execute(query).fetchall()

    @property
    def keys(self) -> list:
        """The keys of the server."""
        return [key for (key,) in self.rows("auth/auth.db", "SELECT key_hash FROM api_keys ORDER BY id")]
