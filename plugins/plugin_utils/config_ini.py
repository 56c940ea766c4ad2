# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ``config.ini`` of a hand-made site, read as inventory variables. Pure.

Such a file has a section for the server and one for each of four models::

    [XINFERENCE]
    XINFERENCE_GPUS="0,1"
    MODELS_VOLUMES_DIRECTORY=/data/docker_models
    [EMBEDDING]
    EMBEDDING_INSTALL_ENABLE=true
    EMBEDDING_GPU=0

Its script read it line by line and ignored the sections, so the names alone count here, too.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "EMBEDDING": {
        "model_name": "bce-embedding-base_v1",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
        "source": {"modelscope": "maidalun/bce-embedding-base_v1"},
    },
    "RERANKER": {
        "model_name": "bce-reranker-base_v1",
        "model_type": "rerank",
        "model_engine": "sentence_transformers",
        "source": {"modelscope": "maidalun/bce-reranker-base_v1"},
    },
    "TTS": {"model_name": "CosyVoice-300M", "model_type": "audio", "source": {"modelscope": "iic/CosyVoice-300M"}},
    "STT": {"model_name": "SenseVoiceSmall", "model_type": "audio", "source": {"modelscope": "iic/SenseVoiceSmall"}},
}
"""The four models such a site serves, by the prefix of their settings."""

KNOWN = {"XINFERENCE_GPUS", "MODELS_VOLUMES_DIRECTORY"} | {
    f"{prefix}_{setting}" for prefix in MODELS for setting in ("INSTALL_ENABLE", "GPU")
}


def read_site(text: str) -> dict[str, Any]:
    """The variables that say the same as the file, and every problem in it.

    Returns ``{"gpus": [int], "root": str, "models": [entry], "problems": [str]}``. A model that the file does not
    mention is not in the list; one that is switched off is, with ``enabled: false``. The root is a directory of its own
    on the old disk: what the old server left in MODELS_VOLUMES_DIRECTORY may have names of ours, such as ``logs``.
    """
    settings, problems = _settings(text)
    gpus = _numbers(settings, "XINFERENCE_GPUS", problems)
    root = settings.get("MODELS_VOLUMES_DIRECTORY", "")
    if not root.startswith("/"):
        problems.append(f"MODELS_VOLUMES_DIRECTORY must be an absolute path, not {root!r}")
    models = [_entry(prefix, settings, gpus, problems) for prefix in MODELS if f"{prefix}_INSTALL_ENABLE" in settings]
    if not models:
        names = ", ".join(f"{prefix}_INSTALL_ENABLE" for prefix in MODELS)
        problems.append(f"names no model; it needs one of {names}")
    return {"gpus": gpus, "root": f"{root.rstrip('/')}/xinference", "models": models, "problems": problems}


def _settings(text: str) -> tuple[dict[str, str], list[str]]:
    """Names and values, without quotes and trailing comments; unknown and repeated names are problems."""
    settings: dict[str, str] = {}
    problems = []
    for number, raw in enumerate(text.lstrip("\ufeff").splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in "#;" or re.fullmatch(r"\[.*\]", line):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or name not in KNOWN:
            near = get_close_matches(name.upper(), KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(sorted(KNOWN))}"
            problems.append(f"line {number}: {line!r} is not a setting of such a file; {hint}")
        elif name in settings:
            problems.append(f"line {number}: {name} is there twice")
        else:
            value = re.sub(r"\s+#.*$", "", value)
            settings[name] = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    return settings, problems


def _numbers(settings: dict[str, str], name: str, problems: list[str]) -> list[int]:
    words = [word.strip() for word in settings.get(name, "").split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        problems.append(f"{name} must be GPU numbers such as 0 or 0,1, not {settings.get(name, '')!r}")
        return []
    return [int(word) for word in words]


def _entry(prefix: str, settings: dict[str, str], gpus: list[int], problems: list[str]) -> dict[str, Any]:
    """The entry of one model as the inventory has it."""
    switch = settings[f"{prefix}_INSTALL_ENABLE"].lower()
    if switch not in ("true", "false"):
        problems.append(f"{prefix}_INSTALL_ENABLE must be true or false, not {switch!r}")
    found: list[str] = []
    own = _numbers(settings, f"{prefix}_GPU", found)
    # A model that is off may have any GPU, as it always could.
    if switch == "true":
        problems += found
        problems += [f"{prefix}_GPU: {gpu} is not in XINFERENCE_GPUS" for gpu in own if gpus and gpu not in gpus]
    model = MODELS[prefix]
    entry = {"model_uid": model["model_name"], **model, "gpus": own}
    return entry if switch == "true" else {**entry, "enabled": False}
