# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying steps out, on a server that can be told to fail, hang, answer late or not at all."""

from __future__ import annotations

import json
import threading
import time

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import launch as launching
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import (
    ServerError,
    Unreachable,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.converge import converge
from ansible_collections.airgap.xinference.plugins.module_utils.server.outcome import human
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record, lock
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import Running, look
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError
from scripted import Scripted, do, failing_with, no_pauses, scripted, spec, writes


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_pauses(monkeypatch)


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_models_are_launched_and_recorded(version, tmp_path):
    server, record = scripted(version), Record(tmp_path / "launched.json")
    outcomes = do(server, spec("a"), spec("b"), record=record)
    assert {uid: (one.action, one.ok, one.changed) for uid, one in outcomes.items()} == {
        "a": ("launch", True, True),
        "b": ("launch", True, True),
    }
    assert outcomes["a"].model["id"] == "a" and outcomes["a"].duration > 0
    entries = Record(tmp_path / "launched.json").entries
    assert all(entry.ready and entry.since and entry.shown["model_name"] == "bce" for entry in entries.values())
    again = do(server, spec("a"), spec("b"), record=record)
    assert {one.action for one in again.values()} == {"keep"} and server.log == []
    assert not any(one.changed for one in again.values())


def test_models_are_launched_together_within_the_limit():
    server = scripted(polls=5)
    do(server, *[spec(f"m{number}") for number in range(6)], limit=3)
    assert server.most_at_once == 3
    server = scripted(polls=5)
    vllm = [spec(f"m{number}", model_engine="vllm") for number in range(3)]
    do(server, *vllm, limit=3)
    assert server.most_at_once == 1


def test_where_no_gpu_is_shared_the_longest_launch_starts_first():
    small, large = spec("small"), spec("large", model_type="LLM")
    for gpus, first in ((0, "large"), (2, "small")):
        server = scripted()
        server.gpus = gpus
        do(server, small, large, limit=1)
        assert writes(server)[0] == f"launch {first}"
    server = scripted(m="Unreachable")
    server.cluster_info = failing_with(Unreachable("busy"))
    do(server, small, large, limit=1)
    assert writes(server)[0] == "launch small"


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_one_failure_stops_nobody_and_leaves_nothing(version, tmp_path):
    server, record = scripted(version, bad="it does not fit"), Record(tmp_path / "launched.json")
    outcomes = do(server, spec("bad"), spec("good"), record=record)
    assert outcomes["good"].ok and not outcomes["bad"].ok and not outcomes["bad"].changed
    assert "it does not fit" in outcomes["bad"].error and "address=" not in outcomes["bad"].error
    assert set(Record(tmp_path / "launched.json").entries) == {"good"}
    assert "terminate good" not in server.log


def test_an_unknown_name_is_answered_with_the_nearest():
    server = scripted(m="Embedding model bcee not found, available models: dict_keys(['bce'])")
    (outcome,) = do(server, spec(model_name="bcee")).values()
    assert outcome.diagnosis.cause == "Xinference 4.1.0 has no embedding model named bcee."
    assert "Set model_name to bce" in outcome.diagnosis.cure


def test_a_name_of_another_type_is_found_there():
    server = scripted(m="Rerank model zzz not found")
    server.registrations = lambda kind: [{"model_name": "zzz" if kind == "audio" else "qwx"}]
    (outcome,) = do(server, spec(model_name="zzz", model_type="rerank")).values()
    assert "Set model_type to audio" in outcome.diagnosis.cure


def test_an_engine_that_cannot_run_gives_the_true_reason():
    server = scripted(m="Model bce cannot be run on engine vLLM.")
    (outcome,) = do(server, spec(model_engine="vLLM")).values()
    assert "No module named 'vllm'" in outcome.diagnosis.cause and "Usable here: st" in outcome.diagnosis.cure
    assert "vLLM" in outcome.sentence() and "Cure: " in outcome.sentence()


def test_an_explanation_that_fails_hides_nothing():
    server = scripted(m="Model bce cannot be run on engine x.")

    def fail(*arguments):
        raise Unreachable("gone")

    server.engines = server.registrations = fail
    (outcome,) = do(server, spec(model_engine="x")).values()
    assert "cannot be run on engine x" in outcome.error


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_a_launch_that_hangs_is_cancelled(version):
    server, record = scripted(version, m="hang"), Record(None)
    start = time.monotonic()
    outcomes = do(server, spec("m"), spec("n"), record=record, timeout=1.0)
    assert time.monotonic() - start < 60
    assert "cancel m" in server.log and outcomes["n"].ok
    assert "not ready after 1 s (progress 80%); the launch was cancelled" in outcomes["m"].error
    assert "wait_timeout" in outcomes["m"].diagnosis.cure
    assert set(record.entries) == {"n"}


@pytest.mark.parametrize(("status", "listed"), [("READY", True), ("CREATING", False), ("READY", False)])
def test_what_a_failed_launch_leaves_running_is_stopped(status, listed):
    server, record = scripted(m="hang"), Record(None)

    def half(payload, timeout=None):
        server._note("launch", "m")
        server.put("m", status, listed)
        raise ServerError("it broke", 500, "it broke", "POST", "/v1/models")

    server.launch = half
    (outcome,) = do(server, spec(), record=record).values()
    assert not outcome.ok and "it broke" in outcome.error and not record.entries
    assert "m" not in server.live or server.live["m"]["status"] == "ERROR"
    assert writes(server) == ["launch m", *(["cancel m"] if status == "CREATING" else []), "terminate m"]


def test_a_launch_that_fails_by_itself_is_not_terminated():
    server = scripted(m="it does not fit")
    do(server, spec())
    assert writes(server) == ["launch m"]


def test_a_sweep_that_fails_hides_no_reason(monkeypatch):
    server = scripted(m="it does not fit")
    (outcome,) = do(server, spec()).values()
    server, looked = scripted(m="it does not fit"), []

    def fail(client):
        looked.append(client)
        raise Unreachable("gone")

    monkeypatch.setattr(launching, "look", fail)
    (outcome,) = do(server, spec()).values()
    assert looked and "it does not fit" in outcome.error


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_a_timeout_cancels_once_and_waits_until_the_launch_has_unwound(version, monkeypatch):
    server, cancel = scripted(version, m="hang"), Scripted.cancel
    cancelled = []

    def slowly(uid):
        cancelled.append(time.monotonic())
        server._note("cancel", uid)
        threading.Timer(0.7, cancel, (server, uid)).start()

    monkeypatch.setattr(server, "cancel", slowly)
    start = time.monotonic()
    (outcome,) = do(server, spec(), timeout=1.0).values()
    assert len(cancelled) == 1 and cancelled[0] - start > 0.9
    assert server.live["m"]["status"] == "ERROR" and outcome.duration > 1.6
    assert "the launch was cancelled" in outcome.error


def test_a_launch_ready_at_the_last_moment_is_not_cancelled(monkeypatch):
    server = scripted(polls=1)
    follow = launching.Launcher.follow

    def late(self):
        self.deadline = 0
        server.instances("m")
        return follow(self)

    monkeypatch.setattr(launching.Launcher, "follow", late)
    (outcome,) = do(server, spec()).values()
    assert outcome.ok and "cancel m" not in server.log


def test_drift_relaunches():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    (outcome,) = do(server, spec(replica=2), record=record).values()
    assert outcome.action == "relaunch" and writes(server) == ["terminate m", "launch m"]
    assert record.entries["m"].fingerprint == spec(replica=2).fingerprint()


def test_a_failed_relaunch_is_a_change_and_is_forgotten():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    server.behaviour["m"] = "broken"
    (outcome,) = do(server, spec(replica=2), record=record).values()
    assert (outcome.ok, outcome.changed, outcome.model) == (False, True, None) and not record.entries


def test_pruning_goes_first_and_its_failure_is_reported():
    server, record = scripted(old="stays"), Record(None)
    server.behaviour.pop("old")
    do(server, spec("old"), spec("gone"), record=record)
    server.behaviour["old"] = "stays"
    outcomes = do(server, spec("new"), record=record)
    assert writes(server)[-1] == "launch new"
    assert outcomes["gone"].ok and outcomes["new"].ok and "it cannot stop" in outcomes["old"].error
    assert "old" in record.entries and "gone" not in record.entries


def test_a_model_gone_meanwhile_counts_as_terminated():
    server, record = scripted(), Record(None)
    do(server, spec("old"), record=record)
    steps = plan([], look(server), record.entries)
    server.live.clear()
    (outcome,) = converge(server, steps, record)
    assert outcome.ok and not record.entries


def test_somebody_elses_launch_is_waited_for_and_taken_over():
    server, record = scripted(polls=3), Record(None)
    server.put("m", "CREATING", False)
    server.live["m"]["left"] = 3
    (outcome,) = do(server, spec(), record=record).values()
    assert (outcome.action, outcome.changed, writes(server)) == ("adopt", True, [])
    assert record.entries["m"].ready


def test_somebody_elses_other_model_is_replaced_after_the_wait():
    server, record = scripted(polls=3), Record(None)
    server.put("m", "CREATING", False, model_name="other")
    server.live["m"]["left"] = 3
    (outcome,) = do(server, spec(), record=record).values()
    assert outcome.action == "relaunch" and "model_name is other" in outcome.reason
    assert writes(server) == ["terminate m", "launch m"]


def test_our_own_interrupted_launch_is_waited_for():
    server, record = scripted(polls=3), Record(None)
    record.begin(spec())
    server.put("m", "CREATING", False)
    server.live["m"]["left"] = 3
    (outcome,) = do(server, spec(), record=record).values()
    assert (outcome.action, outcome.changed, writes(server)) == ("keep", False, [])
    assert record.entries["m"].ready


def test_a_launch_under_way_that_is_waited_for_in_vain_is_cancelled():
    server, record = scripted(m="hang"), Record(None)
    record.begin(spec())
    server.put("m", "CREATING", False)
    (outcome,) = do(server, spec(), record=record, timeout=0.3).values()
    assert "the launch was cancelled" in outcome.error and writes(server) == ["cancel m"]


def test_a_launch_with_other_fields_under_way_is_cancelled_first():
    server, record = scripted(m="hang"), Record(None)
    record.begin(spec(replica=2))
    server.put("m", "CREATING", False)
    steps = plan([spec()], look(server), record.entries)
    server.log.clear()
    server.behaviour.clear()
    server.live["m"]["left"] = 1000
    (outcome,) = converge(server, steps, record)
    assert outcome.ok and writes(server) == ["cancel m", "terminate m", "launch m"]


def test_a_taken_uid_is_cleared_and_launched_once_more():
    server, record = scripted(), Record(None)
    steps = plan([spec()], look(server), record.entries)
    server.put("m", "READY", listed=False)
    (outcome,) = converge(server, steps, record)
    assert outcome.ok and writes(server) == ["launch m", "terminate m", "launch m"]


def test_somebody_who_was_faster_keeps_an_equal_model_and_fails_a_different_one():
    server, record = scripted(), Record(None)
    steps = plan([spec()], look(server), record.entries)
    server.put("m")
    (outcome,) = converge(server, steps, record)
    assert outcome.ok and writes(server) == ["launch m"]
    server, record = scripted(), Record(None)
    server.put("m", model_name="other")
    (outcome,) = converge(server, steps, record)
    assert not outcome.ok and "another model serves under this uid" in outcome.error
    assert "m" in server.live and not record.entries


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_an_earlier_launch_that_unwinds_is_waited_for(version, monkeypatch):
    server = scripted(version, m="m-rep0 is running")
    launch, left = server.launch, [3]

    def freed_later(payload, timeout=None):
        left[0] -= 1
        if not left[0]:
            server.behaviour.clear()
        return launch(payload, timeout)

    server.launch = freed_later
    (outcome,) = do(server, spec()).values()
    assert outcome.ok and left == [0]
    monkeypatch.setattr(launching, "UNWIND_LIMIT", 0.0)
    (outcome,) = do(scripted(version, m="m-0 is running"), spec()).values()
    assert "restart the server" in outcome.diagnosis.cure and "m-0 is running" in outcome.error


def test_a_failure_without_a_reason_says_where_to_look():
    server = scripted()
    server._finish = lambda uid, one: one.update(status="ERROR", error="")
    (outcome,) = do(server, spec()).values()
    assert outcome.error == "the server gives no reason" and "log" in outcome.diagnosis.cure


def test_a_launch_that_the_server_forgets_is_a_failure():
    (outcome,) = do(scripted(m="forgets"), spec()).values()
    assert "the server forgot the launch" in outcome.error


def test_a_refused_key_is_not_tried_again():
    server = scripted(m="key")
    (outcome,) = do(server, spec()).values()
    assert outcome.error == "wrong key" and server.log[:2] == ["launch m"]


def test_a_server_that_is_silent_for_a_while_is_waited_for(monkeypatch):
    server = scripted(polls=1)
    answers = iter([Unreachable("busy"), Unreachable("busy")])
    instances = server.instances

    def sometimes(uid=None):
        for failure in answers:
            raise failure
        return instances(uid)

    (step,) = plan([spec()], {}, {})
    server.instances = sometimes
    (outcome,) = converge(server, [step], Record(None))
    assert outcome.ok
    monkeypatch.setattr(launching, "SILENCE", 0.0)
    server.instances = failing_with(Unreachable("dead"))
    (outcome,) = converge(server, plan([spec("n")], {}, {}), Record(None))
    assert outcome.error == "dead"


def test_a_record_that_cannot_be_written_fails_that_model(tmp_path, monkeypatch):
    record = Record(tmp_path / "launched.json")
    monkeypatch.setattr(record, "begin", failing_with(OSError("disk full")))
    server = scripted()
    (outcome,) = do(server, spec(), record=record).values()
    assert "the record could not be written: disk full" in outcome.error and writes(server) == []


def test_bugs_are_not_hidden_and_the_others_finish(monkeypatch):
    server, record = scripted(), Record(None)
    settle = record.settle

    def broken(of, running, instead=None):
        if of.uid == "a":
            raise RuntimeError("a bug")
        settle(of, running)

    monkeypatch.setattr(record, "settle", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        do(server, spec("a"), spec("b"), record=record)
    assert record.entries["b"].ready and not record.entries["a"].ready


def test_what_happens_is_told_while_it_happens(monkeypatch):
    monkeypatch.setattr(launching, "PROGRESS_EVERY", 0.0)
    told = []
    do(scripted(polls=4), spec(), listener=lambda uid, event: told.append(f"{uid} {event}"))
    assert told[0] == "m launch" and told[-1] == "m ready" and "m progress 80%" in told


# -- through the front door


def run(server, root, *entries, **options):
    return apply(server, specs_from(server, list(entries), [], root), root, **options)


ENTRY = {"model_uid": "m", "model_name": "bce", "model_type": "embedding", "model_engine": "st"}


def test_a_rehearsal_writes_nothing(tmp_path):
    server, root = scripted(), tmp_path / "root"
    server.put("theirs")
    result = run(server, root, ENTRY, prune="all", rehearse=True)
    assert result.changed and [(row["action"], row["model_uid"]) for row in result.models] == [
        ("terminate", "theirs"),
        ("launch", "m"),
    ]
    words = "model_uid action reason model duration error diagnosis choice runs why attempts"
    assert set(result.models[0]) == set(words.split())
    assert writes(server) == [] and not root.exists() and server.requests_made == 2
    assert result.after == {"m": ENTRY} and set(result.before) == {"theirs"}


@pytest.mark.parametrize("broken", [False, True])
def test_a_rehearsal_leaves_the_record_as_it_is(broken, tmp_path):
    server = scripted()
    run(server, tmp_path, ENTRY, {**ENTRY, "model_uid": "old"})
    server.put("theirs")
    path = tmp_path / "state" / "launched.json"
    if broken:
        path.write_text("{", encoding="utf-8")
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino, sorted(path.parent.iterdir())
    entries = [{**ENTRY, "replica": 2}, {**ENTRY, "model_uid": "theirs"}, {**ENTRY, "model_uid": "new"}]
    result = run(server, tmp_path, *entries, rehearse=True)
    assert result.changed and len(result.models) == (3 if broken else 4)
    assert before == (
        path.read_bytes(),
        path.stat().st_mtime_ns,
        path.stat().st_ino,
        sorted(path.parent.iterdir()),
    )


def test_a_second_run_costs_two_requests_and_changes_nothing(tmp_path):
    server = scripted()
    first = run(server, tmp_path, ENTRY)
    before = server.requests_made
    second = run(server, tmp_path, ENTRY)
    assert first.changed and not second.changed and server.requests_made - before == 2
    assert (second.before, second.after, second.message) == ({}, {}, "")
    assert [set(row) for row in first.models] == [set(row) for row in second.models]


def test_a_model_that_is_only_listed_any_more_is_looked_at_again(tmp_path):
    server = scripted()
    run(server, tmp_path, ENTRY)
    old = dict(server.models())
    server.live.clear()
    models, listed = server.models, [old, old]
    server.models = lambda: listed.pop() if len(listed) > 1 else models()
    applied = run(server, tmp_path, ENTRY)
    assert (applied.models[0]["action"], "m" in server.live) == ("launch", True)


def test_failures_make_one_message_with_cause_and_cure(tmp_path):
    server = scripted(x="Model bce cannot be run on engine vLLM.", y="no idea")
    rows = [{**ENTRY, "model_uid": uid} for uid in ("m", "y")] + [{**ENTRY, "model_uid": "x", "model_engine": "vLLM"}]
    result = run(server, tmp_path, *rows)
    assert result.message.startswith("2 of 3 models failed on http://127.0.0.1:9997:\n- y: launch failed after")
    assert "Cause: The engine vllm cannot be used here: Failed to import vLLM" in result.message
    assert "Cure: Usable here: st." in result.message
    assert [row["error"] == "" for row in result.models] == [True, False, False]


def test_one_model_only(tmp_path):
    server = scripted()
    run(server, tmp_path, ENTRY, {**ENTRY, "model_uid": "n"})
    server.put("theirs")
    result = run(server, tmp_path, {**ENTRY, "replica": 2}, only="m")
    assert [(row["action"], row["model_uid"]) for row in result.models] == [("relaunch", "m")]
    for uid in ("theirs", "n"):
        (row,) = run(server, tmp_path, only=uid).models
        assert (row["action"], row["reason"], row["model"]) == ("terminate", "absent was asked for", None)
    assert run(server, tmp_path, only="n").models == [] and set(server.live) == {"m"}


def test_somebody_else_at_work_is_waited_for_and_named(tmp_path):
    with lock(tmp_path / "state" / "lock", 0, "the keeper"):
        with pytest.raises(Exception, match="are being changed by the keeper"):
            run(scripted(), tmp_path, ENTRY, lock_wait=0.1)
        assert run(scripted(), tmp_path, ENTRY, rehearse=True).changed


def test_paths_come_from_what_was_shipped(tmp_path):
    sourced = {**ENTRY, "source": {"path": "/data/MiniLM"}}
    with pytest.raises(SpecError, match="not in the bundle on this host"):
        run(scripted(), tmp_path, sourced, rehearse=True)
    (tmp_path / "state").mkdir()
    shipped = {"models": {"MiniLM": {"path": "/opt/x/models/MiniLM/1f", "digest": "sha256:1f"}}, "wheels": {}}
    (tmp_path / "state" / "artifacts.json").write_text(json.dumps(shipped), encoding="utf-8")
    result = run(scripted(), tmp_path, sourced, rehearse=True)
    assert result.after["m"]["model_path"] == "/opt/x/models/MiniLM/1f"
    coming = {**ENTRY, "source": {"path": "/data/bge-m3"}}
    with pytest.raises(SpecError, match="not in the bundle on this host"):
        specs_from(scripted(), [coming], [], tmp_path)
    (spec,) = specs_from(scripted(), [coming], [], tmp_path, rehearse=True)
    assert spec.fields["model_path"] == str(tmp_path / "models/bge-m3/to-come")
    with pytest.raises(SpecError, match="model without source in the bundle"):
        run(scripted(), tmp_path, ENTRY, rehearse=True)
    assert run(scripted(), tmp_path, {**ENTRY, "model_name": "ours"}, rehearse=True).changed
    registered = {**sourced, "fallbacks": [{"model_name": "ours"}]}
    assert run(scripted(), tmp_path, registered, rehearse=True).changed


@pytest.mark.parametrize("text", ["{", "[]", '{"models": {"m": {}}}'])
def test_a_broken_list_of_what_was_shipped_is_said(text, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "artifacts.json").write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match="ship the bundle again"):
        run(scripted(), tmp_path, ENTRY, rehearse=True)


def test_a_broken_record_is_said(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "launched.json").write_text("{", encoding="utf-8")
    server = scripted()
    server.put("m")
    result = run(server, tmp_path, ENTRY)
    assert "set aside" in result.notices[0] and result.models[0]["action"] == "adopt"


def test_lost_instances_and_durations_have_words():
    assert Running("m", None, "READY").state == "lost" and Running("m").state == "lost"
    assert (human(0.44), human(12.3), human(185)) == ("0.4 s", "12 s", "3 min 05 s")
