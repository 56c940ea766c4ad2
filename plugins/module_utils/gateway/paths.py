# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which requests are a client's. Everything that is not listed here is administration.

Read in the routers of 4.1.0 (xinference/api/routers/) and in restful_api.py of 1.8.1. What launches, ends, registers,
downloads, restarts, shows logs or accounts is not in the list, and neither is what a later version adds.
"""

from __future__ import annotations

import re
from typing import List, Tuple

CLIENT = "client"
SOCKET = "socket"
HEALTH = "health"
LOGIN = "login"
METRICS = "metrics"
ADMINISTRATION = "administration"

_UID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# Below /v1/models there are also lists that tell how the server is run.
_MODEL = rf"/v1/models/(?!(?:instances|prompts|families|vllm-supported)(?:\?|$)){_UID}"
_QUERY = r"(?:\?[!-~]*)?"

POST = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/anthropic/v1/messages",
    "/anthropic/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/convert_ids_to_tokens",
    "/v1/rerank",
    "/v1/images/generations",
    "/v1/images/variations",
    "/v1/images/inpainting",
    "/v1/images/edits",
    "/v1/images/ocr",
    "/v1/images/docanalyze",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/audio/speech",
    "/v1/audio/embeddings",
    "/v1/video/generations",
    "/v1/video/generations/image",
    "/v1/video/generations/flf",
    "/v1/worlds/generations",
    "/v1/flexible/infers",
)
"""Paths that ask a model something."""

GET = (
    r"/v1/models",
    _MODEL,
    rf"/v1/requests/{_UID}/progress",
    r"/anthropic/v1/models",
    rf"/anthropic/v1/models/{_UID}",
)
"""Expressions of paths that show what can be asked, which clients read first."""

REALTIME = "/v1/realtime"
"""OpenAI's WebSocket path. Neither 1.8.1 nor 4.1.0 has one; a server that has it is passed on to."""
AUTH = "/v1/cluster/auth"
"""Xinference's own client asks here, without credentials, whether to log in."""

_PATH = re.compile(r"(?:GET|POST|PUT|DELETE|PATCH) /[A-Za-z0-9/._-]+\Z")


def kinds(more: Tuple[str, ...] = ()) -> List[Tuple[str, str]]:
    """Pairs of an expression over `METHOD /path?query`, as it was received, and the kind of such a request.

    The path is matched as the client wrote it, to its end, so nothing that is decoded or tidied up later gets through.
    """
    posted = "|".join(re.escape(path) for path in POST)
    added = [(rf"^{re.escape(path)}{_QUERY}$", CLIENT) for path in more]
    return [
        (rf"^POST (?:{posted}){_QUERY}$", CLIENT),
        (rf"^GET (?:{'|'.join(GET)}){_QUERY}$", CLIENT),
        *added,
        (rf"^GET {REALTIME}{_QUERY}$", SOCKET),
        (r"^(?:GET|HEAD) /status$", HEALTH),
        (rf"^GET {AUTH}$", LOGIN),
        (r"^GET /metrics$", METRICS),
    ]


def path_fault(path: str) -> str:
    """What is wrong with a path that a site adds, empty when nothing is."""
    if not _PATH.match(path):
        return "is not a method and a path, such as POST /sdapi/v1/txt2img"
    if "//" in path or any(part in (".", "..") for part in path.split(" ")[1].split("/")):
        return "has parts that a server may read as another path"
    return ""
