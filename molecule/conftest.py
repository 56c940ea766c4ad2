# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of all scenarios share: the site as its inventory says, and its servers as clients reach them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

PROJECT = Path(__file__).resolve().parents[1]
SCENARIO = Path(os.environ.get("MOLECULE_SCENARIO_DIRECTORY", "."))
# The testbed as code, and what this scenario expects.
sys.path[:0] = [str(PROJECT / "tests"), str(SCENARIO / "tests")]
EPHEMERAL = Path(os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY", "."))
INVENTORY = EPHEMERAL / "inventory"


@dataclass(frozen=True)
class Run:
    """A run of ansible-playbook: status, output, seconds, and what was counted."""

    status: int
    output: str
    seconds: float

    @property
    def tasks(self) -> int:
        """How many tasks were started."""
        return self.output.count("\nTASK [")

    def recap(self, host: str) -> dict[str, int]:
        """Ansible's counts for a host."""
        line = next(line for line in self.output.splitlines()[::-1] if line.startswith(f"{host} ") and "ok=" in line)
        return {key: int(number) for key, number in (part.split("=") for part in line.partition(":")[2].split())}


def run_playbook(name: str, *arguments: str) -> Run:
    """Run one of the project's playbooks against this scenario's hosts."""
    command = ["ansible-playbook", "-i", str(INVENTORY), str(PROJECT / "playbooks" / f"{name}.yml"), *arguments]
    # Molecule asks for colours, and they would stand in the way of reading the output.
    plain = {**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=EPHEMERAL, env=plain, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stdout + done.stderr, time.monotonic() - began)


@pytest.fixture(scope="session")
def playbook() -> Callable[..., Run]:
    """Runs a playbook."""
    return run_playbook


@pytest.fixture(scope="session")
def bed() -> dict[str, Any]:
    """The hosts of the testbed by name, to be stopped, started and looked into past SSH."""
    from testbed.hosts import Testbed

    name = f"molecule-{os.environ['MOLECULE_SCENARIO_NAME']}"
    return dict(Testbed(name, EPHEMERAL / "bed").load())


@dataclass(frozen=True)
class Site:
    """One host as a client on the site's network sees it."""

    name: str
    endpoint: str

    def get(self, path: str) -> Any:
        """What the server answers."""
        answer = requests.get(self.endpoint + path, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        """What the server answers to a request with this body."""
        answer = requests.post(self.endpoint + path, json=body, timeout=300)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture
def site(host: Any) -> Site:
    """The host under test, from outside."""
    told = host.ansible.get_variables()
    return Site(told["inventory_hostname"], f"http://{told['ansible_host']}:9997")


def as_root(host: Any, command: str) -> str:
    """What a shell command says that root runs on the host, whoever logs in."""
    with host.sudo():
        return str(host.check_output(command))
