# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A hand-made site's config.ini becomes inventory variables that say the same."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from ansible_collections.airgap.xinference.plugins.plugin_utils.config_ini import MODELS, read_site

SITE = """\
[XINFERENCE]
# Which GPUs the server may use
XINFERENCE_GPUS="0,1"
MODELS_VOLUMES_DIRECTORY=/data/docker_models
[EMBEDDING]
EMBEDDING_INSTALL_ENABLE=true
EMBEDDING_GPU=0
[RERANKER]
RERANKER_INSTALL_ENABLE=true
RERANKER_GPU=0
[TTS]
TTS_INSTALL_ENABLE=false
TTS_GPU=7
[STT]
STT_INSTALL_ENABLE=true
STT_GPU=1
"""


def test_every_setting_is_brought_over():
    site = read_site(SITE)
    assert (site["gpus"], site["root"], site["problems"]) == ([0, 1], "/data/docker_models/xinference", [])
    assert [(model["model_uid"], model["gpus"], model.get("enabled", True)) for model in site["models"]] == [
        ("bce-embedding-base_v1", [0], True),
        ("bce-reranker-base_v1", [0], True),
        ("CosyVoice-300M", [7], False),
        ("SenseVoiceSmall", [1], True),
    ]


def test_its_models_can_be_launched():
    entries = [
        {key: value for key, value in model.items() if key not in ("gpus", "source")} for model in MODELS.values()
    ]
    assert [spec.uid for spec in parse([{**entry, "model_uid": entry["model_name"]} for entry in entries])]


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "  \r\n")])
def test_a_file_written_on_windows_says_the_same(change):
    assert read_site(change(SITE)) == read_site(SITE)


def test_a_model_that_is_not_mentioned_is_not_served():
    text = "XINFERENCE_GPUS=0\nMODELS_VOLUMES_DIRECTORY=/m/\nSTT_INSTALL_ENABLE=true\nSTT_GPU=0 # alone\n"
    site = read_site(text)
    assert site["problems"] == [] and site["root"] == "/m/xinference"
    assert [model["model_uid"] for model in site["models"]] == ["SenseVoiceSmall"]


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ('"0,1"', '"0,x"', "XINFERENCE_GPUS must be GPU numbers"),
        ("EMBEDDING_GPU=0", "EMBEDDING_GPU=2", "EMBEDDING_GPU: 2 is not in XINFERENCE_GPUS"),
        ("STT_GPU=1\n", "", "STT_GPU must be GPU numbers"),
        ("STT_INSTALL_ENABLE=true", "STT_INSTALL_ENABLE=ja", "must be true or false, not 'ja'"),
        ("=/data/docker_models", "=models", "must be an absolute path, not 'models'"),
        ("STT_GPU=1", "STT_GPUS=1", "line 16: 'STT_GPUS=1' is not a setting"),
        ("[STT]", "STT_GPU=0", "STT_GPU is there twice"),
    ],
)
def test_mistakes_are_named(before, after, problem):
    assert problem in "; ".join(read_site(SITE.replace(before, after))["problems"])


def test_all_mistakes_are_named_at_once():
    assert len(read_site("XINFERENCE_GPUS=a\nfoo\n")["problems"]) == 4
