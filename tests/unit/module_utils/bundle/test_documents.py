# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""JSON from outside: what is no document, what would take for ever, what two readers could read in two ways."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.documents import (
    DocumentError,
    open_regular,
    parse,
    read_small,
    shown,
)


def test_what_json_is() -> None:
    assert parse(b'{"a": [1, 2.5, "x", null, true, {"b": {}}], "\xc3\xa9": 18446744073709551615}') == {
        "a": [1, 2.5, "x", None, True, {"b": {}}],
        "é": 2**64 - 1,
    }


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe{", "utf-8"),
        (b'{"a": 1} and more', "Extra data"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"digest": 1, "size": 2, "digest": 3}', "'digest' occurs twice"),
        (b'[{"deep": {"a": 1, "a": 1}}]', "'a' occurs twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b'{"size": ' + b"9" * 2_000_000 + b"}", "a number of 2000000 digits"),
    ],
)
def test_what_is_refused_quickly(raw: bytes, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(DocumentError, match="not JSON") as caught:
        parse(raw)
    assert words in str(caught.value) and len(str(caught.value)) < 200
    assert time.monotonic() - began < 30


def test_a_small_regular_file_is_read_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_small(tmp_path / "file") == b"content" == read_small(tmp_path / "file", 7)
    with pytest.raises(DocumentError, match="7 bytes is more than a manifest can have"):
        read_small(tmp_path / "file", 6)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(str(tmp_path / "pipe"))
    (tmp_path / "directory").mkdir()
    for name in ("link", "pipe", "directory"):
        with pytest.raises(DocumentError, match="not a regular file"):
            read_small(tmp_path / name)
    with pytest.raises(DocumentError, match="not a regular file"):
        read_small("/dev/zero")
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "none")


def test_what_is_exchanged_between_look_and_open_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"content")
    honest = os.lstat(str(tmp_path / "file"))
    (tmp_path / "file").unlink()
    os.mkfifo(str(tmp_path / "file"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "lstat", lambda _path: honest)
    with pytest.raises(DocumentError, match="not a regular file"):
        open_regular(tmp_path / "file")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_value_is_shown_in_one_short_line_that_a_terminal_cannot_obey() -> None:
    deep: object = "x"
    for _level in range(500):
        deep = [deep]
    for value in ("y" * 10**6, "\x1b[2J\n", deep, {"a": {"b": {"c": [1] * 1000}}}, 10**40, [None] * 10**6):
        text = shown(value)
        assert len(text) < 200 and text.isprintable()
