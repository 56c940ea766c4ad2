# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts on this machine that serve natively, with a real Xinference that need not be installed for each.

A host is a root directory. Playbooks serve a `ServedHost`, from a thin environment that borrows its packages from the
shared one of the tests. The server of a `StartedHost` is started by the test, as its manager would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

import plays
import yaml
from ansible_collections.airgap.xinference.plugins.module_utils.host import native_run, service
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import Native
from ansible_collections.airgap.xinference.plugins.module_utils.host.venv import MARKER, Venv
from doors import run_module
from servers import NEW, Missing, environment, free_port
from sites import REPOSITORY, Site, make_bundle, make_model
from tiny_models import cache_root

SUPERVISOR = next(
    line
    for line in (REPOSITORY / "roles/xinference_bundle/files/host-requirements.txt").read_text().splitlines()
    if line.startswith("supervisor==")
)
DIGEST = "0123456789ab"
# supervisord, as far as anybody who looks at processes can tell: it starts the server and waits.
MANAGER = "import subprocess, sys; subprocess.run(sys.argv[1:3])"
LIMIT_S = 240.0


class NativeHost:
    """A host with the root directory `root`. `output` is what the last playbook printed."""

    def __init__(self, place: Path, variables: Mapping[str, Any], name: str) -> None:
        self.place, self.root, self.name = place, place / "root", name
        self.port, self.output = free_port(), ""
        self.variables: Dict[str, Any] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "xinference_root": str(self.root),
            "xinference_backend": "native",
            "xinference_host": "127.0.0.1",
            "xinference_port": self.port,
            # A machine that does much else starts a server slowly.
            "xinference_server_wait_timeout": 480,
            **variables,
        }

    @property
    def endpoint(self) -> str:
        """Where the server answers."""
        return f"http://127.0.0.1:{self.port}"

    def play(self, playbook: str, *arguments: str, expect: int = 0, **variables: Any) -> str:
        """Run a playbook of the collection for this host alone; returns what it printed."""
        inventory = self.place / "hosts.json"
        hosts = {"hosts": {self.name: {}}, "vars": {**self.variables, **variables}}
        inventory.touch(mode=0o600)
        inventory.write_text(json.dumps({"xinference": hosts}))
        done = plays.run("-i", str(inventory), f"playbooks/{playbook}.yml", *arguments)
        self.output = done.stdout
        assert done.returncode == expect, done.stdout
        return done.stdout


# --- served by playbooks ----------------------------------------------------------------------------------------------


class ServedHost(NativeHost):
    """A host as shipping leaves it, with the server of a version and with models, by the name of each its directory."""

    def __init__(
        self,
        place: Path,
        models: Mapping[str, str],
        variables: Mapping[str, Any],
        version: str = NEW,
        name: str = "gpu-1",
    ) -> None:
        super().__init__(place, variables, name)
        paths = {}
        for model, directory in models.items():
            path = self.root / "models" / model / DIGEST
            path.parent.mkdir(parents=True)
            path.symlink_to(directory)
            paths[model] = {"path": str(path), "digest": f"sha256:{DIGEST}"}
        wheels = {"server": {"path": str(self.root / "wheels/server" / DIGEST), "digest": f"sha256:{DIGEST}"}}
        (self.root / "state").mkdir(parents=True)
        (self.root / "state/artifacts.json").write_text(json.dumps({"models": paths, "wheels": wheels}))
        borrow(environment(version), self.root / "venvs" / DIGEST)


def borrow(shared: Path, path: Path) -> None:
    """An environment at `path` that has the packages of another one, and supervisord."""
    packages = next(shared.glob("lib/python3*/site-packages"))
    own = path / packages.relative_to(shared)
    own.mkdir(parents=True)
    (path / "bin").symlink_to(shared / "bin")
    (path / "pyvenv.cfg").write_bytes((shared / "pyvenv.cfg").read_bytes())
    (own / "borrowed.pth").write_text(f"{packages}\n{supervisor()}\n")
    # Where a host looks which version it serves.
    (found,) = packages.glob("xinference-*.dist-info")
    (own / found.name).symlink_to(found)
    made = Venv(str(path), sys.executable, "test", 0.0)
    records = {
        record.relative_to(path).as_posix(): [record.stat().st_size, record.stat().st_mtime_ns]
        for record in own.glob("*.dist-info/RECORD")
    }
    (path / MARKER).write_text(json.dumps({**asdict(made), "records": records}))


def supervisor() -> Path:
    """A directory with supervisord, fetched with pip when it is not there. Raises Missing."""
    target = cache_root() / SUPERVISOR.replace("==", "-")
    if not (target / "supervisor").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), SUPERVISOR]
        if subprocess.run(command, check=False).returncode:
            raise Missing(f"{SUPERVISOR} cannot be installed")
    return target


# --- started by the test ----------------------------------------------------------------------------------------------


def offline() -> Dict[str, str]:
    """The switches of the role, as they stand in its variables."""
    variables = yaml.safe_load((REPOSITORY / "roles/xinference_server/vars/main.yml").read_text())
    return {**variables["__xinference_server_offline"], "XINFERENCE_MODEL_SRC": "huggingface"}


class StartedHost(NativeHost):
    """A host that is shipped to and has releases; its server is the one of the tests' own environment."""

    def __init__(self, place: Path, version: str, auth: bool = False, name: str = "gpu-1") -> None:
        super().__init__(place, {}, name)
        self.python, self.auth = environment(version) / "bin" / "python", auth
        self.manager: Optional[subprocess.Popen[bytes]] = None

    def ship(self) -> None:
        """Ship a small model, as the playbooks do."""
        model = make_model(self.place / "alpha", {"weights.bin": 300_000, "config.json": 50})
        bundle = make_bundle(self.place, {"alpha": model})
        site = Site(self.place, {"ansible_connection": "local", "ansible_python_interpreter": sys.executable})
        entry = {"model_uid": "alpha", "model_name": "bce", "model_type": "embedding", "source": {"name": "alpha"}}
        options = {"bundle": str(bundle), "root": str(self.root), "models": [entry], "backend": "native"}
        done = site.run("xinference_ship", options)
        assert not done.get("failed"), done

    def release(self, environment: Optional[Mapping[str, Any]] = None, **options: Any) -> str:
        """Put a release in force; returns its id."""
        home = self.root / "home"
        variables = {
            "PATH": f"{self.python.parent}:/usr/bin:/bin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            **offline(),
            "XINFERENCE_HOME": str(home),
            "XINFERENCE_AUTH_ADVANCED": "1" if self.auth else "0",
            "CUDA_VISIBLE_DEVICES": "-1",
            "OMP_NUM_THREADS": "2",
            **(environment or {}),
        }
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "INFO"]
        definition = {
            "name": "xinference",
            "manager": "supervisord",
            "command": [str(self.python), str(self.python.with_name("xinference-local")), *words],
            "environment": {name: value for name, value in variables.items() if value is not None},
            "directory": str(home),
            "host": "127.0.0.1",
            "port": self.port,
            "stop_timeout": 20,
        }
        done, _seconds = run_module("xinference_release", {"root": str(self.root), "service": definition, **options})
        assert not done.get("failed"), done
        return str(done["release"])

    @property
    def native(self) -> Native:
        return Native(self.root)

    def start(self, wait: bool = True) -> None:
        """Start the server under its manager, and wait until it answers."""
        for name in ("run", "logs", "home"):
            (self.root / name).mkdir(mode=0o750, parents=True, exist_ok=True)
        command = [sys.executable, "-c", MANAGER, str(self.root / "current/bin/run"), str(self.root)]
        command += ["supervisord", str(self.root / "run/supervisord.conf")]
        with (self.root / "logs/server.log").open("ab") as log:
            self.manager = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.root)
        if wait:
            self.until(lambda: service.answers(f"{self.endpoint}/status") and self.native.state().active)

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            log = (self.root / "logs/server.log").read_text(errors="replace")
            assert time.monotonic() < deadline, f"it did not happen\n{log[-3000:]}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server and what belongs to it."""
        if self.manager is not None:
            for pid in self.native.runners():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            self.manager.wait(60)
            self.manager = None
        native_run.sweep(self.root)

    def kill(self) -> None:
        """What a machine that runs out of memory does to the server; its manager does not start it again."""
        pid = self.native.state().pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        assert self.manager is not None
        self.manager.wait(60)
        self.manager = None
