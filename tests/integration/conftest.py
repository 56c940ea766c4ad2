# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the integration tests: real Xinference servers and models they can serve.

A server is started when first asked for and kept for the whole session. Where a server cannot be run, its tests are
skipped (in CI they fail, see no_skips.py).
"""

from __future__ import annotations

from typing import Callable, Dict, Iterator

import pytest
import servers
import tiny_models
from servers import NEW, OLD, Missing, Server

ADMIN = {"username": "admin", "password": "only-for-tests"}


@pytest.fixture(scope="session")
def server_of() -> Iterator[Callable[[str], Server]]:
    """A function from a version to its shared server without authentication.

    One that a test killed, or left without an answer, is replaced, so that only that test fails.
    """
    started: Dict[str, Server] = {}

    def get(version: str) -> Server:
        if version in started and not started[version].serves():
            started.pop(version).stop()
        if version not in started:
            try:
                started[version] = servers.start(version)
            except Missing as error:
                pytest.skip(str(error))
        return started[version]

    yield get
    for server in started.values():
        server.stop()


@pytest.fixture(params=[NEW, OLD])
def server(request: pytest.FixtureRequest, server_of: Callable[[str], Server]) -> Iterator[Server]:
    """A server of each version in turn, without authentication; empty before and after the test."""
    found = server_of(request.param)
    found.clear()
    yield found
    found.clear()


@pytest.fixture
def new_server(server_of: Callable[[str], Server]) -> Iterator[Server]:
    """The 4.1.0 server without authentication; empty before and after the test."""
    found = server_of(NEW)
    found.clear()
    yield found
    found.clear()


@pytest.fixture
def old_server(server_of: Callable[[str], Server]) -> Iterator[Server]:
    """The 1.8.1 server without authentication; empty before and after the test."""
    found = server_of(OLD)
    found.clear()
    yield found
    found.clear()


@pytest.fixture(scope="session")
def guarded_server() -> Iterator[Server]:
    """A 4.1.0 server with authentication on, whose administrator is ADMIN."""
    try:
        # All tests come from one address, and each may be refused once.
        found = servers.start(NEW, auth=True, env={"XINFERENCE_RATE_LIMIT_IP_MAX_FAILURES": "1000"})
    except Missing as error:
        pytest.skip(str(error))
    try:
        found.client().setup_admin(found.setup_token(), **ADMIN)
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def models() -> Callable[[str], str]:
    """A function from a kind (rerank, chat, whisper, minilm) to the directory of such a model."""

    def path(kind: str) -> str:
        try:
            python = servers.environment(OLD) / "bin" / "python"
        except Missing as error:
            pytest.skip(str(error))
        return str(tiny_models.model_dir(kind, python))

    return path
