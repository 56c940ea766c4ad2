# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check mode tells what a run would do, and a recorder between module and server sees nothing but reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from doors import Recorder, run_module, tree
from servers import Server


def test_check_mode_writes_nothing_and_foretells_the_run(
    server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    small = {
        "model_uid": "small",
        "model_name": "bce-embedding-base_v1",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
        "model_path": models("minilm"),
    }
    changed = {**small, "request_limits": 3, "envs": {"A_TOKEN": "very-secret"}}

    def check(name: str, params: Dict[str, Any]) -> Dict[str, Any]:
        """Run in check mode and see that it only read; both on the server and on the host."""
        before = tree(tmp_path)
        with Recorder(server.endpoint) as recorder:
            result, _seconds = run_module(
                name, {**params, "endpoint": recorder.endpoint, "root": str(root)}, check=True
            )
            assert recorder.methods == {"GET"}, recorder.lines
            assert result["requests"] == len(recorder.lines)
        assert tree(tmp_path) == before
        assert "failed" not in result, result
        return result

    def run(name: str, params: Dict[str, Any]) -> Dict[str, Any]:
        result, _seconds = run_module(name, {**params, "endpoint": server.endpoint, "root": str(root)})
        assert "failed" not in result, result
        return result

    def told(result: Dict[str, Any]) -> Any:
        rows = [(row["model_uid"], row["action"], row["reason"]) for row in result["models"]]
        return result["changed"], rows, result["diff"], {key for row in result["models"] for key in row}

    story: List[Tuple[str, Dict[str, Any], str]] = [
        ("xinference_model_set", {"models": [small]}, "launch"),
        ("xinference_model_set", {"models": [small]}, "keep"),
        ("xinference_model_set", {"models": [changed]}, "relaunch"),
        ("xinference_model", {**changed, "state": "relaunched"}, "relaunch"),
        ("xinference_model_set", {"models": []}, "terminate"),
        ("xinference_model", {**small}, "launch"),
        ("xinference_model", {"model_uid": "small", "state": "absent"}, "terminate"),
    ]
    for name, params, action in story:
        foretold = check(name, params)
        assert [row["action"] for row in foretold["models"]] == [action]
        done = run(name, params)
        assert told(foretold) == told(done)
        assert "very-secret" not in str({key: done[key] for key in ("models", "diff")})
    assert set(check("xinference_model_set", {"models": [small]})["diff"]["after"]) == {"small"}
