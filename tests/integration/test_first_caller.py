# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Xinference 3.0.0, which belongs to its first caller: here that is the administrator of the inventory, always."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import keys
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import AccessRefused
from doors import Recorder, run_module
from keepers import Kept
from servers import FIRST_CALLER, Server
from sieges import ADMIN, GIVEN_KEY, Report, besieged, guard_in, nobody_got_in, stranger

OTHER_KEY = "sk-Z9y8X7w6V5u4T"
# 3.0.0 starts in two steps with 35 s for the first. All of a test comes from one address, which is not to be banned.
PATIENT = {"XINFERENCE_HEALTH_CHECK_TIMEOUT": "280", "XINFERENCE_RATE_LIMIT_IP_MAX_FAILURES": "1000"}
MASK = "5a" * 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def closed(place: Path) -> Iterator[tuple[Server, Report]]:
    """A 3.0.0 server that was closed from the beginning, with a key that is given."""
    with besieged(FIRST_CALLER, place, PATIENT, api_keys=[{"name": "given", "key": GIVEN_KEY}]) as found:
        yield found


@pytest.fixture
def ask(closed: tuple[Server, Report]) -> Callable[..., dict[str, Any]]:
    """A function that runs a module with the login of the administrator; returns its result."""

    def run(module: str, **options: Any) -> dict[str, Any]:
        return run_module(module, {"endpoint": closed[0].endpoint, **ADMIN, **options})[0]

    return run


def opens(server: Server, key: str) -> bool:
    """Whether a key is accepted."""
    try:
        server.client(api_key=key).models()
    except AccessRefused:
        return False
    return True


def test_nobody_comes_first(closed: tuple[Server, Report]) -> None:
    server, report = closed
    nobody_got_in(report)
    admin = server.client(**ADMIN)
    assert admin.version() == FIRST_CALLER and admin.features.auth == "first-caller"
    assert [(one["username"], "admin" in one["permissions"]) for one in admin.users()] == [(ADMIN["username"], True)]
    with pytest.raises(AccessRefused, match="Setup already completed"):
        server.client().setup_admin(None, "stranger", "let-me-in-12345")
    assert opens(server, GIVEN_KEY) and not opens(server, OTHER_KEY)


@pytest.mark.parametrize("wrong", [{"api_key": "sk-wrong"}, {**ADMIN, "password": "not-this-one"}])
def test_wrong_credentials_are_tried_once(closed: tuple[Server, Report], wrong: dict[str, str]) -> None:
    with Recorder(closed[0].endpoint) as recorder:
        options = {"endpoint": recorder.endpoint, "models": [{"model_uid": "a"}], "wait_timeout": 20}
        result, _seconds = run_module("xinference_health", {**options, **wrong})
        assert result["diagnosis"]["name"] == "wrong-credentials", result
        assert len([line for line in recorder.lines if line.endswith(" 401")]) == 1, recorder.lines


def test_accounts_and_keys_are_managed(
    closed: tuple[Server, Report], ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    server, _report = closed
    viewer = {"name": "viewer", "new_password": "first-word-4"}
    assert [ask("xinference_account", **viewer)["action"] for _run in range(2)] == ["create", "keep"]
    assert server.client(username="viewer", password="first-word-4").models() == {}
    assert ask("xinference_account", **{**viewer, "new_password": "second-word-5"}, reset=True)["changed"]
    assert server.client(username="viewer", password="second-word-5").models() == {}
    assert "last administrator" in ask("xinference_account", name=ADMIN["username"], state="absent")["msg"]
    assert ask("xinference_account", name="viewer", state="absent")["action"] == "remove"

    def key(**options: Any) -> tuple[str, str]:
        found = ask("xinference_api_key", name="rag", directory=str(tmp_path), mask=MASK, **options)
        return found["action"], keys.unmasked(found["masked"], MASK)

    action, first = key()
    assert action == "create" and opens(server, first) and key() == ("keep", first)
    action, second = key(rotate=True)
    assert action == "rotate" and opens(server, second) and not opens(server, first)
    assert key(state="absent") == ("revoke", "") and not opens(server, second)
    assert [one["name"] for one in ask("xinference_api_key_info")["keys"]] == ["given"]


def test_the_keeper_and_the_modules_serve_a_model(
    closed: tuple[Server, Report], ask: Callable[..., dict[str, Any]], models: Callable[[str], str], tmp_path: Path
) -> None:
    server, _report = closed
    launched = {"model_name": "bce-embedding-base_v1", "model_type": "embedding", "model_path": models("minilm")}
    small = {"model_uid": "small", "model_engine": "sentence_transformers", **launched}
    client, root = server.client(api_key=GIVEN_KEY), str(tmp_path)
    kept = Kept(server, tmp_path)
    kept.login = dict(ADMIN)
    kept.release([small])
    kept.start()
    try:
        kept.until(lambda: kept.ready("small"), 200)
    finally:
        kept.stop()
    assert ask("xinference_health", models=[small], wait_timeout=60)["changed"] is False
    assert list(client.models()) == ["small"]
    answer = client.post("/v1/embeddings", json={"model": "small", "input": "a word"})
    assert len(answer["data"][0]["embedding"]) == 384
    with pytest.raises(AccessRefused):
        client.launch({**small, "model_uid": "other"})
    assert ask("xinference_model", **small, root=root)["models"][0]["action"] == "keep"
    assert ask("xinference_model", **small, root=root, state="relaunched")["models"][0]["action"] == "relaunch"
    gone = ask("xinference_model", model_uid="small", root=root, state="absent")
    assert gone["models"][0]["action"] == "terminate" and client.models() == {}


def test_another_start_keeps_the_accounts_and_is_as_closed(closed: tuple[Server, Report], place: Path) -> None:
    server, _report = closed
    admin = server.client(**ADMIN)
    # This version makes several keys of one name, and keys without any.
    double, nameless = (admin.post("/v1/admin/keys", json=named)["key"] for named in ({"name": "given"}, {}))
    server.kill()
    guard_in(place / "release", api_keys=[{"name": "given", "key": OTHER_KEY}], password="another-pass-3")
    with stranger(server.endpoint, place) as verdict:
        server.run()
        server.wait()
        nobody_got_in(verdict())
    assert [one["username"] for one in server.client(**ADMIN).users()] == [ADMIN["username"]]
    assert [opens(server, key) for key in (OTHER_KEY, nameless, GIVEN_KEY, double)] == [True, True, False, False]
