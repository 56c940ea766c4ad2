# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The record survives what happens to files, and the lock lets one in at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import (
    PREVIOUS,
    Entry,
    Instead,
    LockHeld,
    Record,
    awaited,
    lock,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import Running
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse

(SPEC,) = parse([{"model_uid": "m", "model_name": "bce", "model_type": "embedding", "model_path": "/m"}])
READY = Running("m", {"model_name": "bce", "replica": 1}, "READY", 77)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "launched.json"


def test_a_launch_is_recorded_before_and_after(path):
    record = Record(path)
    assert record.entries == {}
    record.begin(SPEC)
    (begun,) = Record(path).entries.values()
    assert (begun.ready, begun.fingerprint, begun.payload) == (False, SPEC.fingerprint(), SPEC.payload())
    record.settle(SPEC, READY)
    (settled,) = Record(path).entries.values()
    assert (settled.ready, settled.since, settled.shown) == (True, 77, READY.shown)
    assert settled.launched_at == begun.launched_at > 0
    record.forget("m")
    assert Record(path).entries == {}


def test_it_says_who_launched_and_who_only_looked_on(path):
    Record(path, who="the keeper").begin(SPEC)
    Record(path, who="Ansible").settle(SPEC, READY)
    assert Record(path).entries["m"].by == "the keeper"
    Record(path).forget("m")
    Record(path, who="Ansible").settle(SPEC, READY)
    assert Record(path).entries["m"].by == "Ansible"


def test_it_says_what_runs_instead_of_the_first_choice(path):
    first, base = replace(SPEC, fields={**SPEC.fields, "model_engine": "vLLM"}), SPEC
    instead = Instead(1, first.fingerprint(), "No module named 'vllm'", "engine-not-usable")
    record = Record(path, who="the keeper")
    record.begin(base, instead, first.payload())
    begun = Record(path).entries["m"]
    assert (begun.instead, begun.previous, begun.fingerprint) == (instead, first.payload(), base.fingerprint())
    record.settle(base, READY, instead)
    settled = Record(path).entries["m"]
    assert (settled.instead, settled.previous) == (instead, None)
    assert settled.told() == {
        "by": "the keeper",
        "launched_at": settled.launched_at,
        "runs": "bce",
        "choice": 1,
        "why": "No module named 'vllm'",
    }
    Record(path).settle(base, READY, instead)
    assert Record(path).entries["m"] == settled
    record.begin(first)
    assert Record(path).entries["m"].instead is None
    record.settle(first, READY)
    assert Record(path).entries["m"].told()["choice"] == 0


def test_a_model_that_runs_on_can_become_what_runs_instead(path):
    record = Record(path)
    record.settle(SPEC, READY)
    record.mark("m", Instead(PREVIOUS, "sha256:new", "it does not fit"))
    before = path.stat().st_mtime_ns
    Record(path).mark("m", Instead(PREVIOUS, "sha256:new", "it does not fit"))
    marked = Record(path).entries["m"]
    assert marked.instead and marked.instead.words == "what ran before" and marked.fingerprint == SPEC.fingerprint()
    assert path.stat().st_mtime_ns == before and Instead(2, "").words == "alternative 2"


def test_a_trial_is_told_from_a_model_that_is_to_serve(path):
    Record(path, who="Ansible").begin_trial(SPEC, "m")
    begun = Record(path).entries["m"]
    assert (begun.trial_of, begun.ready, begun.payload, begun.by) == ("m", False, SPEC.payload(), "Ansible")
    Record(path).settle(SPEC, READY)
    assert Record(path).entries["m"].trial_of == ""


def test_what_a_later_version_notes_is_left_out(path):
    path.parent.mkdir()
    text = '{"format": 1, "models": {"m": {"fingerprint": "sha256:0", "payload": {}, "mood": "good"}}}'
    path.write_text(text, encoding="utf-8")
    assert Record(path).entries == {"m": Entry("sha256:0", {})}


def test_nothing_new_is_not_written(path):
    record = Record(path)
    record.settle(SPEC, READY)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    Record(path).settle(SPEC, READY)
    Record(path).forget("other")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_it_is_private_and_leaves_no_scraps(path):
    Record(path).settle(SPEC, READY)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["launched.json"]


WRONG_FACTS: list[dict[str, Any]] = [
    {"payload": []},
    {"payload": "x"},
    {"payload": None},
    {"shown": []},
    {"shown": None},
    {"fingerprint": 5},
    {"ready": "yes"},
    {"launched_at": "yesterday"},
    {"launched_at": 1e300},
    {"launched_at": -1},
    {"launched_at": float("nan")},
    {"launched_at": None},
    {"since": "x"},
    {"since": 10**20},
    {"by": None},
    {"previous": "x"},
    {"trial_of": None},
    {"instead": "x"},
    {"instead": []},
    {"instead": {"number": 1}},
    {"instead": {"number": "1", "wanted": "sha256:0"}},
    {"instead": {"number": True, "wanted": "sha256:0"}},
    {"instead": {"number": 1, "wanted": None}},
    {"instead": {"number": 1, "wanted": "", "why": 5}},
    {"instead": {"number": 1, "wanted": "", "later": 5}},
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 99, "models": {}}',
        '{"format": 1, "models": {"m": {"x": 1}}}',
        '{"format": 1, "models": {"m": null}}',
        '{"format": 1, "models": []}',
        '{"format": "1", "models": {}}',
        *(
            json.dumps({"format": 1, "models": {"m": {"fingerprint": "sha256:0", "payload": {}, **wrong}}})
            for wrong in WRONG_FACTS
        ),
        "\udcff\udcfe",
        "[" * 100000,
    ],
)
def test_a_broken_record_is_set_aside(path, text):
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    looking = Record(path, writable=False)
    assert looking.entries == {} and "could not be read" in looking.notice and path.exists()
    record = Record(path)
    assert record.entries == {} and "set aside as launched.json.broken-" in record.notice
    (aside,) = path.parent.iterdir()
    assert aside.read_bytes() == text.encode("utf-8", "surrogateescape")
    record.begin(SPEC)
    assert set(Record(path).entries) == {"m"}


def test_check_mode_writes_nothing(path):
    record = Record(path, writable=False)
    record.begin(SPEC)
    assert record.entries and not path.parent.exists()


def test_a_failed_write_keeps_the_old_record(path, monkeypatch):
    record = Record(path)
    record.settle(SPEC, READY)
    before = path.read_text(encoding="utf-8")

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="no space"):
        record.forget("m")
    assert path.read_text(encoding="utf-8") == before
    assert [one.name for one in path.parent.iterdir()] == ["launched.json"]


def test_the_keeper_goes_on_in_memory_where_nothing_can_be_written(path, monkeypatch):
    Record(path).settle(SPEC, READY)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    record = Record(path, lenient=True)
    record.forget("m")
    record.begin(SPEC)
    assert record.entries["m"].ready is False and "No space left on device" in record.notice
    assert Record(path).entries["m"].ready is True
    with pytest.raises(OSError, match="No space left"):
        record.rewrite()
    with pytest.raises(OSError, match="No space left"):
        record.begin_trial(replace(SPEC, uid="m-beside"), "m")
    Record(path, writable=False).rewrite()
    Record(None).rewrite()


def test_entries_of_older_releases_lack_newer_facts():
    assert Entry("sha256:0", {}).ready is False
    assert Entry("sha256:0", {}).shown == {}


def test_an_entry_without_newer_facts_is_read(path):
    path.parent.mkdir()
    path.write_text('{"format": 1, "models": {"m": {"fingerprint": "sha256:0", "payload": {}}}}', encoding="utf-8")
    assert Record(path).entries == {"m": Entry("sha256:0", {})}


def _hold(path, held, release):
    with lock(path, 0, "the keeper"):
        held.set()
        release.wait(30)


def test_the_lock_is_for_one_and_names_its_holder(tmp_path):
    path = tmp_path / "state" / "lock"
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, held, release))
    holder.start()
    try:
        assert held.wait(10)
        start = time.monotonic()
        words = rf"the keeper \(process {holder.pid}, since .*Waited 0 s"
        with pytest.raises(LockHeld, match=words), lock(path, 0.3, "ansible"):
            pass
        assert 0.2 < time.monotonic() - start < 30
        context.Process(target=_release_later, args=(release,)).start()
        with lock(path, 10, "ansible"):
            assert "ansible" in path.read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == ""
    finally:
        release.set()
        holder.join()


def _wait_for(path):
    with lock(path, 20, "ansible"):
        pass


def test_whoever_holds_the_lock_can_see_that_somebody_waits(tmp_path):
    path = tmp_path / "state" / "lock"
    waiter = threading.Thread(target=_wait_for, args=(path,))
    with lock(path, 0, "the keeper"):
        assert not awaited(path)
        with pytest.raises(LockHeld), lock(path, 0, "another that does not wait"):
            pass
        waiter.start()
        end = time.monotonic() + 10
        while not awaited(path):
            assert time.monotonic() < end
    waiter.join(10)
    assert not waiter.is_alive() and not awaited(path)


def test_a_full_disk_does_not_keep_anybody_from_the_lock(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.pwrite", full)
    again = lock(tmp_path / "lock", 0, "ansible")
    with lock(tmp_path / "lock", 0, "the keeper"), pytest.raises(LockHeld, match="an unknown process"), again:
        pass


def _release_later(release):
    time.sleep(0.3)
    release.set()


def test_the_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    context = multiprocessing.get_context("fork")
    held, never = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, held, never))
    holder.start()
    assert held.wait(10)
    holder.kill()
    holder.join()
    with lock(path, 5, "ansible"):
        pass
