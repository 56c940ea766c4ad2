# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Values of keys on the controller: in files for their owner only, and in no result."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.action import xinference_api_key
from ansible_collections.airgap.xinference.plugins.module_utils.server.keys import masked
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_names import file_name

VALUE = "xf-abcdefghijklmnopqrstuvwxyz"


class Task:
    """Runs the action with a module that answers as it is told."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.patch = directory, monkeypatch

    def run(self, action: str, value: str = VALUE, check: bool = False, **options: Any) -> dict[str, Any]:
        arguments = {"name": "rag", "directory": str(self.directory / "keys"), **options}

        def module(_self: Any, module_args: dict[str, Any], **_: Any) -> dict[str, Any]:
            crossed = masked(value, module_args["mask"]) if value else ""
            assert value not in crossed or not value
            return {"changed": action != "keep", "action": action, "name": "rag", "masked": crossed}

        self.patch.setattr(ActionBase, "_execute_module", module)
        self.patch.setattr(ActionBase, "run", lambda *_: {})
        found = xinference_api_key.ActionModule.__new__(xinference_api_key.ActionModule)
        found._task = SimpleNamespace(args=arguments, check_mode=check)
        return found.run(task_vars={"inventory_hostname": "gpu-1"})

    @property
    def file(self) -> Path:
        return self.directory / "keys/gpu-1/rag"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    return Task(tmp_path, monkeypatch)


def test_a_new_key_is_in_a_file_and_in_no_result(task: Task) -> None:
    result = task.run("create")
    assert task.file.read_text() == f"{VALUE}\n" and result["file"] == str(task.file)
    assert task.file.stat().st_mode & 0o777 == 0o600 and task.file.parent.stat().st_mode & 0o777 == 0o700
    assert VALUE not in json.dumps(result) and "masked" not in result
    assert [path.name for path in task.file.parent.iterdir()] == ["rag"]


def test_the_same_key_changes_nothing_and_a_lost_or_open_file_is_mended(task: Task) -> None:
    task.run("create")
    assert task.run("keep")["changed"] is False
    task.file.unlink()
    assert task.run("keep", check=True)["changed"] and not task.file.exists()
    assert task.run("keep")["action"] == "write" and task.file.exists()
    task.file.chmod(0o644)
    assert task.run("keep")["action"] == "write" and task.file.stat().st_mode & 0o777 == 0o600


def test_check_mode_writes_nothing(task: Task) -> None:
    assert task.run("create", value="", check=True)["changed"] and not task.file.exists()


def test_a_revoked_key_takes_its_file_along(task: Task) -> None:
    task.run("create")
    assert task.run("keep", value="", state="absent", check=True)["changed"] and task.file.exists()
    assert task.run("keep", value="", state="absent")["changed"] and not task.file.exists()
    assert task.run("keep", value="", state="absent")["changed"] is False


def test_a_value_that_nobody_knows_any_more_is_a_failure(task: Task) -> None:
    assert "Rotate it" in task.run("keep", value="")["msg"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", 7])
def test_names_that_lead_elsewhere_have_no_file(name: Any) -> None:
    assert xinference_api_key.place("keys", "gpu-1", name) is None


@pytest.mark.parametrize("host", ["../up", "/etc", "..", "gpu-1.site"])
def test_names_of_hosts_lead_nowhere_either(host: str) -> None:
    assert xinference_api_key.place("keys", host, "rag") == Path("keys", file_name(host), "rag")
