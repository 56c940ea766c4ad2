# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway before real servers: keys of 4.1.0 itself, and of the gateway before 1.8.1, which has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import gateways
import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import routes
from conftest import ADMIN
from gateways import Site
from servers import NEW, Server

KEY = "sk-of-the-gateway-0123456789"
ASK = json.dumps({"model": "embed", "input": "a"})
MODEL = {"model_uid": "embed", "model_name": "bce-embedding-base_v1", "model_type": "embedding"}


def before(server: Server) -> Dict[str, Any]:
    """The ways to one server."""
    return {"routes": routes({"gpu-1": server.endpoint.partition("//")[2]}, {"gpu-1": ["embed"]})}


def ask(site: Site, key: str, source: str = "127.0.0.1") -> int:
    """The status of a request for an embedding; one that is answered has it."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    answer = site.ask("POST", "/models/embed/v1/embeddings", ASK, headers, source)
    if answer.status == 200:
        assert len(json.loads(answer.read())["data"][0]["embedding"]) == 384
    return answer.status


def test_an_old_server_gets_keys(old_server: Server, models: Callable[[str], str], tmp_path: Path) -> None:
    servers.launch(old_server.client(), {**MODEL, "model_path": models("minilm")})
    with gateways.site(tmp_path, keys={"rag": KEY}, **before(old_server)) as site:
        site.put()
        assert (ask(site, KEY), ask(site, KEY.upper())) == (200, 401)
        assert json.loads(site.ask("GET", "/v1/cluster/auth").read()) == {"auth": True}
        # As anybody may do with that server itself.
        assert site.ask("DELETE", "/v1/models/embed", None, {"Authorization": f"Bearer {KEY}"}).status == 403


def test_a_client_with_a_wrong_key_has_nobody_else_banned(models: Callable[[str], str], tmp_path: Path) -> None:
    """A new server bans the address that fails often. It has to be the client's, and not the gateway's."""
    try:
        server = servers.start(NEW, auth=True, env={"XINFERENCE_RATE_LIMIT_IP_MAX_FAILURES": "3"})
    except servers.Missing as error:
        pytest.skip(str(error))
    try:
        server.client().setup_admin(server.setup_token(), **ADMIN)
        admin = server.client(**ADMIN)
        key = admin.post("/v1/admin/keys", json={"name": "rag"})["key"]
        payload = {**MODEL, "model_engine": "sentence_transformers", "model_path": models("minilm")}
        servers.launch(admin, payload)
        with gateways.site(tmp_path, server_auth=True, **before(server)) as site:
            site.put()
            assert ask(site, key) == ask(site, key, "127.0.0.2") == 200
            refused = [ask(site, "sk-wrong-wrong-wrong", "127.0.0.2") for _number in range(4)]
            assert refused[0] == 401 and 200 not in refused
            assert ask(site, key, "127.0.0.2") != 200 and ask(site, key) == 200
    finally:
        server.stop()
