# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts on this machine that playbooks serve natively, with a real Xinference that need not be installed for each.

A host is a root directory as shipping leaves it: models and an environment. The environment is a thin one that borrows
its packages from the shared one of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Mapping

from ansible_collections.airgap.xinference.plugins.module_utils.host.venv import MARKER, Venv
from servers import NEW, Missing, environment, free_port
from sites import REPOSITORY
from tiny_models import cache_root

SUPERVISOR = next(
    line
    for line in (REPOSITORY / "roles/xinference_bundle/files/host-requirements.txt").read_text().splitlines()
    if line.startswith("supervisor==")
)
DIGEST = "0123456789ab"
LIMIT = 600


class NativeHost:
    """A host with the server of a version and with models, by the name of each its directory. `output` is what the last
    playbook printed."""

    def __init__(
        self,
        place: Path,
        models: Mapping[str, str],
        variables: Mapping[str, Any],
        version: str = NEW,
        name: str = "gpu-1",
    ) -> None:
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
        self._ship(models, environment(version))

    def _ship(self, models: Mapping[str, str], shared: Path) -> None:
        paths = {}
        for name, directory in models.items():
            path = self.root / "models" / name / DIGEST
            path.parent.mkdir(parents=True)
            path.symlink_to(directory)
            paths[name] = {"path": str(path), "digest": f"sha256:{DIGEST}"}
        wheels = {"server": {"path": str(self.root / "wheels/server" / DIGEST), "digest": f"sha256:{DIGEST}"}}
        (self.root / "state").mkdir(parents=True)
        (self.root / "state/artifacts.json").write_text(json.dumps({"models": paths, "wheels": wheels}))
        borrow(shared, self.root / "venvs" / DIGEST)

    @property
    def endpoint(self) -> str:
        """Where the server answers."""
        return f"http://127.0.0.1:{self.port}"

    def play(self, playbook: str, *arguments: str, expect: int = 0, **variables: Any) -> str:
        """Run a playbook of the collection for this host alone; returns what it printed."""
        inventory = self.place / "hosts.json"
        inventory.write_text(
            json.dumps({"xinference": {"hosts": {self.name: {}}, "vars": {**self.variables, **variables}}})
        )
        inventory.chmod(0o600)
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        done = subprocess.run(
            [program, "-i", str(inventory), f"playbooks/{playbook}.yml", *arguments],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
                "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
                "ANSIBLE_NOCOLOR": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        self.output = done.stdout
        assert done.returncode == expect, done.stdout
        return done.stdout


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
