# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of the inventory may be shown. One rule for both wings and for all modules.

Hidden are the whole value below a name that speaks of a secret, and every environment variable but those that this
collection sets itself, because nobody can tell by its name what a site puts into one.
"""

from __future__ import annotations

import json
import re
from typing import Any, Iterator, Mapping

HIDDEN = "(hidden)"
SECRET = re.compile(r"token|secret|passw|passwd|pwd|credential|key|auth|private", re.IGNORECASE)
# Names that hold one of these words by chance: counts and ids of tokens, tokenizers, authors.
HARMLESS = re.compile(
    r"tokeni[sz]er|author(?!i)|keyword|token_ids?(_|$)|(^|_)(bos|eos|pad|unk|stop|mask|image|video|audio)_token(_|$)"
    r"|(^|_)(max|min|num|n|new|model|batched|chunk|reserved|special)_(\w+_)?tokens?(_|$)|^key_?(value|cache)",
    re.IGNORECASE,
)
ENVIRONMENTS = ("envs", "environment", "overrides")
OURS = re.compile(
    r"XINFERENCE_\w+|CUDA_\w+|NVIDIA_\w+|HF_(HUB_OFFLINE|DATASETS_OFFLINE|HUB_DISABLE_TELEMETRY|HOME)"
    r"|TRANSFORMERS_OFFLINE|MODELSCOPE_(CACHE|DOMAIN)|DO_NOT_TRACK|VLLM_NO_USAGE_STATS|VLLM_CACHE_ROOT|RAY_USAGE_STATS_ENABLED"
    r"|GRADIO_ANALYTICS_ENABLED|PIP_NO_INDEX|UV_OFFLINE|PATH|HOME|LANG|PYTHONUNBUFFERED|PYTHONNOUSERSITE|NLTK_DATA"
    r"|TIKTOKEN_CACHE_DIR|TRITON_CACHE_DIR|FLASHINFER_WORKSPACE_BASE"
)
NO_SECRETS = ("XINFERENCE_AUTH_ADVANCED", "TIKTOKEN_CACHE_DIR")
# A secret by its looks: user and password in a URL, or a long text of letters and digits that is no path.
LOOKS_SECRET = re.compile(r"://[^/\s@]+@|\A(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])[A-Za-z0-9_+=-]{20,}\Z")
# Shorter values are words and numbers that stand everywhere; to blot them out would make a result unreadable.
SHORTEST = 4
_YAML_KEY = re.compile(r"( *)((?:- )*)(\"(?:[^\"\\]|\\.)*\"|[^\s:\"]+):(?: (.*))?\Z")


def is_secret(name: Any) -> bool:
    """Whether a name speaks of a secret."""
    return bool(SECRET.search(str(name))) and not HARMLESS.search(str(name))


def masked(value: Any) -> Any:
    """A value as it may be shown, dictionaries and lists inside it too."""
    if isinstance(value, Mapping):
        return {name: masked_field(name, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return HIDDEN if isinstance(value, str) and "://" in value and LOOKS_SECRET.search(value) else value


def masked_json(text: str) -> str:
    """A JSON document as it may be shown; nothing of a text that is none."""
    if not text:
        return ""
    try:
        return json.dumps(masked(json.loads(text)), indent=2, ensure_ascii=False) + "\n"
    except ValueError:
        return f"{HIDDEN}\n"


def masked_yaml(text: str) -> str:
    """A document that `yaml_text` wrote, one key or item a line, as it may be shown."""
    lines, hidden_below, environment_below = [], None, None
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip(" "))
        if hidden_below is not None and depth > hidden_below:
            continue
        hidden_below = None
        if environment_below is not None and depth <= environment_below:
            environment_below = None
        found = _YAML_KEY.match(line)
        if not found:
            item = masked(line)
            lines.append(f"{' ' * depth}{HIDDEN}" if environment_below is not None or item == HIDDEN else line)
            continue
        name, value = found.group(3).strip('"'), found.group(4)
        inside = environment_below is not None
        if _hides(name, value or "", inside):
            lines.append(f"{line[: found.end(3)]}: {HIDDEN}")
            hidden_below = depth
            continue
        if value is None and name.lower() in ENVIRONMENTS:
            environment_below = depth
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def secrets_in(value: Any) -> Iterator[str]:
    """Texts in `value` that must appear in no output at all."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name in NO_SECRETS:
                continue
            if is_secret(name):
                yield from _texts(item)
            else:
                if _is_environment(name) and isinstance(item, Mapping):
                    rest = [content for one, content in item.items() if not OURS.fullmatch(str(one))]
                    yield from (text for text in _texts(rest) if LOOKS_SECRET.search(text))
                yield from secrets_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item)
    elif isinstance(value, str) and "://" in value and LOOKS_SECRET.search(value):
        yield value


def masked_field(name: Any, value: Any) -> Any:
    """`value` as it may be shown under `name`."""
    if _is_environment(name) and isinstance(value, Mapping):
        return {one: HIDDEN if _hides(one, item, True) else item for one, item in value.items()}
    if _is_environment(name) and isinstance(value, (list, tuple)):
        return HIDDEN
    return HIDDEN if _hides(name, value, False) else masked(value)


def _hides(name: Any, value: Any, environment: bool) -> bool:
    """Whether the value of this name is hidden as a whole."""
    if value is None or isinstance(value, bool) or name in NO_SECRETS:
        return False
    if isinstance(value, str) and "://" in value and LOOKS_SECRET.search(value):
        return True
    return is_secret(name) or (environment and not OURS.fullmatch(str(name)))


def _is_environment(name: Any) -> bool:
    return str(name).lower() in ENVIRONMENTS


def _texts(value: Any) -> Iterator[str]:
    """All texts and numbers in a secret that are long enough to be looked for."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif len(str(value).strip()) >= SHORTEST and str(value).strip().lower() not in ("true", "false", "none", "null"):
        yield str(value)
