# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An air-gapped site in a temporary directory: a small bundle, an SSH server of our own, and playbooks run for real."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle

REPOSITORY = Path(__file__).resolve().parents[2]
SSHD = "/usr/sbin/sshd"


def make_model(directory: Path, sizes: Dict[str, int], seed: int = 1) -> Path:
    """A directory of files with random content, the same for the same seed."""
    source = random.Random(seed)
    for name, size in sizes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.randbytes(size))
    return directory


def make_wheel(directory: Path, name: str, tag: str = "py3-none-any") -> Path:
    """A wheel with one module that has the wheel's name."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"NAME = {name!r}\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return path


def make_bundle(place: Path, models: Dict[str, Path], annotations: Optional[Dict[str, str]] = None) -> Path:
    """A bundle in `place`/bundle with these models and two tiny wheelhouses."""
    host = make_wheel(place / "wheels-host", "kindly").parent
    server = make_wheel(place / "wheels-server", "serving").parent
    requests = [Request("models", name, str(path)) for name, path in models.items()]
    requests.append(Request("wheels", "host", str(host)))
    requests.append(Request("wheels", "server", str(server), annotations or {}))
    write_bundle(place / "bundle", requests)
    return place / "bundle"


def path_without(directory: Path, *names: str) -> str:
    """A PATH that has every program of this machine but the named ones."""
    directory.mkdir()
    for folder in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for program in os.scandir(folder):
            link = directory / program.name
            if program.name not in names and not link.is_symlink():
                link.symlink_to(program.path)
    return str(directory)


@dataclass
class SshHost:
    """An SSH server on a free port of the loopback, for root and for whoever gets the key."""

    place: Path
    path: Optional[str] = None
    port: int = 0
    process: Any = field(default=None, repr=False)

    def start(self) -> SshHost:
        """Start the server; it runs until `stop`."""
        self.place.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("hostkey", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.place / name)], check=True)
        shutil.copy(self.place / "id.pub", self.place / "authorized")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.place}/hostkey",
            f"AuthorizedKeysFile {self.place}/authorized",
            "StrictModes no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            "UsePAM no",
            "PidFile none",
            "Subsystem sftp internal-sftp",
            *([f'SetEnv "PATH={self.path}"'] if self.path else []),
        ]
        config = self.place / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        log = (self.place / "log").open("wb")
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise RuntimeError((self.place / "log").read_text())

    def stop(self) -> None:
        """End the server and every session of it."""
        self.process.terminate()
        self.process.wait(10)

    def variables(self, user: str = "root") -> Dict[str, Any]:
        """Connection variables of an inventory."""
        options = f"-o UserKnownHostsFile={self.place}/known -o StrictHostKeyChecking=no"
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": user,
            "ansible_ssh_private_key_file": str(self.place / "id"),
            "ansible_ssh_common_args": options,
        }


@dataclass
class Site:
    """A host of an inventory, whose playbooks are run by a real ansible-playbook."""

    place: Path
    variables: Dict[str, Any]
    environment: Dict[str, str] = field(default_factory=dict)
    output: str = ""
    # Of its own, as every controller has; not below `place`, for the path of a socket ends after 107 bytes.
    sockets: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="ssh-"), repr=False)

    @property
    def root(self) -> Path:
        """The root directory on the host."""
        return self.place / "site"

    def command(self, action: str, options: Dict[str, Any], arguments: List[str]) -> List[str]:
        """The command line of a play of one task, whose result is written to result.json."""
        inventory = {"all": {"hosts": {"site1": {"ansible_python_interpreter": "/usr/bin/python3", **self.variables}}}}
        (self.place / "hosts.json").write_text(json.dumps(inventory))
        keep = {"content": "{{ out | to_json }}", "dest": str(self.place / "result.json"), "mode": "0600"}
        tasks = [
            {f"airgap.xinference.{action}": options, "register": "out"},
            {
                "ansible.builtin.copy": keep,
                "delegate_to": "localhost",
                "connection": "local",
                "become": False,
                "check_mode": False,
                "diff": False,
            },
        ]
        (self.place / "play.json").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        return [program, "-i", str(self.place / "hosts.json"), str(self.place / "play.json"), *arguments]

    def surroundings(self) -> Dict[str, str]:
        """The environment of ansible-playbook."""
        return {
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": self.sockets.name,
            **self.environment,
        }

    def run(self, action: str, options: Dict[str, Any], *arguments: str) -> Dict[str, Any]:
        """Run one action and return its result; a failed one has `failed` and what Ansible printed as `msg`."""
        (self.place / "result.json").unlink(missing_ok=True)
        done = subprocess.run(
            self.command(action, options, list(arguments)),
            env=self.surroundings(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.output = done.stdout
        if done.returncode:
            return {"failed": True, "msg": done.stdout}
        return json.loads((self.place / "result.json").read_text())
