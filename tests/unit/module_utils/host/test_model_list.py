# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another list of models in the release in force."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import release
from ansible_collections.airgap.xinference.plugins.module_utils.host.model_list import put_in_force
from ansible_collections.airgap.xinference.plugins.module_utils.host.release import Entry, ReleaseError

OLD: Dict[str, Entry] = {
    "models.json": Entry("[]\n", 0o400),
    "artifacts.json": Entry("{}\n"),
    "registrations.json": Entry('[{"model_type": "LLM"}]\n', 0o400),
    "bin/keeper.pyz": Entry(data=b"PK\xff"),
}
MODELS = [{"model_uid": "a", "envs": {"HF_TOKEN": "hidden"}}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    release.make(tmp_path, OLD)
    release.switch(tmp_path, release.identity(OLD))
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "state/artifacts.json").write_text('{"models": {"bge": {"path": "/b"}}}', encoding="utf-8")
    return tmp_path


def test_the_lists_become_others_and_all_else_stays(root: Path) -> None:
    assert put_in_force(root, MODELS, rehearse=False)
    now = release.in_force(root)
    assert json.loads(now["models.json"].text) == MODELS
    assert json.loads(now["artifacts.json"].text) == {"models": {"bge": {"path": "/b"}}}
    assert {name: entry for name, entry in now.items() if name in ("registrations.json", "bin/keeper.pyz")} == {
        name: entry for name, entry in OLD.items() if name in ("registrations.json", "bin/keeper.pyz")
    }
    assert stat.S_IMODE((root / "current/models.json").stat().st_mode) == 0o400
    assert set(release.history(root)) == {release.identity(OLD), release.current(root)}
    assert not put_in_force(root, MODELS, rehearse=False), "a second time there is nothing to change"


def test_a_rehearsal_tells_and_writes_nothing(root: Path) -> None:
    before = sorted(root.rglob("*"))
    assert put_in_force(root, MODELS, rehearse=True)
    assert sorted(root.rglob("*")) == before and release.current(root) == release.identity(OLD)


def test_nothing_happens_where_no_release_is_in_force(tmp_path: Path) -> None:
    assert not put_in_force(tmp_path, MODELS, rehearse=False)
    (tmp_path / "current").symlink_to("releases/0123456789ab")
    assert not put_in_force(tmp_path, MODELS, rehearse=False)
    assert not (tmp_path / "releases").exists()


@pytest.mark.parametrize("rehearse", [True, False])
def test_a_release_that_somebody_changed_is_not_built_upon(root: Path, rehearse: bool) -> None:
    (root / "current/artifacts.json").chmod(0o644)
    with pytest.raises(ReleaseError, match=r"playbooks/serve\.yml"):
        put_in_force(root, MODELS, rehearse)
