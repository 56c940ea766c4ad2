# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From the models of an inventory to the sources of a bundle."""

from __future__ import annotations

from typing import Any, Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather


def model(uid: str, **source: Any) -> Dict[str, Any]:
    """A model entry with a source."""
    return {"model_uid": uid, "source": source}


def test_each_source_once_in_order_of_name() -> None:
    sources, problems = gather(
        {
            "gpu1": [model("b", path="/m/bge/"), model("q", modelscope="Qwen/Qwen3", revision="v1")],
            "gpu2": [model("b2", path="/m/bge"), model("c", path="/m/x", name="a-name")],
            "gpu3": None,
        }
    )
    assert problems == []
    assert [(source.name, source.content.get("path")) for source in sources] == [
        ("Qwen3", None),
        ("a-name", "/m/x"),
        ("bge", "/m/bge"),
    ]
    assert sources[0].content == {
        "modelscope": "Qwen/Qwen3",
        "revision": "v1",
        "allow_patterns": [],
        "ignore_patterns": [],
    }
    assert sources[2].wanted_by == ["gpu1: b", "gpu2: b2"]


def test_models_that_are_off_or_have_no_source_are_left_out() -> None:
    entries = [{"model_uid": "x", "model_path": "/m"}, {**model("y", path="/y"), "enabled": False}]
    assert gather({"gpu1": entries}) == ([], [])


def test_defaults_and_a_pattern_that_is_no_list() -> None:
    sources, problems = gather({"gpu1": [model("q", modelscope="o/n", ignore_patterns="*.onnx")]})
    assert problems == []
    assert (sources[0].content["revision"], sources[0].content["ignore_patterns"]) == ("master", ["*.onnx"])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/m/bge", "not a mapping"),
        ({}, "either `path` or `modelscope`"),
        ({"path": "/a", "modelscope": "o/n"}, "either `path` or `modelscope`"),
        ({"path": "/a", "revison": "x"}, "unknown fields revison"),
        ({"path": "/a", "revision": "x"}, "revision, which a `path` cannot have"),
        ({"modelscope": "name-only"}, "not organisation/name"),
        ({"modelscope": "o/n", "origin": "elsewhere"}, "only a `path` needs"),
        ({"path": "/m/strange name"}, "set `source.name`"),
        ({"path": "/m/x", "name": ".."}, "'..' is not a name"),
    ],
)
def test_a_wrong_source(source: Any, words: str) -> None:
    sources, problems = gather({"gpu1": [{"model_uid": "u", "source": source}]})
    assert sources == [] and len(problems) == 1
    assert problems[0].startswith("gpu1: u: ") and words in problems[0]


def test_licence_and_origin_go_along() -> None:
    local = model("a", path="/m/x", license="mit", origin="https://example.org/x")
    sources, problems = gather({"gpu1": [local, model("b", modelscope="o/n", license="other")]})
    assert problems == []
    assert [source.content.get("license") for source in sources] == ["other", "mit"]
    assert sources[1].content == {"path": "/m/x", "license": "mit", "origin": "https://example.org/x"}


def test_all_conflicts_and_errors_at_once() -> None:
    _sources, problems = gather(
        {
            "gpu1": [model("a", path="/one/m"), model("b", modelscope="o/m")],
            "gpu2": [model("a", path="/two/m"), model("c", path="")],
            "gpu3": "models",
            "gpu4": ["model"],
        }
    )
    assert len(problems) == 5
    assert "the name 'm' means path /two/m here and path /one/m for gpu1: a" in problems[1]
    assert "gpu3: xinference_models is not a list" in problems[3]
