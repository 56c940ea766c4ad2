# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several hosts of one site on this machine, each with a root directory of its own, and the role that ships to them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from sites import REPOSITORY

ROLE = "airgap.xinference.xinference_ship"
KEPT = {
    "content": "{{ __xinference_ship_result | to_json }}",
    "dest": "{{ result_dir }}/{{ inventory_hostname }}.json",
    "mode": "0600",
}


@dataclass
class Fleet:
    """Hosts h1, h2 ... of an inventory, in `place`; `variables` are those of all of them."""

    place: Path
    bundle: Path
    count: int
    variables: Dict[str, Any]
    forks: int = 20
    environment: Dict[str, str] = field(default_factory=dict)
    own: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    play: Dict[str, Any] = field(default_factory=dict)
    """Further keywords of the play."""
    # Not below `place`, for the path of a socket ends after 107 bytes.
    sockets: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="ssh-"), repr=False)
    output: str = ""

    @property
    def names(self) -> List[str]:
        return [f"h{number}" for number in range(1, self.count + 1)]

    def root(self, name: str) -> Path:
        """The root directory of a host."""
        return self.place / name

    def blob(self, name: str, digest: str) -> Path:
        """The file of a blob on a host."""
        return self.root(name) / "blobs/sha256" / digest[7:]

    def command(self, *arguments: str) -> List[str]:
        """The command line of a play that has the role and keeps its results."""
        hosts = {
            name: {"xinference_root": str(self.root(name)), **self.variables, **self.own.get(name, {})}
            for name in self.names
        }
        shared = {
            "ansible_python_interpreter": "/usr/bin/python3",
            "xinference_bundle_dir": str(self.bundle),
            "result_dir": str(self.place / "results"),
        }
        inventory = {"all": {"vars": shared, "children": {"xinference": {"hosts": hosts}}}}
        (self.place / "hosts.json").write_text(json.dumps(inventory))
        (self.place / "results").mkdir(exist_ok=True)
        keep = {"ansible.builtin.copy": KEPT, "delegate_to": "localhost", "connection": "local", "become": False}
        keep["check_mode"] = False
        tasks = [{"ansible.builtin.import_role": {"name": ROLE}}, keep]
        play = {"hosts": "xinference", "gather_facts": False, "tasks": tasks, **self.play}
        (self.place / "play.json").write_text(json.dumps([play]))
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        files = ["-i", str(self.place / "hosts.json"), str(self.place / "play.json")]
        return [program, *files, "--forks", str(self.forks), *arguments]

    def surroundings(self) -> Dict[str, str]:
        """The environment of ansible-playbook."""
        return {
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": self.sockets.name,
            "XDG_CACHE_HOME": str(self.place / "cache"),
            **self.environment,
        }

    def ship(self, *arguments: str, check: bool = True) -> Dict[str, Dict[str, Any]]:
        """Run the role; the results by host."""
        for path in (self.place / "results").glob("*"):
            path.unlink()
        done = subprocess.run(
            self.command(*arguments),
            env=self.surroundings(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.output = done.stdout
        assert not check or done.returncode == 0, done.stdout
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.place / "results").iterdir())}

    def complete(self, name: str) -> bool:
        """Whether a host has every blob of the bundle, bit for bit."""
        blobs = Bundle.open(self.bundle).blobs
        return all(
            self.blob(name, digest).exists()
            and hashlib.sha256(self.blob(name, digest).read_bytes()).hexdigest() == digest[7:]
            for digest in blobs
        )

    def listening(self) -> List[str]:
        """What still says that a host passes blobs on."""
        return [str(path) for name in self.names for path in (self.root(name) / "state").glob("peer-*")]
