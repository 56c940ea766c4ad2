# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A release is read as a whole or not at all."""

from __future__ import annotations

import json

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keeper_release as releases
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_release import Settings, Unreadable

ENTRIES = [{"model_uid": "m", "model_name": "bce"}, {"model_uid": "n", "model_name": "bce"}]
FILES = {
    "keeper.json": {"endpoint": "http://127.0.0.1:9997", "policy": "report", "interval": 3, "later": True},
    "server.json": {"backend": "native", "gpus": []},
    "models.json": ENTRIES,
}


def put(root, name="one", **files):
    directory = root / "releases" / name
    directory.mkdir(parents=True)
    for file, content in {**FILES, **{key.replace("_", "."): value for key, value in files.items()}}.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / file).write_text(text, encoding="utf-8")
    link = root / "new"
    link.symlink_to(f"releases/{name}")
    link.replace(root / "current")


def test_it_says_what_to_look_after_and_how(tmp_path):
    put(tmp_path, credentials_json={"username": "admin", "password": "12345678"})
    found = releases.load(tmp_path)
    assert (found.id, found.entries, found.registrations) == ("one", tuple(ENTRIES), ())
    assert found.settings == Settings("http://127.0.0.1:9997", "report", 3.0)
    assert found.login == {"username": "admin", "password": "12345678"}
    assert found.entry("n") == ENTRIES[1] and found.entry("x") == {}


def test_a_model_is_known_by_its_entry_and_its_release(tmp_path):
    put(tmp_path)
    before = releases.load(tmp_path)
    put(tmp_path, "two", models_json=[ENTRIES[0], {**ENTRIES[1], "model_path": "/n"}])
    after = releases.load(tmp_path)
    assert before.key("m") != before.key("n") and before.key("m") != after.key("m")
    assert before.key("n").split(":")[1] != after.key("n").split(":")[1]
    assert before.key("m").split(":")[1] == after.key("m").split(":")[1]


@pytest.mark.parametrize(
    "files",
    [
        {"models_json": None},
        {"models_json": "[{"},
        {"models_json": {}},
        {"models_json": ["m"]},
        {"models_json": "[" * 100000},
        {"server_json": None},
        {"keeper_json": None},
        {"keeper_json": []},
        {"keeper_json": {"policy": "restore"}},
        {"keeper_json": {"endpoint": "http://x", "interval": "often"}},
        {"registrations_json": "nothing"},
        {"credentials_json": "[]"},
    ],
)
def test_half_a_release_is_none(tmp_path, files):
    put(tmp_path, **files)
    with pytest.raises(Unreadable, match="releases/one/"):
        releases.load(tmp_path)


def test_no_release_is_said_to_be_none(tmp_path):
    with pytest.raises(Unreadable, match="no release is in force"):
        releases.load(tmp_path)
    (tmp_path / "current").symlink_to("releases/gone")
    with pytest.raises(Unreadable, match="missing"):
        releases.load(tmp_path)


def test_nonsense_in_settings_never_makes_a_busy_loop(tmp_path):
    wild = {"endpoint": "http://x", "interval": 0, "grace": -5, "parallel": 0, "verify": -1, "policy": "hope"}
    put(tmp_path, keeper_json=wild)
    found = releases.load(tmp_path).settings
    assert (found.interval, found.grace, found.parallel, found.verify, found.policy) == (1, 0, 1, 0, "restore")
