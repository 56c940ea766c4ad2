# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A native deployment in a directory: shipped models, a real release, a real server started as its manager would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import yaml
from ansible_collections.airgap.xinference.plugins.module_utils.host import native_run, service
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import Native
from doors import run_module
from servers import environment, free_port
from sites import REPOSITORY, Site, make_bundle, make_model

VARIABLES = REPOSITORY / "roles/xinference_server/vars/main.yml"
# supervisord, as far as anybody who looks at processes can tell: it starts the server and waits.
MANAGER = "import subprocess, sys; subprocess.run(sys.argv[1:3])"
LIMIT_S = 240.0


def offline() -> Dict[str, str]:
    """The switches of the role, as they stand in its variables."""
    found = yaml.safe_load(VARIABLES.read_text())["__xinference_server_offline"]
    return {**found, "XINFERENCE_MODEL_SRC": "huggingface"}


class NativeHost:
    """A host with the root directory `root`, whose server is a real Xinference from the tests' own environment."""

    def __init__(self, place: Path, version: str, auth: bool = False) -> None:
        self.place, self.root, self.port = place, place / "site", free_port()
        self.python = environment(version) / "bin" / "python"
        self.auth = auth
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
            url = f"http://127.0.0.1:{self.port}/status"
            self.until(lambda: service.answers(url) and self.native.state().active)

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

    def play(self, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run playbooks/diagnose.yml against this host."""
        known = {"xinference_root": str(self.root), "xinference_port": self.port, **variables}
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        command: List[str] = [program, "-i", "inventories/quickstart", "playbooks/diagnose.yml"]
        command += ["-e", json.dumps(known), *arguments]
        surroundings = {**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        surroundings["ANSIBLE_COLLECTIONS_PATH"] = str(REPOSITORY / "build/collections")
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env=surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
