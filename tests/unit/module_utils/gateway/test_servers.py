# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a gateway reaches the servers of an inventory."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.servers import Unreachable, servers_of


def host(listens: str, address: str = "gpu.bank.example") -> dict[str, Any]:
    return {"address": address, "listens": listens, "port": 9997}


@pytest.mark.parametrize(
    ("listens", "here", "elsewhere"),
    [
        ("10.0.0.5", "10.0.0.5:9997", "10.0.0.5:9997"),
        ("0.0.0.0", "127.0.0.1:9997", "gpu.bank.example:9997"),
        ("::", "127.0.0.1:9997", "gpu.bank.example:9997"),
        ("fd00::5", "[fd00::5]:9997", "[fd00::5]:9997"),
        ("127.0.0.1", "127.0.0.1:9997", ""),
        ("localhost", "127.0.0.1:9997", ""),
        ("::1", "[::1]:9997", ""),
    ],
)
def test_a_server_is_reached_where_it_listens(listens: str, here: str, elsewhere: str) -> None:
    assert servers_of({"gpu": host(listens)}, "gpu") == {"gpu": here}
    if elsewhere:
        assert servers_of({"gpu": host(listens)}, "edge") == {"gpu": elsewhere}


def test_all_that_listen_on_loopback_elsewhere_are_named() -> None:
    hosts = {"one": host("127.0.0.1"), "two": host("localhost"), "edge": host("127.0.0.1")}
    with pytest.raises(Unreachable, match=r"on edge does not reach one, two: .* Set xinference_host"):
        servers_of(hosts, "edge")
