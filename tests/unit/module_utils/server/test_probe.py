# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which question a model gets, and how answers are judged: recorded ones and wrong ones."""

from __future__ import annotations

import copy
import io
import struct
import wave

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import judge
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client
from ansible_collections.airgap.xinference.plugins.module_utils.server.fields import PROBE, PROBE_KINDS
from ansible_collections.airgap.xinference.plugins.module_utils.server.probe import (
    OPTIONS,
    SEARCH,
    TEXTS,
    kind_of,
    probe,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.sound import RATE, listen, tone
from fakes import VERSIONS, recorded, serving


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kind_follows_from_what_the_server_shows(version):
    models = {one["id"]: one for one in recorded(version, "models")["data"]}
    kinds = {uid: kind_of(model) for uid, model in models.items()}
    assert kinds == {"embedding": "embedding", "rerank": "rerank", "chat": "chat", "whisper": "transcription"}


@pytest.mark.parametrize(
    ("shown", "kind"),
    [
        ({"model_type": "LLM", "model_ability": ["generate"]}, "generate"),
        ({"model_type": "LLM"}, "chat"),
        ({"model_type": "audio", "model_ability": ["text2audio", "text2audio_zero_shot"]}, "speech"),
        ({"model_type": "audio", "model_ability": ["speaker_embedding"]}, "audio (speaker_embedding)"),
        ({"model_type": "image", "model_ability": ["text2image"]}, "image"),
        ({}, "rerank"),
    ],
)
def test_kinds(shown, kind):
    assert kind_of(shown, "rerank") == kind


# -- embedding


def vectors(*rows):
    return {"data": [{"index": i, "embedding": list(row)} for i, row in enumerate(rows)]}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_embedding_passes(version):
    answer = recorded(version, "probe_embedding")
    detail = judge.embedding(TEXTS, answer, {}, {"dimensions": 384})
    assert detail.startswith("384 dimensions, length 1.000, related 0.7")
    assert judge.embedding(TEXTS, answer, {"dimensions": 384, "norm": 1}, {"dimensions": 768})


def test_another_model_than_its_name_says():
    with pytest.raises(judge.Unexpected, match=r"have 2 dimensions.*registered with 768.*probe\.expect\.dimensions"):
        judge.embedding(TEXTS, vectors((1, 0), (1, 0.1), (0, 1)), {}, {"dimensions": 768})
    assert judge.embedding(TEXTS, vectors((1, 0), (1, 0.1), (0, 1)), {"dimensions": None}, {"dimensions": 768})


def test_related_texts_must_be_closer():
    answer = vectors((1, 0), (0, 1), (1, 0.1))
    with pytest.raises(judge.Unexpected, match="is no closer to"):
        judge.embedding(TEXTS, answer, {}, {})
    assert judge.embedding(TEXTS, answer, {"related": None}, {}) == "2 dimensions, length 1.000"


def test_norm_when_asked_for():
    answer = vectors((3, 4))
    assert judge.embedding(["a"], answer, {"norm": 5}, {})
    with pytest.raises(judge.Unexpected, match=r"5\.000 instead of 1"):
        judge.embedding(["a"], answer, {"norm": 1}, {})


@pytest.mark.parametrize(
    "answer", [{}, None, [], {"data": []}, {"data": [{"index": 0}]}, {"data": [{"index": 0, "embedding": ["x"]}]}]
)
def test_an_answer_without_vectors(answer):
    with pytest.raises(judge.Unexpected, match="1 vectors were wanted"):
        judge.embedding(["a"], answer, {}, {})


@pytest.mark.parametrize("row", [(0, 0), (float("nan"), 1), (float("inf"), 1)])
def test_empty_vectors(row):
    with pytest.raises(judge.Unexpected, match="empty or not numbers"):
        judge.embedding(["a"], vectors(row), {}, {})


# -- rerank


def scores(*values):
    return {"results": [{"index": i, "relevance_score": x} for i, x in enumerate(values)]}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_rerank_has_the_right_form(version):
    assert judge.rerank(SEARCH, recorded(version, "probe_rerank"), {"best": None}, {}).startswith("scores 0.5")


def test_the_right_document_must_win():
    assert judge.rerank(SEARCH, scores(0.9, 0.1), {}, {}) == "scores 0.900, 0.100"
    with pytest.raises(judge.Unexpected, match=r"Document 1 came first instead of document 0 \(scores 0.100, 0.900\)"):
        judge.rerank(SEARCH, scores(0.1, 0.9), {}, {})
    assert judge.rerank(SEARCH, scores(0.1, 0.9), {"best": 1}, {})


@pytest.mark.parametrize("answer", [None, {}, scores(0.5), scores(0.5, float("nan")), {"results": [{"index": 0}]}])
def test_a_rerank_without_its_scores(answer):
    with pytest.raises(judge.Unexpected, match="2 scores were wanted"):
        judge.rerank(SEARCH, answer, {}, {})


# -- words


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_words(version):
    answer = copy.deepcopy(recorded(version, "probe_chat"))
    assert isinstance(judge.chat([], answer, {"words": None}, {}), str)
    answer["choices"][0]["message"]["content"] = "Paris,\n of course"
    assert judge.chat([], answer, {"contains": "paris"}, {}) == "Paris, of course"
    with pytest.raises(judge.Unexpected, match="'Rome' was wanted"):
        judge.chat([], answer, {"contains": "Rome"}, {})
    answer["choices"][0]["message"]["content"] = " "
    with pytest.raises(judge.Unexpected, match="Words were wanted"):
        judge.chat([], answer, {}, {})


def test_thoughts_are_words_too():
    answer = {"choices": [{"message": {"content": None, "reasoning_content": "Let me think"}}]}
    assert judge.chat([], answer, {}, {}) == "Let me think"


@pytest.mark.parametrize("answer", [None, {}, {"choices": []}, {"choices": ["x"]}])
def test_an_answer_without_choices(answer):
    with pytest.raises(judge.Unexpected, match="with choices was wanted"):
        judge.chat([], answer, {}, {})
    with pytest.raises(judge.Unexpected, match="with choices was wanted"):
        judge.generate("", answer, {}, {})


def test_generated_words():
    assert judge.generate("", {"choices": [{"text": " Paris."}]}, {}, {}) == "Paris."


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_transcription(version):
    assert judge.transcription("", recorded(version, "probe_transcription"), {}, {})
    with pytest.raises(judge.Unexpected, match="with a text was wanted"):
        judge.transcription("", {"words": []}, {}, {})


# -- sound


def test_a_tone_is_a_wav_file():
    kind, seconds = listen(tone(0.5))
    assert (kind, seconds) == ("wav", 0.5)
    with wave.open(io.BytesIO(tone(0.5))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"ID3\x04rest", "mp3"), (b"\xff\xfb\x90", "mp3"), (b"fLaC....", "flac"), (b"OggS....", "ogg")],
)
def test_other_sound_files(data, kind):
    assert listen(data) == (kind, None)


def test_a_float_wav_can_be_played():
    header = b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, RATE, RATE * 4, 4, 32)
    assert listen(header + b"data" + struct.pack("<I", 4) + b"\0\0\0\0") == ("wav", None)


@pytest.mark.parametrize("data", [b"", b'{"detail": "no"}', b"RIFF\0\0\0\0WAVE", tone(0), tone(0.1)[:20]])
def test_what_cannot_be_played(data):
    with pytest.raises(judge.Unexpected, match="A sound file was wanted"):
        judge.speech("", data, {}, {})


def test_sound_that_is_too_short():
    assert judge.speech("", tone(1.0), {"seconds": 0.5}, {}) == "wav, 1.00 s"
    with pytest.raises(judge.Unexpected, match=r"lasts 0\.10 s, and at least 0\.5 s"):
        judge.speech("", tone(0.1), {"seconds": 0.5}, {})


# -- the whole


def test_probe_false_asks_nothing():
    with serving(lambda *_: (500, {})) as fake:
        found = probe(Client(fake.endpoint), {"model_uid": "a", "probe": False})
        assert (found.state, found.ok, fake.seen) == ("skipped", True, [])


def test_a_type_without_a_probe_is_skipped():
    with serving(lambda *_: (500, {})) as fake:
        found = probe(Client(fake.endpoint), {"model_uid": "a"}, {"model_type": "image"})
        assert (found.state, found.detail, fake.seen) == ("skipped", "there is no probe for image", [])


def test_a_model_that_is_not_there():
    with serving(lambda *_: (200, {"data": []})) as fake:
        found = probe(Client(fake.endpoint), {"model_uid": "a"})
        assert (found.state, found.error) == ("failed", "The server does not list a model a.")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_recorded_model_passes(version):
    answers = {"/v1/models": recorded(version, "models"), "/v1/embeddings": recorded(version, "probe_embedding")}
    with serving(lambda method, path, headers: (200, answers[path])) as fake:
        entry = {"model_uid": "embedding", "probe": {"expect": {"dimensions": 384}}}
        found = probe(Client(fake.endpoint), entry)
        assert (found.state, found.kind) == ("passed", "embedding")
        assert found.latency_s is not None and found.latency_s >= 0


def test_a_server_s_error_is_explained():
    with serving(lambda *_: (500, {"detail": "Remote server 127.0.0.1:4 closed"})) as fake:
        found = probe(Client(fake.endpoint), {"model_uid": "a"}, {"model_type": "embedding"})
        assert found.state == "failed" and not found.ok
        assert found.diagnosis is not None and found.diagnosis.name == "process-died"


def test_a_sound_file_that_is_not_there():
    with serving(lambda *_: (500, {})) as fake:
        entry = {"model_uid": "a", "probe": {"kind": "transcription", "input": "/nonexistent.wav"}}
        found = probe(Client(fake.endpoint), entry, {"model_type": "audio"})
        assert found.state == "failed" and "/nonexistent.wav" in found.error and fake.seen == []


def test_a_model_that_only_clones_gets_a_voice():
    answers = [(500, {"detail": "CosyVoice model expect a prompt_speech"}), (200, tone(0.2))]
    with serving(lambda *_: answers.pop(0)) as fake:
        shown = {"model_type": "audio", "model_ability": ["text2audio"]}
        found = probe(Client(fake.endpoint), {"model_uid": "a"}, shown)
        assert (found.state, found.detail) == ("passed", "wav, 0.20 s")
        assert fake.seen == ["POST /v1/audio/speech"] * 2


def test_a_request_can_be_extended():
    with serving(lambda *_: (200, {"choices": [{"text": "x"}]})) as fake:
        entry = {"model_uid": "a", "probe": {"kind": "generate", "input": "y", "request": {"max_tokens": 1}}}
        assert probe(Client(fake.endpoint), entry, {"model_type": "LLM"}).state == "passed"
        assert fake.seen == ["POST /v1/completions"]


@pytest.mark.parametrize("wish", [{"timeout": "long"}, {"input": 5}, {"request": 5}, {"expect": 5}, {"sample": 5}])
@pytest.mark.parametrize("kind", ["embedding", "rerank", "chat", "speech"])
def test_a_misshapen_wish_fails_its_model_only(wish, kind):
    with serving(lambda *_: (200, {"results": [], "data": []})) as fake:
        found = probe(Client(fake.endpoint), {"model_uid": "m", "probe": {"kind": kind, **wish}}, {})
    assert (found.state, bool(found.error)) == ("failed", True)


@pytest.mark.parametrize("message", ["words", ["words"], 5])
def test_a_message_of_another_shape_is_a_failed_probe(message):
    with serving(lambda *_: (200, {"choices": [{"message": message}]})) as fake:
        found = probe(Client(fake.endpoint), {"model_uid": "m", "probe": {"kind": "chat"}}, {})
    assert found.state == "failed" and "cannot be judged: AttributeError" in found.error


def test_the_kinds_that_are_refused_are_the_ones_without_a_check():
    assert set(PROBE_KINDS) == set(judge.CHECKS) and set(PROBE) == set(OPTIONS)
