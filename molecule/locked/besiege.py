# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Before anything is deployed: make the secrets of the site, let strangers try, and watch all processes.

    python molecule/locked/besiege.py DIRECTORY

In the directory (molecule's) there are then `secrets/`, a file each and `all.json`; `strangers/`, a report of each port
that they try; and `watched.json`, written by a process that ends when `secrets/all.json` goes.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import string
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "integration")]

from testbed import images
from testbed.engine import docker
from testbed.hosts import LABEL, Testbed

BED = "molecule-locked"
STRANGER = f"testbed-{BED}-stranger"
# Variables of the server reach it from a private file and are then in its environment, and in that of what it starts.
SERVER = ("*xinference-local*", "*guarded.py*", "*/xinf-api-*", "*multiprocessing*", "*xoscar*", "Model: *")
MAY_KNOW = {pattern: ["hub"] for pattern in SERVER}
PORTS = {"server": "http://{}:9997", "gateway": "https://{}:443"}


def make_secrets(directory: Path) -> Path:
    """The secrets of the site, and a file with all of them."""
    chance = random.SystemRandom()
    letters = string.ascii_letters + string.digits

    def text(start: str, length: int, more: str = "") -> str:
        return start + "".join(chance.choices(letters + more, k=length))

    # Some with what has to be quoted, so that a form of them is searched for as well.
    made = {
        "administrator": text("", 22, "'$/") + "'$",
        "hub": text("hf_", 22, "'$/\"") + '"',
        "client": text("sk-", 13),
    }
    directory.mkdir(mode=0o700)
    for name, value in {**made, "all.json": json.dumps({"secrets": made, "may_know": MAY_KNOW})}.items():
        path = directory / name
        path.touch(0o600)
        path.write_text(value)
    return directory / "all.json"


def let_strangers_in(bed: Testbed, reports: Path) -> None:
    """A container on the network of the hosts, from which every port is tried until it is removed."""
    reports.mkdir()
    tries = [
        [
            "python3",
            "/strangers.py",
            url.format(host.address),
            "--seconds",
            "36000",
            "--report",
            f"/reports/{name}-{port}",
        ]
        for name, host in bed.load().items()
        for port, url in PORTS.items()
    ]
    script = " & ".join(shlex.join(command) for command in tries)
    container = ["--name", STRANGER, "--label", f"{LABEL}={BED}", "--network", f"testbed-{BED}", "--init"]
    # They try all the time and leave the machine some of it.
    container += ["--cpus", "0.5", "--volume", f"{TESTS / 'testbed/strangers.py'}:/strangers.py:ro"]
    container += ["--volume", f"{reports}:/reports"]
    docker("run", "--detach", *container, images.base(), "sh", "-c", f"{script} & wait")


def watch(secrets: Path, report: Path) -> None:
    """Look at all processes of hosts, containers and this machine until the file of secrets goes."""
    subprocess.Popen(
        [sys.executable, "-m", "testbed.places", str(secrets), str(report)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=report.with_suffix(".err").open("wb"),
        start_new_session=True,
    )


def main() -> int:
    """Begin."""
    directory = Path(sys.argv[1])
    images.nginx()
    watch(make_secrets(directory / "secrets"), directory / "watched.json")
    let_strangers_in(Testbed(BED, directory / "bed"), directory / "strangers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
