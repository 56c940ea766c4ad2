# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a model downloads beside itself, at its launch or at the first request, although it was given a `model_path`.

One table for both wings: the bundle fetches the companions of its models, the launch is told where they are. It knows
neither wing, so both may know it. Every row was read in Xinference 4.1.0 and 1.8.1 (`model/audio/…`, where 1.8.1 has
the model) and in the libraries they call:

* FunASR takes `vad_model`, `punc_model` and `spk_model` from the launch options (audio/funasr.py, `load`) and looks the
  short names of the defaults up in its name_maps_from_hub.py; what exists as a path is used as it is. Its search for a
  newer release on PyPI is switched off by `disable_update` (auto/auto_model.py).
* Qwen3-ASR (4.1.0 only) takes `forced_aligner` (audio/qwen3_asr.py).
* F5-TTS takes `vocoder_path` (audio/f5tts.py); without it the vocoder comes from a hub in both versions.
* AuK (4.1.0 only) takes `qwen_path`, unless its directory holds Qwen2.5-Omni-3B (audio/auk.py).
* An embedding request with arrays of tokens makes both versions load tiktoken's cl100k_base (embedding/core.py), which
  tiktoken looks for in TIKTOKEN_CACHE_DIR under the SHA-1 of its address (tiktoken/load.py).
* CosyVoice needs nothing: its text normalisation has the rules in the package, wetext 0.0.9 and later (4.1.0) and
  WeTextProcessing (1.8.1) alike.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

FUNASR = ("SenseVoiceSmall", "Fun-ASR-*", "paraformer-zh*", "seaco-paraformer-zh")
PARAFORMER = ("paraformer-zh*", "seaco-paraformer-zh")


class Companion(NamedTuple):
    """Something a model needs beside itself.

    `models` are patterns of the names it is for (all models of the type when empty). The path goes into the launch
    option `option` or the environment variable `variable`. It comes from ModelScope, or is one `file` at a `url`.
    """

    name: str
    type: str
    models: Tuple[str, ...]
    option: str = ""
    variable: str = ""
    modelscope: str = ""
    allow_patterns: Tuple[str, ...] = ()
    url: str = ""
    file: str = ""
    sha256: str = ""


COMPANIONS = (
    Companion(
        name="speech_fsmn_vad_zh-cn-16k-common-pytorch",
        type="audio",
        models=FUNASR,
        option="vad_model",
        modelscope="iic/speech_fsmn_vad_zh-cn-16k-common-pytorch",
    ),
    Companion(
        name="punc_ct-transformer_cn-en-common-vocab471067-large",
        type="audio",
        models=PARAFORMER,
        option="punc_model",
        modelscope="iic/punc_ct-transformer_cn-en-common-vocab471067-large",
    ),
    Companion(
        name="speech_campplus_sv_zh-cn_16k-common",
        type="audio",
        models=("paraformer-zh-spk",),
        option="spk_model",
        modelscope="iic/speech_campplus_sv_zh-cn_16k-common",
    ),
    Companion(
        name="Qwen3-ForcedAligner-0.6B",
        type="audio",
        models=("Qwen3-ASR-*",),
        option="forced_aligner",
        modelscope="Qwen/Qwen3-ForcedAligner-0.6B",
    ),
    Companion(
        name="vocos-mel-24khz",
        type="audio",
        models=("F5-TTS",),
        option="vocoder_path",
        modelscope="pengzhendong/vocos-mel-24khz",
        allow_patterns=("config.yaml", "pytorch_model.bin"),
    ),
    Companion(
        name="Qwen2.5-Omni-3B",
        type="audio",
        models=("AuK", "AuK-Flash"),
        option="qwen_path",
        modelscope="Qwen/Qwen2.5-Omni-3B",
    ),
    Companion(
        name="tiktoken-cl100k_base",
        type="embedding",
        models=(),
        variable="TIKTOKEN_CACHE_DIR",
        url="https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken",
        file="9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
)

SETTINGS: Tuple[Tuple[str, Tuple[str, ...], Dict[str, Any]], ...] = (("audio", FUNASR, {"disable_update": True}),)
"""Launch options that keep a model from asking the internet: type, patterns of names, options."""

NOT_CARRIED = {
    "MeloTTS-*": "NLTK data and several BERT tokenizers from Hugging Face (audio/melotts.py, thirdparty/melo/text)",
    "IndexTTS*": "four small models, or `options.small_models_dir` with all of them (audio/indextts2.py)",
    "Confucius4-TTS": "w2v-bert-2.0, CAMPPlus and BigVGAN from a hub (audio/confucius4_tts.py)",
    "YuE2-3B": "its VAE from a hub (audio/yue2.py)",
}
"""Audio models that download more, and take no path for it: what they want, and where that was read."""


def companions_of(entry: Mapping[str, Any]) -> List[Companion]:
    """The companions of a model entry, without those that it names itself."""
    options, variables = _mapping(entry.get("options")), _mapping(entry.get("envs"))
    return [
        row
        for row in COMPANIONS
        if _is_for(row.type, row.models, entry) and row.option not in options and row.variable not in variables
    ]


def launch_extras(entry: Mapping[str, Any], paths: Mapping[str, str]) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Launch options and environment variables that a model needs offline.

    `paths` are directories on the host by name in the bundle; a companion that is not among them is left out.
    """
    options: Dict[str, Any] = {}
    for kind, models, settings in SETTINGS:
        if _is_for(kind, models, entry):
            options.update(settings)
    found = [(row, paths[row.name]) for row in companions_of(entry) if row.name in paths]
    options.update({row.option: path for row, path in found if row.option})
    return options, {row.variable: path for row, path in found if row.variable}


def not_carried(entry: Mapping[str, Any]) -> Optional[str]:
    """What an entry's model will try to download in spite of everything; None when nothing is known of that."""
    name = str(entry.get("model_name"))
    wants = [text for pattern, text in NOT_CARRIED.items() if fnmatchcase(name, pattern)]
    return wants[0] if wants and entry.get("model_type") == "audio" else None


def _is_for(kind: str, models: Tuple[str, ...], entry: Mapping[str, Any]) -> bool:
    """Whether a row of this type and these patterns concerns an entry; Apple's MLX engines load in other ways."""
    if entry.get("model_type") != kind or str(entry.get("model_engine")).lower() == "mlx":
        return False
    name = str(entry.get("model_name"))
    return not models or any(fnmatchcase(name, pattern) for pattern in models)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
