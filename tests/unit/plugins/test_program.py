# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs for a host: complete, the same every time, and run by a bare interpreter from its standard input."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import frames
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.plugin_utils.program import command, pack, program


def test_a_pack_has_what_its_modules_import_and_nothing_else():
    names = zipfile.ZipFile(io.BytesIO(pack(["bundle.frames"]))).namelist()
    assert {f"airgap_xinference/bundle/{name}.py" for name in ("__init__", "frames", "digest")} <= set(names)
    assert "airgap_xinference/__init__.py" in names and "airgap_xinference/bundle/images.py" not in names
    assert pack(["bundle.frames"]) == pack(["bundle.frames"]) and len(program("bundle.receive")) < 256 * 1024


@pytest.mark.parametrize("python", [sys.executable, "python3.8", "/usr/bin/python3"])
def test_the_receiver_runs_from_its_standard_input(python, tmp_path):
    # pyenv's shims answer only for the chosen version.
    surroundings = {**os.environ, "PYENV_VERSION": "3.8"} if python == "python3.8" else None
    if not shutil.which(python) or subprocess.run([python, "-V"], env=surroundings, check=False).returncode:
        pytest.skip(f"{python} is not installed")
    # What lies in the working directory must not be taken for a module of ours or of Python.
    (tmp_path / "json.py").write_text("raise SystemExit('run by mistake')")
    root = tmp_path / "root"
    said = [
        program("bundle.receive"),
        frames.command_line(frames.Open(str(root), "ctl", "ops", 1)),
        frames.command_line(frames.Blob(hash_bytes(b"blob"), 4, 0)) + b"blob",
        frames.command_line(frames.End()),
    ]
    done = subprocess.run(
        ["/bin/sh", "-c", command(shlex.quote(python))],
        input=b"".join(said),
        capture_output=True,
        cwd=tmp_path,
        env=surroundings,
        check=False,
        timeout=30,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [next(iter(answer)) for answer in answers if "got" not in answer] == ["ready", "verified", "done"]
    assert Path(root, "blobs/sha256", hash_bytes(b"blob")[7:]).read_bytes() == b"blob"
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_program_that_is_cut_says_so():
    done = subprocess.run(
        ["/bin/sh", "-c", command(sys.executable)],
        input=program("bundle.receive")[:-9],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1 and b"the program did not arrive" in done.stderr


def test_the_command_survives_every_login_shell():
    text = command("/usr/bin/python3")
    assert "\n" not in text and "!" not in text and len(text) < 200
