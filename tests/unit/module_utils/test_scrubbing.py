# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""No secret is left in a text, in whatever form it stands there; and what is none stays readable."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote, quote_plus

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.masking import HIDDEN
from ansible_collections.airgap.xinference.plugins.module_utils.scrubbing import Scrubber, forms

SECRET = 'p&ss "w$rd"/+%ü\'x'
PLAIN = "hunter2hunter2"


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        json.dumps({"value": SECRET}),
        json.dumps({"value": SECRET}, ensure_ascii=False),
        repr({"value": SECRET}),
        quote(SECRET, safe=""),
        quote(SECRET),
        quote_plus(SECRET),
        quote(SECRET, safe="").lower(),
        SECRET.replace("$", "$$"),
        SECRET.encode().hex(),
        b64(SECRET),
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
        b64(f"admin:{SECRET}"),
        b64(f"ab:{SECRET}"),
        b64(f"a:{SECRET}:tail"),
        b64(f"abc:{SECRET}!"),
    ],
)
def test_a_known_secret_goes_in_every_form(text: str) -> None:
    scrubber = Scrubber([SECRET])
    cleaned = scrubber.clean(f"before [{text}] after")
    assert scrubber.left_in(text) and not scrubber.left_in(cleaned)
    assert HIDDEN in cleaned and cleaned.startswith("before [") and cleaned.endswith("] after")
    # Nothing that decodes to it is left either.
    assert SECRET not in cleaned and quote(SECRET, safe="") not in cleaned


@pytest.mark.parametrize("length", range(6, 16))
@pytest.mark.parametrize("before", ["", "u:", "us:", "user:"])
@pytest.mark.parametrize("after", ["", "x", "yz"])
def test_base64_is_found_wherever_it_begins(length: int, before: str, after: str) -> None:
    secret = "Zq7-Xw9_Kd2+Lm4/"[:length]
    encoded = b64(f"{before}{secret}{after}")
    cleaned = Scrubber([secret]).known_out(encoded)
    assert HIDDEN in cleaned
    rest = cleaned.replace(HIDDEN, "")
    assert len(rest) <= len(encoded) - length


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("Authorization: Bearer abcDEF123.456-789", "abcDEF123"),
        ("authorization=bearer  abcDEF123456", "abcDEF123456"),
        ("'Authorization': 'Basic dXNlcjpwYXNz'", "dXNlcjpwYXNz"),
        ("GET /v1/models?api_key=a1b2c3&x=1", "a1b2c3"),
        ("key sk-72tkvudyGLPMi was used", "72tkvudyGLPMi"),
        ("  Setup token: Vw3kPq-8_zz91kLmN0p", "Vw3kPq-8_zz91kLmN0p"),
        ("Initial administrator setup reopened. Setup token: Vw3kPq-8_zz9", "Vw3kPq-8_zz9"),
        ('{"setup_token": "Vw3kPq-8_zz91kLm"}', "Vw3kPq-8_zz91kLm"),
        ("cloning https://bob:geheim@host/repo", "geheim"),
        ("hf_abcdefghijklmnopqrst", "hf_abcdefghijklmnopqrst"),
        ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln", "eyJhbGciOi"),
        ("password: 'geheim wort'", "geheim"),
        ('"password":"ge\\"heim"', "heim"),
        ("{'api_key': 'k-1234abcd', 'n': 1}", "k-1234abcd"),
        ("DB_PASSWORD=geheim123", "geheim123"),
        ("HF_TOKEN=abcd1234 vllm serve", "abcd1234"),
        ("hash $2b$12$abcdefghijklmnopqrstuvwxyz012345", "abcdefghijklmnopqrstuv"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\nabc=\n-----END RSA PRIVATE KEY-----\n", "MIIEpAIB"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n", "b3BlbnNz"),
        ("b3BlbnNzaC1rZXktdjEAAAAA\nAAAAB3NzaC1yc2EAAAADAQAB\n-----END OPENSSH PRIVATE KEY-----\n", "AAAAB3Nza"),
    ],
)
def test_what_looks_like_a_secret_goes(text: str, gone: str) -> None:
    cleaned = Scrubber([]).clean(text)
    assert gone in text and gone not in cleaned and HIDDEN in cleaned


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 512, eos_token: </s>, tokenizer: BertTokenizer",
        "2026-11-20T10:08:11.757Z ERROR xinference.core.worker pid:7262 node:vm Failed to load model bge-m3-0",
        'INFO:     127.0.0.1:5000 - "POST /v1/rerank HTTP/1.1" 200 OK',
        "Uvicorn running on http://127.0.0.1:9997 (Press CTRL+C to quit)",
        "models/bge-m3/5d41402abc4b/config.json sha256:" + "0" * 64,
        "password: true",
        "the keeper: running",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert Scrubber([PLAIN]).clean(text) == text


def test_long_secrets_go_before_those_that_they_contain() -> None:
    cleaned = Scrubber(["secret", "secret-and-more"]).clean("it is secret-and-more, and secret")
    assert "more" not in cleaned and cleaned.count(HIDDEN) == 2


@pytest.mark.parametrize("secret", ["hidden", "(hidden)", "idde", "a(hidden)b", "dden)"])
def test_a_secret_that_is_part_of_what_stands_for_one_is_no_leak(secret: str) -> None:
    scrubber = Scrubber([secret, "another-1"])
    cleaned = scrubber.clean(f"it is {secret}, and another-1, and password=what")
    assert cleaned == "it is (hidden), and (hidden), and password=(hidden)"
    assert not scrubber.left_in(cleaned) and scrubber.left_in(f"it is {secret}!") is (secret != "(hidden)")


def test_names_and_numbers_of_data_stay_and_texts_are_cleaned() -> None:
    told = Scrubber([PLAIN]).clean_data({"a": [1, None, True, f"x {PLAIN}"], PLAIN: {"b": 2.5}})
    assert told == {"a": [1, None, True, f"x {HIDDEN}"], HIDDEN: {"b": 2.5}}


def test_a_number_that_is_a_secret_goes() -> None:
    scrubber = Scrubber(["9997"])
    told = scrubber.clean_data({"port": 9997, "uptime": 1.5, "on": True, "odd": 0.9997})
    assert told == {"port": HIDDEN, "uptime": 1.5, "on": True, "odd": HIDDEN}


def test_short_texts_are_no_secrets() -> None:
    assert Scrubber(["on", "1", ""]).clean("1 is on") == "1 is on"
    assert all(len(form) >= 4 for form in forms("abcd"))
