# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model whose process died, on servers that keep its uid: what would take all others along is not done."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import launch as launching
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.launch import Launcher, LaunchFailed
from scripted import Scripted


class Holding(Scripted):
    """It holds on to the uid of a model that died until that is terminated."""

    ended = 0

    def launch(self, payload: Any, timeout: Any = None) -> Any:
        if "m" in self.live:
            raise ServerError("refused", 400, "Model is already in the model list, uid: m", "POST", "/v1/models")
        return super().launch(payload, timeout)

    def terminate(self, uid: str, timeout: Any = None) -> None:
        self.ended += 1
        del self.live[uid]


@pytest.fixture
def launcher(monkeypatch: Any) -> Any:
    monkeypatch.setattr(launching, "SELF_RECOVERY", 0.1)

    def make(version: str) -> Any:
        server: Any = Holding(version)
        server.put("m", "ERROR", listed=False)
        return server, Launcher(server, "m", time.monotonic() + 30, lambda uid, event: None)

    return make


PAYLOAD = {"model_uid": "m", "model_name": "bce", "model_type": "embedding"}


@pytest.mark.parametrize("version", ["2.1.0", "4.1.0"])
def test_a_dead_model_is_cleared_away_and_launched_again(version: str, launcher: Any) -> None:
    server, found = launcher(version)
    assert found.launch(PAYLOAD).state == "ready" and server.ended == 1


@pytest.mark.parametrize("version", ["1.8.1", "1.14.0", "2.0.0"])
def test_a_server_that_would_end_with_it_is_left_alone_and_the_cure_is_said(version: str, launcher: Any) -> None:
    server, found = launcher(version)
    with pytest.raises(LaunchFailed, match="cannot forget it") as caught:
        found.launch(PAYLOAD)
    assert server.ended == 0 and caught.value.diagnosis and "Restart the server" in caught.value.diagnosis.cure
