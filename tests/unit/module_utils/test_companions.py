# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Companions of models: fetched for the bundle, given to the launch, and never against what an inventory says."""

from __future__ import annotations

from typing import Any, Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import name_problem
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather, notices
from ansible_collections.airgap.xinference.plugins.module_utils.companions import (
    COMPANIONS,
    companions_of,
    launch_extras,
    not_carried,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse

VAD = "speech_fsmn_vad_zh-cn-16k-common-pytorch"
PUNCTUATION = "punc_ct-transformer_cn-en-common-vocab471067-large"
SPEAKER = "speech_campplus_sv_zh-cn_16k-common"


def audio(name: str, **more: Any) -> Dict[str, Any]:
    source = {"modelscope": f"iic/{name}"}
    return {"model_uid": "stt", "model_name": name, "model_type": "audio", "source": source, **more}


def test_rows_can_be_carried_and_handed_over() -> None:
    assert len({row.name for row in COMPANIONS}) == len(COMPANIONS)
    for row in COMPANIONS:
        assert name_problem(row.name) is None
        assert bool(row.option) != bool(row.variable), "a path goes to one place"
        assert bool(row.modelscope) != bool(row.url and row.sha256 and row.file), "and comes from one"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SenseVoiceSmall", [VAD]),
        ("Fun-ASR-Nano-2512", [VAD]),
        ("paraformer-zh", [VAD, PUNCTUATION]),
        ("seaco-paraformer-zh", [VAD, PUNCTUATION]),
        ("paraformer-zh-spk", [VAD, PUNCTUATION, SPEAKER]),
        ("Qwen3-ASR-1.7B", ["Qwen3-ForcedAligner-0.6B"]),
        ("F5-TTS", ["vocos-mel-24khz"]),
        ("CosyVoice-300M", []),
        ("whisper-large-v3", []),
    ],
)
def test_models_and_their_companions(name: str, expected: list) -> None:
    assert [row.name for row in companions_of(audio(name))] == expected
    assert companions_of({**audio(name), "model_type": "LLM"}) == []
    assert companions_of(audio(name, model_engine="MLX")) == []


def test_what_the_inventory_says_wins() -> None:
    entry = audio("paraformer-zh", options={"vad_model": "/my/vad", "disable_update": False})
    assert [row.name for row in companions_of(entry)] == [PUNCTUATION]
    spec = parse([entry], artifacts_paths={"paraformer-zh": "/m", VAD: "/vad", PUNCTUATION: "/punc"})[0]
    assert spec.options == {"vad_model": "/my/vad", "punc_model": "/punc", "disable_update": False}


def test_the_launch_is_told_where_companions_are() -> None:
    spec = parse([audio("SenseVoiceSmall")], artifacts_paths={"SenseVoiceSmall": "/models/s", VAD: "/models/vad/1"})[0]
    payload = spec.payload()
    assert (payload["model_path"], payload["vad_model"]) == ("/models/s", "/models/vad/1")
    assert payload["disable_update"] is True and "punc_model" not in payload
    other = parse([audio("SenseVoiceSmall")], artifacts_paths={"SenseVoiceSmall": "/models/s", VAD: "/models/vad/2"})[0]
    assert spec.fingerprint() != other.fingerprint(), "another companion is another model"


def test_a_companion_that_was_not_shipped_is_left_to_the_server() -> None:
    assert launch_extras(audio("SenseVoiceSmall"), {}) == ({"disable_update": True}, {})


def test_token_arrays_need_a_variable() -> None:
    entry = {"model_uid": "e", "model_name": "bge-m3", "model_type": "embedding", "envs": {"A": "1"}}
    entry["source"] = {"path": "/srv/bge-m3"}
    paths = {"bge-m3": "/models/b", "tiktoken-cl100k_base": "/models/t"}
    spec = parse([entry], artifacts_paths=paths)[0]
    assert spec.fields["envs"] == {"A": "1", "TIKTOKEN_CACHE_DIR": "/models/t"}
    own = {**entry, "envs": {"TIKTOKEN_CACHE_DIR": "/own"}}
    assert parse([own], artifacts_paths=paths)[0].fields["envs"] == {"TIKTOKEN_CACHE_DIR": "/own"}
    assert "envs" not in parse([{**entry, "envs": None}], artifacts_paths={"bge-m3": "/models/b"})[0].fields


def test_the_bundle_fetches_each_companion_once() -> None:
    models = {
        "gpu1": [audio("SenseVoiceSmall"), audio("paraformer-zh", model_uid="b")],
        "gpu2": [audio("SenseVoiceSmall"), audio("paraformer-zh-spk", model_uid="off", enabled=False)],
        "gpu3": [{"model_name": "paraformer-zh-spk", "model_type": "audio", "model_path": "/own"}],
    }
    sources, problems = gather(models)
    assert problems == [] and [source.name for source in sources] == [
        "SenseVoiceSmall",
        "paraformer-zh",
        PUNCTUATION,
        VAD,
    ]
    vad = sources[-1]
    assert vad.content["modelscope"] == "iic/speech_fsmn_vad_zh-cn-16k-common-pytorch"
    assert vad.wanted_by == ["gpu1: stt", "gpu1: b", "gpu2: stt"]
    assert [source.name for source in gather(models, companions=False)[0]] == ["SenseVoiceSmall", "paraformer-zh"]


def test_a_source_of_ones_own_stands_in_for_a_companion() -> None:
    own = {"model_uid": "v", "model_name": "x", "model_type": "audio", "source": {"path": f"/srv/{VAD}"}}
    sources, problems = gather({"gpu1": [own, audio("SenseVoiceSmall")]})
    assert problems == [] and sources[-1].content == {"path": f"/srv/{VAD}"}


def test_what_cannot_be_carried_is_named() -> None:
    assert not_carried(audio("SenseVoiceSmall")) is None
    found = notices({"gpu1": [audio("MeloTTS-English"), audio("MeloTTS-Chinese", enabled=False)]})
    assert len(found) == 1 and found[0].startswith("gpu1: MeloTTS-English downloads NLTK data")
