# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Secrets are hidden wherever they stand, and what is none stays readable."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.masking import HIDDEN, masked, secrets_in


@pytest.mark.parametrize(
    "name",
    ["hf_token", "HF_TOKEN", "apiKey", "api_key", "s3_pwd", "Password", "auth", "authorization", "private", "secret"],
)
@pytest.mark.parametrize("value", ["s3cret", 1234567, ["s3cret"], {"any": {"thing": ["s3cret"]}}])
def test_all_below_the_name_of_a_secret_is_hidden(name, value):
    deep = {"options": [{"more": {name: value}}]}
    assert masked(deep) == {"options": [{"more": {name: HIDDEN}}]}
    assert set(secrets_in(deep)) == {"1234567" if value == 1234567 else "s3cret"}


def test_a_variable_is_hidden_unless_it_is_ours():
    ours = {
        "XINFERENCE_HOME": "/x",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "XINFERENCE_AUTH_ADVANCED": "1",
    }
    theirs = {"DSN": "s3cret", "OMP_NUM_THREADS": "4", "XINFERENCE_TOKEN": "s3cret"}
    for name in ("envs", "environment"):
        assert masked({name: {**ours, **theirs}}) == {name: {**ours, **dict.fromkeys(theirs, HIDDEN)}}
    assert list(secrets_in({"environment": ours})) == []


def test_words_and_numbers_stay():
    entry = {
        "max_tokens": 512,
        "max_num_batched_tokens": 8192,
        "tokenizer": "/m",
        "stop_token_ids": [151643, 151645],
        "author": "somebody",
        "use_auth": True,
        "model_path": "/opt/xinference/models/a",
        "api_key": None,
    }
    assert masked(entry) == entry and list(secrets_in(entry)) == []
    # To blot out a word of three letters, or a path, would make a result unreadable.
    assert list(secrets_in({"api_key": "abc", "envs": {"A": "/opt/xinference", "B": "4", "C": "127.0.0.1"}})) == []


def test_secrets_by_their_looks():
    url, opaque = "postgres://user:s3cret@db/x", "sk1234567890abcdefghij"
    assert masked({"options": {"store": url, "ok": "http://h/x"}}) == {"options": {"store": HIDDEN, "ok": "http://h/x"}}
    assert set(secrets_in({"envs": {"DSN": url, "X": opaque}, "options": {"a": url}})) == {url, opaque}
