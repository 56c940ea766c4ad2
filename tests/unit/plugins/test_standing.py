# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of what runs where tells of the keeper what a person has to know at night."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import standing as looking
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_state
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_state import Model, State
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import Running
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from ansible_collections.airgap.xinference.plugins.plugin_utils import standing

NOW = 1_800_000_000.0
SERVER = {"state": "running", "release": "5d41402abc4b", "runs": "x:v4.1.0", "gpus": ["0"], "since": NOW - 7200}
KEEPER = {
    "state": "running",
    "since": NOW - 7200,
    "policy": "restore",
    "server_restarts": 2,
    "problem": "",
    "doing": "",
}
MODEL: dict[str, Any] = {
    "model_uid": "m",
    "state": "ready",
    "since": NOW - 300,
    "error": "",
    "desired": True,
    "by": "the keeper",
    "restarts": 3,
    "verified": {"at": NOW - 60, "ok": True, "detail": "384 dimensions"},
    "notes": ["last fault 6 min ago: the server was started anew", "last cure 5 min ago: launched again by the keeper"],
}


def lines(**changes: Any) -> list[str]:
    found = {"server": SERVER, "keeper": KEEPER, "models": [MODEL], **changes}
    return standing.table({"gpu1": found}, NOW)


def test_every_question_has_its_column() -> None:
    shown = lines()
    assert shown[0].split() == [column.upper() for column in standing.COLUMNS]
    assert shown[1].split()[:5] == ["gpu1", "5d41402abc4b", "x:v4.1.0", "0", "(server)"] and shown[1].split()[-2] == "2"
    assert "(keeper)" in shown[2] and shown[3] == "  policy: restore"
    model = shown[4]
    assert " m " in model and " yes " in model and "(5 min)" in model and " keeper " in model and " 3 " in model
    assert model.endswith("yes (1 min)")
    assert shown[5:7] == [f"  {note}" for note in MODEL["notes"]]
    assert shown[-1] == "1 of 1 servers run; 1 of 1 models are ready."


@pytest.mark.parametrize(
    ("by", "word"),
    [
        ("the Ansible module xinference_model_set", "Ansible"),
        ("the keeper", "keeper"),
        ("somebody else", "somebody else"),
        ("", "-"),
    ],
)
def test_whoever_launched_it_has_a_short_name(by: str, word: str) -> None:
    assert standing.launcher(by) == word


def test_without_a_keeper_nothing_is_made_up() -> None:
    bare = {**MODEL, "restarts": None, "verified": None, "notes": [], "by": "Ansible"}
    shown = lines(keeper={**KEEPER, "state": "off"}, models=[bare])
    assert shown[-2].split()[-3:] == ["Ansible", "-", "-"]
    assert shown[1].split()[-2] == "-"


@pytest.mark.parametrize("state", ["silent", "absent"])
def test_a_keeper_that_ought_to_run_is_loud(state: str) -> None:
    assert any("it ought to run" in line for line in lines(keeper={**KEEPER, "state": state}))


def test_a_model_that_does_not_answer_and_a_keeper_with_a_problem_are_seen() -> None:
    bad = {**MODEL, "verified": {"at": NOW - 60, "ok": False}}
    shown = lines(models=[bad], keeper={**KEEPER, "problem": "the login was refused"})
    assert any("no (1 min)" in line for line in shown) and "  the login was refused" in shown


def test_what_a_failed_launch_left_is_shown_and_not_missed() -> None:
    left = {"model_uid": "m-beside", "state": "failed", "desired": False}
    shown = lines(models=[MODEL, left])
    assert any(" m-beside " in line for line in shown) and shown[-1].endswith("1 of 1 models are ready.")


def test_a_host_that_is_down_is_a_line() -> None:
    shown = standing.table({"gpu1": {}}, NOW)
    assert "unreachable" in shown[1] and len(shown) == 4


# -- what the host finds out


class Client:
    """A server with one model of the release, a stranger, and one model missing."""

    def models(self) -> dict[str, Any]:
        return {uid: {"id": uid, "model_name": "bce"} for uid in ("m", "theirs")}

    def instances(self) -> list[dict[str, Any]]:
        return [{"model_uid": uid, "status": "READY", "instance_created_ts": 5} for uid in ("m", "theirs")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    entries = [{"model_uid": uid, "model_name": "bce", "model_type": "embedding", "model_path": "/"} for uid in "mn"]
    (tmp_path / "current").mkdir()
    (tmp_path / "current/models.json").write_text(json.dumps(entries))
    (tmp_path / "state").mkdir()
    spec = parse(entries)[0]
    Record(tmp_path / "state/launched.json", who="Ansible").settle(
        spec, Running("m", {"model_name": "bce"}, "READY", 5)
    )
    return tmp_path


def test_a_row_knows_the_release_the_record_and_the_keeper(root: Path) -> None:
    client: Any = Client()
    rows = {row["model_uid"]: row for row in looking.models(root, client)}
    assert [(uid, row["state"], row["desired"], row["by"]) for uid, row in rows.items()] == [
        ("m", "ready", True, "Ansible"),
        ("theirs", "ready", False, "somebody else"),
        ("n", "missing", True, ""),
    ]
    assert rows["m"]["restarts"] is None and looking.keeper(root)["state"] == "off"
    (root / "current/keeper.json").write_text("{}")
    state = State(policy="restore", server={"restarts": 4}, started=7.0)
    state.models["m"] = Model("m", by="the keeper", restarts=2, fault={"at": NOW, "what": "gone"})
    assert keeper_state.save(root / "state", state) == ""
    client = Client()
    (row,) = [row for row in looking.models(root, client) if row["model_uid"] == "m"]
    assert (row["restarts"], row["by"], row["fault"]["what"]) == (2, "the keeper", "gone")
    assert "gone" in row["notes"][0]
    assert looking.keeper(root) == {**KEEPER, "since": 7.0, "server_restarts": 4}
