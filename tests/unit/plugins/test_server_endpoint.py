# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a host reaches its own server."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.filter.server_endpoint import server_endpoint


@pytest.mark.parametrize(
    ("host", "backend", "endpoint"),
    [
        ("127.0.0.1", "native", "http://127.0.0.1:9997"),
        ("localhost", "native", "http://127.0.0.1:9997"),
        ("0.0.0.0", "native", "http://127.0.0.1:9997"),
        ("::", "native", "http://[::1]:9997"),
        ("10.0.0.11", "native", "http://10.0.0.11:9997"),
        ("fd00::11", "native", "http://[fd00::11]:9997"),
        # Published on loopback as well.
        ("10.0.0.11", "docker", "http://127.0.0.1:9997"),
        ("fd00::11", "docker", "http://127.0.0.1:9997"),
        ("::", "docker", "http://[::1]:9997"),
    ],
)
def test_a_server_is_asked_where_it_listens(host: str, backend: str, endpoint: str) -> None:
    assert server_endpoint(host, 9997, backend) == endpoint
