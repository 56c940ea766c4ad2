# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nobody got in, the right keys alone open, through TLS, and no secret is anywhere but in the files meant for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import EPHEMERAL

testinfra_hosts = ["local://"]
HOSTS = ("gpu-1", "gpu-2")
SECRETS = EPHEMERAL / "secrets"
AUTHORITY = SECRETS / "authority/authority.crt"
STRANGER = "testbed-molecule-locked-stranger"
ASKED = {"model": "minilm", "input": "A cat sleeps."}
LIMIT = 120.0
# Of each host and of the controller, what may hold a secret; all for its owner only.
PRIVATE_PATHS = (
    "gpu-?:/opt/xinference/releases/*/accounts.json",
    "gpu-?:/opt/xinference/releases/*/credentials.json",
    "gpu-?:/opt/xinference/releases/*/server.env",
    "gpu-?:/opt/xinference/state/seed",
    "gpu-?:/opt/xinference/gateway/*",
    "controller:*/secrets/*",
)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def reports() -> dict[str, dict[str, Any]]:
    """What the strangers wrote down, by HOST-PORT."""
    return {
        path.name: json.loads(path.read_text()) for path in (EPHEMERAL / "strangers").iterdir() if path.suffix == ""
    }


def key(name: str) -> str:
    """The key of the client `rag`."""
    return (SECRETS / "keys/gpu-1/rag" if name == "gpu-1" else SECRETS / "client").read_text().strip()


def ask(host: Any, bearer: str | None, path: str = "/v1/embeddings", body: Any = None) -> requests.Response:
    """What a client gets that trusts the authority of the site and nobody else."""
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    method = "GET" if body is None else "POST"
    url = f"https://{host.address}{path}"
    return requests.request(method, url, json=body, headers=headers, verify=str(AUTHORITY), timeout=LIMIT)


@pytest.mark.parametrize("name", HOSTS)
def test_the_right_key_opens_through_tls(bed: dict[str, Any], name: str) -> None:
    answer = ask(bed[name], key(name), body=ASKED)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"][0]["embedding"]) == 384


@pytest.mark.parametrize("name", HOSTS)
def test_no_other_key_opens(bed: dict[str, Any], name: str) -> None:
    other = key(next(other for other in HOSTS if other != name))
    for wrong in (None, other, key(name)[:-1] + "."):
        for path, body in (("/v1/embeddings", ASKED), ("/v1/models", None)):
            answer = ask(bed[name], wrong, path, body)
            assert answer.status_code in (401, 403), (wrong, path, answer.text)


@pytest.mark.parametrize("name", HOSTS)
def test_a_client_administers_nothing(bed: dict[str, Any], name: str) -> None:
    launch = {"model_uid": "mine", "model_name": "bge-m3", "model_type": "embedding"}
    login = {"username": "keeper-of-keys", "password": (SECRETS / "administrator").read_text()}
    for path, body in (("/v1/models", launch), ("/v1/admin/users", None), ("/metrics", None), ("/token", login)):
        assert ask(bed[name], key(name), path, body).status_code in (401, 403, 404), path


@pytest.mark.parametrize("name", HOSTS)
def test_there_is_no_other_way_in(bed: dict[str, Any], name: str) -> None:
    for url in (f"http://{bed[name].address}:9997/status", f"http://{bed[name].address}/v1/models"):
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=LIMIT)
    # nginx says that this is a port for TLS, and nothing else.
    plain = requests.get(f"http://{bed[name].address}:443/v1/models", timeout=LIMIT)
    assert plain.status_code in (400, 497)


def test_strangers_tried_all_the_time_and_never_got_in() -> None:
    asking = {f"{name}-gateway" for name in HOSTS}
    # Since long before there was a gateway, and still: every attempt once more at a gateway that is there.
    until(lambda: all(sum(reports()[name]["answers"].values()) > 100 for name in asking))
    found = reports()
    assert set(found) == asking | {f"{name}-server" for name in HOSTS}
    assert {name: report["open"] for name, report in found.items() if report["open"]} == {}
    for name, report in found.items():
        if name in asking:
            assert report["unreached"] > 0 and report["answers"].get("401", 0) > 0, report
        else:
            assert report["unreached"] == report["attempts"] > 100, report


@pytest.fixture(scope="module")
def search() -> Any:
    """Looks for what the site was given, for what was made for it, and for a secret that is planted below."""
    from testbed.leaks import Search

    made = {"key of gpu-1": SECRETS / "keys/gpu-1/rag"}
    made.update({path.name: path for path in (SECRETS / "authority").rglob("*.key")})
    told = json.loads((SECRETS / "all.json").read_text())["secrets"]
    return Search({**told, **{name: path.read_text().strip() for name, path in made.items()}, "planted": PLANTED})


PLANTED = "planted-on-purpose-4711"


@pytest.fixture(scope="module")
def leaks(bed: dict[str, Any], search: Any) -> Iterator[list[Any]]:
    """All that is found on hosts and controller, with a secret planted in one place of each."""
    from testbed import engine
    from testbed.leaks import Private
    from testbed.places import of_host

    private = [Private(pattern) for pattern in PRIVATE_PATHS]
    found = []
    (EPHEMERAL / "planted").write_text(PLANTED)
    for host in bed.values():
        host.exec("sh", "-c", f"echo {PLANTED} > /var/log/planted")
        found += of_host(search, host, private)
        for command in ("inspect", "logs"):
            found += search.in_text(f"docker {command} {host.container}", engine.docker(command, host.container))
    began = SECRETS.stat().st_ctime
    for place in (EPHEMERAL, Path.home() / ".ansible", Path("/tmp")):
        found += search.in_tree(
            place, f"controller:{place}", private, since=began - 3600 if place == EPHEMERAL else began
        )
    yield sorted(set(found))
    (EPHEMERAL / "planted").unlink()


def test_what_ansible_told_was_all_that_it_can_tell() -> None:
    log = (EPHEMERAL / "ansible.log").read_text()
    assert log.count("PLAY RECAP") == 2 and "task path: " in log and "+++ after" in log


def test_no_secret_is_but_where_it_belongs(leaks: list[Any]) -> None:
    found = [str(leak) for leak in leaks if leak.secret != "planted"]
    assert found == []


def test_the_search_was_not_blind(leaks: list[Any]) -> None:
    found = {leak.place for leak in leaks if leak.secret == "planted"}
    assert found == {*(f"{name}:/var/log/planted" for name in HOSTS), f"controller:{EPHEMERAL}/planted"}


def test_no_process_was_told_a_secret() -> None:
    """Ends the watch, so it comes last."""
    (SECRETS / "all.json").unlink()
    report = EPHEMERAL / "watched.json"
    until(lambda: json.loads(report.read_text())["ended"])
    told = json.loads(report.read_text())
    assert told["leaks"] == [] and told["processes"] > 500
