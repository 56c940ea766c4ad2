# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A release of one backend does not take the place of a server that the other one still runs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import backends
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import State

ADDRESSES: List[Optional[str]] = []


class Client:
    """Stands for the docker client, on a host with one container or none."""

    seen: Optional[Dict[str, Any]] = None
    service = "server"

    def __init__(self, address: Optional[str] = None) -> None:
        ADDRESSES.append(address)

    def container(self, labels: Dict[str, str]) -> Optional[Dict[str, Any]]:
        return self.seen if labels["com.docker.compose.service"] == self.service else None


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "current").mkdir()
    view = {"backend": "docker", "project": "xinference", "service": "server"}
    (tmp_path / "current" / "server.json").write_text(json.dumps(view))
    monkeypatch.setattr(backends, "Docker", Client)
    return tmp_path


@pytest.mark.parametrize("service", ["server", "keeper"])
@pytest.mark.parametrize(
    ("running", "wanted", "refused"),
    [(True, "native", True), (True, "docker", False), (False, "native", False), (None, "native", False)],
)
def test_a_container_that_runs_is_in_the_way_of_the_native_backend(
    root: Path, monkeypatch: pytest.MonkeyPatch, running: Optional[bool], wanted: str, refused: bool, service: str
) -> None:
    monkeypatch.setattr(Client, "service", service)
    seen = None if running is None else {"State": {"Running": running}}
    monkeypatch.setattr(Client, "seen", seen)
    if not refused:
        backends.refuse_other(root, wanted, "tcp://h")
        return
    with pytest.raises(backends.OtherBackend, match=r"stop\.yml -e xinference_backend=docker"):
        backends.refuse_other(root, wanted, "tcp://h")
    assert ADDRESSES[-1] == "tcp://h"


def test_without_a_release_nothing_is_in_the_way(tmp_path: Path) -> None:
    backends.refuse_other(tmp_path, "native")


@pytest.mark.parametrize(("server", "keepers", "refused"), [(True, [], True), (False, [7], True), (False, [], False)])
def test_a_native_server_or_keeper_is_in_the_way_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: bool, keepers: List[int], refused: bool
) -> None:
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / "server.json").write_text(json.dumps({"backend": "native"}))
    native = SimpleNamespace(state=lambda: State(server), keepers=lambda: keepers)
    monkeypatch.setattr(backends, "Native", lambda root: native)
    expected = pytest.raises(backends.OtherBackend, match="backend=native") if refused else contextlib.nullcontext()
    with expected:
        backends.refuse_other(tmp_path, "docker")
