# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The switches that keep a server and its engines from looking for a network, and whether an environment has them."""

from __future__ import annotations

from typing import Dict, List, Mapping

SWITCHES: Dict[str, str] = {
    "XINFERENCE_ENABLE_VIRTUAL_ENV": "0",
    "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "1",
    "XINFERENCE_DOWNLOAD_MAX_ATTEMPTS": "1",
    "XINFERENCE_ENABLE_OTEL": "false",
    "MODELSCOPE_DOMAIN": "127.0.0.1:9",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "PIP_NO_INDEX": "1",
    "UV_OFFLINE": "1",
}
"""What the role xinference_server sets, see its vars/main.yml."""
INSTALLING = ("XINFERENCE_ENABLE_VIRTUAL_ENV", "PIP_NO_INDEX", "UV_OFFLINE")
"""What is otherwise where launches may install packages from the site itself."""
SITE_INDEX = ("UV_FIND_LINKS", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_FIND_LINKS")
"""What then says where those are."""
_OFF = ("", "0", "false", "no", "off")


def switches(environment: Mapping[str, str]) -> Dict[str, str]:
    """The switches that an environment has, and whether packages come from the site: no other variable, no secret."""
    return {name: str(environment[name]) for name in (*SWITCHES, *SITE_INDEX) if name in environment}


def missing(found: Mapping[str, str]) -> List[str]:
    """The switches that are absent from `found`, or stand the other way."""
    own = any(name in found for name in SITE_INDEX)
    wanted = {name: value for name, value in SWITCHES.items() if not (own and name in INSTALLING)}
    return [name for name, value in wanted.items() if name not in found or not _same(value, found[name])]


def _same(wanted: str, found: str) -> bool:
    if wanted.lower() not in ("0", "1", "false"):
        return wanted == found.strip()
    return (wanted.lower() in _OFF) == (found.strip().lower() in _OFF)
