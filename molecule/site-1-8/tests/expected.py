# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the site of this scenario asks for, in the words of the engine, the hook and the server."""

from __future__ import annotations

from typing import Any

VERSION = "1.8.1"
SECRET = "hf_NotForEveryone4711"
MODELS = ("minilm", "rerank", "chat")
# `placement` is by the server's numbers.
SITES: dict[str, dict[str, Any]] = {
    "gpu-1": {
        "device_ids": ["0", "1"],
        "host_gpus": [0, 1],
        "placement": {"minilm": [0], "rerank": [1], "chat": [1]},
    },
}
