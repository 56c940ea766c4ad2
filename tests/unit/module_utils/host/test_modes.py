# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What others may not read is closed, nothing is opened, and what is right is left alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import modes


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def place(root: Path, name: str, rights: int) -> Path:
    path = root / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.touch()
    path.chmod(rights)
    return path


def test_what_tells_of_the_site_is_closed_and_the_rest_is_left(tmp_path: Path) -> None:
    state = place(tmp_path, "state/", 0o755)
    closed = [place(tmp_path, name, 0o755) for name in ("releases/", "home/", "cache/", "logs/", "blobs/")]
    elsewhere = place(tmp_path / "other", "data/", 0o777)
    left = {name: place(tmp_path, f"{name}/", 0o755) for name in ("models", "wheels", "venvs", "lib", "tools")}
    told = [place(state, "artifacts.json", 0o644), place(state, "odd", 0o666)]
    private = place(state, "launched.json", 0o600)
    for_others = [place(state, "xinference.prom", 0o644), place(state, "service.lock", 0o644)]
    link = state / "link"
    link.symlink_to(left["models"])

    modes.close(modes.too_open(tmp_path, [str(elsewhere), str(tmp_path / "not yet")]))
    assert {mode(path) for path in (*closed, elsewhere)} == {0o750}
    assert {mode(path) for path in told} == {0o640} and mode(private) == 0o600
    assert mode(state) == 0o755 and {mode(path) for path in for_others} == {0o644}
    assert {mode(path) for path in left.values()} == {0o755} and mode(tmp_path) == 0o700
    assert modes.too_open(tmp_path, [str(elsewhere)]) == []


def test_tighter_rights_of_the_site_stay(tmp_path: Path) -> None:
    home = place(tmp_path, "home/", 0o700)
    odd = place(tmp_path, "cache/", 0o705)
    modes.close(modes.too_open(tmp_path))
    assert mode(home) == 0o700 and mode(odd) == 0o700


def test_what_is_another_users_is_not_tried(tmp_path: Path, monkeypatch: Any) -> None:
    place(tmp_path, "home/", 0o755)
    assert modes.too_open(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    assert modes.too_open(tmp_path) == []


def test_a_directory_that_everything_lies_in_is_left_alone(tmp_path: Path) -> None:
    """A home that is / or /opt by mistake must not lock everybody else out of the host."""
    closed = [path for path, _mode in modes.limits(tmp_path, ["/", "/opt", "/opt/x/..", str(tmp_path / "home")])]
    assert not {Path("/"), Path("/opt"), Path("/opt/x/..")} & set(closed) and tmp_path / "home" in closed


@pytest.mark.parametrize("shared", ["/", "/var", "/home", "/usr", "/etc", "{root}", "{root}/state", "{root}/.."])
def test_what_others_need_never_becomes_the_servers_own(tmp_path: Path, shared: str) -> None:
    own = tmp_path / "data"
    modes.refuse_shared(tmp_path, [str(own), str(tmp_path / "home"), "/var/lib/xinference", "/data"])
    with pytest.raises(ValueError, match="Name a directory that holds nothing else"):
        modes.refuse_shared(tmp_path, [str(own), shared.format(root=tmp_path)])
