# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""As whom a container runs, and what is given to that user. Giving needs root; the rest does not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import container_user
from ansible_collections.airgap.xinference.plugins.module_utils.host.container_user import UserError

ROOTLESS = {"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}


@pytest.mark.parametrize(("wanted", "user"), [("", ""), ("1000", "1000:1000"), ("1000:50", "1000:50")])
def test_a_user_is_a_number(wanted: str, user: str) -> None:
    assert container_user.user_of(wanted, {}) == user


@pytest.mark.parametrize("wanted", ["xinference", "1000:", "-1", "1000:staff", "1 "])
def test_a_name_is_refused_because_a_container_does_not_know_it(wanted: str) -> None:
    with pytest.raises(UserError, match=r"xinference_server_user is .* uid:gid, such as 1000:1000"):
        container_user.user_of(wanted, {})


@pytest.mark.parametrize("info", [ROOTLESS, {"SecurityOptions": ["name=userns"]}])
def test_an_engine_with_users_of_its_own_needs_none(info: Dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Leave xinference_server_user empty"):
        container_user.user_of("1000", info)
    assert container_user.user_of("", info) == ""


def test_root_keeps_a_right_only_where_directories_are_of_others(tmp_path: Path, monkeypatch: Any) -> None:
    paths = [str(tmp_path)]
    wanted = () if tmp_path.stat().st_uid == 0 else ("DAC_OVERRIDE",)
    assert container_user.capabilities("", paths, {}) == wanted
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    missing = [str(tmp_path / "not yet")]
    assert container_user.capabilities("", missing, {}) == ("DAC_OVERRIDE",)
    assert container_user.capabilities("", missing, ROOTLESS) == container_user.capabilities("7:7", missing, {}) == ()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert container_user.capabilities("", missing, {}) == ()


def tree(top: Path) -> List[str]:
    (top / "below").mkdir(parents=True)
    (top / "below/file").touch()
    (top / "link").symlink_to("/etc/passwd")
    return [str(top)]


def test_what_is_not_the_users_is_found_however_deep(tmp_path: Path) -> None:
    mine = f"{tmp_path.stat().st_uid}:{tmp_path.stat().st_gid}"
    paths = tree(tmp_path / "home")
    assert container_user.not_theirs(mine, [*paths, str(tmp_path / "not yet")]) == []
    assert container_user.not_theirs("54321:54321", paths) == paths


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_everything_is_given_and_nothing_behind_a_link(tmp_path: Path) -> None:
    paths = tree(tmp_path / "home")
    (tmp_path / "as link").symlink_to(paths[0])
    container_user.hand_over("54321:54322", [str(tmp_path / "as link")])
    assert container_user.not_theirs("54321:54322", paths) == []
    assert (tmp_path / "home/link").lstat().st_uid == 54321 and Path("/etc/passwd").stat().st_uid == 0
    assert tmp_path.stat().st_uid != 54321


def test_who_may_not_give_is_told_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_arguments: object, **_more: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(UserError, match=r"xinference_server_user, 54321:54321.*Let the play become root"):
        container_user.hand_over("54321:54321", tree(tmp_path / "home"))
