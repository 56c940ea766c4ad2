# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Paths and GPUs of the host as the server of the release in force knows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import shipped_paths
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError, parse
from ansible_collections.airgap.xinference.plugins.module_utils.server.view import View

ENTRY = {"model_uid": "m", "model_name": "bge-m3", "model_type": "embedding"}


def release(root: Path, **told: Any) -> View:
    (root / "current").mkdir(exist_ok=True)
    (root / "current" / "server.json").write_text(json.dumps(told))
    return View.load(root)


def test_a_container_has_other_paths_and_numbers(tmp_path: Path) -> None:
    gpus = [{"index": 0, "names": ["2", "GPU-c"]}, {"index": 1, "names": ["3", "GPU-d"]}]
    view = release(tmp_path, backend="docker", models="/models", gpus=gpus)
    assert view.path(f"{tmp_path}/models/bge-m3/0123") == "/models/bge-m3/0123"
    assert view.path("/data/elsewhere") == "/data/elsewhere"
    assert view.gpus is not None
    for names in ([3, 2], ["gpu-D", "GPU-c"]):
        assert parse([{**ENTRY, "gpus": names}], view.gpus)[0].gpu_idx == (1, 0)
    with pytest.raises(SpecError, match="names a GPU twice"):
        parse([{**ENTRY, "gpus": [3, "GPU-d"]}], view.gpus)
    with pytest.raises(SpecError, match="GPU 0 is not one of the server's"):
        parse([{**ENTRY, "gpus": [0]}], view.gpus)


def test_a_native_server_has_those_of_the_host(tmp_path: Path) -> None:
    view = release(tmp_path, backend="native", gpus=[{"index": 2, "names": ["2"]}, {"index": 3, "names": ["3"]}])
    assert view.path(f"{tmp_path}/models/bge-m3/0123") == f"{tmp_path}/models/bge-m3/0123"
    assert view.gpus is not None
    assert parse([{**ENTRY, "gpus": [3]}], view.gpus)[0].gpu_idx == (3,)


def test_without_a_release_the_order_of_the_inventory_counts(tmp_path: Path) -> None:
    view = View.load(tmp_path)
    assert view.gpus is None and view.path("/x") == "/x"
    assert parse([{**ENTRY, "gpus": [3]}], [2, 3])[0].gpu_idx == (1,)


def test_paths_of_shipped_models_are_the_servers(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    path = f"{tmp_path}/models/bge-m3/0123"
    (tmp_path / "state" / "artifacts.json").write_text(json.dumps({"models": {"bge-m3": {"path": path}}}))
    view = release(tmp_path, backend="docker", models="/models", gpus=[])
    assert shipped_paths(tmp_path, view) == {"bge-m3": "/models/bge-m3/0123"}
    assert shipped_paths(tmp_path) == {"bge-m3": path}
