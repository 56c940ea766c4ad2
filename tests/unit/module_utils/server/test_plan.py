# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens to a model: every case of what is wanted, what runs and what the record says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan, standing, visible_drift
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import PREVIOUS, Entry, Instead
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import Running, combine
from ansible_collections.airgap.xinference.plugins.module_utils.server.schedule import share_gpu, startable
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse

SHOWN = {"model_name": "bce", "model_type": "embedding", "model_engine": "st", "replica": 1}


def spec(uid="m", gpus=(), **fields):
    entry = {"model_uid": uid, "model_name": "bce", "model_type": "embedding", "model_engine": "st", **fields}
    if gpus:
        entry["gpus"] = list(gpus)
    return parse([entry], server_gpus=range(8))[0]


def running(uid="m", status="READY", listed=True, since=100, replicas=(), error="", **shown):
    return {uid: Running(uid, {**SHOWN, **shown} if listed else None, status, since, list(replicas), error)}


def entry(of, ready=True, since=100, **shown):
    seen = Running(of.uid, {**SHOWN, **shown})
    return {of.uid: Entry(of.fingerprint(), of.payload(), ready, 1.0, since, seen.shown if ready else {})}


def one(desired, *arguments, **options):
    (step,) = plan(desired, *arguments, **options)
    return step


def test_a_model_that_does_not_run_is_launched():
    step = one([spec()], {}, {})
    assert (step.action, step.uid, step.reason, step.before) == ("launch", "m", "not running", None)
    assert step.after == spec().payload()


def test_a_model_that_vanished_is_launched_and_that_is_said():
    step = one([spec()], {}, entry(spec()))
    assert step.action == "launch" and "gone from the server since" in step.reason


def test_a_model_that_runs_as_recorded_is_kept():
    step = one([spec()], running(), entry(spec()))
    assert (step.action, step.changes, step.before) == ("keep", False, step.after)


def test_any_changed_field_relaunches_and_is_named():
    step = one([spec(options={"batch_size": 8})], running(), entry(spec(replica=2)))
    assert step.action == "relaunch"
    assert step.reason == "batch_size 8 is new; replica 2 is gone"
    assert step.before == spec(replica=2).payload()


def test_changed_content_is_a_changed_path():
    step = one([spec(model_path="/m/b")], running(), entry(spec(model_path="/m/a")))
    assert step.action == "relaunch" and "model_path was /m/a, becomes /m/b" in step.reason


def test_relaunch_can_be_asked_for():
    assert one([spec()], running(), entry(spec()), relaunch=["m"]).action == "relaunch"
    assert one([spec()], {}, {}, relaunch=["m"]).action == "launch"


def test_a_model_of_somebody_else_is_taken_over_when_it_is_the_same():
    step = one([spec()], running(), {})
    assert step.action == "adopt" and step.changes


@pytest.mark.parametrize(
    ("shown", "fields", "words"),
    [
        ({"model_name": "bge"}, {}, "model_name is bge, wanted bce"),
        ({"model_type": "rerank"}, {}, "model_type"),
        ({"replica": 2}, {}, "replica is 2, wanted 1"),
        ({"model_size_in_billions": 7}, {"model_size_in_billions": 0.5}, "wanted 0_5"),
        ({"accelerators": ["3"]}, {"gpus": [1]}, "GPU 3, wanted 1"),
    ],
)
def test_a_different_model_of_somebody_else_is_replaced(shown, fields, words):
    step = one([spec(**fields)], running(**shown), {})
    assert step.action == "relaunch" and words in step.reason


@pytest.mark.parametrize(
    ("shown", "fields"),
    [
        ({"model_engine": "ST"}, {}),
        ({"model_engine": None}, {}),
        ({"model_size_in_billions": "0_5"}, {"model_size_in_billions": "0.5"}),
        ({"quantization": "none"}, {}),
        ({"accelerators": ["1"]}, {"gpus": [1, 2]}),
        ({"accelerators": []}, {"gpus": [1]}),
    ],
)
def test_other_words_for_the_same_are_no_drift(shown, fields):
    assert visible_drift(spec(**fields), running(**shown)["m"]) == []


@pytest.mark.parametrize("status", ["CREATING", "LOADING", "UPDATING"])
def test_launches_under_way_are_waited_for_never_doubled(status):
    under_way = running(status=status, listed=False)
    assert one([spec()], under_way, {}).action == "adopt"
    kept = one([spec()], under_way, entry(spec(), ready=False))
    assert kept.action == "keep" and "waited for" in kept.reason
    assert one([spec(replica=2)], under_way, entry(spec(), ready=False)).action == "relaunch"


def test_a_replica_that_still_loads_is_a_launch_under_way():
    assert running(replicas=["READY", "LOADING"])["m"].state == "starting"
    assert running(replicas=["READY", "READY"])["m"].state == "ready"


def test_a_finished_launch_of_an_interrupted_run_is_kept():
    assert one([spec()], running(), entry(spec(), ready=False)).action == "keep"


def test_ghosts_of_failed_launches_are_launched_again_with_the_reason():
    step = one([spec()], running(status="ERROR", listed=False, error="no\nway"), {})
    assert step.action == "launch" and step.reason == "its last launch failed: no"
    assert one([spec()], running(status="ERROR"), entry(spec())).action == "relaunch"
    assert one([spec()], running(listed=False), {}).action == "launch"
    assert one([spec()], running(status="TERMINATING", listed=False), {}).action == "launch"


def test_a_change_made_on_the_server_is_seen():
    step = one([spec()], running(replica=3), entry(spec()))
    assert step.action == "relaunch" and "replica was 1, is 3" in step.reason


def test_a_fact_that_the_record_does_not_have_yet_relaunches_nothing():
    recorded = entry(spec())
    old = {name: value for name, value in recorded["m"].shown.items() if name not in ("replica", "model_engine")}
    recorded["m"] = replace(recorded["m"], shown=old)
    assert one([spec()], running(), recorded).action == "keep"
    assert one([spec()], running(model_name="x"), recorded).action == "relaunch"
    assert one([], running(since=200), recorded).action == "terminate"


def test_a_relaunch_by_somebody_else_is_seen():
    step = one([spec()], running(since=200), entry(spec()))
    assert step.action == "adopt" and "somebody else on 1970-01-01 at 00:03 UTC" in step.reason
    step = one([spec()], running(since=200, model_name="x"), entry(spec(), model_name="x"))
    assert step.action == "relaunch" and "model_name is x" in step.reason
    assert one([spec()], running(since=None), entry(spec())).action == "keep"


def test_a_server_with_an_absurd_clock_breaks_nothing():
    assert "at an unknown time" in one([spec()], running(since=10**30), entry(spec())).reason


def test_only_our_own_models_are_pruned():
    both = {**running("ours"), **running("theirs")}
    assert [(s.action, s.uid) for s in plan([], both, entry(spec("ours")))] == [("terminate", "ours")]
    everything = plan([], both, entry(spec("ours")), prune="all")
    assert [(s.action, s.uid) for s in everything] == [("terminate", "ours"), ("terminate", "theirs")]
    assert plan([], both, entry(spec("ours")), prune="none") == []
    with pytest.raises(ValueError, match="managed, all, none"):
        plan([], {}, {}, prune="some")


def test_a_model_that_replaced_ours_is_left_alone():
    step = one([], running(since=200, model_name="other"), entry(spec()))
    assert step.action == "cleanup" and "left alone" in step.reason
    assert one([], running(since=200), entry(spec())).action == "terminate"


def test_what_is_not_wanted_and_does_not_run_is_forgotten_once():
    assert one([], {}, entry(spec())).action == "cleanup"
    failed = running(status="ERROR", listed=False)
    assert one([], failed, entry(spec())).action == "cleanup"
    assert plan([], failed, {}) == plan([], failed, {}, prune="all") == []


def test_order_is_removals_then_small_models_then_llms():
    desired = [
        spec("llm", model_type="LLM"),
        spec("audio", model_type="audio"),
        spec("rerank", model_type="rerank"),
        spec("b"),
        spec("a"),
    ]
    steps = plan(desired, running("old"), entry(spec("old")))
    assert [step.uid for step in steps] == ["old", "b", "a", "rerank", "audio", "llm"]


def test_secrets_are_hidden_everywhere():
    asked = spec(envs={"HF_TOKEN": "s3cret", "OMP": 4}, options={"api_key": "s3cret"})
    recorded = spec(envs={"HF_TOKEN": "0ld", "OMP": 4}, options={"api_key": "0ld"})
    step = one([asked], running(), entry(recorded))
    assert step.action == "relaunch" and "envs" in step.reason
    assert "s3cret" not in repr((step.before, step.after, step.reason)) and "0ld" not in step.reason
    assert "0ld" not in repr((step.before, step.after))


def test_the_two_lists_of_a_server_become_one():
    found = combine(
        {"a": SHOWN, "old": SHOWN},
        [
            {"model_uid": "a", "status": "READY", "instance_created_ts": 5, "replica_statuses": [{"status": "READY"}]},
            {
                "model_uid": "b",
                "status": "ERROR",
                "replica_statuses": [{"status": "ERROR", "error_message": "x"}, {"error_message": "x"}],
            },
            {"model_uid": "c", "status": "CREATING"},
            {"model_uid": "d", "status": "TERMINATED"},
            {"model_uid": "e", "status": "READY", "replica_statuses": None},
        ],
    )
    states = {uid: one.state for uid, one in found.items()}
    assert states == {"a": "ready", "old": "ready", "b": "failed", "c": "starting", "e": "lost"}
    assert found["b"].error == "x" and found["a"].since == 5


# -- what may run at once


def steps_of(*specs, limit=4, active=()):
    return [step.uid for step in startable(plan(specs, {}, {}), active, limit)]


def test_models_start_together_within_the_limit():
    assert steps_of(spec("a"), spec("b"), spec("c")) == ["a", "b", "c"]
    assert steps_of(spec("a"), spec("b"), spec("c"), limit=2) == ["a", "b"]


def test_models_sharing_a_gpu_with_a_measuring_engine_start_in_turn():
    embedding, vllm = spec("e", gpus=[0]), spec("v", gpus=[0, 1], model_type="LLM", model_engine="vLLM")
    other = spec("o", gpus=[2], model_type="LLM", model_engine="sglang")
    assert steps_of(embedding, vllm, other) == ["e", "o"]
    (active,) = plan([embedding], {}, {})
    assert [step.uid for step in startable(plan([vllm, other], {}, {}), [active], 4)] == ["o"]


def test_where_nothing_is_shared_llms_start_first():
    models = [spec("e", gpus=[0]), spec("llm", gpus=[1], model_type="LLM"), spec("a", gpus=[2], model_type="audio")]
    assert steps_of(*models) == ["llm", "a", "e"] and steps_of(*models, limit=1) == ["llm"]
    assert steps_of(*models, spec("r", gpus=[0], model_type="rerank")) == ["e", "r", "a", "llm"]
    anywhere = [spec("e"), spec("llm", model_type="LLM", model_engine="vllm")]
    assert steps_of(*anywhere) == ["e"]
    assert [step.uid for step in startable(plan(anywhere, {}, {}), [], 4, gpus=False)] == ["llm", "e"]


def test_a_waiting_model_is_not_overtaken_on_its_gpu():
    first = spec("1", gpus=[0], model_engine="vllm")
    second = spec("2", gpus=[0, 1], model_engine="vllm")
    third = spec("3", gpus=[1], model_engine="vllm")
    assert steps_of(first, second, third) == ["1"]


def test_where_a_model_may_land_anywhere_it_may_share():
    assert share_gpu(spec("a"), spec("b", gpus=[1]))
    assert not share_gpu(spec("a", n_gpu=None), spec("b"))
    assert not share_gpu(spec("a", gpus=[0]), spec("b", gpus=[1]))


def test_launches_wait_for_removals():
    steps = plan([spec("new")], running("old"), entry(spec("old")))
    assert [step.uid for step in startable(steps, [], 4)] == ["old"]
    assert startable(steps[1:], steps[:1], 4) == []
    assert [step.uid for step in startable(steps[1:], [], 4)] == ["new"]


# -- alternatives

SMALLER = {"model_name": "small", "model_engine": "tf"}
SMALLEST = {"model_name": "tiny", "replica": 2}
FAULT = "No module named 'vllm'"


def falling(**fields):
    """A first choice with two alternatives."""
    return spec(fallbacks=[SMALLER, SMALLEST], **fields)


def alternative(number=1, ready=True, since=100, first=None, **shown):
    """The record of an alternative that was launched because the first choice failed."""
    first = first or falling()
    chosen = first.choices[number]
    served = {"model_name": chosen.name, "model_engine": "tf", "replica": chosen.fields.get("replica", 1)}
    seen = Running("m", {**SHOWN, **served, **shown})
    instead = Instead(number, first.fingerprint(), FAULT, "package-missing")
    return {"m": Entry(chosen.fingerprint(), chosen.payload(), ready, 1.0, since, seen.shown, "x", instead)}


def numbers(step):
    return [choice.number for choice in step.tries]


def small(**shown):
    return running(model_name="small", model_engine="tf", **shown)


def test_all_choices_are_tried_in_order():
    step = one([falling()], {}, {})
    assert (step.action, numbers(step), step.after["model_name"]) == ("launch", [0, 1, 2], "bce")
    assert [choice.spec.name for choice in step.tries] == ["bce", "small", "tiny"]
    assert numbers(one([spec()], {}, {})) == [0]


def test_an_operators_run_goes_back_to_the_first_choice():
    step = one([falling()], small(), alternative())
    assert (step.action, numbers(step), step.before["model_name"], step.after["model_name"]) == (
        "relaunch",
        [0, 1, 2],
        "small",
        "bce",
    )
    assert step.reason == (
        f"alternative 1 serves (small on tf) because the first choice failed: {FAULT}; the first choice is tried again"
    )
    assert step.previous["model_name"] == "small"


def test_nobody_else_goes_back():
    step = one([falling()], small(), alternative(), first_choice=False)
    assert (step.action, step.changes, numbers(step), step.instead.number) == ("keep", False, [1], 1)
    assert FAULT in step.reason and step.after["model_name"] == "small"
    step = one(
        [falling()], running(model_name="tiny", model_engine="tf", replica=2), alternative(2), first_choice=False
    )
    assert (step.action, numbers(step)) == ("keep", [2])


def test_a_first_choice_that_still_cannot_run_interrupts_nobody():
    step = one([falling()], small(), alternative(), hindered={"m": "vLLM is not there"})
    assert step.action == "keep" and step.reason.endswith("the first choice still cannot run: vLLM is not there")
    assert one([falling()], {}, alternative(), hindered={"m": "vLLM is not there"}).action == "launch"
    assert one([falling()], small(replica=9), alternative(), hindered={"m": "vLLM is not there"}).action == "relaunch"
    asked = one([falling()], small(), alternative(), relaunch=["m"], hindered={"m": "x"})
    assert (asked.action, numbers(asked)) == ("relaunch", [0, 1, 2])
    asked = one([falling()], small(), alternative(), relaunch=["m"], first_choice=False)
    assert (asked.action, numbers(asked)) == ("relaunch", [1, 0, 2])


def test_what_ran_last_comes_back_first_without_an_operators_word():
    step = one([falling()], {}, alternative(2), first_choice=False)
    assert (step.action, numbers(step)) == ("launch", [2, 0, 1])
    assert numbers(one([falling()], {}, alternative(2))) == [0, 1, 2]
    failed = one([falling()], small(status="ERROR", listed=False), alternative(), first_choice=False)
    assert (failed.action, numbers(failed)) == ("launch", [1, 0, 2])


def test_a_changed_first_choice_is_tried_whoever_asks():
    for word in (True, False):
        step = one([falling(request_limits=7)], small(), alternative(), first_choice=word)
        assert (step.action, numbers(step)) == ("relaunch", [0, 1, 2])


def test_a_changed_alternative_is_launched_anew_and_a_new_order_is_none():
    changed = spec(fallbacks=[{**SMALLER, "replica": 3}, SMALLEST])
    assert one([changed], small(), alternative(), first_choice=False).action == "relaunch"
    turned = spec(fallbacks=[SMALLEST, SMALLER])
    step = one([turned], small(), alternative(), first_choice=False)
    assert (step.action, numbers(step)) == ("keep", [2])


def test_what_was_brought_back_stays_until_an_operator_comes():
    old, new = spec(replica=2), spec(replica=3)
    instead = Instead(PREVIOUS, new.fingerprint(), "it does not fit")
    recorded = {uid: replace(one, instead=instead) for uid, one in entry(old, replica=2).items()}
    seen = running(replica=2)
    kept = one([new], seen, recorded, first_choice=False)
    assert (kept.action, numbers(kept), kept.after) == ("keep", [PREVIOUS], old.payload())
    assert kept.reason == "what ran before serves (bce on st) because the first choice failed: it does not fit"
    again = one([new], seen, recorded)
    assert (again.action, numbers(again), again.previous) == ("relaunch", [0], old.payload())
    back = one([new], {}, recorded, first_choice=False)
    assert (back.action, numbers(back), back.tries[0].spec.payload()) == ("launch", [PREVIOUS, 0], old.payload())
    newer = one([spec(replica=4)], seen, recorded, first_choice=False)
    assert newer.action == "relaunch"
    assert one([old], seen, recorded, first_choice=False).instead is None


def test_an_interrupted_launch_of_an_alternative_is_waited_for():
    recorded = alternative(ready=False)
    under_way = small(status="CREATING", listed=False)
    step = one([falling()], under_way, recorded, first_choice=False)
    assert (step.action, numbers(step), step.instead.number) == ("keep", [1], 1)
    assert one([falling()], under_way, recorded).action == "relaunch"


def test_what_was_ended_for_a_launch_is_not_forgotten():
    old = spec(replica=2)
    recorded = {uid: replace(one, previous=old.payload()) for uid, one in entry(spec(), ready=False).items()}
    assert one([spec()], {}, recorded).previous == old.payload()
    assert one([spec(replica=3)], running(status="CREATING", listed=False), recorded).previous == old.payload()
    assert one([spec(replica=3)], running(), entry(spec())).previous == spec().payload()
    assert one([spec()], {}, {}).previous is None


@pytest.mark.parametrize(
    "left", [{}, running(), running(status="TERMINATING"), running(status="ERROR"), running(status="CREATING")]
)
def test_what_ran_is_known_wherever_an_interrupted_run_ended_it(left):
    assert one([spec(replica=3)], left, entry(spec())).previous == spec().payload()


def test_what_an_interrupted_run_launched_is_what_ran_before_once_it_serves():
    older = spec(replica=2).payload()
    recorded = {uid: replace(known, previous=older) for uid, known in entry(spec(), ready=False).items()}
    assert one([spec(replica=3)], running(), recorded).previous == spec().payload()
    assert one([spec(replica=3)], running(status="ERROR"), recorded).previous == older


def test_a_trial_that_was_interrupted_goes_and_is_nothing_that_ran_before():
    trial = {uid: replace(one, trial_of="m") for uid, one in entry(spec("m-beside"), ready=False).items()}
    assert one([], running("m-beside"), trial).action == "terminate"
    assert one([], running("m-beside", status="CREATING", listed=False), trial).action == "terminate"
    assert one([], running("m-beside", model_name="theirs"), trial).action == "cleanup"
    wanted = one([spec("m-beside", replica=2)], running("m-beside"), trial)
    assert (wanted.action, wanted.previous, wanted.wanted) == ("relaunch", None, {"m-beside"})


def test_a_stranger_that_is_an_alternative_is_taken_over_only_by_who_may_not_go_back():
    step = one([falling()], small(), {}, first_choice=False)
    assert (step.action, numbers(step), step.instead.number) == ("adopt", [1], 1)
    assert one([falling()], small(), {}).action == "relaunch"
    assert one([falling()], running(model_name="other"), {}, first_choice=False).action == "relaunch"
    assert numbers(one([falling()], running(), {})) == [0]


def test_drift_of_an_alternative_is_seen():
    step = one([falling()], small(replica=4), alternative(), first_choice=False)
    assert step.action == "relaunch" and "replica was 1, is 4" in step.reason and numbers(step) == [1, 0, 2]
    step = one([falling()], small(since=200), alternative(), first_choice=False)
    assert (step.action, numbers(step), step.instead.number) == ("adopt", [1], 1)


def test_a_model_is_launched_beside_the_one_that_serves_where_that_is_asked_for():
    def beside(*arguments, **options):
        return one(*arguments, **options).beside

    changed, served = spec(replica=2), (running(), entry(spec()))
    assert beside([changed], *served, how="beside") and not beside([changed], *served)
    assert beside([spec(replica=2, relaunch="beside")], *served)
    assert not beside([spec(replica=2, relaunch="replace")], *served, how="beside")
    assert not beside([spec()], {}, {}, how="beside")
    assert not beside([changed], running(status="ERROR"), entry(spec()), how="beside")


def test_standing():
    (recorded,) = alternative(2).values()
    assert standing(falling(), recorded) == 2
    assert standing(falling(), entry(falling())["m"]) == 0
    assert standing(spec(replica=5), recorded) is None
    assert standing(spec(), recorded) is None


def test_models_wait_for_whatever_may_be_launched_before_them():
    first = spec("a", gpus=[0], fallbacks=[{"model_name": "x", "model_engine": "vllm", "gpus": [1]}])
    second, third = spec("b", gpus=[1]), spec("c", gpus=[0])
    assert steps_of(first, second) == ["a"]
    assert steps_of(third, first) == ["c"]
    assert steps_of(spec("a", gpus=[0], fallbacks=[{"replica": 2, "gpus": [2, 3]}]), second) == ["a", "b"]
