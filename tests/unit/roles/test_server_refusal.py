# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles do not open a server to the network that everybody could use, nor start one that nobody could."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List

import pytest

ROOT = Path(__file__).parents[3]
COLLECTIONS = ROOT.parents[2] if ROOT.parents[1].name == "ansible_collections" else ROOT / "build/collections"
PLAY = {"hosts": "localhost", "connection": "local", "gather_facts": False}
OPEN = "open to everyone who reaches 0.0.0.0:9997"


@pytest.mark.skipif(not shutil.which("ansible-playbook"), reason="ansible-playbook is not installed")
@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"xinference_host": "0.0.0.0"}, [OPEN]),
        ({"xinference_auth": True}, ["(`xinference_auth`) needs"]),
        (
            {
                "xinference_auth": True,
                "xinference_username": "root",
                "xinference_password": "s3cret7",
                "xinference_api_keys": ["chat", {"name": "rag", "key": "sk-short"}],
            },
            ["needs 8 characters at least", "13 letters or digits: rag"],
        ),
        (
            {
                "xinference_auth": True,
                "xinference_username": "root",
                "xinference_password": 1234567,
                "xinference_server_arguments": ["--host=0.0.0.0", "-MH", "127.0.0.1", "-p80"],
                "xinference_api_keys": [
                    {"key": True},
                    {"name": "b", "key": "sk-abcdefghijklm"},
                    {"name": "c", "key": "sk-abcdefghijklm"},
                ],
            },
            [
                "needs 8 characters",
                "one without a name",
                "between, or none",
                "under two names",
                "says --host=0.0.0.0, -p80;",
            ],
        ),
        (
            {"xinference_host": "0.0.0.0", "xinference_reset_password": True},
            [OPEN, "resets nothing"],
        ),
    ],
)
def test_what_cannot_be_closed_is_refused_with_all_its_faults(
    tmp_path: Path, wanted: Dict[str, Any], told: List[str]
) -> None:
    said = refused(tmp_path, "xinference_server", wanted)
    for part in told:
        assert part in said
    assert "s3cret7" not in said and "sk-short" not in said
    assert not (tmp_path / "root").exists()


@pytest.mark.skipif(not shutil.which("ansible-playbook"), reason="ansible-playbook is not installed")
def test_keys_that_no_server_could_make_are_refused_before_any_is_made(tmp_path: Path) -> None:
    keys = [1, None, "rag", "RAG", "a/b", {"name": "chat", "state": "gone"}]
    wanted = {"xinference_auth": True, "xinference_username": "root", "xinference_api_keys": keys}
    said = " ".join(refused(tmp_path, "xinference_access", wanted).split())
    for part in (
        "needs `xinference_username`",
        "between: a/b;",
        "present or absent: int, NoneType, gone;",
        "names a key twice",
    ):
        assert part in said, part


@pytest.mark.skipif(not shutil.which("ansible-playbook"), reason="ansible-playbook is not installed")
def test_a_key_that_is_given_is_not_left_in_force_in_silence(tmp_path: Path) -> None:
    """Its value is the inventory's, so that a green run would leave a leaked one in force."""
    wanted = {
        "xinference_auth": True,
        "xinference_username": "root",
        "xinference_password": "verysecret-1",
        "xinference_api_keys": ["chat", {"name": "rag", "key": "sk-abcdefghijklm", "state": "absent"}],
        "xinference_rotate_keys": ["rag", "chat"],
    }
    said = " ".join(refused(tmp_path, "xinference_access", wanted).split())
    assert "give each another value and run playbooks/serve.yml: rag;" in said
    assert "say absent; delete them and run playbooks/serve.yml: rag." in said
    started = refused(tmp_path, "xinference_server", wanted)
    assert "would be in force; delete them: rag." in " ".join(started.split())
    assert "sk-abcdefghijklm" not in said + started


@pytest.mark.skipif(not shutil.which("ansible-playbook"), reason="ansible-playbook is not installed")
def test_a_registration_that_fails_shows_no_secret(tmp_path: Path) -> None:
    definition = {"model_name": "own-model", "api_key": "s3cretOfTheSite"}
    wanted = {"xinference_endpoint": "http://127.0.0.1:9", "xinference_models": []}
    said = refused(
        tmp_path,
        "xinference_models",
        {**wanted, "xinference_registrations": [{"model_type": "LLM", "definition": definition}]},
    )
    assert "own-model" in said and "s3cretOfTheSite" not in said


def refused(tmp_path: Path, role: str, wanted: Dict[str, Any]) -> str:
    """What is said by a play that ends in a failure because of these variables."""
    play = {**PLAY, "tasks": [{"ansible.builtin.import_role": {"name": f"airgap.xinference.{role}"}}]}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    (tmp_path / "ansible.cfg").touch()
    settings = {
        "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "tmp"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
    }
    variables = {"xinference_root": str(tmp_path / "root"), **wanted}
    command = ["ansible-playbook", "-vvv", "-i", "localhost,", "-e", json.dumps(variables), str(tmp_path / "play.yml")]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stdout
