# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the keeper calls what it finds, and what its policy lets it do about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_drift as drift
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_drift import findings, may_act
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Entry, Instead
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import Running
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse

MODEL = {"model_uid": "m", "model_name": "bce", "model_type": "embedding", "model_path": "/m"}
(SPEC,) = parse([MODEL])
SHOWN = {"model_name": "bce", "model_type": "embedding", "replica": 1}
READY = Running("m", SHOWN, "READY", 77)
ENTRY = Entry(SPEC.fingerprint(), SPEC.payload(), True, 70.0, 77, READY.shown, "Ansible")


def one(running=None, entry=ENTRY, spec=SPEC, served=(), stopped=()):
    seen = {"m": running} if running else {}
    (found,) = findings([spec], seen, {"m": entry} if entry else {}, served, stopped)
    return found


def test_a_model_as_wanted_is_running():
    found = one(READY)
    assert (found.kind, found.state, found.since, found.to_do) == (drift.RUNNING, "ready", 77, False)


@pytest.mark.parametrize(
    "running, entry, served, kind",
    [
        (None, ENTRY, (), drift.GONE),
        (None, None, (), drift.NEW),
        (None, ENTRY, ("m",), drift.STOPPED),
        (None, None, ("m",), drift.STOPPED),
        (None, replace(ENTRY, ready=False), (), drift.GONE),
        (None, replace(ENTRY, fingerprint="sha256:old"), (), drift.CHANGED),
        (READY, replace(ENTRY, fingerprint="sha256:old"), ("m",), drift.CHANGED),
        (replace(READY, status="ERROR"), ENTRY, ("m",), drift.FAILED),
        (Running("m", None, "ERROR"), ENTRY, (), drift.FAILED),
        (Running("m", None, "ERROR"), None, (), drift.NEW),
        (Running("m", None, "READY"), ENTRY, ("m",), drift.FAILED),
        (Running("m", None, "LOADING"), ENTRY, (), drift.STARTING),
        (Running("m", None, "LOADING"), None, (), drift.STARTING),
        (Running("m", SHOWN, "TERMINATING"), ENTRY, ("m",), drift.STARTING),
        (READY, None, (), drift.TAKEN),
        (READY, replace(ENTRY, ready=False), (), drift.TAKEN),
        (replace(READY, since=99), ENTRY, (), drift.TAKEN),
        (replace(READY, model={**SHOWN, "model_name": "other"}), ENTRY, (), drift.ALTERED),
        (replace(READY, model={**SHOWN, "model_name": "other"}), None, (), drift.ALTERED),
    ],
)
def test_everything_has_a_name(running, entry, served, kind):
    found = one(running, entry, served=served)
    assert found.kind == kind and found.text
    assert found.to_do == (kind != drift.STARTING)


def test_a_model_stopped_by_hand_stays_one_until_it_runs():
    assert one(None, None, stopped=("m",)).kind == drift.STOPPED
    assert one(READY, stopped=("m",)).kind == drift.RUNNING


def test_an_alternative_that_runs_is_kept_and_comes_back_as_it_was():
    (spec,) = parse([{**MODEL, "fallbacks": [{"model_path": "/small"}]}])
    second = spec.fallbacks[0]
    instead = Instead(1, spec.fingerprint(), "it does not fit")
    entry = Entry(second.fingerprint(), second.payload(), True, 70.0, 77, READY.shown, "Ansible", instead)
    assert one(READY, entry, spec).kind == drift.RUNNING
    assert one(None, entry, spec).kind == drift.GONE
    (other,) = parse([{**MODEL, "model_path": "/new", "fallbacks": [{"model_path": "/small"}]}])
    assert one(READY, entry, other).kind == drift.CHANGED


def test_strangers_and_what_is_no_longer_wanted_are_named_and_nothing_else():
    theirs = Running("theirs", SHOWN, "READY", 5)
    old = Running("old", SHOWN, "READY", 5)
    broken = Running("broken", None, "ERROR")
    seen = {one.uid: one for one in (READY, theirs, old, broken)}
    found = {one.uid: one for one in findings([SPEC], seen, {"m": ENTRY, "old": ENTRY})}
    assert {uid: one.kind for uid, one in found.items()} == {
        "m": drift.RUNNING,
        "old": drift.LEFT,
        "theirs": drift.FOREIGN,
    }
    assert not any(may_act(found[uid].kind, policy) for uid in ("old", "theirs") for policy in drift.POLICIES)


@pytest.mark.parametrize("policy", drift.POLICIES)
def test_faults_are_mended_under_every_policy_and_wishes_only_where_that_is_wanted(policy):
    assert all(may_act(kind, policy) for kind in (drift.GONE, drift.FAILED, drift.NEW, drift.CHANGED, drift.TAKEN))
    assert all(may_act(kind, policy) is (policy == drift.RESTORE) for kind in (drift.STOPPED, drift.ALTERED))
    assert not may_act(drift.RUNNING, policy) and not may_act(drift.STARTING, policy)
