# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The client where a real server cannot be made to do it: faults, refusals, strange answers."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server import transport
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import (
    AccessRefused,
    Client,
    ServerError,
    Unreachable,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.health import look_at
from fakes import VERSIONS, recorded, serving

MODELS = {"object": "list", "data": [{"id": "a", "model_name": "bge-m3"}]}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(transport, "PAUSES", (0.0, 0.0))


@pytest.mark.parametrize("status", [502, 503])
def test_a_read_is_repeated_when_a_proxy_fails(status):
    answers = [(status, b"bad gateway"), (200, MODELS)]
    with serving(lambda *_: answers.pop(0)) as fake:
        client = Client(fake.endpoint)
        assert list(client.models()) == ["a"]
        assert client.requests_made == 2


def test_a_read_is_repeated_when_the_connection_breaks_and_not_for_ever():
    with serving(lambda *_: (0, b"")) as fake:
        client = Client(fake.endpoint)
        with pytest.raises(Unreachable):
            client.models()
        assert client.requests_made == len(fake.seen) == 3


@pytest.mark.parametrize("answer", [(0, b""), (502, b""), (503, {"detail": "Model is loading"})])
def test_a_write_is_sent_once(answer):
    with serving(lambda *_: answer) as fake:
        client = Client(fake.endpoint)
        with pytest.raises(ServerError):
            client.terminate("a")
        assert fake.seen == ["DELETE /v1/models/a"]


@pytest.mark.parametrize("status", [400, 404, 500])
def test_other_errors_are_not_repeated(status):
    with serving(lambda *_: (status, {"detail": "[address=127.0.0.1:1, pid=2] no"})) as fake:
        with pytest.raises(ServerError, match="no") as caught:
            Client(fake.endpoint).models()
        assert (caught.value.status, caught.value.detail, len(fake.seen)) == (status, "no", 1)
        assert caught.value.details["server_error"]["path"] == "/v1/models"


def test_a_refused_key_is_tried_once():
    with serving(lambda *_: (401, {"detail": "Could not validate credentials"})) as fake:
        client = Client(fake.endpoint, api_key="sk-wrong")
        for _attempt in range(3):
            with pytest.raises(AccessRefused, match="Check api_key"):
                client.models()
        assert fake.seen == ["GET /v1/models"]


def test_a_refused_login_is_tried_once():
    def answer(method, path, headers):
        return (200, {"auth": True}) if path == "/v1/cluster/auth" else (401, {"detail": "Incorrect username"})

    with serving(answer) as fake:
        client = Client(fake.endpoint, username="u", password="p")
        for _attempt in range(3):
            with pytest.raises(AccessRefused, match="refused the login of user u: Incorrect username"):
                client.models()
        assert fake.seen == ["GET /v1/cluster/auth", "POST /token"]


def test_no_login_where_none_is_asked_for():
    def answer(method, path, headers):
        assert "Authorization" not in headers
        return (200, {"auth": False}) if path == "/v1/cluster/auth" else (200, MODELS)

    with serving(answer) as fake:
        Client(fake.endpoint, username="u", password="p").models()
        assert fake.seen == ["GET /v1/cluster/auth", "GET /v1/models"]


def test_a_session_that_ran_out_is_renewed_once():
    tokens = iter(["one", "two", "three"])
    valid = {"one"}

    def answer(method, path, headers):
        if path == "/v1/cluster/auth":
            return 200, {"auth": True}
        if path == "/token":
            return 200, {"access_token": next(tokens)}
        good = headers.get("Authorization", "").split(" ")[-1] in valid
        return (200, MODELS) if good else (401, {"detail": "Could not validate credentials"})

    with serving(answer) as fake:
        client = Client(fake.endpoint, username="u", password="p")
        client.models()
        valid.clear()
        valid.add("two")
        client.models()
        assert fake.seen.count("POST /token") == 2
        valid.clear()
        with pytest.raises(AccessRefused):
            client.models()
        assert fake.seen.count("POST /token") == 3


def test_a_renewed_session_that_is_refused_again_ends_it():
    tokens, good = iter(["one", "two", "three"]), {"one"}

    def answer(method, path, headers):
        if path == "/v1/cluster/auth":
            return 200, {"auth": True}
        if path == "/token":
            return 200, {"access_token": next(tokens)}
        allowed = headers.get("Authorization", "").split(" ")[-1] in good
        return (200, MODELS) if allowed else (401, {"detail": "Could not validate credentials"})

    with serving(answer) as fake:
        client = Client(fake.endpoint, username="u", password="p")
        client.models()
        good.clear()
        fake.seen.clear()
        for _attempt in range(4):
            with pytest.raises(AccessRefused):
                client.models()
        assert fake.seen == ["GET /v1/models", "POST /token", "GET /v1/models"]


def test_threads_renew_a_session_once_and_all_go_on():
    tokens, good, at_once = iter(["one", "two", "three"]), {"one"}, threading.Barrier(4)

    def answer(method, path, headers):
        if path == "/v1/cluster/auth":
            return 200, {"auth": True}
        if path == "/token":
            time.sleep(0.1)
            return 200, {"access_token": next(tokens)}
        if headers["Authorization"] == "Bearer one" and "one" not in good:
            at_once.wait(10)
        allowed = headers["Authorization"].split(" ")[-1] in good
        return (200, MODELS) if allowed else (401, {"detail": "Could not validate credentials"})

    with serving(answer) as fake, ThreadPoolExecutor(4) as pool:
        client = Client(fake.endpoint, username="u", password="p")
        client.models()
        good.clear()
        good.add("two")
        fake.seen.clear()
        jobs = [pool.submit(client.models) for _number in range(4)]
        assert all(list(job.result()) == ["a"] for job in jobs)
        assert fake.seen.count("POST /token") == 1


def test_forbidden_is_not_a_wrong_key():
    answers = [(403, {"detail": "Not enough permissions"}), (200, MODELS)]
    with serving(lambda *_: answers.pop(0)) as fake:
        client = Client(fake.endpoint, api_key="sk")
        with pytest.raises(AccessRefused, match="Use an account that has this permission"):
            client.models()
        assert client.models()


def test_credentials_are_not_sent_where_none_are_needed():
    def answer(method, path, headers):
        assert "Authorization" not in headers
        return 200, {"auth": True, "uptime": 1, "workers": {}}

    with serving(answer) as fake:
        client = Client(fake.endpoint, api_key="sk")
        assert client.auth_enabled() and client.auth_enabled()
        client.status()
        assert fake.seen == ["GET /v1/cluster/auth", "GET /status"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((302, b""), "redirects GET /v1/models to https://elsewhere/"),
        ((200, b"<html>Welcome to nginx</html>"), "not answered with JSON but with '<html>Welcome"),
        ((200, {"hello": 1}), "has no field 'data'"),
        ((500, b"Internal Server Error"), "with 500: Internal Server Error"),
    ],
)
def test_strange_answers_are_named(answer, words):
    with serving(lambda *_: answer) as fake, pytest.raises(ServerError, match=words):
        Client(fake.endpoint).models()


WRONG: list[Any] = [None, [], "words", 5, [None], [{}], {}, {"data": None}, {"data": [{"x": 1}]}, {"data": ["a"]}]


@pytest.mark.parametrize("body", [*WRONG, b""])
def test_an_answer_of_another_shape_is_an_error_that_says_so(body):
    calls = {
        "models": lambda client: client.models(),
        "instances": lambda client: client.instances(),
        "cluster_info": lambda client: client.cluster_info(),
        "registrations": lambda client: client.registrations("LLM"),
        "version": lambda client: client.version(),
        "status": lambda client: client.status(),
        "progress": lambda client: client.progress("a"),
        "auth": lambda client: client.auth_enabled(),
        "look": look_at,
    }
    fine: dict[str, list[Any]] = {"instances": [[]], "cluster_info": [[], [{}]], "registrations": [[]]}
    with serving(lambda *_: (200, body)) as fake:
        for name, call in calls.items():
            if body in fine.get(name, []) or (name == "status" and isinstance(body, dict)):
                call(Client(fake.endpoint))
            elif name == "look":
                assert call(Client(fake.endpoint)).problems
            else:
                with pytest.raises(ServerError, match=r"Is this address an Xinference server\?"):
                    call(Client(fake.endpoint))


@pytest.mark.parametrize(
    "workers", [[], "x", {"a": None}, {"a": []}, {"a": {"status": 5}}, {"a": {"status": {"cpu": 5}}}]
)
def test_workers_of_another_shape_break_nothing(workers):
    with serving(lambda *_: (200, {"uptime": 1, "workers": workers})) as fake:
        assert look_at(Client(fake.endpoint)).problems


def test_what_came_is_told():
    words = r"list of models with an `id` each, and this came: .*name.*x"
    with serving(lambda *_: (200, {"data": [{"name": "x"}]})) as fake, pytest.raises(ServerError, match=words):
        Client(fake.endpoint).models()


@pytest.mark.parametrize("opening", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"])
def test_a_server_that_trickles_bytes_is_given_up(opening):
    """Each read is in time, and the answer never ends."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            connection, _address = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(opening)
                while not over.wait(0.05):
                    connection.sendall(b"H")

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"did not answer POST /x within 0\.2 s"):
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}").post("/x", timeout=0.2)
        assert time.monotonic() - started < 20
        over.set()
        thread.join()


def test_an_endpoint_that_is_no_url():
    client = Client("127.0.0.1:9997")
    with pytest.raises(Unreachable, match=r"not a URL such as http://127\.0\.0\.1:9997"):
        client.models()
    assert client.requests_made == 1


def test_a_user_without_a_password():
    with pytest.raises(ServerError, match="both a user name and a password"):
        Client("http://127.0.0.1:1", username="u")


def test_names_are_quoted_in_paths():
    with serving(lambda *_: (200, {"progress": 0.5})) as fake:
        assert Client(fake.endpoint).progress("a/b c") == 0.5
        assert fake.seen == ["GET /v1/models/a%2Fb%20c/progress"]


def test_the_surroundings_do_not_count(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with serving(lambda *_: (200, MODELS)) as fake:
        assert Client(fake.endpoint).models()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_launch_waits_only_where_it_must(version):
    def answer(method, path, headers):
        return 200, {"version": version, "model_uid": "a"}

    with serving(answer) as fake:
        assert Client(fake.endpoint).launch({"model_uid": "a"}) == "a"
        expected = "POST /v1/models?wait_ready=false" if version == "4.1.0" else "POST /v1/models"
        assert fake.seen == ["GET /v1/cluster/version", expected]


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_models(version):
    with serving(lambda *_: (200, recorded(version, "models"))) as fake:
        assert set(Client(fake.endpoint).models()) == {"embedding", "rerank", "chat", "whisper"}


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_registration_is_none(version):
    refusal = recorded(version, "registration_unknown")
    with serving(lambda *_: (refusal["status"], {"detail": refusal["detail"]})) as fake:
        assert Client(fake.endpoint).registration("embedding", "none") is None


def test_engines_only_where_there_is_a_choice():
    answers = {"/v1/cluster/version": {"version": "1.8.1"}}
    with serving(lambda method, path, headers: (200, answers.get(path, {"vllm": "not installed"}))) as fake:
        client = Client(fake.endpoint)
        assert client.engines("rerank", "bge-reranker-base") == {}
        assert client.engines("embedding", "bge-m3") == {"vllm": "not installed"}
        assert fake.seen == ["GET /v1/cluster/version", "GET /v1/engines/embedding/bge-m3"]


def test_recorded_refusals_say_what_to_do():
    wanted = {
        "no-credentials": "give api_key, or username and password",
        "key-may-not-launch": "Give username and password instead of api_key",
        "second-setup": "Setup already completed",
    }
    for name, words in wanted.items():
        refusal = recorded("4.1.0", "access")[name]
        answer = (refusal["status"], {"detail": refusal["detail"]})
        with serving(lambda *_, answer=answer: answer) as fake, pytest.raises(AccessRefused, match=words):
            Client(fake.endpoint).models()
