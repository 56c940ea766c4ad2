# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The fields of a model entry, as one table: what each accepts, and what of it the server shows later.

Every row names a field of an entry of `xinference_models`. Launch fields go to the server as they are; our own fields
steer us and never leave. Validation, the launch payload, the fingerprint and the visible drift all read this table.
A checker takes the value from the inventory and returns the value to send, or raises ValueError saying what it wants.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Optional

MODEL_TYPES = ("LLM", "embedding", "rerank", "image", "audio", "video", "flexible", "world")
# Launched in this order where they share a GPU: small and modest first, the one that takes what is left last.
LAUNCH_ORDER = ("embedding", "rerank", "audio", "flexible", "image", "video", "world", "LLM")

UID_LENGTH = 100
REPLACE, BESIDE = RELAUNCH = ("replace", "beside")
REPLICA_SUFFIX = re.compile(r"-rep\d+$")


def text(value: Any) -> str:
    """A string that is not empty. Numbers are taken as their text, because YAML turns `v1: 12` into one."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError("must be a text that is not empty")
    return str(value).strip()


def whole(minimum: int) -> Callable[[Any], int]:
    """A whole number of at least `minimum`."""

    def check(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"must be a whole number, {minimum} or more")
        return value

    return check


def boolean(value: Any) -> bool:
    """True or false, also in the words YAML and the command line use for them."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "yes", "on"):
        return True
    if word in ("false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def mapping(value: Any) -> Dict[str, Any]:
    """A dictionary whose keys are texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be a dictionary")
    return dict(value)


def options(value: Any) -> Dict[str, Any]:
    """A dictionary that JSON can carry: without the numbers that it has no words for, however deep."""
    found = mapping(value)
    for name, item in found.items():
        try:
            json.dumps(item, allow_nan=False, default=str)
        except (ValueError, RecursionError):
            raise ValueError(f"must be what JSON can carry; {name} is or holds NaN or an infinite number") from None
    return found


def environment(value: Any) -> Dict[str, str]:
    """A dictionary of environment variables: every value becomes the text a process sees."""
    found = mapping(value)
    for name, item in found.items():
        if isinstance(item, (dict, list)) or item is None:
            raise ValueError(f"must map names to texts; {name} has none")
    return {name: str(item) for name, item in found.items()}


def texts(value: Any) -> list:
    """A list of texts."""
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of texts")
    return [text(item) for item in value]


def mappings(value: Any) -> list:
    """A list of dictionaries."""
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of dictionaries")
    return [mapping(item) for item in value]


def sequence(value: Any) -> list:
    """A list of anything; whoever reads it checks what is in it."""
    if not isinstance(value, (list, tuple)):
        raise ValueError("must be a list of dictionaries")
    return list(value)


def relaunch(value: Any) -> str:
    """How a changed model takes the place of the one that runs."""
    if value not in RELAUNCH:
        raise ValueError(f"must be one of {', '.join(RELAUNCH)}{suggestion(value, RELAUNCH)}")
    return str(value)


def model_type(value: Any) -> str:
    """One of Xinference's model types, in its own spelling whatever the case."""
    for known in MODEL_TYPES:
        if isinstance(value, str) and value.strip().lower() == known.lower():
            return known
    raise ValueError(f"must be one of {', '.join(MODEL_TYPES)}{suggestion(value, MODEL_TYPES)}")


def model_uid(value: Any) -> str:
    """A uid the server can launch, address in a URL and terminate again."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("must be a text")
    uid = str(value)
    if not uid.strip():
        raise ValueError("is empty")
    if len(uid) > UID_LENGTH:
        raise ValueError(f"has {len(uid)} characters; Xinference takes at most {UID_LENGTH}")
    if "/" in uid:
        raise ValueError('contains "/"; Xinference launches such a model, and can then never terminate it')
    if uid in (".", ".."):
        raise ValueError("is a step in a path, not a name; Xinference launches it, and can then never terminate it")
    if uid != uid.strip() or not uid.isprintable():
        raise ValueError("begins or ends with a blank or contains an unprintable character")
    if REPLICA_SUFFIX.search(uid):
        raise ValueError('ends in "-rep" and a number, the suffix Xinference gives to replicas')
    return uid


def size(value: Any) -> Any:
    """The size in billions: a whole number, or a fraction in Xinference's spelling (0.5 becomes "0_5")."""
    written = str(value).strip().replace(".", "_")
    if isinstance(value, bool) or not re.fullmatch(r"\d+(_\d+)?", written):
        raise ValueError('must be a number of billions, such as 7, 0.5 or "0_5"')
    billions, _separator, fraction = written.partition("_")
    return written if fraction.strip("0") else int(billions)


def gpu_count(value: Any) -> Any:
    """How many GPUs a replica takes: a whole number, "auto", or none at all (CPU only)."""
    if value is None or str(value).strip().lower() == "none":
        return None
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return whole(1)(value)
    except ValueError:
        raise ValueError('must be "auto", a whole number, 1 or more, or none for CPU only') from None


def gpu_list(value: Any) -> list:
    """Host GPUs, each as its index or its UUID; one alone may stand without a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, (int, str)) or item == "" for item in items):
        raise ValueError("must be a list of GPU indexes or UUIDs, as `nvidia-smi -L` prints them")
    return [str(item).strip() for item in items]


def probe(value: Any) -> Any:
    """What to ask the model when it is verified: a dictionary (see `server.probe`), or false for nothing."""
    if value is False or (isinstance(value, str) and value.lower() == "false"):
        return False
    wish = {} if value is True else mapping(value)
    _known("", wish, PROBE)
    expect = wish.get("expect")
    if expect is not None:
        if not isinstance(expect, dict):
            raise ValueError("wants a dictionary in `expect`")
        _known("expect.", expect, EXPECT)
    return wish


def _known(prefix: str, given: Dict[str, Any], table: Dict[str, Callable[[Any], Any]]) -> None:
    """Check each value of `given` by its row; null stands for nothing everywhere."""
    for name, value in given.items():
        if name not in table:
            raise ValueError(f"has an unknown field {prefix}{name}{suggestion(name, table)}")
        try:
            if value is not None:
                table[name](value)
        except ValueError as error:
            raise ValueError(f"has a field {prefix}{name} that {error}") from None


def number(minimum: float) -> Callable[[Any], float]:
    """A number of at least `minimum`."""

    def check(value: Any) -> float:
        try:
            found = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = float("nan")
        if not minimum <= found < float("inf"):
            raise ValueError(f"must be a number, {minimum:g} or more")
        return found

    return check


def question(value: Any) -> Any:
    """What a probe sends: a text, a list that is not empty, or the query and documents of a rerank."""
    search = (
        isinstance(value, dict) and isinstance(value.get("query"), str) and isinstance(value.get("documents"), list)
    )
    if not search and not (isinstance(value, (str, list)) and value):
        raise ValueError("must be a text, a list, or a dictionary with `query` and `documents`")
    return value


def probe_kind(value: Any) -> str:
    """One of the questions that can be put."""
    if value not in PROBE_KINDS:
        raise ValueError(f"must be one of {', '.join(PROBE_KINDS)}{suggestion(value, PROBE_KINDS)}")
    return str(value)


PROBE_KINDS = ("embedding", "rerank", "chat", "generate", "transcription", "speech")
PROBE: Dict[str, Callable[[Any], Any]] = {
    "kind": probe_kind,
    "input": question,
    "expect": lambda value: value,
    "sample": text,
    "request": mapping,
    "timeout": number(0.001),
}
EXPECT: Dict[str, Callable[[Any], Any]] = {
    "dimensions": whole(1),
    "norm": number(0),
    "related": boolean,
    "best": whole(0),
    "words": boolean,
    "contains": text,
    "seconds": number(0),
}


@dataclass(frozen=True)
class Field:
    """One row of the table.

    `check` validates and normalises. `sent` is false for our own fields. `null` allows an explicit none to be sent.
    `shown` is the key of the same fact in GET /v1/models, None where the server never shows it.
    """

    check: Callable[[Any], Any]
    sent: bool = True
    null: bool = False
    shown: Optional[str] = None


FIELDS: Dict[str, Field] = {
    "model_uid": Field(model_uid),
    "model_name": Field(text, shown="model_name"),
    "model_type": Field(model_type, shown="model_type"),
    "model_engine": Field(text, shown="model_engine"),
    "model_format": Field(text, shown="model_format"),
    "model_size_in_billions": Field(size, shown="model_size_in_billions"),
    "quantization": Field(text, shown="quantization"),
    "model_path": Field(text),
    "replica": Field(whole(1), shown="replica"),
    "replica_config": Field(mappings),
    "n_gpu": Field(gpu_count, null=True),
    "n_worker": Field(whole(1)),
    "worker_ip": Field(text),
    "request_limits": Field(whole(0)),
    "peft_model_config": Field(options),
    "envs": Field(environment),
    "enable_virtual_env": Field(boolean),
    "virtual_env_packages": Field(texts),
    "virtual_env_find_links": Field(texts),
    "download_hub": Field(text),
    "enable_thinking": Field(boolean),
    # Ours.
    "options": Field(options, sent=False),
    "source": Field(mapping, sent=False),
    "gpus": Field(gpu_list, sent=False),
    "enabled": Field(boolean, sent=False),
    "allow_code": Field(boolean, sent=False),
    "probe": Field(probe, sent=False),
    "fallbacks": Field(sequence, sent=False),
    "relaunch": Field(relaunch, sent=False),
}

SOURCE_FIELDS = ("path", "modelscope", "name", "revision", "license", "origin", "allow_patterns", "ignore_patterns")

# Written by people who know Xinference's API, and answered with what this collection wants instead.
NOT_HERE = {
    "gpu_idx": "give the host's GPUs in `gpus`; the indexes the server sees are computed from `xinference_gpus`",
}


def nearest(word: Any, known: Iterable[str], count: int = 3) -> list:
    """The up to `count` members of `known` that look most like `word`, best first; case does not matter."""
    folded: Dict[str, str] = {}
    for name in known:
        folded.setdefault(str(name).lower(), str(name))
    found = difflib.get_close_matches(str(word).lower(), list(folded), n=count, cutoff=0.6)
    return [folded[name] for name in found]


def suggestion(word: Any, known: Iterable[str]) -> str:
    """`; did you mean x?` for the nearest of `known`, or nothing when none is near."""
    found = nearest(word, known, 1)
    return f"; did you mean {found[0]}?" if found else ""
