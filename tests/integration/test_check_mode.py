# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Both modules are doors to one record, and in check mode a recorder behind them sees nothing but reads."""

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

    several = "xinference_model_set"
    one = "xinference_model"
    absent = {"model_uid": "small", "state": "absent"}
    story: List[Tuple[str, Dict[str, Any], List[str]]] = [
        (several, {"models": [small]}, ["launch"]),
        (several, {"models": [small]}, ["keep"]),
        (one, small, ["keep"]),
        (several, {"models": [changed]}, ["relaunch"]),
        (one, changed, ["keep"]),
        (one, {**changed, "state": "relaunched"}, ["relaunch"]),
        (several, {"models": [changed]}, ["keep"]),
        (several, {"models": []}, ["terminate"]),
        (one, small, ["launch"]),
        (several, {"models": [small]}, ["keep"]),
        (one, absent, ["terminate"]),
        (one, absent, []),
    ]
    for name, params, actions in story:
        foretold = check(name, params)
        assert [row["action"] for row in foretold["models"]] == actions
        done = run(name, params)
        assert told(foretold) == told(done)
        assert done["changed"] is (actions not in ([], ["keep"]))
        assert set(done) == {"changed", "models", "requests", "diff", "invocation"}
        assert "very-secret" not in str({key: done[key] for key in ("models", "diff")})
        if actions == ["keep"]:
            assert done["requests"] == 2
        if actions == ["launch"]:
            assert done["models"][0]["model"]["model_name"] == small["model_name"]
            assert done["models"][0]["duration"] > 0 and not done["diff"]["before"]
            assert done["diff"]["after"]["small"]["model_path"] == small["model_path"]
    assert set(check("xinference_model_set", {"models": [small]})["diff"]["after"]) == {"small"}
