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


WHOLE_FILE = """
import pytest
pytest.importorskip("no_such_library_anywhere")

def test_that_is_not_reached(): ...
"""


def run(ci: str, story: str, place: Path) -> subprocess.CompletedProcess[str]:
    """What pytest says of a file with this text, in CI or elsewhere."""
    (place / "test_story.py").write_text(story)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no_skips", "-p", "no:cacheprovider", "--rootdir", ".", "test_story.py"],
        cwd=place,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "ci, summary, status",
    [("true", "1 failed, 1 passed, 1 xfailed, 2 errors", 1), ("", "1 passed, 3 skipped, 1 xfailed", 0)],
)
def test_what_is_skipped_fails_in_ci(ci: str, summary: str, status: int, tmp_path: Path) -> None:
    done = run(ci, STORY, tmp_path)
    assert (done.returncode, summary in done.stdout) == (status, True), done.stdout
    if ci:
        for reason in ("there is no server", "there is no disk", "there is no root"):
            assert reason in done.stdout


@pytest.mark.parametrize("ci, summary, status", [("true", "1 error", 2), ("", "1 skipped", 5)])
def test_a_file_that_is_skipped_as_a_whole_fails_in_ci(ci: str, summary: str, status: int, tmp_path: Path) -> None:
    done = run(ci, WHOLE_FILE, tmp_path)
    assert (done.returncode, summary in done.stdout) == (status, True), done.stdout
    if ci:
        assert "has to run" in done.stdout and "no_such_library_anywhere" in done.stdout
