# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks of this checkout, run for real as an operator runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = str(Path(sys.executable).with_name("ansible-playbook"))
LIMIT_S = 1800  # far more than any takes, for one that hangs


def run(
    *arguments: str, environment: Optional[Mapping[str, str]] = None, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run ansible-playbook with our own settings and collection; `stdout` is all that it printed."""
    settings = {
        "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
        "ANSIBLE_NOCOLOR": "1",
    }
    return subprocess.run(
        [PROGRAM, *arguments],
        cwd=cwd,
        env={**os.environ, **settings, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


def play(
    names: Sequence[str],
    inventories: Sequence[Path],
    variables: Mapping[str, Any],
    place: Path,
    options: Sequence[str] = (),
    expect: int = 0,
) -> str:
    """Run playbooks of ours, or others by their paths, with extra variables, which pass through a file in `place`.

    Returns what was printed. Fails the test where they do not end well, or with another `expect` where they do.
    """
    settings = place / "variables.json"
    settings.write_text(json.dumps(variables))
    settings.chmod(0o600)
    hosts = [part for inventory in inventories for part in ("-i", str(inventory))]
    paths = [name if "/" in name else f"playbooks/{name}.yml" for name in names]
    done = run(*hosts, "-e", f"@{settings}", *options, *paths)
    assert (done.returncode == 0) is (expect == 0), done.stdout
    return done.stdout


def changes(printed: str) -> int:
    """How many tasks changed something, by the recaps."""
    return sum(map(int, re.findall(r"changed=(\d+)", printed)))
