# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real Xinference servers for tests: their environments, their processes.

An environment is `<cache>/venvs/<version>-<hash of its requirements>`, made with pip when missing (about 80 s and 2 GB
each). One in OVER has a Xinference only, and all else from the environment of another version (about 20 s and 95 MB).
XINFERENCE_TEST_VENVS may name a directory with ready ones, called after the version.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client, ServerError
from tiny_models import cache_root

NEW = "4.1.0"
OLD = "1.8.1"
FIRST_CALLER = "3.0.0"
"""The first version that belongs to its first caller; up to 4.0.1 they make accounts by the same code."""
OVER = {FIRST_CALLER: NEW}
"""Versions that run with the packages of another."""
HERE = Path(__file__).parent
START_LIMIT = 300.0
READY_LIMIT = 300.0
OFFLINE = {
    "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
    "XINFERENCE_MODEL_SRC": "modelscope",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    # Nothing is to come back by itself while a test looks at a failure.
    "XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT": "0",
}


class Missing(Exception):
    """A server cannot be run here; the text says why."""


def environment(version: str) -> Path:
    """The virtual environment with this version of Xinference, made when it is not there. Raises Missing."""
    ready = os.environ.get("XINFERENCE_TEST_VENVS")
    if ready:
        if not (Path(ready) / version / "bin" / "xinference-local").exists():
            raise Missing(f"XINFERENCE_TEST_VENVS={ready} has no Xinference {version}")
        return Path(ready) / version
    below = environment(OVER[version]) if version in OVER else None
    requirements = HERE / f"xinference-{version}.txt"
    told = requirements.read_bytes() + (below.name.encode() if below else b"")
    target = cache_root() / "venvs" / f"{version}-{hashlib.sha256(told).hexdigest()[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds it made
        if not (target / ".complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            print(f"Installing {requirements.stem} into {target} ...", file=sys.stderr, flush=True)
            try:
                if below:
                    _build_over(target, requirements, below)
                else:
                    _build(target, requirements)
            except (OSError, subprocess.CalledProcessError) as error:
                raise Missing(f"{requirements.name} cannot be installed: {error}") from error
            (target / ".complete").touch()
    return target


def _build(target: Path, requirements: Path) -> None:
    """Make an environment where it will stay, because its scripts hold its path."""
    python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if not python:
        raise Missing("Python 3.11 is needed for a real Xinference and is not on PATH")
    pip = [str(target / "bin" / "python"), "-m", "pip"]
    subprocess.run([python, "-m", "venv", str(target)], check=True)
    subprocess.run([*pip, "install", "--quiet", "--requirement", str(requirements)], check=True)
    # It comes as a CUDA build, and beside a CPU torch it breaks `import transformers`.
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    binary = next(target.glob("lib/python3*/site-packages/imageio_ffmpeg/binaries/ffmpeg-*"))
    (target / "bin" / "ffmpeg").symlink_to(binary)


def _build_over(target: Path, requirements: Path, below: Path) -> None:
    """Make an environment with what is required and nothing that this needs, which it finds in the one below."""
    python = str(below / "bin" / "python")
    subprocess.run([python, "-m", "venv", "--without-pip", str(target)], check=True)
    install = ["-m", "pip", "--python", str(target / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([python, *install, "--requirement", str(requirements)], check=True)
    (packages,) = target.glob("lib/python3*/site-packages")
    (packages / "below.pth").write_text(f"{next(below.glob('lib/python3*/site-packages'))}\n")


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server. `home` holds everything it writes and is removed by `stop`."""

    version: str
    endpoint: str
    home: Path
    auth: bool
    command: List[str] = field(repr=False)
    surroundings: Dict[str, str] = field(repr=False)
    process: Any = field(default=None, repr=False)

    @property
    def log(self) -> str:
        """All that it has printed."""
        return (self.home / "log").read_text(errors="replace")

    def client(self, **options: Any) -> Client:
        """A client without credentials, unless `options` give some."""
        return Client(self.endpoint, **{"timeout": 60.0, **options})

    def setup_token(self) -> str:
        """The token that the first administrator must show (4.1 and later with authentication on)."""
        with contextlib.closing(sqlite3.connect(self.home / "xinference" / "auth" / "auth.db")) as database:
            row = database.execute("SELECT value FROM system_config WHERE key = 'setup_token'").fetchone()
        return str(row[0])

    def pids(self) -> List[int]:
        """Every process of this server: those whose environment names its home."""
        found = []
        mark = f"XINFERENCE_HOME={self.home}/".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def clear(self, **login: Any) -> None:
        """Terminate every model, also failed ones, and forget custom registrations of embedding models."""
        client = self.client(**login)
        for instance in client.instances():
            with contextlib.suppress(ServerError):
                client.terminate(instance["model_uid"])
        for entry in client.registrations("embedding"):
            if not entry["is_builtin"]:
                client.unregister("embedding", entry["model_name"])

    def run(self) -> None:
        """Run the server's command; it goes on in the same log."""
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.surroundings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home,
            )

    def serves(self) -> bool:
        """Whether its process runs and it answers."""
        try:
            return self.process.poll() is None and bool(self.client().status().get("workers"))
        except ServerError:
            return False

    def wait(self) -> None:
        """Wait until it answers. One that does not is stopped, and RuntimeError raised with its log."""
        client = self.client(timeout=5.0)
        limit = time.monotonic() + START_LIMIT
        while True:
            try:
                if client.status().get("workers"):
                    return
            except ServerError:
                pass
            if self.process.poll() is not None or time.monotonic() > limit:
                text = self.log[-4000:]
                self.stop()
                raise RuntimeError(f"Xinference {self.version} did not come up:\n{text}")
            time.sleep(0.3)

    def kill(self) -> None:
        """End every process of this server at once; its home and its port stay."""
        self._end(((signal.SIGKILL, 60.0),))

    def stop(self) -> None:
        """End every process of this server and remove its home."""
        self._end(((signal.SIGTERM, 10.0), (signal.SIGKILL, 60.0)))
        self.process.wait(timeout=60)
        shutil.rmtree(self.home, ignore_errors=True)

    def _end(self, ways: Any) -> None:
        for sign, patience in ways:
            limit = time.monotonic() + patience
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            while self.pids() and time.monotonic() < limit:
                self.process.poll()  # takes note of its end, so that it is no zombie
                time.sleep(0.1)


def start(
    version: str,
    auth: bool = False,
    env: Optional[Mapping[str, str]] = None,
    arguments: Optional[List[str]] = None,
    wait: bool = True,
    guard: Optional[Path] = None,
    port: int = 0,
) -> Server:
    """Start a server on a free port of loopback and wait until it answers. Raises Missing or RuntimeError with its log.

    `auth` is for versions that have accounts of their own; `arguments` are added to the command line. `guard` is a
    directory with the files of `guarding`, through whose program the server is started. A `port` may be chosen.
    """
    venv = environment(version)
    home = Path(tempfile.mkdtemp(prefix=f"xinference-{version}-"))
    port = port or free_port()
    surroundings: Dict[str, str] = {
        "PATH": f"{venv}/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        **OFFLINE,
        "XINFERENCE_HOME": f"{home}/xinference",
        "XINFERENCE_AUTH_ADVANCED": "1" if auth else "0",
        **(env or {}),
    }
    command = [f"{venv}/bin/xinference-local", "--host", "127.0.0.1", "--port", str(port), *(arguments or [])]
    if guard is not None:
        command = [f"{venv}/bin/python", str(guard / "bin/guarded.py"), *command]
    server = Server(version, f"http://127.0.0.1:{port}", home, auth, command, surroundings)
    server.run()
    if wait:
        server.wait()
    return server


def launch(client: Client, payload: Mapping[str, Any]) -> None:
    """Launch a model and wait until it serves; fails with what the server says of it."""
    client.launch(payload, timeout=READY_LIMIT)
    limit = time.monotonic() + READY_LIMIT
    while True:
        (instance,) = client.instances(payload["model_uid"])
        if instance["status"] == "READY":
            return
        assert instance["status"] in ("CREATING", "LOADING"), instance
        assert time.monotonic() < limit, instance
        time.sleep(0.3)


@contextlib.contextmanager
def running(version: str, **options: Any) -> Iterator[Server]:
    """`start`, and `stop` at the end of the block."""
    server = start(version, **options)
    try:
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    for wanted in (NEW, OLD, *OVER):
        print(environment(wanted))
