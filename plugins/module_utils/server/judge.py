# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the answer to a probe is what a working model gives. Pure: an answer in, words out, or `Unexpected`.

Every check takes (question, answer, expectations, the model as the server shows it) and returns what it found.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Mapping, Sequence

from .sound import listen

Expect = Mapping[str, Any]
Shown = Mapping[str, Any]
NORM_TOLERANCE = 0.01
SHOWN_TEXT = 60


class Unexpected(Exception):
    """The model answered, and not as it should; the text says what was wanted and what came."""


def embedding(question: Sequence[str], answer: Any, expect: Expect, shown: Shown) -> str:
    """One vector a text, of the right dimension and length, and akin texts closer than others."""
    vectors = _vectors(answer, len(question))
    sizes = sorted({len(vector) for vector in vectors})
    wanted = expect.get("dimensions", shown.get("dimensions"))
    if len(sizes) != 1 or (wanted is not None and sizes[0] != int(wanted)):
        raise Unexpected(
            f"The vectors have {' and '.join(map(str, sizes))} dimensions, and the model is registered with {wanted}. "
            "Is it another model than its name says? If it is meant so, set probe.expect.dimensions."
        )
    norms = [math.sqrt(sum(x * x for x in vector)) for vector in vectors]
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise Unexpected(f"The vectors have the lengths {_list(norms)}: they are empty or not numbers.")
    norm = expect.get("norm")
    if norm is not None and any(abs(found - float(norm)) > NORM_TOLERANCE for found in norms):
        raise Unexpected(f"The vectors have the lengths {_list(norms)} instead of {float(norm):g}.")
    found = f"{sizes[0]} dimensions, length {norms[0]:.3f}"
    if len(vectors) < 3 or not expect.get("related", True):
        return found
    near, far = _cosine(vectors[0], vectors[1]), _cosine(vectors[0], vectors[2])
    if not near > far:
        raise Unexpected(
            f"{question[0]!r} is no closer to {question[1]!r} ({near:.3f}) than to {question[2]!r} ({far:.3f})."
        )
    return f"{found}, related {near:.2f}, unrelated {far:.2f}"


def rerank(question: Mapping[str, Any], answer: Any, expect: Expect, shown: Shown) -> str:
    """A score for every document, and the right one first."""
    results = answer.get("results") if isinstance(answer, dict) else None
    count = len(question["documents"])
    try:
        scores = {int(one["index"]): float(one["relevance_score"]) for one in results or []}
    except (TypeError, KeyError, ValueError):
        scores = {}
    if sorted(scores) != list(range(count)) or not all(math.isfinite(score) for score in scores.values()):
        raise Unexpected(f"{count} scores were wanted, and this came: {_short(answer)}")
    best = max(scores, key=lambda index: scores[index])
    said = f"scores {_list([scores[index] for index in range(count)])}"
    wanted = expect.get("best", 0)
    if wanted is not None and best != int(wanted):
        raise Unexpected(f"Document {best} came first instead of document {wanted} ({said}).")
    return said


def chat(question: Any, answer: Any, expect: Expect, shown: Shown) -> str:
    """Words, or for a model that thinks first at least thoughts."""
    message = _choice(answer).get("message") or {}
    text = str(message.get("content") or "") or str(message.get("reasoning_content") or "")
    return _words(text, answer, expect)


def generate(question: Any, answer: Any, expect: Expect, shown: Shown) -> str:
    """Words."""
    return _words(str(_choice(answer).get("text") or ""), answer, expect)


def transcription(question: Any, answer: Any, expect: Expect, shown: Shown) -> str:
    """A text, which may be empty: a tone is no speech."""
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        raise Unexpected(f"An answer with a text was wanted, and this came: {_short(answer)}")
    return _contains(answer["text"], expect) or "no words, as a tone has none"


def speech(question: Any, answer: bytes, expect: Expect, shown: Shown) -> str:
    """A file that can be played."""
    try:
        kind, seconds = listen(answer)
    except ValueError as error:
        raise Unexpected(f"A sound file was wanted, and this came: {error}.") from error
    least = expect.get("seconds")
    if least is not None and seconds is not None and seconds < float(least):
        raise Unexpected(f"The sound lasts {seconds:.2f} s, and at least {float(least):g} s were wanted.")
    return f"{kind}, {seconds:.2f} s" if seconds is not None else f"{kind}, {len(answer) / 1024:.0f} KiB"


CHECKS: Dict[str, Callable[[Any, Any, Expect, Shown], str]] = {
    "embedding": embedding,
    "rerank": rerank,
    "chat": chat,
    "generate": generate,
    "transcription": transcription,
    "speech": speech,
}


def _vectors(answer: Any, count: int) -> List[List[float]]:
    try:
        data = sorted(answer["data"], key=lambda one: one["index"])
        vectors = [[float(x) for x in one["embedding"]] for one in data]
    except (TypeError, KeyError, ValueError):
        vectors = []
    if len(vectors) != count:
        raise Unexpected(f"{count} vectors were wanted, and this came: {_short(answer)}")
    return vectors


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = sum(x * y for x, y in zip(a, b))
    return product / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b)))


def _choice(answer: Any) -> Mapping[str, Any]:
    try:
        return dict(answer["choices"][0])
    except (TypeError, KeyError, IndexError, ValueError):
        raise Unexpected(f"An answer with choices was wanted, and this came: {_short(answer)}") from None


def _words(text: str, answer: Any, expect: Expect) -> str:
    if not text.strip() and expect.get("words", True):
        raise Unexpected(f"Words were wanted, and none came: {_short(answer)}")
    return _contains(text, expect)


def _contains(text: str, expect: Expect) -> str:
    wanted = expect.get("contains")
    if wanted is not None and str(wanted).lower() not in text.lower():
        raise Unexpected(f"{wanted!r} was wanted in the answer, and it is {_short(text)!r}.")
    return _short(" ".join(text.split()))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.3f}" for number in numbers)
