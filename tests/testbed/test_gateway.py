# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway in a container on an air-gapped host, from the bundle to a client: a story in steps, told in order.

Behind it is a stand-in (tests/integration/upstream.py), because what the server answers does not matter here.
"""

from __future__ import annotations

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
from plays import REPOSITORY, changes

from . import images
from .engine import docker
from .hosts import Host, Testbed
from .site import Site
from .spec import HostSpec

NAME = f"gateway-{os.getpid()}"
KEY, NEXT = "sk-planted-first-0123456789", "sk-planted-second-0123456789"
SERVE = "nohup python3 /opt/upstream.py 9997 > /dev/null 2>&1 &"


class Gateway(Site):
    """One host that serves and has the gateway, and its clients."""

    container_name = "xinference-gateway"

    def __init__(self, host: Host, place: Path) -> None:
        variables: Dict[str, Any] = {
            "xinference_bundle_dir": str(place / "bundle"),
            "xinference_backend": "docker",
            "xinference_models": [],
            "xinference_gateway_image": images.NGINX,
            "xinference_gateway_authority": str(place / "authority"),
            "xinference_gateway_keys": [{"name": "rag", "key": KEY}],
        }
        super().__init__(host, place, variables)
        self.inventories.append(place / "gateway.json")
        self.inventories[-1].write_text(json.dumps({"xinference_gateway": {"hosts": {host.name: None}}}))

    def ask(self, method: str, path: str, key: str = "") -> int:
        """The status of a request by a client elsewhere, which trusts the site only; 0 without an answer."""
        trust = ssl.create_default_context(cafile=str(self.place / "authority/authority.crt"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        )
        request = urllib.request.Request(
            f"https://{self.host.address}{path}", method=method, data=b"{}" if method == "POST" else None
        )
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with opener.open(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    images.host()
    images.nginx()
    bed = Testbed(NAME)
    try:
        host = bed.up([HostSpec("gpu-1", gpus=0)])["gpu-1"]
        docker("cp", str(REPOSITORY / "tests/integration/upstream.py"), f"{host.container}:/opt/upstream.py")
        host.exec("sh", "-c", SERVE)
        found = Gateway(host, tmp_path_factory.mktemp("gateway"))
        yield found
    finally:
        bed.down()


def test_the_image_comes_with_the_bundle(site: Gateway) -> None:
    assert images.NGINX in site.play("bundle")
    site.play("ship")
    assert images.NGINX in site.host.docker("images", "--format", "{{.Repository}}:{{.Tag}}")


def test_wrong_variables_are_refused_together(site: Gateway) -> None:
    wrong: Dict[str, Any] = {"xinference_gateway_admin_from": ["10.0.0.300"], "xinference_gateway_body_size": "huge"}
    said = site.play("gateway", expect=1, xinference_gateway_keys=[{"name": "rag", "key": "short-planted"}], **wrong)
    assert all(word in said for word in ("10.0.0.300", "huge", "the key of rag has 13 characters"))
    assert "short-planted" not in said and not (site.place / "authority").exists()


def test_clients_ask_through_it_and_nobody_administers(site: Gateway) -> None:
    printed = site.play("gateway", options=["-vvv", "--diff"])
    assert KEY not in printed and "PRIVATE KEY" not in printed
    assert site.ask("GET", "/v1/models", KEY) == 200 and site.ask("POST", "/v1/embeddings", KEY) == 200
    assert site.ask("GET", "/v1/models") == 401
    assert (
        site.ask("POST", "/v1/models", KEY)
        == site.ask("POST", "/token", KEY)
        == site.ask("GET", "/metrics", KEY)
        == 403
    )


def test_the_container_can_do_little(site: Gateway) -> None:
    seen = site.container()
    limits = seen["HostConfig"]
    assert limits["ReadonlyRootfs"] and limits["CapDrop"] == ["ALL"] and not limits["Privileged"]
    assert sorted(name.replace("CAP_", "") for name in limits["CapAdd"]) == [
        "CHOWN",
        "NET_BIND_SERVICE",
        "SETGID",
        "SETUID",
    ]
    assert limits["SecurityOpt"] == ["no-new-privileges:true"]
    users = {
        line.split()[1]
        for line in site.host.docker("top", site.container_name, "-eo", "pid,user,args").splitlines()
        if "worker" in line
    }
    assert users == {"nobody"}
    assert KEY not in json.dumps(seen) and KEY not in site.host.exec("ps", "-eo", "args")


def test_a_second_run_changes_nothing(site: Gateway) -> None:
    assert changes(site.play("gateway")) == 0
    assert changes(site.play("gateway", options=["--check", "--diff"])) == 0


def test_another_key_is_put_in_force_by_the_same_container(site: Gateway) -> None:
    before = site.container()["Id"]
    rotated: Dict[str, Any] = {"xinference_gateway_keys": [{"name": "rag", "key": NEXT}]}
    printed = site.play("gateway", options=["--check", "--diff"], **rotated)
    assert changes(printed) == 1 and NEXT not in printed and site.ask("GET", "/v1/models", KEY) == 200
    site.play("gateway", **rotated)
    assert (site.ask("GET", "/v1/models", KEY), site.ask("GET", "/v1/models", NEXT)) == (401, 200)
    assert site.container()["Id"] == before
    assert site.host.exec("sh", "-c", f"grep -rl {KEY} /opt/xinference || true") == ""


def test_it_comes_back_after_a_reboot(site: Gateway) -> None:
    site.host.reboot()
    site.host.exec("sh", "-c", SERVE)
    # By the engine itself; nobody runs a playbook.
    limit = time.monotonic() + 60
    while site.ask("GET", "/v1/models", NEXT) != 200:
        assert time.monotonic() < limit, site.host.docker("ps", "--all")
        time.sleep(0.5)
    assert changes(site.play("gateway", xinference_gateway_keys=[{"name": "rag", "key": NEXT}])) == 0


def test_teardown_takes_it_away(site: Gateway) -> None:
    site.play("teardown", xinference_teardown_confirm="yes")
    assert site.container_name not in site.host.docker("ps", "--all", "--format", "{{.Names}}")
    assert site.host.exec("sh", "-c", "ls -A /opt/xinference/gateway 2> /dev/null || true") == ""
