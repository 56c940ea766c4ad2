# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway in front of a stand-in, with the real nginx of this machine: what goes through, and how."""

from __future__ import annotations

import dataclasses
import json
import socket
import ssl
import stat
import time
import warnings
from pathlib import Path
from typing import Iterator, List

import gateways
import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import Route, routes
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import (
    GatewayError,
    answers,
    converge,
    remove,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host import modes
from ansible_collections.airgap.xinference.plugins.plugin_utils.authority import AUTHORITY
from gateways import NAME, WAIT, Site
from upstream import Upstream

KEY = "sk-Planted.Secret_0123456789"
OTHER = "sk-another-client-0123456789"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    upstreams = [Upstream(name).start() for name in ("one", "two")]
    servers = {upstream.name: f"127.0.0.1:{upstream.port}" for upstream in upstreams}
    ways = [Route("", (servers["one"],)), *routes(servers, {"one": ["a", "shared"], "two": ["b", "shared"]})]
    try:
        with gateways.site(tmp_path_factory.mktemp("gateway"), routes=ways, keys={"rag": KEY, "other": OTHER}) as site:
            site.upstreams.extend(upstreams)
            yield site
    finally:
        for upstream in upstreams:
            upstream.stop()


@pytest.fixture
def site(running: Site) -> Site:
    """The gateway as the inventory has it, and stand-ins that have seen nothing."""
    for upstream in running.upstreams:
        upstream.forget()
    running.put()
    for upstream in running.upstreams:
        upstream.forget()
    return running


# --- what goes through --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "POST /v1/chat/completions",
        "POST /v1/embeddings?x=1",
        "POST /v1/rerank",
        "POST /v1/audio/transcriptions",
        "POST /v1/images/generations",
        "POST /v1/messages",
        "GET /v1/models",
        "GET /v1/models/bge-m3",
        "GET /v1/requests/4711/progress",
    ],
)
def test_what_a_client_asks_goes_through_as_it_is(site: Site, line: str) -> None:
    method, path = line.split(" ")
    assert site.ask(method, path, "{}" if method == "POST" else None, BEARER).status == 200
    assert site.lines() == [line]


ADMINISTRATION = [
    # What the server offers.
    "POST /v1/models",
    "DELETE /v1/models/embed",
    "POST /v1/models/instance",
    "GET /v1/models/instances",
    "GET /v1/models/instances?x=1",
    "POST /v1/models/embed/replicas",
    "GET /v1/models/embed/events",
    "POST /v1/models/embed/requests/1/abort",
    "PUT /v1/models",
    "PATCH /v1/models",
    "POST /token",
    "POST /v1/admin/setup",
    "GET /v1/admin/keys",
    "GET /v1/admin/keys/1/reveal",
    "DELETE /v1/clusters",
    "GET /v1/cluster/info",
    "GET /v1/cluster/logs",
    "PUT /v1/cluster/system_settings",
    "POST /v1/model_registrations/LLM",
    "GET /v1/cache/models",
    "POST /v1/ui/embed",
    "GET /ui/",
    "GET /docs",
    "GET /openapi.json",
    "GET /metrics",
    "GET /",
    # Others paths to the same.
    "POST //v1//models",
    "POST /v1//models",
    "POST /v1/models/",
    "POST /v1/./models",
    "POST /v1/chat/../models",
    "POST /v1/embeddings/../models",
    "POST /v1/embeddings/..%2fmodels",
    "POST /v1/embeddings/%2e%2e/models",
    "POST /v1/embeddings%2f..%2f..%2fv1%2fmodels",
    "POST /v1%2fmodels",
    "POST /v1/%6dodels",
    "POST /V1/models",
    "POST /V1/EMBEDDINGS",
    "POST /v1/embeddings.",
    "POST /v1/embeddings/",
    "POST /v1/embeddings;/../models",
    "POST /v1/embeddings%00",
    "POST /v1/embeddings%3f/../models",
    "POST /v1/embeddings#/../models",
    "POST /v1/embeddings\\..\\models",
    "GET /v1/models/../admin/keys",
    "GET /v1/models/..",
    "GET /v1/models/%2e%2e/cluster/info",
    "GET /v1/models/a/../../cluster/info",
    "GET /v1/models/.hidden",
    "GET /v1/models/a%2fevents",
    "GET /v1/requests/../cluster/progress",
    "DELETE /v1/embeddings",
    "get /v1/models",
    "GET http://127.0.0.1/v1/cluster/info",
    "POST http://gateway.example/v1/models",
    "POST https://gateway.example/v1/models",
    "CONNECT 127.0.0.1:9997",
    "TRACE /v1/models",
    "OPTIONS *",
    # Below a model or a host.
    "POST /models/a/v1/models",
    "POST /models/a/../../token",
    "POST /models/a/../a/v1/models",
    "POST /models/a//v1/embeddings",
    "POST /models/nobody/v1/embeddings",
    "GET /models/a",
    "POST /hosts/one/v1/models",
    "POST /hosts/one/token",
    "GET /hosts/one/metrics",
    "GET /hosts/one/v1/cluster/info",
]


@pytest.mark.parametrize(
    "more", ["", "X-HTTP-Method-Override: GET\nX-Original-URL: /v1/models\nX-Forwarded-For: 127.0.0.1\n"]
)
def test_everything_else_is_closed(site: Site, more: str) -> None:
    """Also with a good key, and whatever a client says about itself."""
    rest = f"Host: {NAME}\nAuthorization: Bearer {KEY}\nContent-Length: 0\nConnection: close\n{more}"
    answered = {line: site.send(f"{line} HTTP/1.1\n{rest}") for line in ADMINISTRATION}
    assert {line: code for line, code in answered.items() if code not in (0, 400, 403, 404, 405, 501)} == {}
    assert site.lines() == []


def test_one_request_is_not_two(site: Site) -> None:
    """What follows the body, or hides in it, is another request of the client's, and judged like any other."""
    second = "POST /v1/models HTTP/1.1\r\nHost: gateway.example\r\nContent-Length: 0\r\n\r\n"
    head = f"POST /v1/embeddings HTTP/1.1\nHost: {NAME}\nAuthorization: Bearer {KEY}\n"
    for framing in ("Content-Length: 2\nTransfer-Encoding: chunked\n", "Content-Length: 2\nContent-Length: 90\n"):
        site.send(head + framing, b"0\r\n\r\n" + second.encode())
    site.send(head + "Content-Length: 0\n", second.encode())
    assert {line for line in site.lines() if line != "POST /v1/embeddings"} == set()


@pytest.mark.parametrize(
    "host",
    [
        "Host: other.example",
        f"Host: x@{NAME}",
        "Host: ",
        f"Host: {NAME}.evil",
        f"Host: {NAME}\nHost: {NAME}",
        "Nothing: x",
    ],
)
def test_another_name_is_refused(site: Site, host: str) -> None:
    assert site.send(f"GET /v1/models HTTP/1.1\n{host}\nAuthorization: Bearer {KEY}\nConnection: close\n") in (400, 421)
    assert site.lines() == []


def test_a_server_is_told_a_name_of_the_gateway(site: Site) -> None:
    site.send(
        f"GET /v1/models HTTP/1.1\nHost: {NAME}:9997@other.example\nAuthorization: Bearer {KEY}\nConnection: close\n"
    )
    assert [seen.values("Host") for seen in site.upstreams[0].seen] == [[NAME]]


def test_a_name_in_the_request_line_counts_and_is_judged(site: Site) -> None:
    asked = f"Host: {NAME}\nAuthorization: Bearer {KEY}\nConnection: close\n"
    assert site.send(f"GET http://other.example/v1/models HTTP/1.1\n{asked}") == 421
    assert site.send(f"GET http://{NAME}/v1/models HTTP/1.1\n{asked}") == 200
    assert site.lines() == ["GET /v1/models"]


# --- who may ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "Authorization: Bearer wrong-wrong-wrong-wrong\n",
        f"Authorization: Bearer {KEY.swapcase()}\n",
        f"Authorization: Bearer {KEY}x\n",
        f"Authorization: Bearer x{KEY}\n",
        f"Authorization: {KEY}\n",
        f"Authorization: Basic {KEY}\n",
        f"Authorization: Bearer wrong-wrong, Bearer {KEY}\n",
        f"Authorization: Bearer wrong-wrong\nAuthorization: Bearer {KEY}\n",
        f"X-Api-Key: {KEY}\n",
        "Authorization: Bearer ~^.*\n",
    ],
)
def test_without_a_key_nobody_is_heard(site: Site, lines: str) -> None:
    for path in ("/v1/models", "/models/shared/v1/models"):
        assert site.send(f"GET {path} HTTP/1.1\nHost: {NAME}\nConnection: close\n{lines}") in (400, 401)
    assert site.lines() == []


def test_a_key_stays_at_the_gateway_and_the_address_is_the_real_one(site: Site) -> None:
    faked = {
        "X-Forwarded-For": "10.9.9.9",
        "X-Real-IP": "10.9.9.9",
        "Forwarded": "for=10.9.9.9",
        "X-Forwarded-Host": "x",
    }
    site.ask("GET", "/v1/models", None, {**BEARER, **faked, "X-Xinference-Backend-Authorization": "x"})
    (seen,) = site.upstreams[0].seen
    assert seen.values("X-Forwarded-For") == seen.values("X-Real-IP") == ["127.0.0.1"]
    assert seen.values("Host") == [NAME] and KEY not in str(seen.headers) and "10.9.9.9" not in str(seen.headers)
    assert not any(seen.values(name) for name in ("Authorization", "Forwarded", "X-Xinference-Backend-Authorization"))


def test_servers_that_ask_themselves_get_the_key_once(site: Site) -> None:
    site.put(keys={}, server_auth=True)
    assert site.ask("GET", "/v1/models", None, BEARER).status == 200
    assert site.upstreams[0].seen[0].values("Authorization") == [f"Bearer {KEY}"]
    site.send(f"GET /v1/models HTTP/1.1\nHost: {NAME}\nAuthorization: Bearer a\nAuthorization: Bearer {KEY}\n")
    assert all(len(seen.values("Authorization")) == 1 for seen in site.upstreams[0].seen)


def test_administration_and_metrics_are_for_named_addresses(site: Site) -> None:
    assert site.ask("GET", "/hosts/two/metrics").status == 403
    site.put(metrics_from=["127.0.0.0/8"])
    assert site.ask("GET", "/hosts/two/metrics").status == 200
    assert site.ask("POST", "/v1/models", "{}", BEARER).status == 403
    site.put(admin_from=["127.0.0.1"])
    assert site.ask("POST", "/v1/models", "{}", BEARER).status == 200
    assert site.ask("POST", "/v1/models", "{}").status == 401
    # What changes a server is done to one that is named.
    assert site.ask("POST", "/models/shared/v1/models", "{}", BEARER).status == 403
    assert site.lines() == ["POST /v1/models", "GET /metrics"]


def test_health_and_whether_to_log_in_are_told_to_everybody(site: Site) -> None:
    assert site.ask("GET", "/status").status == 200
    assert json.loads(site.ask("GET", "/v1/cluster/auth").read()) == {"auth": True}
    assert site.lines() == ["GET /status"]


# --- how it goes through ------------------------------------------------------------------------------------------


def test_the_first_words_are_there_before_the_last_are_said(site: Site) -> None:
    answer = site.ask("POST", "/v1/chat/completions", '{"stream": true}', BEARER)
    assert answer.read1(100) == b"data: first\n\n"
    site.upstreams[0].go.set()
    assert answer.read() == b"data: last\n\n"


def test_an_upload_is_not_kept_back(site: Site) -> None:
    """The server has the first bytes while the client still holds the rest; nothing is written to a disk."""
    part = b"x" * 300_000

    def parts() -> Iterator[bytes]:
        yield part
        assert site.upstreams[0].began.wait(WAIT)
        yield part

    answer = site.ask("POST", "/v1/audio/transcriptions", parts(), BEARER)
    assert json.loads(answer.read())["body"] == 2 * len(part)
    kept = [path for path in Path(site.runner.scratch).rglob("*") if path.is_file() and path.name != "nginx.pid"]
    assert kept == []


def test_bodies_and_rates_have_limits(site: Site) -> None:
    site.put(body_size="1k", rate=1)
    assert site.ask("POST", "/v1/embeddings", "x" * 2000, BEARER).status == 413
    other = {"Authorization": f"Bearer {OTHER}"}
    codes = [site.ask("GET", "/v1/models", None, BEARER).status for _number in range(6)]
    assert 429 in codes and site.ask("GET", "/v1/models", None, other).status == 200
    site.put(rate=1, keys={}, server_auth=True)
    codes = [site.ask("GET", "/v1/models", None, {"Authorization": f"Bearer {n}"}).status for n in range(6)]
    assert 429 in codes


def test_a_websocket_goes_through_and_no_other_upgrade(site: Site) -> None:
    head = f"Host: {NAME}\nAuthorization: Bearer {KEY}\nConnection: Upgrade\n"
    with site.connect() as connection:
        text = f"GET /v1/realtime?model=a HTTP/1.1\n{head}Upgrade: websocket\n\n"
        connection.sendall(text.replace("\n", "\r\n").encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 101 ")
        connection.sendall(b"\x81\x05hello")
        assert connection.recv(1000) == b"\x81\x05hello"
    site.upstreams[0].forget()
    site.send(f"GET /v1/realtime HTTP/1.1\n{head}Upgrade: h2c\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\n")
    site.send(f"GET /v1/models HTTP/1.1\n{head}Upgrade: websocket\n")
    assert [seen.values("Upgrade") for seen in site.upstreams[0].seen] == [[], []]


def test_connections_to_the_server_are_used_again(site: Site) -> None:
    for _number in range(12):
        site.ask("GET", "/v1/models", None, BEARER).read()
    # Each of the four workers has connections of its own.
    assert len({seen.connection for seen in site.upstreams[0].seen}) <= 4


def test_a_model_leads_to_the_hosts_that_serve_it(site: Site) -> None:
    def served(uid: str, count: int = 1) -> List[str]:
        path = f"/models/{uid}/v1/embeddings"
        return [json.loads(site.ask("POST", path, "{}", BEARER).read())["server"] for _number in range(count)]

    assert served("a") == ["one"] and served("b") == ["two"]
    assert set(served("shared", 20)) == {"one", "two"}
    assert set(site.lines()) == {"POST /v1/embeddings"}


def test_a_host_that_is_gone_is_left_out(site: Site) -> None:
    lost = Upstream("three").start()
    servers = (f"127.0.0.1:{lost.port}", f"127.0.0.1:{site.upstreams[0].port}")
    site.put(routes=[Route("", servers)])
    asked = [json.loads(site.ask("POST", "/v1/embeddings", "{}", BEARER).read())["server"] for _number in range(20)]
    assert set(asked) == {"one", "three"}
    lost.stop()
    answered = [site.ask("POST", "/v1/embeddings", "{}", BEARER) for _number in range(20)]
    assert {answer.status for answer in answered} == {200}
    assert {json.loads(answer.read())["server"] for answer in answered} == {"one"}


def test_before_hosts_of_different_models_one_has_to_be_named(site: Site) -> None:
    site.put(routes=[route for route in site.gateway.routes if route.prefix])
    answer = site.ask("GET", "/v1/models", None, BEARER)
    assert answer.status == 404 and "/models/<model uid>/v1" in json.loads(answer.read())["error"]["message"]
    assert site.ask("GET", "/status").status == 200 and site.lines() == []


def test_old_tls_is_refused(site: Site) -> None:
    context = ssl.create_default_context(cafile=str(site.authority / f"{AUTHORITY}.crt"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", site.gateway.port), timeout=WAIT) as plain, pytest.raises(OSError):
        context.wrap_socket(plain, server_hostname=NAME)


# --- the gateway itself -------------------------------------------------------------------------------------------


def test_the_log_has_no_key_no_body_and_no_query(site: Site) -> None:
    log = Path(site.runner.log)
    before = len(log.read_text())
    site.ask("POST", "/v1/embeddings?token=planted-in-query", '{"input": "planted-in-body"}', BEARER).read()
    site.ask("GET", "/planted-in-path", None, BEARER).read()
    site.ask("GET", "/v1/models", None, {"Authorization": "Bearer planted-wrong-key"}).read()
    text = log.read_text()[before:]
    rows = [json.loads(line) for line in text.splitlines()]
    asked = [(row["client"], row["path"], row["status"]) for row in rows]
    assert asked == [("rag", "/v1/embeddings", 200), ("rag", "-", 403), ("", "/v1/models", 401)]
    said = text + (log.parent / "gateway-error.log").read_text()
    assert "planted" not in said and KEY not in said


def test_a_second_time_changes_nothing_and_an_interrupted_one_is_made_up_for(site: Site) -> None:
    assert site.put().action == "none"
    assert site.put(rate=7).action == "reload" and answers(site.gateway, site.wanted)
    # Switched, and ended before nginx was told.
    reload, site.runner.reload = site.runner.reload, lambda: (one for one in ()).throw(KeyboardInterrupt)  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        site.put(rate=8)
    site.runner.reload = reload  # type: ignore
    assert not answers(site.gateway, site.wanted)
    assert site.put(rate=8).action == "reload" and answers(site.gateway, site.wanted)


def test_an_answer_that_was_begun_outlives_a_new_configuration(site: Site) -> None:
    answer = site.ask("POST", "/v1/chat/completions", '{"stream": true}', BEARER)
    assert answer.read1(100) == b"data: first\n\n"
    done = site.put(keys={"other": OTHER})
    assert done.action == "reload" and KEY not in str(done.diff) and OTHER not in str(done.diff)
    assert site.ask("GET", "/v1/models", None, BEARER).status == 401
    site.upstreams[0].go.set()
    assert answer.read() == b"data: last\n\n"


def test_the_log_is_rotated_on_a_host_that_also_serves(site: Site) -> None:
    """As docs/gateway.md says. Serving closes the directory of logs, and only nginx's master opens files there."""
    log = Path(site.runner.log)
    modes.close(modes.too_open(site.place.parent))
    assert stat.S_IMODE(log.parent.stat().st_mode) == modes.CLOSED

    def asked_and_written() -> None:
        before, limit = size(), time.monotonic() + WAIT
        while size() == before:
            assert time.monotonic() < limit, "requests are answered, and nothing is written"
            site.ask("GET", "/v1/models", None, BEARER).read()

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    for rate in (11, 12):
        log.rename(log.with_name(f"gateway.log.{rate}"))
        site.runner.reload()
        asked_and_written()
        assert site.put(rate=rate).action == "reload"
        asked_and_written()


def test_what_nginx_refuses_replaces_nothing(site: Site) -> None:
    wanted = {**site.wanted, "tls.key": dataclasses.replace(site.wanted["tls.key"], text="no key\n")}
    with pytest.raises(GatewayError, match="nginx refuses the configuration, so that nothing was changed"):
        converge(site.place, site.runner, site.gateway, wanted, WAIT, False)
    assert site.ask("GET", "/v1/models", None, BEARER).status == 200
    assert site.put().action == "none"


def test_private_files_are_private_and_old_keys_are_gone(site: Site) -> None:
    site.put(keys={"other": OTHER})
    for name in ("keys.conf", "tls.key"):
        (path,) = site.place.glob(f"releases/*/{name}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
    kept = [path for path in site.place.rglob("*") if path.is_file() and KEY in path.read_text(errors="replace")]
    assert kept == []


def test_it_is_taken_away(site: Site) -> None:
    assert remove(site.place, site.runner, dry=True) and site.place.exists()
    assert remove(site.place, site.runner, dry=False) and not site.place.exists()
    assert not site.runner.running() and not remove(site.place, site.runner, dry=False)
