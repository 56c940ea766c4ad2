# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A test that cannot run fails in CI, and is skipped elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
STORY = """
import pytest

@pytest.fixture(scope="session")
def server():
    pytest.skip("there is no server")

def test_of_a_fixture(server): ...
def test_by_itself(): pytest.skip("there is no disk")
@pytest.mark.skipif(True, reason="there is no root")
def test_of_a_mark(): ...
@pytest.mark.xfail
def test_known(): raise AssertionError
def test_that_runs(): ...
"""


@pytest.mark.parametrize(
    "ci, summary, status",
    [("true", "1 failed, 1 passed, 1 xfailed, 2 errors", 1), ("", "1 passed, 3 skipped, 1 xfailed", 0)],
)
def test_what_is_skipped_fails_in_ci(ci: str, summary: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "test_story.py").write_text(STORY)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no_skips", "-p", "no:cacheprovider", "--rootdir", ".", "test_story.py"],
        cwd=tmp_path,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, summary in done.stdout) == (status, True), done.stdout
    if ci:
        for reason in ("there is no server", "there is no disk", "there is no root"):
            assert reason in done.stdout
