# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Running one module of the collection through the real ansible command, and getting what it returned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional

ROOT = Path(__file__).resolve().parents[2]


def run_module(
    name: str, arguments: Dict[str, Any], check: bool = False, environment: Optional[Dict[str, str]] = None
) -> Dict[str, Any]:
    """Run a module on this machine; returns its result, also when it failed (then with `failed`)."""
    command = [str(Path(sys.executable).with_name("ansible")), "localhost", "--inventory", "localhost,"]
    command += ["--connection", "local", "--module-name", f"airgap.xinference.{name}", "--args", json.dumps(arguments)]
    command += ["--extra-vars", json.dumps({"ansible_python_interpreter": sys.executable})]
    ended = subprocess.run(
        [*command, "--check", "--diff"] if check else command,
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "build/collections"),
            "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
            "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            "ANSIBLE_NOCOLOR": "1",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    marker = "=> {"
    start = ended.stdout.find(marker)
    assert start >= 0, ended.stdout + ended.stderr
    result, _end = json.JSONDecoder().raw_decode(ended.stdout[start + len(marker) - 1 :])
    result["failed"] = ended.returncode != 0
    return result
