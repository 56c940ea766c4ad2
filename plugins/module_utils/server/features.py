# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a server of a given version can do: one table, read off the released packages 1.3.0 to 4.1.0.

Code that behaves differently by version asks `features(version)`; it never compares version numbers itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Dict, FrozenSet, Optional, Tuple

OLDEST = (1, 3)


@dataclass(frozen=True)
class Features:
    """Abilities of one server version.

    auth: how accounts come to be. `config-file`: only from a JSON file given at start. `opt-in`: the same, or a
        database when XINFERENCE_AUTH_ADVANCED is set. `first-caller`: on by default, whoever sets up first is
        administrator. `setup-token`: on by default, set-up asks for the token printed in the log.
    launch_returns_early: a launch may return before the model is ready, because `/v1/models/instances` then tells for
        every replica why it failed. Without it the reason is only in the answer of a blocking launch.
    engine_types: model types that have a choice of engine, which `/v1/engines` explains.
    engine_required: model types that cannot be launched without `model_engine`.
    specs_types: model types whose registration holds `model_specs` instead of `model_id` and `model_revision`.
    definition_version: schema of a registration: 2 has `version: 2` and one spec a quantization, 1 lists
        `quantizations` in a spec.
    model_shows_engine: `/v1/models` shows `model_engine` for every type, not only for LLM.
    virtual_env_default: every launch installs packages unless XINFERENCE_ENABLE_VIRTUAL_ENV=0.
    engine_source: what a site without internet can give a launch that installs packages. `image`: nothing is ever
        installed. `index`: an index in pip's configuration. `wheels`: a directory of wheels too.
    ends_the_dead: a model whose process died, and which the server gave up, can be terminated, which frees its uid.
        Earlier a worker that is asked to do so crashes (xoscar's destroy_actor(None)), and every model with it.
    autostart: the server itself can launch models again after a restart.
    api_key_may_launch: an API key may do all that its owner may; later it may only list and infer.
    image_cuda: CUDA in the project's own GPU image. image_driver: the oldest NVIDIA driver (major number) for that.
    """

    version: str
    auth: str = "config-file"
    launch_returns_early: bool = False
    engines_by_type: bool = False
    engine_types: FrozenSet[str] = frozenset({"LLM"})
    engine_required: FrozenSet[str] = frozenset({"LLM"})
    specs_types: FrozenSet[str] = frozenset({"LLM"})
    definition_version: int = 1
    model_shows_engine: bool = False
    virtual_env_default: bool = False
    engine_source: str = "image"
    ends_the_dead: bool = False
    autostart: bool = False
    api_key_may_launch: bool = True
    image_cuda: str = "12.4"
    image_driver: int = 550


def _types(*names: str) -> FrozenSet[str]:
    return frozenset(names)


# (first version with the change, what changed). The file that shows it, in the package of that version, is behind it.
CHANGES: Tuple[Tuple[Tuple[int, int], Dict[str, Any]], ...] = (
    # api/restful_api.py: /v1/engines/{model_type}/{model_name}; model/embedding/ has engines
    ((1, 7), {"engines_by_type": True, "engine_types": _types("LLM", "embedding")}),
    # model/embedding/core.py: EmbeddingModelFamilyV2.model_specs; model/llm/llm_family.py: LLMFamilyV2
    ((1, 8), {"specs_types": _types("LLM", "embedding"), "definition_version": 2}),
    # model/rerank/core.py: create_rerank_model_instance(model_engine=...), RerankModelFamilyV2.model_specs
    (
        (1, 9),
        {"engine_types": _types("LLM", "embedding", "rerank"), "specs_types": _types("LLM", "embedding", "rerank")},
    ),
    # core/status_guard.py: class ReplicaStatus with error_message
    ((1, 14), {"launch_returns_early": True}),
    # constants.py: XINFERENCE_ENABLE_VIRTUAL_ENV defaults to 1; model/image/core.py has engines
    # doc/source/getting_started/using_docker_image.rst, versionchanged v2.0
    (
        (2, 0),
        {
            "virtual_env_default": True,
            "engine_source": "index",
            "engine_types": _types("LLM", "embedding", "rerank", "image"),
            "image_cuda": "12.9",
            "image_driver": 575,
        },
    ),
    # core/worker.py: terminate_model destroys the actor only where there is one
    ((2, 1), {"ends_the_dead": True}),
    # constants.py: XINFERENCE_AUTH_ADVANCED, off by default, beside --auth-config
    ((2, 9), {"auth": "opt-in", "api_key_may_launch": False}),
    # core/autostart.py, core/launch_history_store.py
    ((2, 12), {"autostart": True}),
    # deploy/cmdline.py without --auth-config; api/oauth2/advanced/routes.py: /v1/admin/setup without a token
    # doc/source/getting_started/using_docker_image.rst, versionchanged v3.0.0
    ((3, 0), {"auth": "first-caller", "image_cuda": "13.0", "image_driver": 580}),
    # model/audio/engine_family.py; embedding and rerank record the engine used
    (
        (3, 1),
        {"engine_types": _types("LLM", "embedding", "rerank", "image", "audio"), "model_shows_engine": True},
    ),
    # model/utils.py: video and world have engines
    ((3, 4), {"engine_types": _types("LLM", "embedding", "rerank", "image", "audio", "video", "world")}),
    # model/core.py: VirtualEnvSettings.find_links; constants.py: XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS
    ((4, 0), {"engine_source": "wheels"}),
    # api/oauth2/advanced/routes.py: setup_token
    ((4, 1), {"auth": "setup-token"}),
)

# Suffix of an image's tag -> (CUDA, oldest driver); doc/source/getting_started/using_docker_image.rst of v1.9.0.
VARIANTS: Dict[str, Tuple[str, int]] = {"-cu128": ("12.8", 570), "-cu129": ("12.9", 575)}


def parse_version(version: str) -> Tuple[int, int]:
    """Major and minor number of a version text such as `4.1.0`, `1.11.0.post1` or `v2.0.0rc1`.

    Raises ValueError when it does not start like a version.
    """
    match = re.match(r"v?(\d+)\.(\d+)", version.strip())
    if not match:
        raise ValueError(f"{version!r} is not a version of Xinference such as 4.1.0")
    return int(match.group(1)), int(match.group(2))


def features(version: str) -> Features:
    """What the server of this version can do; a version newer than the table is taken to be like its last row.

    Versions below 1.3 are taken to be like 1.3, see `supported`. A text that is no version (a development build reports
    such as `0+unknown`) is taken to be the newest.
    """
    try:
        number = parse_version(version)
    except ValueError:
        number = CHANGES[-1][0]
    found = Features(version=version)
    for since, change in CHANGES:
        if number >= since:
            found = replace(found, **change)
    return found


def supported(version: str) -> bool:
    """Whether this collection is made for the version."""
    try:
        return parse_version(version) >= OLDEST
    except ValueError:
        return False


def image_needs(tag: str) -> Optional[Tuple[str, int]]:
    """CUDA and the oldest NVIDIA driver for an image of the project, by its tag; None for one that runs on processors.

    A tag that names no version, such as `latest`, is taken to be the newest.
    """
    if tag.endswith("-cpu"):
        return None
    for suffix, needs in VARIANTS.items():
        if tag.endswith(suffix):
            return needs
    found = features(tag)
    return found.image_cuda, found.image_driver
