# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One real request to a model, as a client would send it, and a judgement of the answer.

What is sent and expected by default suits a real model. An entry of `xinference_models` overrides it in `probe`:

kind: embedding, rerank, chat, generate, transcription or speech, where the type of the model does not tell.
input: embedding: a text, something akin to it, something else. rerank: {query, documents}. chat, generate, speech: a
    text. transcription: path of a sound file on the host; a tone by default.
expect: embedding: dimensions, norm, related (true). rerank: best (index of the document that must win, 0). chat,
    generate: words (true), contains (a text). transcription: contains. speech: seconds (at least). Null switches an
    expectation off.
sample: speech only: path of a WAV with the voice to be cloned.
request: further fields of the request, e.g. {voice: ...} or {max_tokens: 64}.
timeout: seconds for the answer.

`probe: false` skips the model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from .client import Client, ServerError
from .diagnose import Diagnosis, diagnose
from .judge import CHECKS, Unexpected
from .sound import tone

KINDS = tuple(CHECKS)
OPTIONS = ("kind", "input", "expect", "sample", "request", "timeout")
TIMEOUT = 120.0
TEXTS = ["The cat sleeps on the warm sofa.", "A kitten naps on the couch.", "The central bank raised interest rates."]
SEARCH = {
    "query": "How long may a cat sleep in a day?",
    "documents": ["Cats sleep twelve to sixteen hours a day.", "The central bank raised interest rates."],
}
QUESTION = "What is the capital of France? Answer with one word."
BEGINNING = "The capital of France is"
# What comes of an answer or an entry of another shape than it should have; one model's, never all models' failure.
MISSHAPEN = (TypeError, ValueError, AttributeError, LookupError)
SENTENCE = "The models of this site are ready."


@dataclass(frozen=True)
class ProbeResult:
    """`state` is `passed`, `failed` or `skipped`; `detail` says what came back, or why nothing was asked.

    `latency_s` is how long the request took in seconds, None when there was none.
    """

    state: str
    kind: str = ""
    latency_s: Optional[float] = None
    detail: str = ""
    error: str = ""
    diagnosis: Optional[Diagnosis] = None

    @property
    def ok(self) -> bool:
        """False only for a model that was asked and did not do."""
        return self.state != "failed"


def probe(client: Client, entry: Mapping[str, Any], shown: Optional[Mapping[str, Any]] = None) -> ProbeResult:
    """Ask the model of `entry` (an entry of `xinference_models`) one question.

    `shown` is what the server says of the model (`Client.models`); it is asked for when not given. Never raises for
    what the model or the server does wrong; that is the result.
    """
    wish = entry.get("probe")
    if wish is False:
        return ProbeResult("skipped", detail="switched off by probe: false")
    options = dict(wish) if isinstance(wish, Mapping) else {}
    kind, uid = str(options.get("kind") or ""), str(entry["model_uid"])
    try:
        if shown is None:
            shown = client.models().get(uid)
        if shown is None:
            return ProbeResult("failed", kind, error=f"The server does not list a model {uid}.")
        kind = kind or kind_of(shown, str(entry.get("model_type") or ""))
        if kind not in CHECKS:
            return ProbeResult("skipped", kind, detail=f"there is no probe for {kind or 'a model of no type'}")
        send = SENDERS[kind]
        started = time.monotonic()
        question, answer = send(client, uid, options)
        latency = round(time.monotonic() - started, 3)
    except ServerError as error:
        return ProbeResult("failed", kind, error=error.message, diagnosis=diagnose(error.detail or error.message))
    except (OSError, *MISSHAPEN) as error:
        return ProbeResult("failed", kind, error=f"The probe cannot be put: {_words(error)}")
    try:
        detail = CHECKS[kind](question, answer, dict(options.get("expect") or {}), shown)
    except Unexpected as problem:
        return ProbeResult("failed", kind, latency, error=str(problem))
    except MISSHAPEN as error:
        return ProbeResult("failed", kind, latency, error=f"The answer cannot be judged: {_words(error)}")
    return ProbeResult("passed", kind, latency, detail)


def kind_of(shown: Mapping[str, Any], model_type: str = "") -> str:
    """The kind of probe for a model as the server shows it; the model's type where there is none."""
    model_type = str(shown.get("model_type") or model_type)
    abilities = [str(one) for one in shown.get("model_ability") or []]
    if model_type == "LLM":
        return "generate" if "generate" in abilities and "chat" not in abilities else "chat"
    if model_type == "audio":
        if any(one.startswith("text2audio") for one in abilities):
            return "speech"
        return "transcription" if not abilities or "audio2text" in abilities else f"audio ({', '.join(abilities)})"
    return model_type


Sent = Tuple[Any, Any]


def _words(error: Exception) -> str:
    """An error as text; that of a missing key or a wrong type says little without its name."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _extra(options: Mapping[str, Any]) -> Dict[str, Any]:
    return dict(options.get("request") or {})


def _limit(options: Mapping[str, Any]) -> float:
    return float(options.get("timeout") or TIMEOUT)


def _embedding(client: Client, uid: str, options: Mapping[str, Any]) -> Sent:
    texts = options.get("input") or TEXTS
    texts = [texts] if isinstance(texts, str) else list(texts)
    body = {"model": uid, "input": texts, **_extra(options)}
    return texts, client.post("/v1/embeddings", json=body, timeout=_limit(options))


def _rerank(client: Client, uid: str, options: Mapping[str, Any]) -> Sent:
    search = dict(options.get("input") or SEARCH)
    body = {"model": uid, **search, **_extra(options)}
    return search, client.post("/v1/rerank", json=body, timeout=_limit(options))


def _chat(client: Client, uid: str, options: Mapping[str, Any]) -> Sent:
    said = options.get("input") or QUESTION
    messages: List[Any] = [{"role": "user", "content": said}] if isinstance(said, str) else list(said)
    body = {"model": uid, "messages": messages, "max_tokens": 32, "temperature": 0, **_extra(options)}
    return messages, client.post("/v1/chat/completions", json=body, timeout=_limit(options))


def _generate(client: Client, uid: str, options: Mapping[str, Any]) -> Sent:
    start = options.get("input") or BEGINNING
    body = {"model": uid, "prompt": start, "max_tokens": 16, "temperature": 0, **_extra(options)}
    return start, client.post("/v1/completions", json=body, timeout=_limit(options))


def _transcription(client: Client, uid: str, options: Mapping[str, Any]) -> Sent:
    path = options.get("input")
    sound, name = (Path(path).read_bytes(), Path(path).name) if path else (tone(), "tone.wav")
    fields = {"model": uid, **{name: str(value) for name, value in _extra(options).items()}}
    files = {"file": (name, sound, "application/octet-stream")}
    return name, client.post_multipart("/v1/audio/transcriptions", fields, files, timeout=_limit(options))


def _speech(client: Client, uid: str, options: Mapping[str, Any]) -> Sent:
    text = str(options.get("input") or SENTENCE)
    body = {"model": uid, "input": text, "voice": "", "response_format": "wav", **_extra(options)}
    sample = options.get("sample")
    path = "/v1/audio/speech"
    if not sample:
        try:
            return text, client.post_for_bytes(path, json=body, timeout=_limit(options))
        except ServerError as error:
            if "prompt_speech" not in error.detail:
                raise
    # The model only clones voices. Without a sample a tone will do to hear whether it speaks at all.
    voice = Path(sample).read_bytes() if sample else tone(3.0)
    fields = {name: str(value) for name, value in body.items()}
    files = {"prompt_speech": ("voice.wav", voice, "application/octet-stream")}
    return text, client.post_multipart_for_bytes(path, fields, files, timeout=_limit(options))


SENDERS: Dict[str, Callable[[Client, str, Mapping[str, Any]], Sent]] = {
    "embedding": _embedding,
    "rerank": _rerank,
    "chat": _chat,
    "generate": _generate,
    "transcription": _transcription,
    "speech": _speech,
}
