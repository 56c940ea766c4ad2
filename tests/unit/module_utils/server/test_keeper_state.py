# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of the keeper: whole, readable by all, and no reason to fail."""

from __future__ import annotations

import json
import os

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_state as states
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_told
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_state import Model, State

NOW = 1_800_000_000.0


def filled():
    state = State(release="r1", policy="restore", server={"state": "up", "since": NOW - 90, "restarts": 2, "boot": 5.0})
    state.models["m"] = Model(
        "m",
        state="ready",
        kind="running",
        by="the keeper",
        since=NOW - 60,
        served_since=NOW - 50,
        restarts=3,
        faults=4,
        launches=2,
        fault={"at": NOW - 100, "what": "gone"},
        cure={"at": NOW - 50, "what": "launched again by the keeper"},
        verified={"at": NOW - 40, "ok": True, "detail": "384 dimensions", "latency_s": 0.1},
    )
    state.models['quo"te'] = Model('quo"te', state="missing", kind="gone", failures=2, again=NOW + 30, key="k")
    state.foreign = ["theirs"]
    return state


def test_what_is_written_is_read_again(tmp_path):
    assert states.save(tmp_path, filled(), NOW) == ""
    found = states.load(tmp_path)
    assert found.models == filled().models
    assert (found.server["restarts"], found.server["boot"], found.release) == (2, 5.0, "r1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keeper.json", "xinference.prom"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"keeper.json": 0o640, "xinference.prom": 0o644}


def test_everybody_may_read_the_metrics_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        states.save(tmp_path, filled(), NOW)
    finally:
        os.umask(before)
    assert (tmp_path / "xinference.prom").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 99}',
        '{"format": 1, "models": {}}',
        '{"format": 1, "models": [1], "server": {}}',
        '{"format": 1, "models": [{"uid": "m", "restarts": "often"}], "server": {}}',
        '{"format": 1, "models": [{"uid": "m", "since": []}], "server": {}}',
        '{"format": 1, "models": [{"uid": "m", "fault": 5}], "server": {}}',
        '{"format": 1, "models": [], "server": 3}',
        '{"format": 1, "models": [], "server": {"boot": "x"}}',
        "[" * 100000,
    ],
)
def test_what_cannot_be_understood_is_forgotten(tmp_path, text):
    (tmp_path / "keeper.json").write_text(text, encoding="utf-8")
    assert states.load(tmp_path) == State()
    assert keeper_told.lines(tmp_path.parent, NOW)


def test_a_disk_without_room_is_told_and_nothing_is_left_over(tmp_path, monkeypatch):
    states.save(tmp_path, filled(), NOW)
    before = (tmp_path / "keeper.json").read_text(encoding="utf-8")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fchmod", full)
    told = states.save(tmp_path, State(), NOW + 1)
    assert "keeper.json cannot be written: No space left on device" in told and "xinference.prom" in told
    assert (tmp_path / "keeper.json").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keeper.json", "xinference.prom"]


def test_no_directory_is_no_reason_to_fail(tmp_path):
    assert "cannot be written" in states.save(tmp_path / "nowhere", State(), NOW)
    assert states.load(tmp_path / "nowhere") == State()


@pytest.mark.parametrize("jump, wait", [(0, 30), (10, 20), (100, 0), (-100_000, 4320)])
def test_a_clock_that_was_set_holds_no_model_back_for_ever(jump, wait):
    left = states.trouble(filled().models['quo"te'], NOW + jump, 1000.0)
    assert (left.failures, left.key) == (2, "k") and left.until == 1000.0 + wait


def test_metrics_are_what_prometheus_reads():
    text = states.metrics(filled(), NOW)
    assert 'xinference_keeper_model_ready{model_uid="m"} 1\n' in text
    assert 'xinference_keeper_model_ready{model_uid="quo\\"te"} 0\n' in text
    assert 'xinference_keeper_model_restarts_total{model_uid="m"} 3\n' in text
    assert "xinference_keeper_server_up 1\n" in text and "xinference_keeper_foreign_models 1\n" in text
    assert 'model_verified{model_uid="m"} 1' in text and 'model_verified{model_uid="quo' not in text
    for line in text.splitlines():
        assert line.startswith("#") or (len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0)
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and text.endswith("\n")


def test_a_server_that_is_down_serves_no_model():
    state = filled()
    state.server["state"] = "down"
    assert 'xinference_keeper_model_ready{model_uid="m"} 0\n' in states.metrics(state, NOW)


def test_people_read_it_too(tmp_path):
    root = tmp_path
    (root / "state").mkdir()
    (root / "current").mkdir()
    (root / "current/keeper.json").write_text("{}", encoding="utf-8")
    states.save(root / "state", filled(), NOW - 5)
    text = "\n".join(keeper_told.lines(root, NOW))
    assert "keeper: running, last seen 5 s" in text and "server: up for 1 min, 2 restarts seen" in text
    assert "m: ready since 1 min ago, launched by the keeper" in text
    assert "last fault 1 min ago: gone" in text and "last cure 50 s ago: launched again by the keeper" in text
    assert "did not stay up 2 times in a row; tried again in 30 s" in text and "not ours, left alone: theirs" in text


def test_it_shows_when_the_keeper_is_silent_or_off_or_was_ended(tmp_path):
    (tmp_path / "state").mkdir()
    assert keeper_told.told(tmp_path)["state"] == "off"
    (tmp_path / "current").mkdir()
    (tmp_path / "current/keeper.json").write_text("{}", encoding="utf-8")
    assert keeper_told.told(tmp_path)["state"] == "absent"
    states.save(tmp_path / "state", filled(), NOW)
    assert keeper_told.told(tmp_path, NOW + 100)["state"] == "running"
    assert keeper_told.told(tmp_path, NOW + 1000)["state"] == "silent"
    told = json.loads((tmp_path / "state/keeper.json").read_text(encoding="utf-8"))
    (tmp_path / "state/keeper.json").write_text(json.dumps({**told, "doing": "ended"}), encoding="utf-8")
    assert keeper_told.told(tmp_path, NOW + 1000)["state"] == "ended"


@pytest.mark.parametrize(
    "change",
    [
        {"server": [1]},
        {"server": {"restarts": float("inf")}},
        {"refused": "soon"},
        {"refused": {"until": "soon"}},
        {"models": [{"uid": "a", "restarts": float("inf")}]},
        {"models": [{"uid": "a", "fault": {"at": "x"}}]},
        {"models": [{"uid": "a", "fault": "x"}]},
        {"models": [{"uid": "a", "again": "x"}]},
        {"models": [{"uid": "a", "since": float("nan")}]},
    ],
)
def test_what_no_keeper_wrote_is_not_gone_by(tmp_path, change):
    states.save(tmp_path, filled(), NOW)
    told = json.loads((tmp_path / "keeper.json").read_text(encoding="utf-8"))
    (tmp_path / "keeper.json").write_text(json.dumps({**told, **change}), encoding="utf-8")
    assert states.load(tmp_path) == states.State()
