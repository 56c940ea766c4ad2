# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an alternative takes over from its entry, and that bundles carry what alternatives need."""

from __future__ import annotations

from typing import Any, Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.alternatives import alternatives, choices, merged
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather, notices

RERANKER: Dict[str, Any] = {
    "model_uid": "reranker",
    "model_name": "bge-reranker-v2-m3",
    "model_type": "rerank",
    "model_engine": "vLLM",
    "model_format": "pytorch",
    "quantization": "none",
    "gpus": [0],
    "request_limits": 8,
    "options": {"gpu_memory_utilization": 0.3},
    "source": {"modelscope": "BAAI/bge-reranker-v2-m3"},
}
BASE = {"modelscope": "BAAI/bge-reranker-base"}


def test_another_model_brings_its_own_weights_and_engine_options() -> None:
    override = {"model_name": "bge-reranker-base", "model_engine": "sentence_transformers", "source": BASE}
    assert merged(RERANKER, override) == {
        "model_uid": "reranker",
        "model_name": "bge-reranker-base",
        "model_type": "rerank",
        "model_engine": "sentence_transformers",
        "gpus": [0],
        "request_limits": 8,
        "source": BASE,
    }


@pytest.mark.parametrize(
    ("override", "gone"),
    [
        ({"model_engine": "sentence_transformers"}, {"options"}),
        ({"model_engine": "VLLM"}, set()),
        ({"model_size_in_billions": 7}, {"source"}),
        ({"model_format": "gptq"}, {"source"}),
        ({"quantization": "Int4"}, set()),
        ({"model_name": "other"}, {"source", "model_format", "quantization"}),
        ({"model_path": "/m"}, {"source"}),
        ({"model_path": None}, set()),
        ({"n_gpu": 1}, {"gpus"}),
        ({"n_gpu": None}, {"gpus"}),
        ({"replica_config": [{}]}, {"gpus"}),
        ({"options": {"max_model_len": 1}}, set()),
        ({"gpus": None, "options": None}, set()),
    ],
)
def test_what_does_not_fit_any_more_is_left_behind(override: Dict[str, Any], gone: set) -> None:
    result = merged(RERANKER, override)
    assert set(RERANKER) - set(result) == gone
    assert {name: result[name] for name in override} == override


def test_sizes_are_compared_whatever_their_spelling() -> None:
    entry = {**RERANKER, "model_size_in_billions": "0_5"}
    assert "source" in merged(entry, {"model_size_in_billions": 0.5})
    assert "source" in merged({**entry, "model_size_in_billions": 7}, {"model_size_in_billions": "7"})
    assert "source" not in merged(entry, {"model_size_in_billions": 1.5})


def test_an_alternative_has_none_of_its_own() -> None:
    entry = {**RERANKER, "relaunch": "beside", "enabled": True, "fallbacks": [{"fallbacks": [{}], "replica": 2}]}
    (found,) = alternatives(entry)
    assert not {"relaunch", "enabled", "fallbacks"} & set(found) and found["replica"] == 2
    assert [one.get("replica") for one in choices(entry)] == [None, 2]


@pytest.mark.parametrize("nonsense", [None, "x", {"a": 1}, 5])
def test_nonsense_is_left_to_who_checks_entries(nonsense: Any) -> None:
    assert alternatives({**RERANKER, "fallbacks": nonsense}) == []
    assert len(alternatives({**RERANKER, "fallbacks": [nonsense, {}]})) == (2 if isinstance(nonsense, dict) else 1)


def test_a_bundle_carries_alternatives_and_what_they_need() -> None:
    speech = {
        "model_uid": "stt",
        "model_name": "whisper-large-v3",
        "model_type": "audio",
        "source": {"path": "/w"},
        "fallbacks": [{"model_name": "SenseVoiceSmall", "source": {"modelscope": "iic/SenseVoiceSmall"}}],
    }
    entry = {**RERANKER, "fallbacks": [{"model_name": "b", "source": BASE}, {"model_engine": "transformers"}]}
    off = {**entry, "model_uid": "off", "enabled": False, "fallbacks": [{"model_name": "c", "source": {"path": "/c"}}]}
    sources, problems = gather({"gpu1": [entry, speech, off]})
    assert problems == []
    assert {source.name: source.wanted_by for source in sources} == {
        "bge-reranker-v2-m3": ["gpu1: reranker"],
        "bge-reranker-base": ["gpu1: reranker: fallback 1"],
        "w": ["gpu1: stt"],
        "SenseVoiceSmall": ["gpu1: stt: fallback 1"],
        "speech_fsmn_vad_zh-cn-16k-common-pytorch": ["gpu1: stt"],
    }
    melo = {**speech, "fallbacks": [{"model_name": "MeloTTS-English", "source": {"path": "/melo"}}]}
    assert "MeloTTS-English downloads" in notices({"gpu1": [melo]})[0]


def test_what_is_wrong_with_alternatives_is_told_beside_the_rest() -> None:
    entry = {**RERANKER, "fallbacks": ["x"]}
    other = {**RERANKER, "fallbacks": [{"replica": 2}, {"source": {"path": "/a", "modelscope": "o/n"}}]}
    bad = {**RERANKER, "model_uid": "bad", "source": {}, "fallbacks": [{"replica": 2}]}
    clash = {**RERANKER, "fallbacks": [{"source": {"path": "/data/bge-reranker-v2-m3"}}]}
    sources, problems = gather({"gpu1": [entry, other, bad], "gpu2": [clash]})
    assert len(sources) == 1 and sources[0].wanted_by[0] == "gpu1: reranker"
    words = ["is not a list of dictionaries", "fallback 2: source needs either", "bad: source needs", "gpu2: reranker"]
    assert len(problems) == len(words) and all(word in text for word, text in zip(words, problems)), problems
