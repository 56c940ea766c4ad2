# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the server printed is read where it is kept: from the site's engine, or from the files of the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, Optional

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import server_log
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Answer, DockerError


class Engine:
    """Stands for the docker client, on a host with one container."""

    asked: List[List[str]] = []
    addresses: List[Optional[str]] = []
    down = False

    def __init__(self, address: Optional[str] = None) -> None:
        self.addresses.append(address)
        if self.down:
            raise DockerError("it does not answer")

    def container(self, labels: Dict[str, str]) -> Dict[str, str]:
        return {"Id": "c0ffee"}

    def ask(self, *arguments: str) -> Answer:
        self.asked.append(list(arguments))
        return Answer(0, "out\n", "err\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "current").mkdir()
    view = {"backend": "docker", "project": "xinference", "service": "server"}
    (tmp_path / "current" / "server.json").write_text(json.dumps(view))
    monkeypatch.setattr(server_log, "Docker", Engine)
    monkeypatch.setattr(server_log, "files", lambda root: lambda since: f"files since {since:.0f}")
    return tmp_path


def test_a_container_is_read_from_the_engine_that_the_site_names(root: Path) -> None:
    assert server_log.reader(root, "tcp://h")(7.5) == "out\nerr\n"
    assert Engine.addresses[-1] == "tcp://h"
    assert Engine.asked[-1] == ["logs", "--since", "7", "--tail", str(server_log.LINES), "c0ffee"]


def test_without_the_engine_the_files_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "down", True)
    assert server_log.reader(root)(7.5) == "files since 8"


def test_without_a_release_the_files_are_read(root: Path) -> None:
    (root / "current" / "server.json").unlink()
    assert server_log.reader(root)(3.0) == "files since 3"
