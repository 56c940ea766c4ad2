# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Compose plugin that was shipped, and how the client of a user finds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_release import compose_plugin, link_plugin


def test_the_client_finds_the_plugin_that_was_shipped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    shipped = tmp_path / "tools/docker-compose/6a1e2b0f"
    shipped.mkdir(parents=True)
    (shipped / "docker-compose").touch()
    plugin = compose_plugin({"tools": {"docker-compose": {"path": str(shipped)}}})
    link = tmp_path / ".docker/cli-plugins/docker-compose"
    assert plugin == shipped / "docker-compose"
    assert link_plugin(plugin, True) and not link.parent.exists()
    assert link_plugin(plugin, False) and link.resolve() == plugin
    assert not link_plugin(plugin, False) and not link_plugin(plugin, True)
    link.unlink()
    link.write_text("another's, or one that was copied here")
    assert link_plugin(plugin, False) and link.resolve() == plugin
    assert [path.name for path in link.parent.iterdir()] == ["docker-compose"]


@pytest.mark.parametrize("artifacts", [{}, {"tools": {}}, {"tools": {"docker-compose": {"path": "/nowhere"}}}])
def test_without_a_plugin_there_is_none(artifacts: Any) -> None:
    assert compose_plugin(artifacts) is None
