# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens to a model: every case of what is wanted, what runs and what the record says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan, visible_drift
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Entry
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
