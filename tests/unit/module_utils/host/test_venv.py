# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Environments: which Python they need, and that a half built one never counts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import venv

HERE = f"cp3{sys.version_info.minor}"


def wheel(directory: Path, name: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(str(path), "w") as archive:
        archive.writestr(f"{name}.py", "WORKS = True\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", {"cp311"}),
        ("bcrypt-5.0.0-cp39-abi3-manylinux_2_34_x86_64.whl", set()),
        ("requests-2.34.2-py3-none-any.whl", set()),
        ("uv-0.13.8-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", set()),
    ],
)
def test_only_wheels_for_one_python_say_which(name: str, tags: set) -> None:
    assert venv.required_tags([name]) == tags


def test_the_python_that_runs_is_chosen_when_it_fits() -> None:
    assert venv.tag_of(venv.choose_python({HERE})) == HERE
    assert venv.choose_python(set())


def test_a_python_that_does_not_fit_is_refused_with_what_to_do() -> None:
    with pytest.raises(venv.VenvError, match=r"need Python 3\.99.*xinference_server_python"):
        venv.choose_python({"cp399"}, sys.executable)


def test_places_come_from_what_was_shipped(tmp_path: Path) -> None:
    listing = {"wheels": {"server": {"digest": "sha256:0123456789abcdef", "path": "/somewhere"}}}
    (tmp_path / "state").mkdir()
    (tmp_path / "state/artifacts.json").write_text(json.dumps(listing))
    assert venv.places(tmp_path, "server") == (Path("/somewhere"), tmp_path / "venvs/0123456789ab")
    with pytest.raises(venv.VenvError, match="No wheels/other was shipped"):
        venv.places(tmp_path, "other")


def test_an_environment_is_built_without_an_index_and_then_left_alone(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "kindly")
    path = tmp_path / "venvs/one"
    built = venv.build(tmp_path / "wheels", path)
    code = "import kindly, sys; sys.exit(not kindly.WORKS)"
    assert subprocess.run([str(path / "bin/python"), "-c", code], check=False).returncode == 0
    assert venv.complete(path) == built
    assert venv.build(tmp_path / "nothing here", path) == built


@pytest.mark.parametrize("harm", ["package gone", "list cut", "python gone"])
def test_a_damaged_environment_is_built_again(tmp_path: Path, harm: str) -> None:
    wheel(tmp_path / "wheels", "kindly")
    path = tmp_path / "venvs/one"
    venv.build(tmp_path / "wheels", path)
    record = next(path.glob("lib/python*/site-packages/kindly-1.0.dist-info/RECORD"))
    if harm == "package gone":
        shutil.rmtree(str(record.parent))
    elif harm == "list cut":
        record.write_text("")
    else:
        (path / "bin/python").unlink()
    assert venv.complete(path) is None
    venv.build(tmp_path / "wheels", path)
    assert venv.complete(path) and record.stat().st_size > 0


def test_a_half_built_environment_is_built_again(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "kindly")
    path = tmp_path / "venvs/one"
    (path / "lib").mkdir(parents=True)
    (path / "lib/rubbish").touch()
    (tmp_path / "venvs/one.abcd/cache").mkdir(parents=True)
    assert venv.complete(path) is None
    venv.build(tmp_path / "wheels", path)
    assert venv.complete(path) and not (path / "lib/rubbish").exists()
    assert {entry.name for entry in (tmp_path / "venvs").iterdir()} == {"one", "one.lock"}


def test_a_failing_installer_leaves_no_environment_that_counts(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "kindly").write_bytes(b"not a wheel")
    with pytest.raises(venv.VenvError, match="Cannot install 1 wheels"):
        venv.build(tmp_path / "wheels", tmp_path / "venvs/one")
    assert venv.complete(tmp_path / "venvs/one") is None


def test_no_wheels_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(venv.VenvError, match="no wheels in"):
        venv.build(tmp_path / "wheels", tmp_path / "venvs/one")
