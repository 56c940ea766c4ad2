# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Alternatives, what ran before, models proven beside others, and launches that are tried again."""

from __future__ import annotations

import threading
import time
from typing import Any, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import launch as launching
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError, Unreachable
from ansible_collections.airgap.xinference.plugins.module_utils.server.converge import converge
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import PREVIOUS, Record
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import look
from scripted import do, failing_with, no_pauses, scripted, spec, writes

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
SMALLER = {"model_name": "small", "model_engine": "tf"}
SMALLEST = {"model_name": "tiny", "model_engine": "tf"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_pauses(monkeypatch)


def falling(**fields):
    """A first choice with two alternatives."""
    return spec(fallbacks=[SMALLER, SMALLEST], **fields)


def name_of(server, uid="m"):
    """What serves under a uid."""
    return server.live[uid]["model"]["model_name"] if uid in server.live else None


def instead_of(entry: Any) -> Any:
    """What an entry of the record says of what serves instead, which it must."""
    assert entry.instead
    return entry.instead


def launched(server):
    return [(payload["model_uid"], payload["model_name"]) for payload in server.payloads]


# -- alternatives


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_the_alternative_serves_under_the_same_uid_and_the_record_says_why(version, tmp_path):
    server, record = scripted(version, bce="it does not fit"), Record(tmp_path / "launched.json")
    (outcome,) = do(server, falling(), record=record).values()
    assert (outcome.ok, outcome.changed, outcome.action, outcome.choice) == (True, True, "launch", 1)
    said = "it does not fit" if version == "4.1.0" else "it says: it does not fit"
    assert (outcome.runs, outcome.why, outcome.model["model_name"]) == ("small on tf", said, "small")
    assert [(one.choice, one.runs, one.error) for one in outcome.attempts] == [
        (0, "bce on st", outcome.attempts[0].error),
        (1, "small on tf", ""),
    ]
    assert "it does not fit" in outcome.attempts[0].error
    assert outcome.notice() == f"m: alternative 1 serves (small on tf) because the first choice failed: {said}."
    (entry,) = Record(tmp_path / "launched.json").entries.values()
    assert entry.ready and entry.payload["model_name"] == "small"
    instead = instead_of(entry)
    assert (instead.number, instead.wanted, instead.why) == (1, falling().fingerprint(), said)


def test_alternatives_are_tried_in_order_until_one_serves():
    server = scripted(bce="no", small="never")
    (outcome,) = do(server, falling()).values()
    assert (outcome.choice, name_of(server)) == (2, "tiny")
    assert launched(server) == [("m", "bce"), ("m", "small"), ("m", "tiny")]
    assert (outcome.why, len(outcome.attempts)) == ("no", 3)


def test_when_nothing_can_be_launched_all_reasons_are_said():
    server, record = scripted(bce="no", small="never", tiny="not at all"), Record(None)
    (outcome,) = do(server, falling(), record=record).values()
    assert not outcome.ok and not outcome.changed and not record.entries and outcome.model is None
    assert outcome.error == (
        "first choice (bce on st): no; alternative 1 (small on tf): never; alternative 2 (tiny on tf): not at all"
    )
    assert (outcome.choice, outcome.runs, outcome.notice()) == (0, "", "")


def test_a_known_cause_is_the_reason_and_its_cure_is_told():
    server = scripted(bce="Model bce cannot be run on engine vLLM.")
    (outcome,) = do(server, spec(model_engine="vllm", fallbacks=[SMALLER])).values()
    assert outcome.ok and outcome.why.startswith("The engine vllm cannot be used here: Failed to import vLLM")
    assert outcome.notice().endswith("Cure: Usable here: st. Set model_engine, or add what is missing to the bundle.")


def test_an_operators_run_goes_back_and_the_keeper_does_not():
    server, record = scripted(bce="no"), Record(None)
    do(server, falling(), record=record)
    server.behaviour.clear()
    (kept,) = do(server, falling(), record=record, first_choice=False).values()
    assert (kept.action, kept.changed, kept.choice, kept.why, writes(server)) == ("keep", False, 1, "no", [])
    assert kept.notice().startswith("m: alternative 1 serves (small on tf)")
    (back,) = do(server, falling(), record=record).values()
    assert (back.ok, back.action, back.choice, name_of(server)) == (True, "relaunch", 0, "bce")
    assert writes(server) == ["terminate m", "launch m"]
    assert record.entries["m"].instead is None
    (again,) = do(server, falling(), record=record).values()
    assert (again.action, again.notice()) == ("keep", "")


def test_going_back_in_vain_ends_where_it_began():
    server, record = scripted(bce="no"), Record(None)
    do(server, falling(), record=record)
    (outcome,) = do(server, falling(), record=record).values()
    assert (outcome.ok, outcome.changed, outcome.choice, name_of(server)) == (True, True, 1, "small")
    assert [one.choice for one in outcome.attempts] == [0, 1]


def test_after_a_restart_the_keeper_brings_back_what_ran_and_ansible_the_first_choice():
    server, record = scripted(bce="no"), Record(None)
    do(server, falling(), record=record)
    server.behaviour.clear()
    server.live.clear()
    (kept,) = do(server, falling(), record=record, first_choice=False).values()
    assert (kept.action, kept.choice, kept.why, name_of(server)) == ("launch", 1, "no", "small")
    assert instead_of(record.entries["m"]).why == "no" and launched(server)[-1] == ("m", "small")
    server.live.clear()
    (first,) = do(server, falling(), record=record).values()
    assert (first.choice, name_of(server)) == (0, "bce")


def test_where_what_ran_fails_too_the_keeper_tries_the_others():
    server, record = scripted(bce="no"), Record(None)
    do(server, falling(), record=record)
    server.behaviour = {"small": "no more"}
    server.live.clear()
    (outcome,) = do(server, falling(), record=record, first_choice=False).values()
    assert outcome.ok and (outcome.choice, name_of(server)) == (0, "bce")
    assert record.entries["m"].instead is None


def test_a_launch_that_hangs_gives_way_to_the_alternative_which_has_its_own_time():
    server = scripted(bce="hang")
    (outcome,) = do(server, falling(), timeout=0.5).values()
    assert outcome.ok and outcome.choice == 1
    assert outcome.attempts[0].diagnosis.name == "slow" and "not ready after" in outcome.attempts[0].error


def test_a_hang_that_survives_its_cancel_holds_the_uid_and_nothing_else_is_tried(monkeypatch):
    monkeypatch.setattr(launching, "CANCEL_LIMIT", 0.2)
    server, record = scripted(bce="hang"), Record(None)

    def in_vain(uid):
        server._note("cancel", uid)
        server.live[uid]["status"] = "ERROR"

    server.cancel = in_vain
    instances = server.instances

    def still_loading(uid=None):
        rows = instances(uid)
        for row in rows:
            if row["status"] == "ERROR":
                row["replica_statuses"] = [{"status": "LOADING", "error_message": None}]
        return rows

    server.instances = still_loading
    (outcome,) = do(server, falling(), record=record, timeout=0.3).values()
    assert not outcome.ok and "does not let go of it" in outcome.error
    assert outcome.diagnosis.name == "held" and "restart the server" in outcome.diagnosis.cure
    assert launched(server) == [("m", "bce")] and look(server)["m"].unwinding
    assert not record.entries["m"].ready


def test_a_uid_that_is_held_by_an_earlier_hang_ends_the_search(monkeypatch):
    monkeypatch.setattr(launching, "UNWIND_LIMIT", 0.0)
    server = scripted("1.8.1", bce="m-0 is running")
    (outcome,) = do(server, falling()).values()
    assert outcome.diagnosis.name == "held" and launched(server) == [("m", "bce")]


def test_a_server_that_is_gone_ends_the_search_and_the_record_keeps_what_was_begun():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    changed = spec(replica=2, fallbacks=[SMALLER])
    server.launch = failing_with(Unreachable("connection refused"))
    (outcome,) = do(server, changed, record=record).values()
    assert outcome.error == "connection refused" and len(outcome.attempts) == 1
    left = record.entries["m"]
    assert (left.ready, left.fingerprint, left.previous) == (False, changed.fingerprint(), spec().payload())


def test_a_server_with_nothing_behind_its_api_ends_the_search():
    server, record = scripted("1.8.1", bce="[Errno 111] Connection refused"), Record(None)
    (outcome,) = do(server, falling(), record=record).values()
    assert outcome.diagnosis.name == "half-dead" and len(outcome.attempts) == 1 and not record.entries["m"].ready


def test_a_refused_key_ends_the_search():
    server = scripted(bce="key")
    (outcome,) = do(server, falling()).values()
    assert outcome.error == "wrong key" and len(outcome.attempts) == 1


# -- what ran before


@pytest.mark.parametrize("version", ["4.1.0", "1.8.1"])
def test_a_relaunch_that_fails_brings_the_old_model_back(version, tmp_path):
    server, record = scripted(version), Record(tmp_path / "launched.json")
    do(server, spec(), record=record)
    server.behaviour["worse"] = "it does not fit"
    (outcome,) = do(server, spec(model_name="worse"), record=record).values()
    assert (outcome.ok, outcome.changed, outcome.choice) == (False, True, PREVIOUS)
    assert outcome.error.endswith("it does not fit; what ran before was brought back and serves")
    assert outcome.model["model_name"] == "bce" and "it does not fit" in outcome.why
    assert launched(server) == [("m", "bce"), ("m", "worse"), ("m", "bce")]
    (entry,) = Record(tmp_path / "launched.json").entries.values()
    assert (entry.ready, entry.payload, entry.previous) == (True, spec().payload(), None)
    assert (instead_of(entry).number, instead_of(entry).wanted) == (PREVIOUS, spec(model_name="worse").fingerprint())
    assert "failed after" in outcome.sentence() and outcome.notice() == ""


def test_what_was_brought_back_is_left_by_the_keeper_and_replaced_by_a_run_that_works():
    server, record = scripted(worse="no"), Record(None)
    do(server, spec(), record=record)
    do(server, spec(model_name="worse"), record=record)
    (kept,) = do(server, spec(model_name="worse"), record=record, first_choice=False).values()
    assert (kept.action, kept.ok, kept.choice, writes(server)) == ("keep", True, PREVIOUS, [])
    assert kept.notice() == "m: what ran before serves (bce on st) because the first choice failed: no."
    server.live.clear()
    (back,) = do(server, spec(model_name="worse"), record=record, first_choice=False).values()
    assert (back.ok, back.choice, name_of(server)) == (True, PREVIOUS, "bce")
    server.behaviour.clear()
    (done,) = do(server, spec(model_name="worse"), record=record).values()
    assert (done.ok, done.choice, name_of(server), record.entries["m"].instead) == (True, 0, "worse", None)


def test_alternatives_come_before_what_ran():
    server, record = scripted(bce="no"), Record(None)
    server.behaviour.clear()
    do(server, spec(), record=record)
    server.behaviour["worse"] = "no"
    (outcome,) = do(server, spec(model_name="worse", fallbacks=[SMALLER]), record=record).values()
    assert outcome.ok and (outcome.choice, name_of(server)) == (1, "small")


def test_what_cannot_be_brought_back_is_said_and_forgotten():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    server.behaviour.update(worse="no", bce="not any more")
    (outcome,) = do(server, spec(model_name="worse"), record=record).values()
    assert not outcome.ok and outcome.model is None and not record.entries
    assert outcome.error.endswith("what ran before could not be brought back: not any more")


def test_the_same_launch_is_not_brought_back():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    server.behaviour["bce"] = "broken"
    (outcome,) = do(server, spec(), record=record, relaunch=["m"]).values()
    assert outcome.error == "broken" and launched(server) == [("m", "bce"), ("m", "bce")]


def test_an_interruption_between_end_and_launch_forgets_nothing():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    previous = record.entries["m"].payload
    record.begin(spec(model_name="worse"), None, previous)
    server.live.clear()
    server.behaviour["worse"] = "no"
    (outcome,) = do(server, spec(model_name="worse"), record=record).values()
    assert not outcome.ok and name_of(server) == "bce" and outcome.choice == PREVIOUS


class Killed(BaseException):
    """The end of a process at once, without a word."""


@pytest.mark.parametrize(
    ("how", "moment"), [("replace", "terminate m"), ("beside", "terminate m"), ("beside", "ask m-beside")]
)
@pytest.mark.parametrize("old_left", [False, True])
def test_a_run_that_is_killed_while_it_ends_the_old_model_forgets_nothing(how, moment, old_left, tmp_path):
    server, path = scripted(), tmp_path / "launched.json"
    do(server, spec(), record=Record(path))
    note = server._note
    dead: List[str] = []

    def deadly(what, uid=""):
        note(what, uid)
        if dead or f"{what} {uid}" == moment:
            dead.append(what)
            raise Killed

    server._note = deadly
    with pytest.raises(Killed):
        do(server, spec(model_name="worse"), record=Record(path), how=how)
    server._note = note
    if not old_left:
        server.live.clear()
    server.behaviour["worse"] = "it does not fit"
    (outcome,) = [one for one in do(server, spec(model_name="worse"), record=Record(path)).values() if one.uid == "m"]
    assert outcome.error.endswith("what ran before was brought back and serves") and name_of(server) == "bce"


def test_nothing_is_ended_that_could_not_be_noted(monkeypatch):
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    monkeypatch.setattr(record, "rewrite", failing_with(OSError("disk full")))
    (outcome,) = do(server, spec(replica=2), record=record).values()
    assert "disk full" in outcome.error and writes(server) == [] and name_of(server) == "bce"


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A server with a model of the record, and what opens that for the keeper on a disk that is full."""
    server, path = scripted(), tmp_path / "launched.json"
    do(server, spec(), record=Record(path))
    monkeypatch.setattr("tempfile.mkstemp", failing_with(OSError("disk full")))
    return server, lambda lenient=True: Record(path, lenient=lenient)


@pytest.mark.parametrize("how", ["replace", "beside"])
@pytest.mark.parametrize("state", ["READY", "CREATING"])
def test_on_a_full_disk_the_keeper_ends_nothing(full_disk, how, state):
    server, record = full_disk
    if state == "CREATING":
        server.put("m", state, False)
        server.live["m"]["left"] = 99
    for _turn in range(2):
        (outcome,) = do(server, spec(replica=2), record=record(), how=how).values()
        assert "disk full" in outcome.error and not outcome.changed
        assert writes(server) == [] and set(server.live) == {"m"}


def test_on_a_full_disk_the_keeper_launches_what_is_missing_or_dead(full_disk):
    server, record = full_disk
    for left in ({}, dict(server.live)):
        server.live = left
        (outcome,) = do(server, spec(), record=record(), relaunch=["m"], first_choice=False).values()
        assert outcome.ok and name_of(server) == "bce"
    server.put("m", "ERROR")
    (outcome,) = do(server, spec(replica=2), record=record()).values()
    assert outcome.ok and server.live["m"]["model"]["replica"] == 2
    (outcome,) = do(server, spec(), record=record(), first_choice=False).values()
    assert "disk full" in outcome.error and server.live["m"]["model"]["replica"] == 2
    (outcome,) = do(server, spec(replica=2), record=record(lenient=False), relaunch=["m"]).values()
    assert "disk full" in outcome.error and writes(server) == []


def test_on_a_full_disk_an_alternative_that_could_not_be_noted_goes_on_serving(full_disk):
    server, record = full_disk
    server.live.clear()
    server.behaviour["bce"] = "no"
    entry = spec(fallbacks=[SMALLER])
    for _turn in range(2):
        do(server, entry, record=record(), first_choice=False)
    assert name_of(server) == "small" and writes(server) == []


# -- beside


def test_a_changed_model_is_proven_beside_the_one_that_serves(tmp_path):
    server, record = scripted(), Record(tmp_path / "launched.json")
    do(server, spec(), record=record)
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert outcome.ok and outcome.choice == 0
    assert [line for line in server.log if line.split()[0] in ("launch", "ask", "terminate")] == [
        "launch m-beside",
        "ask m-beside",
        "terminate m-beside",
        "terminate m",
        "launch m",
    ]
    assert [(one.choice, one.beside) for one in outcome.attempts] == [(0, True), (0, False)]
    assert set(Record(tmp_path / "launched.json").entries) == {"m"} and set(server.live) == {"m"}


@pytest.mark.parametrize("how", ["it has a typo", "dumb"])
def test_what_does_not_work_beside_leaves_the_old_one_untouched(how):
    server, record = scripted(worse=how), Record(None)
    do(server, spec(), record=record)
    (outcome,) = do(server, spec(model_name="worse", relaunch="beside"), record=record).values()
    assert not outcome.ok and not outcome.changed and outcome.model["model_name"] == "bce"
    assert outcome.error.endswith("; what ran before was not touched and serves")
    assert set(server.live) - {"m-beside"} == {"m"} and "m-beside" not in record.entries
    assert "terminate m" not in writes(server) and "launch m" not in writes(server)
    entry = record.entries["m"]
    assert (instead_of(entry).number, entry.fingerprint) == (PREVIOUS, spec().fingerprint())
    (kept,) = do(server, spec(model_name="worse"), record=record, first_choice=False).values()
    assert (kept.action, kept.choice) == ("keep", PREVIOUS)
    if how == "dumb":
        assert outcome.diagnosis.name == "probe" and "is no closer to" in outcome.error


def test_without_room_for_two_the_old_one_makes_way():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    server.behaviour["m-beside"] = FULL
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert outcome.ok and [one.beside for one in outcome.attempts] == [True, False]
    assert writes(server) == ["launch m-beside", "terminate m", "launch m"]


def test_going_back_in_vain_beside_interrupts_nobody():
    server, record = scripted(bce="no"), Record(None)
    do(server, falling(), record=record)
    (outcome,) = do(server, falling(), record=record, how="beside").values()
    assert (outcome.ok, outcome.changed, outcome.choice, outcome.why) == (True, False, 1, "no")
    assert outcome.model["model_name"] == "small" and writes(server) == ["launch m-beside"]
    server.behaviour["bce"] = "still not"
    (outcome,) = do(server, falling(), record=record, how="beside").values()
    assert outcome.why == instead_of(record.entries["m"]).why == "still not"


def test_an_alternative_that_somebody_altered_is_launched_anew_even_beside():
    server, record = scripted(bce="no"), Record(None)
    do(server, falling(), record=record)
    server.live["m"]["model"]["replica"] = 7
    (outcome,) = do(server, falling(), record=record, how="beside").values()
    assert outcome.ok and outcome.choice == 1 and server.live["m"]["model"]["replica"] == 1


def test_a_better_alternative_is_proven_beside_a_worse_one():
    server, record = scripted(bce="no", small="no"), Record(None)
    do(server, falling(), record=record)
    del server.behaviour["small"]
    (outcome,) = do(server, falling(), record=record, how="beside").values()
    assert (outcome.ok, outcome.choice, name_of(server)) == (True, 1, "small")
    assert writes(server) == ["launch m-beside", "launch m-beside", "terminate m-beside", "terminate m", "launch m"]


def serving_one(**fields):
    """A server with a model of the record, and the record."""
    server, record = scripted(), Record(None)
    do(server, spec(**fields), record=record)
    return server, record


@pytest.mark.parametrize("prune", ["none", "managed"])
def test_what_an_interrupted_run_left_beside_is_ended_first(prune):
    server, record = serving_one()
    record.begin_trial(spec("m-beside", replica=3), "m")
    server.put("m-beside")
    outcome = do(server, spec(replica=2), record=record, how="beside", prune=prune)["m"]
    assert outcome.ok and writes(server)[:2] == ["terminate m-beside", "launch m-beside"]
    assert set(server.live) == set(record.entries) == {"m"}


def test_what_an_interrupted_run_left_beside_is_ended_by_a_run_that_tries_nothing():
    server, record = serving_one()
    record.begin_trial(spec("m-beside"), "m")
    server.put("m-beside")
    assert [one.action for one in do(server, spec(), record=record).values()] == ["terminate", "keep"]
    assert set(server.live) == set(record.entries) == {"m"}


@pytest.mark.parametrize("state", ["READY", "CREATING", "TERMINATING"])
def test_a_strangers_model_is_never_ended_for_a_trial(state):
    server, record = serving_one()
    server.put("m-beside", state, state == "READY")
    server.live["m-beside"]["left"] = 99
    theirs = server.live["m-beside"]
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert outcome.ok and server.live["m-beside"] is theirs and set(record.entries) == {"m"}
    assert writes(server) == ["launch m-beside-2", "terminate m-beside-2", "terminate m", "launch m"]


@pytest.mark.parametrize("prune", ["none", "managed"])
def test_a_stranger_that_took_the_uid_of_a_trial_that_was_interrupted_is_left_alone(prune):
    server, record = serving_one()
    record.begin_trial(spec("m-beside"), "m")
    server.put("m-beside", model_name="theirs")
    assert do(server, spec(replica=2), record=record, how="beside", prune=prune)["m"].ok
    assert name_of(server, "m-beside") == "theirs" and set(record.entries) == {"m"}


@pytest.mark.parametrize("name", ["theirs", "bce"])
def test_a_stranger_that_is_faster_than_a_trial_is_left_alone(name):
    server, record = serving_one()
    launch = server.launch

    def late(payload, timeout=None):
        if payload["model_uid"] == "m-beside":
            server.put("m-beside", model_name=name)
        return launch(payload, timeout)

    server.launch = late
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert outcome.ok and name_of(server, "m-beside") == name and set(record.entries) == {"m"}
    assert "terminate m-beside" not in writes(server) and "terminate m-beside-2" in writes(server)


def test_a_trial_that_seemed_to_fail_and_has_its_uid_all_the_same_is_ended():
    server, record = scripted("1.8.1"), Record(None)
    do(server, spec(), record=record)
    launch, terminate, lost = server.launch, server.terminate, ServerError("no", 500, BUSY, "POST", "/v1/models")
    failing = [launch, terminate]

    def answer(call, *arguments):
        """Once each: a launch whose answer is lost, and an end that comes to nothing."""
        first = call in failing
        if call is launch or not first:
            call(*arguments)
        if first:
            failing.remove(call)
            raise lost

    server.launch = lambda payload, timeout=None: answer(launch, payload, timeout)
    server.terminate = lambda uid, timeout=None: answer(terminate, uid)
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert outcome.ok and not failing and set(server.live) == set(record.entries) == {"m"}
    assert "launch m-beside-2" in writes(server)


@pytest.mark.parametrize("there", [True, False])
def test_a_sibling_is_never_ended_for_a_trial(there):
    server, record = serving_one()
    sibling = spec("m-beside", model_name="sibling")
    if there:
        do(server, spec(), sibling, record=record)
    outcomes = do(server, spec(replica=2), sibling, record=record, how="beside", limit=1)
    assert all(one.ok for one in outcomes.values()) and name_of(server, "m-beside") == "sibling"
    assert record.entries["m-beside"].ready and "terminate m-beside" not in writes(server)
    assert [name for uid, name in launched(server) if uid == "m-beside"] == ["sibling"]


def test_a_launch_of_a_sibling_that_was_interrupted_is_no_trial():
    server, record = serving_one()
    record.begin(spec("m-beside"))
    server.put("m-beside")
    assert do(server, spec(replica=2), record=record, how="beside", prune="none")["m"].ok
    assert "m-beside" in server.live and set(record.entries) == {"m", "m-beside"}


def test_where_every_uid_for_a_trial_is_taken_nothing_is_touched():
    server, record = serving_one()
    taken = ["m-beside", *(f"m-beside-{turn}" for turn in range(2, 6))]
    for uid in taken:
        server.put(uid)
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert not outcome.ok and writes(server) == [] and set(server.live) == {"m", *taken}
    assert outcome.diagnosis.name == "no-uid" and "replace" in outcome.diagnosis.cure
    assert ", ".join(taken) in outcome.error and record.entries["m"].instead is None


def test_two_models_whose_long_uids_begin_alike_are_tried_at_the_same_time():
    uids = ["m" * 95 + "1", "m" * 95 + "2"]
    server, record = scripted(polls=5), Record(None)
    do(server, *(spec(uid) for uid in uids), record=record)
    outcomes = do(server, *(spec(uid, replica=2) for uid in uids), record=record, how="beside")
    assert all(one.ok and len(one.attempts) == 2 for one in outcomes.values())
    assert set(server.live) == set(record.entries) == set(uids)


def test_what_ends_the_search_ends_it_beside_too():
    server, record = serving_one()
    server.behaviour["worse"] = "key"
    (outcome,) = do(server, spec(model_name="worse", fallbacks=[SMALLER]), record=record, how="beside").values()
    assert outcome.error == "wrong key" and writes(server) == ["launch m-beside"] and name_of(server) == "bce"
    assert record.entries["m"].instead is None


def test_a_model_proven_beside_that_then_fails_gives_way_to_the_old_one():
    server, record = scripted(), Record(None)
    do(server, spec(), record=record)
    server.behaviour["m"] = ["", "of a sudden", ""]
    (outcome,) = do(server, spec(replica=2), record=record, how="beside").values()
    assert not outcome.ok and outcome.choice == PREVIOUS and "brought back" in outcome.error
    assert record.entries["m"].fingerprint == spec().fingerprint()


# -- again


def test_what_may_pass_by_itself_is_tried_again():
    server, told = scripted(m=[BUSY, ""]), []
    (outcome,) = do(server, spec(), listener=lambda uid, event: told.append(event)).values()
    assert outcome.ok and [bool(one.error) for one in outcome.attempts] == [True, False]
    assert any(event.startswith("failed, again in") for event in told)


def test_it_is_tried_again_a_few_times_only():
    server = scripted(bce=BUSY)
    (outcome,) = do(server, falling()).values()
    assert (outcome.ok, outcome.choice) == (True, 1)
    assert [one.choice for one in outcome.attempts] == [0, 0, 0, 1]


def test_what_does_not_heal_is_tried_once():
    server = scripted(m="No module named 'vllm'")
    (outcome,) = do(server, spec()).values()
    assert len(outcome.attempts) == 1 and not outcome.diagnosis.heals
    assert len(do(scripted(m="no idea"), spec())["m"].attempts) == 1


def test_memory_that_is_not_free_yet_is_waited_for_only_where_something_was_ended():
    server, record = scripted(m=["", FULL, ""]), Record(None)
    do(server, spec(), record=record)
    (outcome,) = do(server, spec(replica=2), record=record).values()
    assert outcome.ok and len(outcome.attempts) == 2
    assert len(do(scripted(m=FULL), spec())["m"].attempts) == 1


def test_a_launch_that_the_server_forgot_is_tried_again():
    server = scripted(m=["forgets", ""])
    (outcome,) = do(server, spec()).values()
    assert outcome.ok and outcome.attempts[0].diagnosis.name == "forgotten"


# -- through the front door

ENTRY = {"model_uid": "m", "model_name": "bce", "model_type": "embedding", "model_engine": "st"}


def run(server, root, entry, **options):
    return apply(server, specs_from(server, [entry], [], root), root, **options)


def test_an_alternative_is_no_failure_and_is_told_as_a_notice(tmp_path):
    server = scripted(bce="no")
    entry = {**ENTRY, "fallbacks": [SMALLER]}
    first = run(server, tmp_path, entry, who="Ansible")
    assert first.message == "" and first.changed
    assert [notice.partition(" (")[0] for notice in first.notices] == [
        "m: alternative 1 serves",
        "m: its vectors do not fit those that clients stored while bce served. Let them embed their texts anew, or "
        "bring bce back before they ask.",
    ]
    (row,) = first.models
    assert (row["choice"], row["runs"], row["why"], row["error"]) == (1, "small on tf", "no", "")
    assert [one["error"] for one in row["attempts"]] == ["no", ""]
    kept = run(server, tmp_path, entry, first_choice=False)
    assert not kept.changed and kept.notices == first.notices and kept.models[0]["choice"] == 1
    foretold = run(server, tmp_path, entry, rehearse=True)
    assert foretold.models[0]["action"] == "relaunch" and foretold.models[0]["choice"] == 0
    foretold = run(server, tmp_path, entry, rehearse=True, first_choice=False)
    assert (foretold.models[0]["choice"], foretold.models[0]["why"]) == (1, "no")


def test_an_engine_that_is_still_missing_interrupts_nobody(tmp_path):
    server = scripted(bce="Model bce cannot be run on engine vllm.")
    entry = {**ENTRY, "model_engine": "vllm", "fallbacks": [{"model_engine": "st"}]}
    server.behaviour["m"] = ["Model bce cannot be run on engine vllm.", ""]
    assert run(server, tmp_path, entry).models[0]["choice"] == 1
    server.log.clear()
    again = run(server, tmp_path, entry)
    assert not again.changed and writes(server) == [] and "engines bce" in server.log
    assert "the first choice still cannot run: Failed to import vLLM" in again.models[0]["reason"]
    server.engines = lambda kind, name: {"vllm": [{"model_format": "pytorch"}]}
    back = run(server, tmp_path, entry)
    assert back.changed and (back.models[0]["choice"], server.live["m"]["model"]["model_engine"]) == (0, "vllm")
    server.engines = failing_with(Unreachable("gone"))
    assert not run(server, tmp_path, entry).changed


def test_the_same_embedding_model_on_another_engine_has_the_same_vectors(tmp_path):
    server = scripted(m=["no", ""])
    applied = run(server, tmp_path, {**ENTRY, "fallbacks": [{"model_engine": "tf"}]})
    assert len(applied.notices) == 1 and "alternative 1" in applied.notices[0]
    server = scripted(bce="no")
    assert len(run(server, tmp_path / "2", {**ENTRY, "model_type": "rerank", "fallbacks": [SMALLER]}).notices) == 1


def test_two_models_that_fall_back_do_so_at_the_same_time():
    server, record = scripted(bce="no", polls=5), Record(None)
    specs = [spec(uid, fallbacks=[SMALLER]) for uid in ("a", "b", "c")]
    outcomes = do(server, *specs, record=record)
    assert all(one.ok and one.choice == 1 for one in outcomes.values()) and server.most_at_once == 3


def test_a_rival_ends_the_search():
    server, record = scripted(), Record(None)
    steps = plan([falling()], look(server), record.entries)
    server.put("m", model_name="other")
    (outcome,) = converge(server, steps, record)
    assert (
        not outcome.ok
        and outcome.diagnosis
        and outcome.diagnosis.name == "rival"
        and len(outcome.attempts) == 1
        and not record.entries
    )


def test_an_adopted_launch_that_turns_out_different_is_replaced_by_the_first_choice_that_works():
    server, record = scripted(bce="no", polls=3), Record(None)
    server.put("m", "CREATING", False, model_name="other")
    server.live["m"]["left"] = 3
    (outcome,) = do(server, falling(), record=record).values()
    assert (outcome.ok, outcome.action, outcome.choice) == (True, "relaunch", 1)


def test_a_slow_unwinding_is_waited_for_before_the_alternative():
    server = scripted(bce="hang")
    cancel = server.cancel

    def slowly(uid):
        server._note("cancel", uid)
        threading.Timer(0.5, cancel, (uid,)).start()

    server.cancel = slowly
    start = time.monotonic()
    (outcome,) = do(server, falling(), timeout=0.3).values()
    assert outcome.ok and outcome.choice == 1 and time.monotonic() - start > 0.8
