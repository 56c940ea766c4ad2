# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""No secret of an inventory in what a module prints, where `-vvv` shows its invocation, nor in the log of its host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SECRET = "s3cretOfTheSite"
# The log of the host is printed, too.
RUN = """
import runpy, sys, syslog
syslog.syslog = lambda level, text: print("logged:", text, file=sys.stderr)
runpy.run_module("ansible_collections.airgap.xinference.plugins.modules." + sys.argv.pop(), run_name="__main__")
"""
MODEL = {"model_uid": "m", "envs": {"hf_token": SECRET}, "options": {"Auth": [{"pin": SECRET}]}}
SERVICE = {
    "name": "x",
    "manager": "auto",
    "command": ["/bin/true"],
    "environment": {"mine_pwd": SECRET, "XINFERENCE_HOME": "/opt/x/home"},
    "directory": "/opt/x",
    "host": "127.0.0.1",
    "port": 9997,
    "stop_timeout": 3,
}
OTHER = "an0therSecret"
ACCOUNTS = {"username": "root", "password": f"it's \\ {OTHER}", "api_keys": [{"name": "rag", "key": SECRET}]}


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("xinference_model_set", {"models": [MODEL]}),
        ("xinference_model", {**MODEL, "model_name": "bce", "model_type": "embedding"}),
        ("xinference_health", {"models": [MODEL]}),
        ("xinference_registration", {"model_type": "LLM", "definition": {"model_name": "m", "api_key": SECRET}}),
        ("xinference_release", {"service": SERVICE, "models": [MODEL]}),
        ("xinference_release", {"service": SERVICE, "secrets": {"WORD": SECRET}, "accounts": ACCOUNTS}),
        ("xinference_restore", {"index": json.dumps({"files": [{"name": "release/a.json", "sha256": SECRET}]})}),
        ("xinference_account", {"name": "a", "new_password": SECRET, "username": "root", "password": SECRET}),
        ("xinference_api_key", {"name": "a", "directory": "d", "mask": SECRET, "username": "b", "password": SECRET}),
        (
            "xinference_gateway",
            {"keys": [{"name": "rag", "key": SECRET}], "certificate": "", "certificate_key": SECRET},
        ),
    ],
)
def test_no_secret_in_the_output(module, options, tmp_path):
    arguments: dict[str, Any] = {**options, "_ansible_verbosity": 3, "_ansible_diff": True}
    if module in ("xinference_release", "xinference_gateway", "xinference_restore"):
        arguments["root"] = str(tmp_path)
    else:
        arguments["endpoint"] = "http://127.0.0.1:1"
    ran = subprocess.run(
        [sys.executable, "-c", RUN, module],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    result = json.loads(ran.stdout)
    assert "logged: Invoked with" in ran.stderr
    assert "invocation" in result and SECRET not in ran.stdout + ran.stderr
    assert OTHER not in ran.stdout + ran.stderr
    assert module != "xinference_release" or "/opt/x/home" in json.dumps(result["diff"])
