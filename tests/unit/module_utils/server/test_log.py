# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lines of real logs that show why a launch failed, and nothing of what must not be shown."""

from __future__ import annotations

import calendar
import os
import time

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.converge import converge
from ansible_collections.airgap.xinference.plugins.module_utils.server.log import TAIL, files, reasons, tail
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record
from scripted import no_pauses, scripted, spec

NEW = """\
2026-11-20T10:08:10.100Z INFO xinference.core.worker pid:7262 role:local address:127.0.0.1:10438 node:vm [request 1] \
Enter launch_builtin_model, args: <x>, kwargs: model_uid=eng-rep0,envs={'HF_TOKEN': 's3cret'} request_id="1"
2026-11-20T10:08:11.756Z ERROR xinference.core.worker pid:7262 role:local address:127.0.0.1:10438 node:vm Failed to \
load model eng-rep0
Traceback (most recent call last):
  File "/x/worker.py", line 5296, in launch_builtin_model
    await model_ref.load()
    ^^^^^^^^^^^^^^^^^^^^^^
OSError: [address=127.0.0.1:4, pid=12] Error no file named model.safetensors found in directory /models/x.

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
ValueError: [address=127.0.0.1:4, pid=12] it cannot be loaded
2026-11-20T10:08:11.757Z ERROR xinference.core.worker pid:7262 role:local address:127.0.0.1:10438 node:vm \
[request 4af5f46e-e4ca-11f1-bcbe-02fc00000001] Leave launch_builtin_model, error: it cannot be loaded, elapsed time: \
0 s request_id="4af5f46e" correlation_id=""
Traceback (most recent call last):
ValueError: it cannot be loaded
2026-11-20T10:08:11.760Z ERROR xinference.core.supervisor pid:7262 role:local address:127.0.0.1:10438 node:vm Failed \
to launch replica eng-rep0: it cannot be loaded
2026-11-20T10:08:12.000Z ERROR xinference.core.supervisor pid:7262 role:local address:127.0.0.1:10438 node:vm Failed \
to launch replica other-rep0: it is somebody else's
"""
OLD = """\
2026-11-20 10:08:48,053 xinference.core.worker 12985 ERROR    Failed to load model eng-0
Traceback (most recent call last):
  File "/x/worker.py", line 5
ValueError: Model qwen2.5-instruct cannot be run on engine vLLM.
2026-11-20 10:08:48,054 xinference.core.worker 12985 ERROR    [request 5e6a8a00] Leave launch_builtin_model, error: no
2026-11-20 10:08:48,058 uvicorn.access 11935 INFO     127.0.0.1:48646 - "POST /v1/models HTTP/1.1" 400
"""
VLLM = """\
(EngineCore_0 pid=412) ERROR 11-20 10:08:47 [core.py:708] EngineCore failed to start.
(EngineCore_0 pid=412) ERROR 11-20 10:08:47 [core.py:708] ValueError: Free memory on device (3.27/15.98 GiB) on \
startup is less than desired GPU memory utilization (0.9, 14.38 GiB). Decrease GPU memory utilization.
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_pauses(monkeypatch)


def test_errors_of_a_model_and_their_causes_are_found():
    assert reasons(NEW, "eng") == [
        "OSError: Error no file named model.safetensors found in directory /models/x.",
        "ValueError: it cannot be loaded",
        "Failed to load model eng-rep0",
        "Failed to launch replica eng-rep0: it cannot be loaded",
    ]
    assert reasons(OLD, "eng") == [
        "ValueError: Model qwen2.5-instruct cannot be run on engine vLLM.",
        "Failed to load model eng-0",
    ]


def test_nothing_of_another_model_is_taken_for_it():
    for uid in ("en", "ng", "eng-rep", "eng-rep1x", "o", "ther"):
        assert reasons(NEW + OLD, uid) == []
    assert reasons(NEW, "other") == ["Failed to launch replica other-rep0: it is somebody else's"]


def test_what_an_engine_prints_by_itself_counts_for_whoever_was_launched():
    first, second = reasons(VLLM, "eng")
    assert first == "EngineCore failed to start."
    assert second.startswith("ValueError: Free memory on device (3.27/15.98 GiB)")
    assert reasons(NEW + VLLM, "eng")[4:] == [first, second]


def test_arguments_of_calls_are_never_shown():
    leaky = NEW.replace("Z INFO xinference.core.worker", "Z ERROR xinference.core.worker", 1)
    assert "s3cret" not in str(reasons(leaky, "eng")) and len(reasons(leaky, "eng")) == 4


def test_only_what_was_printed_since_counts():
    moment = calendar.timegm(time.strptime("2026-11-20 10:08:11", "%Y-%m-%d %H:%M:%S"))
    assert len(reasons(NEW, "eng", moment)) == 4 and reasons(NEW, "eng", moment + 60) == []
    local = time.mktime(time.strptime("2026-11-20 10:08:48", "%Y-%m-%d %H:%M:%S"))
    assert len(reasons(OLD, "eng", local)) == 2 and reasons(OLD, "eng", local + 60) == []


def test_lines_are_few_and_short():
    text = "".join(
        f"2026-11-20T10:08:11.756Z ERROR x pid:1 node:vm Failed m-rep0 {number} {'x' * 500}\n" for number in range(20)
    )
    found = reasons(text, "m")
    assert len(found) == 6 and all(len(line) == 240 for line in found)
    assert reasons("nothing\nof a log\n", "m") == reasons("", "m") == []


def test_the_newest_files_are_read(tmp_path):
    read = files(tmp_path)
    assert read(0) == ""
    logs = tmp_path / "home" / "logs"
    (logs / "local_1").mkdir(parents=True)
    (logs / "local_1" / "xinference.log").write_text(OLD)
    assert read(0) == OLD and read(time.time() + 60) == ""
    os.utime(logs / "local_1" / "xinference.log", (1, 1))
    (logs / "xinference.log").write_text(NEW)
    assert read(1000) == NEW
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text(NEW + VLLM)
    assert read(1000) == NEW + VLLM
    (tmp_path / "long").write_text("a" * TAIL + "\nlast\n")
    assert tail(tmp_path / "long") == "last\n" and tail(tmp_path / "none") == ""


def run(server, text, *specs):
    steps = plan(specs, {}, {})
    return {one.uid: one for one in converge(server, steps, Record(None), log=lambda since: text)}


def test_a_failure_without_a_known_cause_gets_it_from_the_log():
    said = "Engine core initialization failed. See root cause above."
    (outcome,) = run(scripted(m=said), VLLM, spec()).values()
    assert outcome.diagnosis.name == "gpu-memory-taken" and "3.27 of 15.98 GiB" in outcome.diagnosis.cause
    assert outcome.shown_by()[0] == "EngineCore failed to start." and outcome.attempts[0].row()["log"]
    (outcome,) = run(scripted(m=said), "", spec()).values()
    assert outcome.diagnosis.name == "engine-core" and outcome.shown_by() == []


def test_a_known_cause_stays_and_what_was_said_is_not_said_twice():
    text = "2099-01-01T10:08:11.756Z ERROR x pid:1 node:vm Failed m-rep0\nValueError: it does not fit\nOSError: disk\n"
    (outcome,) = run(scripted(m="it does not fit"), text, spec()).values()
    assert outcome.shown_by() == ["OSError: disk", "Failed m-rep0"]
    (outcome,) = run(scripted(m="No module named 'vllm'"), text + "RuntimeError: out of memory\n", spec()).values()
    assert outcome.diagnosis.name == "package-missing"
