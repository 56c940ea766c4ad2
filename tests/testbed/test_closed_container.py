# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server in a container whose port is open to the network from its first second, and a stranger who waits for it."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from plays import changes
from sieges import nobody_got_in, stranger

from .conftest import Carried
from .hosts import Testbed
from .site import SERVER, Site

PASSWORD, OLD_KEY = "planted-pass-1", "sk-A1b2C3d4E5f6G"


@pytest.fixture(scope="module")
def site(bare: Testbed, carried: Carried, tmp_path_factory: pytest.TempPathFactory) -> Site:
    place = tmp_path_factory.mktemp("closed")
    variables = {
        **carried.variables,
        "xinference_images": [{"name": "testbed/xinference:1.8.1-cpu"}],
        "xinference_backend": "docker",
        "xinference_image": "testbed/xinference:4.1.0-cpu",
        "xinference_host": "0.0.0.0",
        "xinference_server_ulimits": {},
        "xinference_models": [],
        "xinference_auth": True,
        "xinference_username": "keeper-of-keys",
        "xinference_password": PASSWORD,
        "xinference_api_keys": ["rag"],
        "xinference_api_key_directory": str(place / "keys"),
    }
    found = Site(bare.hosts["gpu-1"], place, variables)
    found.play("ship")
    return found


def address(site: Site) -> str:
    return f"http://{site.host.address}:9997"


def ask(site: Site, path: str, body: Any = None, token: str = "") -> int:
    """The status of an answer to somebody outside of the host."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        with build_opener(ProxyHandler({})).open(Request(address(site) + path, content, headers), timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def login(site: Site, password: str) -> int:
    return ask(site, "/token", {"username": "keeper-of-keys", "password": password})


def test_a_port_that_is_open_at_once_is_closed_to_strangers(site: Site) -> None:
    with stranger(address(site), site.place) as verdict:
        site.play("serve")
        nobody_got_in(verdict())
    assert login(site, PASSWORD) == 200
    shown = json.dumps(site.container()) + site.inside("env") + site.host.docker("logs", SERVER)
    assert PASSWORD not in shown and PASSWORD not in site.host.exec("cat", "/opt/xinference/current/compose.yaml")


def test_a_lost_database_opens_nothing(site: Site) -> None:
    site.host.docker("stop", SERVER)
    site.host.exec("rm", "-r", "/opt/xinference/home/auth")
    with stranger(address(site), site.place) as verdict:
        site.play("serve")
        nobody_got_in(verdict())
    assert login(site, PASSWORD) == 200


def test_a_client_gets_its_key_and_a_second_run_changes_nothing(site: Site) -> None:
    site.play("access")
    key = (site.place / "keys/gpu-1/rag").read_text().strip()
    assert ask(site, "/v1/models", token=key) == 200
    assert changes(site.play("serve", "access")) == 0


def test_before_3_0_it_is_closed_as_well(site: Site) -> None:
    site.play("stop")
    keys = [{"name": "rag", "key": OLD_KEY}]
    with stranger(address(site), site.place) as verdict:
        site.play("serve", "access", xinference_image="testbed/xinference:1.8.1-cpu", xinference_api_keys=keys)
        nobody_got_in(verdict())
    assert login(site, PASSWORD) == 200 and ask(site, "/v1/models", token=OLD_KEY) == 200
    assert OLD_KEY not in json.dumps(site.container()) + site.inside("env")
