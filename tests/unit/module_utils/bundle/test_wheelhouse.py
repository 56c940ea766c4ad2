# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deciding when pip has to run, what it is told, and what is made of what it leaves."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.wheelhouse import (
    Order,
    Wheel,
    collect,
    facts_of,
    interpreter_facts,
    pip_command,
    pip_of,
    platform_tags,
    up_to_date,
    wheels_in,
)

PYTHON = {"tag": "cp311", "version": "3.11.7", "platform": "linux_x86_64", "implementation": "cpython"}
TORCH = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
SCIPY = "scipy-1.16.3-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
XINFERENCE = "xinference-4.1.0-py3-none-any.whl"
PIP = ["python3", "-m", "pip"]
ORDER = Order(("torch==2.13.0", "xinference==4.1.0"), exclude=("Torch.Vision",))


class Pip:
    """Stands in for running pip: leaves files, remembers commands."""

    def __init__(self, *files: str, code: int = 0, says: str = "") -> None:
        self.files, self.code, self.says = files, code, says
        self.commands: List[List[str]] = []
        self.requirements = ""

    def __call__(self, command: List[str]) -> Tuple[int, str, str]:
        self.commands.append(command)
        self.requirements = Path(command[command.index("--requirement") + 1]).read_text()
        for file in self.files:
            (Path(command[-1]) / file).write_text(file)
        return self.code, self.says, ""


def test_collecting_leaves_out_and_is_not_done_again(tmp_path: Path) -> None:
    pip = Pip(TORCH, XINFERENCE, "torch_vision-0.28.0-cp311-cp311-manylinux_2_28_x86_64.whl")
    wheels = tmp_path / "wheels"
    assert not up_to_date(wheels, "key")
    collect(wheels, ORDER, PIP, "key", pip)
    assert [wheel.file for wheel in wheels_in(wheels)] == [TORCH, XINFERENCE]
    assert up_to_date(wheels, "key") and not up_to_date(wheels, "other")
    assert pip.requirements == "torch==2.13.0\nxinference==4.1.0\n"
    assert pip.commands[0][:4] == ["python3", "-m", "pip", "wheel"]
    assert not any("index" in word for word in pip.commands[0])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["wheels", "wheels.json", "wheels.lock"]


def test_two_that_collect_at_once_run_pip_once(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    second = Pip(TORCH)
    other = threading.Thread(target=collect, args=(wheels, ORDER, PIP, "key", second))

    class First(Pip):
        def __call__(self, command: List[str]) -> Tuple[int, str, str]:
            other.start()
            other.join(0.3)
            return super().__call__(command)

    first = First(TORCH, XINFERENCE)
    collect(wheels, ORDER, PIP, "key", first)
    other.join(10)
    assert (len(first.commands), second.commands) == (1, [])
    assert [wheel.file for wheel in wheels_in(wheels)] == [TORCH, XINFERENCE]


@pytest.mark.parametrize("loss", ["a wheel", "a byte", "all"])
def test_a_lost_wheel_is_noticed(tmp_path: Path, loss: str) -> None:
    wheels = tmp_path / "wheels"
    collect(wheels, ORDER, PIP, "key", Pip(TORCH, XINFERENCE))
    if loss == "a byte":
        (wheels / TORCH).write_text(TORCH[:-1])
    for file in {"a wheel": [TORCH], "all": [TORCH, XINFERENCE]}.get(loss, []):
        (wheels / file).unlink()
    assert not up_to_date(wheels, "key")


def test_a_failure_keeps_the_old_wheels_and_quotes_pip(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    collect(wheels, ORDER, PIP, "key", Pip(TORCH))
    says = "Collecting torch\nERROR: No matching distribution found for torch==99\n"
    with pytest.raises(BundleError) as caught:
        collect(wheels, Order(("torch==99",)), PIP, "new", Pip(code=1, says=says))
    assert caught.value.problems == ["ERROR: No matching distribution found for torch==99"]
    assert "torch==99 (exit status 1 of python3 -m pip)" in str(caught.value)
    assert up_to_date(wheels, "key")


@pytest.mark.parametrize(
    ("files", "portable", "words"),
    [
        (["quantile-python-1.1.tar.gz"], False, "not a wheel"),
        ([TORCH], True, "any machine is wanted"),
        ([XINFERENCE, "xinference-1.8.1-py3-none-any.whl"], False, "a second version of xinference"),
        ([], False, "no file at all"),
    ],
)
def test_what_pip_left_is_checked(tmp_path: Path, files: List[str], portable: bool, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        collect(tmp_path / "wheels", Order(("x",), portable=portable), PIP, "key", Pip(*files))
    assert words in caught.value.problems[0] and not (tmp_path / "wheels").exists()


def test_the_key_tells_what_matters() -> None:
    assert ORDER.key(PYTHON) == ORDER.key({**PYTHON, "version": "3.11.9"})
    others = [Order(("torch==2.14.0",)), Order(ORDER.requirements), Order(ORDER.requirements, ("a==1",))]
    keys = {order.key(PYTHON) for order in [ORDER, *others]} | {ORDER.key({**PYTHON, "tag": "cp312"})}
    assert len(keys) == 5
    portable = Order(("requests==2.32.4",), portable=True)
    assert portable.key(PYTHON) == portable.key({**PYTHON, "tag": "cp312"})


def test_portable_wheels_are_downloaded_for_the_oldest_python(tmp_path: Path) -> None:
    pip = Pip("requests-2.32.4-py3-none-any.whl", "supervisor-4.3.0-py2.py3-none-any.whl")
    order = Order(("requests==2.32.4",), portable=True)
    collect(tmp_path / "wheels", order, PIP, "key", pip)
    command = pip.commands[0]
    assert command[3] == "download" and "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.8"
    assert facts_of(wheels_in(tmp_path / "wheels"), order, PYTHON) == {
        "airgap.xinference.python": "py3",
        "airgap.xinference.python-requires": "3.8",
        "airgap.xinference.platform": "any",
    }


def test_facts_of_native_wheels() -> None:
    wheels = [wheel for wheel in map(Wheel.parse, (TORCH, SCIPY, XINFERENCE)) if wheel]
    assert facts_of(wheels, ORDER, PYTHON) == {
        "airgap.xinference.python": "cp311",
        "airgap.xinference.platform": "linux_x86_64",
        "airgap.xinference.glibc": "2.28",
        "airgap.xinference.xinference-version": "4.1.0",
    }
    assert "airgap.xinference.glibc" not in facts_of(wheels[2:], ORDER, PYTHON)
    assert facts_of(wheels[1:2], ORDER, PYTHON)["airgap.xinference.glibc"] == "2.17"


def test_an_interpreter_is_asked_and_believed_only_when_it_is_cpython() -> None:
    def answer(facts: Dict[str, Any], code: int = 0) -> Any:
        return lambda _command: (code, json.dumps(facts), "no such module")

    assert interpreter_facts("python3", answer(PYTHON)) == PYTHON
    with pytest.raises(BundleError, match="cannot be run"):
        interpreter_facts("python3", answer({}, 1))
    with pytest.raises(BundleError, match="is pypy"):
        interpreter_facts("python3", answer({**PYTHON, "implementation": "pypy"}))


def test_a_python_without_pip_borrows_that_of_another() -> None:
    def answer(*owners: str) -> Any:
        return lambda command: (0 if command[0] in owners else 1, "", "No module named pip")

    assert pip_of("py", "own", answer("py", "own"))[:3] == ["py", "-m", "pip"]
    assert pip_of("py", "own", answer("own"))[:5] == ["own", "-m", "pip", "--python", "py"]
    with pytest.raises(BundleError, match="Neither py nor own has pip"):
        pip_of("py", "own", answer())


@pytest.mark.parametrize("file", ["x.whl", "a-b.whl", "torch-2.13.0.tar.gz", "a-1-2-3-4-5-6.whl"])
def test_what_is_no_wheel(file: str) -> None:
    assert Wheel.parse(file) is None


def test_wheels_for_another_python_are_downloaded_and_never_built() -> None:
    order = Order(("vllm",), version="3.12", platform="manylinux_2_28_x86_64")
    here = {"tag": "cp311", "platform": "linux_x86_64"}
    command = pip_command(["pip"], order, Path("r"), Path("c"), Path("t"), here)
    assert command[1] == "download" and "--only-binary=:all:" in command
    assert command[command.index("--python-version") + 1] == "312"
    platforms = [after for word, after in zip(command, command[1:]) if word == "--platform"]
    assert platforms[0] == "manylinux_2_28_x86_64" and "manylinux2014_x86_64" in platforms
    assert order.key(here) != Order(("vllm",)).key(here)
    assert facts_of([], order, here)["airgap.xinference.python"] == "cp312"


def test_platforms_that_have_no_older_ones_stand_alone() -> None:
    assert platform_tags("macosx_14_0_arm64") == ["macosx_14_0_arm64"]
