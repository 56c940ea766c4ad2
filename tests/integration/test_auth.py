# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Accounts and keys: 4.1.0 with its setup token, 1.8.1 with a configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import pytest
import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import AccessRefused, Client
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from conftest import ADMIN
from doors import Recorder, run_module
from servers import OLD, Server

EMBEDDING = {
    "model_uid": "guarded",
    "model_name": "bce-embedding-base_v1",
    "model_type": "embedding",
    "model_engine": "sentence_transformers",
}


def test_a_new_server_wants_its_setup_token(guarded_server: Server) -> None:
    assert "Setup token: " in guarded_server.log
    token = guarded_server.log.split("Setup token: ")[1].split()[0]
    with pytest.raises(AccessRefused, match="Setup already completed"):
        guarded_server.client().setup_admin(token, **ADMIN)


def test_without_credentials_only_the_outside_shows(guarded_server: Server) -> None:
    client = guarded_server.client()
    assert client.auth_enabled() is True
    assert client.status()["workers"]
    with pytest.raises(AccessRefused, match="give api_key, or username and password"):
        client.models()


def test_a_login_serves_for_many_requests(guarded_server: Server) -> None:
    client = guarded_server.client(**ADMIN)
    assert client.version() == "4.1.0"
    assert client.models() == {}
    # whether it must, the login, version, models
    assert client.requests_made == 4


def test_behind_a_login_models_come_and_go_and_a_key_only_lists_and_infers(
    guarded_server: Server, models: Callable[[str], str], tmp_path: Path
) -> None:
    admin = guarded_server.client(**ADMIN)
    key = admin.post("/v1/admin/keys", json={"name": "site"})["key"]
    keyed = guarded_server.client(api_key=key)
    entry = {**EMBEDDING, "model_path": models("minilm")}
    with pytest.raises(AccessRefused, match="Give username and password instead of api_key"):
        keyed.launch(entry)
    try:
        assert [row["action"] for row in apply(admin, parse([entry]), tmp_path).models] == ["launch"]
        again = guarded_server.client(**ADMIN)
        assert not apply(again, parse([entry]), tmp_path).changed and again.requests_made <= 4
        assert "guarded" in keyed.models()
        answer = keyed.post("/v1/embeddings", json={"model": "guarded", "input": "a"})
        assert len(answer["data"][0]["embedding"]) == 384
        assert not apply(admin, [], tmp_path).failures and admin.models() == {}
    finally:
        guarded_server.clear(**ADMIN)


@pytest.mark.parametrize("wrong", [{"api_key": "sk-wrong"}, {"username": "admin", "password": "wrong-password"}])
def test_a_refusal_is_tried_once(guarded_server: Server, wrong: dict) -> None:
    with Recorder(guarded_server.endpoint) as recorder:
        client = Client(recorder.endpoint, **wrong)
        for _attempt in range(3):
            with pytest.raises(AccessRefused):
                client.models()
        refused = [line for line in recorder.lines if line.endswith(" 401")]
        assert len(refused) == 1, recorder.lines


@pytest.mark.parametrize("wrong", [{"api_key": "sk-wrong"}, {"username": "admin", "password": "wrong-password"}])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("xinference_health", {"models": [{"model_uid": "a"}], "wait_timeout": 20}),
        ("xinference_model_info", {}),
        ("xinference_registration", {"model_type": "embedding", "model_name": "x", "state": "absent"}),
    ],
)
def test_modules_try_a_refused_key_once(guarded_server: Server, module: str, options: dict, wrong: dict) -> None:
    with Recorder(guarded_server.endpoint) as recorder:
        result, _seconds = run_module(module, {"endpoint": recorder.endpoint, **options, **wrong})
        assert result["failed"], result
        assert "refused" in result["msg"]
        assert result["diagnosis"]["name"] == "wrong-credentials"
        assert len([line for line in recorder.lines if line.endswith(" 401")]) == 1, recorder.lines


def test_an_old_server_with_a_configuration_file(tmp_path: Path) -> None:
    settings = {
        "auth_config": {"algorithm": "HS256", "secret_key": "09d25e094faa6ca2556c", "token_expire_in_minutes": 30},
        "user_config": [{**ADMIN, "permissions": ["admin"], "api_keys": ["sk-72tkvudyGLPMi"]}],
    }
    file = tmp_path / "auth.json"
    file.write_text(json.dumps(settings))
    try:
        server = servers.start(OLD, arguments=["--auth-config", str(file)])
    except servers.Missing as error:
        pytest.skip(str(error))
    try:
        assert server.client().auth_enabled() is True
        assert server.client(api_key="sk-72tkvudyGLPMi").models() == {}
        assert server.client(**ADMIN).version() == OLD
        for wrong in ({"api_key": "sk-0000000000000"}, {"username": "admin", "password": "wrong"}):
            client = server.client(**wrong)
            with pytest.raises(AccessRefused):
                client.models()
    finally:
        server.stop()
