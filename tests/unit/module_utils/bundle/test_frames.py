# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wire protocol: the same commands come out however the stream was cut, and nothing else is let through."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import frames
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.frames import (
    Alive,
    Answers,
    Blob,
    Command,
    Commands,
    End,
    Fetch,
    FrameError,
    Open,
    command_line,
)

DIGEST = hash_bytes(b"x")
OPENING = Open("/srv/x", "ctl", "ops", 7, 2.5, None, "pem")
SAID: List[Tuple[Command, bytes]] = [
    (OPENING, b""),
    (Blob(DIGEST, 12, 0), b'{"end":true}'),
    (Alive(), b""),
    (Blob(DIGEST, 5, 5), b""),
    (Blob(DIGEST, 9, 2), b"\n\n\n{}\n\n"),
    (Fetch(DIGEST, 9, 0, (("10.0.0.7", 4711), ("fe80::1", 1))), b""),
    (End(), b""),
]
STREAM = b"".join(command_line(command) + payload for command, payload in SAID)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, len(STREAM)])
def test_what_was_said_comes_out_however_it_was_cut(step):
    commands = Commands()
    heard: List[Command] = []
    payloads: List[bytes] = []
    for start in range(0, len(STREAM), step):
        piece = STREAM[start : start + step]
        buffer = bytearray(piece + b"rubbish behind the end")
        for event in commands.feed(buffer, len(piece)):
            if isinstance(event, memoryview):
                payloads[-1] += bytes(event)
            else:
                heard.append(event)
                payloads.append(b"")
        assert commands.inside or start + step >= len(STREAM) or STREAM[start + step - 1 : start + step] in b"\n}"
    assert list(zip(heard, payloads)) == SAID and not commands.inside


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no json",
        b"[1]",
        b"{}",
        b'{"end": false}',
        b'{"blob": "sha256:../../etc/passwd", "size": 1, "offset": 0}',
        json.dumps({"blob": DIGEST, "size": -1, "offset": 0}).encode(),
        json.dumps({"blob": DIGEST, "size": True, "offset": 0}).encode(),
        json.dumps({"blob": DIGEST, "size": 5, "offset": 6}).encode(),
        json.dumps({"blob": DIGEST, "size": 2**63, "offset": 0}).encode(),
        json.dumps({"fetch": DIGEST, "size": 5}).encode(),
        json.dumps({"fetch": DIGEST, "size": 5, "from": [["a", 70000]]}).encode(),
        json.dumps({"fetch": DIGEST, "size": 5, "from": []}).encode(),
        json.dumps({"open": {"root": "/x"}}).encode(),
        json.dumps({"open": {**OPENING._asdict(), "pid": "7"}}).encode(),
        json.dumps({"open": {**OPENING._asdict(), "wait": float("nan")}}).encode(),
        json.dumps({"open": {**OPENING._asdict(), "more": 1}}).encode(),
        b'{"a":' * 5000,
    ],
)
def test_what_is_no_command_is_refused(text):
    with pytest.raises(FrameError):
        list(Commands().feed(text + b"\n", len(text) + 1))


def test_a_line_without_an_end_is_refused():
    commands, buffer = Commands(), b"x" * 65536
    with pytest.raises(FrameError, match="a line of more"):
        for _piece in range(20):
            list(commands.feed(buffer, len(buffer)))


def test_answers_come_out_whole_and_what_a_shell_said_before_is_noise():
    said: List[Dict[str, Any]] = [
        {"ready": {"free_bytes": 5, "token": "t"}},
        {"got": {DIGEST: 3}, "hashing": None},
        {"verified": DIGEST, "size": 3, "source": "controller"},
        {"refused": DIGEST, "offset": 0, "why": "so"},
        {"damaged": DIGEST, "why": "so"},
        {"failed": "so", "kind": "full"},
        {"busy": {"user": "ops"}},
        {"done": {"adopted": 1, "hashed_bytes": 2, "from_peers_bytes": 0}},
    ]
    stream = b"Welcome!\n" + b"".join(map(frames.line, said))
    answers = Answers()
    heard = [answer for byte in stream for answer in answers.feed(bytes([byte]))]
    assert [frame for _kind, frame in heard] == said and [kind for kind, _frame in heard] == [*map(_kind_of, said)]
    assert answers.noise == b"Welcome!\n"
    with pytest.raises(FrameError):
        answers.feed(b"Segmentation fault\n")


def _kind_of(frame):
    return next(kind for kind in frame if kind != "hashing")


@pytest.mark.parametrize(
    "frame",
    [
        {"ready": {}},
        {"got": {DIGEST: "3"}},
        {"got": [1]},
        {"verified": "x", "size": 1},
        {"verified": DIGEST},
        {"refused": DIGEST, "offset": -1, "why": ""},
        {"failed": 1},
        {"done": {"adopted": 1}},
    ],
)
def test_an_answer_of_the_wrong_shape_is_refused(frame):
    with pytest.raises(FrameError):
        frames.parse_answer(frames.line(frame))
