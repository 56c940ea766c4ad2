# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The docker backend on a real air-gapped host with the real Xinference 4.1.0: a story in steps, told in order."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from plays import REPOSITORY, changes

from .conftest import PACKAGE, Carried
from .engine import compose_plugin, docker
from .hosts import Testbed
from .site import SERVER, Site
from .spec import gpu_uuid

RECORDED = REPOSITORY / "tests/unit/module_utils/host/compose"
IMAGE = "testbed/xinference:4.1.0-cpu"
CONTAINER = SERVER
KEEPER = "xinference-keeper-1"
SECRET = "s3cr'et $HOME"
ISOLATED: Dict[str, Any] = {
    "xinference_server_isolated": True,
    "xinference_server_user": "1000",
    "xinference_host": "0.0.0.0",
    "xinference_server_allow_open": True,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDED.glob("*.yaml")))
def test_compose_accepts_the_recorded_projects(name: str, tmp_path: Path) -> None:
    """The files that the unit tests compare with are read by the real Compose, as they are meant."""
    (tmp_path / "compose.yaml").write_text((RECORDED / f"{name}.yaml").read_text())
    plugin = [str(compose_plugin()), "--project-directory", str(tmp_path)]
    done = subprocess.run([*plugin, "config", "--format", "json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    server = json.loads(done.stdout)["services"]["server"]
    assert server["image"].startswith("sha256:") and server["pull_policy"] == "never"
    if name == "gpu":
        devices = server["deploy"]["resources"]["reservations"]["devices"]
        assert [device["device_ids"] for device in devices] == [["0", "GPU-c"]]
        assert server["environment"]["GREETING"] == 'it costs $$5, "net"'  # as Compose prints what it read as $5
        assert server["command"][2].endswith('"$$0" "$$@"')


@pytest.fixture(scope="module")
def chat(standing: Testbed, carried: Carried) -> Dict[str, Any]:
    """The one model of the site, which only some tests need."""
    host = standing.hosts["gpu-1"]
    return {
        "model_uid": "chat",
        "model_name": "qwen2.5-instruct",
        "model_engine": "transformers",
        "model_format": "pytorch",
        "model_size_in_billions": "0_5",
        "quantization": "none",
        "gpus": [gpu_uuid(host.testbed, host.name, 1)],
        "virtual_env_packages": [PACKAGE],
        "source": {"path": carried.models["chat"], "name": "chat"},
    }


@pytest.fixture(scope="module")
def site(bare: Testbed, carried: Carried, chat: Dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Site:
    host = bare.hosts["gpu-1"]
    host.exec("sh", "-c", "echo one > /etc/site.pem")
    variables: Dict[str, Any] = {
        **carried.variables,
        "xinference_backend": "docker",
        "xinference_image": IMAGE,
        "xinference_engines": "bundle",
        # The other way round than the host numbers them.
        "xinference_gpus": [1, 0],
        "xinference_server_ulimits": {"stack": 67108864},
        "xinference_server_secrets": {"SITE_TOKEN": SECRET},
        "xinference_server_mounts": [{"source": "/etc/site.pem", "target": "/etc/site.pem"}],
        "xinference_verify_report": "",
        "xinference_models": [{**chat, "enabled": False}],
    }
    found = Site(host, tmp_path_factory.mktemp("docker"), variables)
    found.play("ship", xinference_models=[chat])
    return found


def test_the_server_runs_as_the_inventory_says(site: Site) -> None:
    site.play("serve")
    seen = site.container()
    devices = seen["HostConfig"]["DeviceRequests"]
    assert [(one["Driver"], one["DeviceIDs"], one["Capabilities"]) for one in devices] == [
        ("nvidia", ["0", "1"], [["gpu"]])
    ]
    assert seen["State"]["Health"]["Status"] == "healthy"
    assert seen["HostConfig"]["PortBindings"] == {"9997/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9997"}]}
    assert seen["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    mounts = {one["Destination"]: one["RW"] for one in seen["Mounts"]}
    assert mounts["/models"] is False and mounts["/root/.cache/vllm"] is True
    assert seen["Image"] == seen["Config"]["Image"]
    assert seen["HostConfig"]["ReadonlyRootfs"] and seen["HostConfig"]["CapDrop"] == ["ALL"]
    assert seen["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"] and not seen["HostConfig"]["CapAdd"]
    status = site.inside("cat", "/proc/1/status")
    assert re.search(r"CapEff:\t0+\nCapBnd:\t0+\n", status) and "NoNewPrivs:\t1" in status


def test_secrets_arrive_and_are_in_no_file_that_others_can_read(site: Site) -> None:
    environments = site.inside("sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null; true").split("\0")
    assert f"SITE_TOKEN={SECRET}" in environments, "the server's processes have it"
    assert "SITE_TOKEN" not in json.dumps(site.container()) + site.inside("env")
    readable = site.host.exec("find", "-L", "/opt/xinference/current", "-type", "f", "-perm", "/040").split()
    assert "/opt/xinference/current/compose.yaml" in readable
    assert site.host.exec("grep", "-lF", "s3cr", *readable, check=False) == ""


def test_what_tells_of_the_site_is_closed_to_other_users(site: Site) -> None:
    """As another user meets it, who lists what can be read; software, weights and metrics are for everybody."""
    site.host.exec("useradd", "--no-create-home", "somebody", check=False)
    command = "find /opt/xinference -type f -readable -size +0 2>/dev/null || true"
    seen = site.host.exec("su", "--shell", "/bin/sh", "somebody", "-c", command).split()
    beyond = [path for path in seen if path.split("/")[3] not in ("models", "wheels", "lib", "tools")]
    assert beyond == ["/opt/xinference/state/xinference.prom"]
    assert len(seen) > 1, "the look of another user found nothing at all"
    listed = site.host.exec("find", "/opt/xinference", "-perm", "/022", "-not", "-type", "l")
    assert listed == "", "somebody else may write there"


def test_a_launch_gets_from_the_bundle_what_the_image_lacks(site: Site, chat: Dict[str, Any]) -> None:
    missing = site.host.docker("exec", CONTAINER, "python3", "-c", f"import {PACKAGE}; print(1)", check=False)
    assert missing == ""
    assert "default" not in site.host.exec("ip", "route")
    site.play("models", xinference_models=[chat])
    found = site.inside("find", "/root/.xinference/virtualenv", "-type", "d", "-name", PACKAGE)
    assert "/qwen2.5-instruct/transformers/" in found
    launched = json.loads(site.host.exec("cat", "/opt/xinference/state/launched.json"))
    assert '"gpu_idx": [1]' in json.dumps(launched) and '"/models/chat/' in json.dumps(launched)


def test_a_second_run_changes_nothing(site: Site, chat: Dict[str, Any]) -> None:
    assert changes(site.play("ship", "serve", "models", xinference_models=[chat])) == 0


def test_a_change_of_the_models_leaves_the_container_alone(site: Site) -> None:
    before = site.container()["Id"]
    assert changes(site.play("serve")) == 1  # the release
    assert site.container()["Id"] == before


def test_lost_gpus_are_found_and_given_back(site: Site) -> None:
    before = site.container()["Id"]
    site.host.lose_gpus(CONTAINER)
    printed = site.play("serve")
    assert "Recreate the container that lost GPUs, 0, 1" in printed
    assert site.container()["Id"] != before
    assert site.inside("nvidia-smi", "-L").count("UUID") == 2


def test_a_recreation_that_was_interrupted_is_finished(site: Site) -> None:
    """Compose, killed when it had made the new container and not yet removed the old one, leaves both."""
    seen = site.container()
    labels = [part for name, value in seen["Config"]["Labels"].items() for part in ("--label", f"{name}={value}")]
    site.host.docker("create", "--name", f"{seen['Id'][:12]}_{CONTAINER}", *labels, seen["Image"], "true")
    site.play("serve", xinference_server_log_max_files=9)
    names = site.host.docker("ps", "--all", "--format", "{{.Names}}").split()
    assert sorted(names) == [KEEPER, CONTAINER]
    assert site.container()["Id"] != seen["Id"]


def test_settings_that_cannot_be_are_refused_while_the_server_runs_on(site: Site) -> None:
    before, release = site.container()["Id"], site.host.exec("readlink", "/opt/xinference/current")
    wrong: Dict[str, Any] = {
        "xinference_port": 70000,
        "xinference_host": "gpu.site",
        "xinference_server_allow_open": True,
        "xinference_server_mounts": [{"source": "/etc", "target": "/models"}],
    }
    refused: List[Tuple[Dict[str, Any], List[str]]] = [
        ({"xinference_server_shm_size": "lots"}, ["Compose does not take"]),
        ({"xinference_server_container_options": {"nonsense": 1}}, ["nonsense is not allowed"]),
        (wrong, ["must be from 1 to 65535", "must be an IP address", "/models is taken"]),
    ]
    for settings, told in refused:
        printed = " ".join(site.play("serve", expect=1, **settings).split())
        assert all(words in printed for words in told), printed
    assert site.container()["Id"] == before and site.container()["State"]["Health"]["Status"] == "healthy"
    assert site.host.exec("readlink", "/opt/xinference/current") == release


def test_a_project_of_the_same_name_is_left_alone(site: Site) -> None:
    labels = {"project": "xinference", "service": "web", "oneoff": "False", "project.working_dir": "/srv/xinference"}
    marks = [part for name, value in labels.items() for part in ("--label", f"com.docker.compose.{name}={value}")]
    site.host.docker("create", "--name", "xinference-web-1", *marks, IMAGE, "true")
    try:
        assert "is not that of /opt/xinference: xinference-web-1" in site.play("serve", expect=1)
        assert "xinference-web-1" in site.host.docker("ps", "--all", "--format", "{{.Names}}").split()
    finally:
        site.host.docker("rm", "xinference-web-1")


@pytest.fixture
def lookups(site: Site) -> Iterator[Callable[[], int]]:
    """A function that counts name queries that left containers or the host's engine; nobody answers them meanwhile."""
    # Not those that stay inside: the engine's own server of names is asked at 127.0.0.11.
    what = ["--dport", "53", "!", "-d", "127.0.0.0/8"]
    rules = [[chain, "-p", word, *what] for chain in ("POSTROUTING", "PREROUTING") for word in ("udp", "tcp")]

    def count() -> int:
        table = site.host.exec("iptables", "-t", "mangle", "-nvxL")
        rows = [row.split() for row in table.splitlines() if "dpt:53" in row]
        assert len(rows) == len(rules)
        return sum(int(row[0]) for row in rows)

    site.host.exec("cp", "/etc/resolv.conf", "/root/resolv")
    try:
        for rule in rules:
            site.host.exec("iptables", "-t", "mangle", "-A", *rule)
        site.host.exec("sh", "-c", "echo nameserver 192.0.2.53 > /etc/resolv.conf")
        yield count
    finally:
        site.host.exec("cp", "/root/resolv", "/etc/resolv.conf")
        for rule in rules:
            site.host.exec("iptables", "-t", "mangle", "-D", *rule, check=False)


def test_an_isolated_server_answers_and_sends_nothing_out(
    site: Site, chat: Dict[str, Any], lookups: Callable[[], int]
) -> None:
    """As a user of its own too; the same look-up is seen to leave when the server is not isolated."""
    ask = "import socket\nfor name in ('pypi.org', 'huggingface.co'):\n  try: socket.getaddrinfo(name, 443)\n"
    ask += "  except OSError: pass\n  else: raise SystemExit(name)"
    site.host.docker("restart", CONTAINER)  # the new nameserver is read at the start
    site.inside("python3", "-c", ask)
    assert lookups() > 0
    with_chat = {**ISOLATED, "xinference_models": [chat]}
    site.play("serve", "models", **with_chat)
    before = lookups()
    site.inside("python3", "-c", ask)
    assert lookups() == before
    assert site.inside("id", "-u").strip() == "1000"
    # Neither the host nor anything behind it, whatever the address.
    bridges = re.findall(r"inet ([0-9.]+)", site.host.exec("ip", "-4", "address"))
    reach = "import socket, sys\nfor place in sys.argv[1:]:\n  try: socket.create_connection((place, 22), 20)\n"
    reach += "  except OSError: pass\n  else: print(place)"
    outside = [place for place in bridges if not place.startswith("127.")]
    assert len(outside) > 2 and site.host.exec("python3", "-c", reach, *outside).split() == outside
    assert site.inside("python3", "-c", reach, *outside, "192.0.2.1") == ""
    request = json.dumps({"model": "chat", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]})
    url = "http://127.0.0.1:9997/v1/chat/completions"
    answer = site.host.exec("curl", "-sS", "--fail", "-H", "Content-Type: application/json", "-d", request, url)
    assert json.loads(answer)["usage"]["completion_tokens"] > 0
    ingress = json.loads(site.host.docker("inspect", "xinference-ingress-1"))[0]
    site.host.docker("restart", CONTAINER)
    patiently = ["--retry", "300", "--retry-all-errors", "--retry-delay", "1"]
    site.host.exec("curl", "-sS", "--fail", *patiently, "http://127.0.0.1:9997/status")
    assert json.loads(site.host.docker("inspect", "xinference-ingress-1"))[0]["State"] == ingress["State"]
    assert changes(site.play("serve", **with_chat)) == 0
    asking = {**ISOLATED, "xinference_server_container_options": {"dns": ["192.0.2.53"]}}
    assert "options.dns and xinference_server_isolated exclude" in site.play("serve", expect=1, **asking)


def answers(site: Site, *where: str) -> bool:
    """Whether the server answers at the host's address to whoever is in the container that docker is asked for."""
    curl = ["curl", "-sS", "--fail", "--max-time", "10", f"http://{site.host.address}:9997/status"]
    return "uptime" in docker(*where, *curl, check=False)


def test_a_firewall_lets_named_addresses_alone_reach_a_published_port(site: Site) -> None:
    """The machine that manages the host is let in, another one on the same network is not; SSH is for both."""
    assert site.inside("id", "-u").strip() == "1000", "it is isolated, as the step before left it"
    stranger = ["run", "--rm", "--network", f"testbed-{site.host.testbed}", IMAGE]
    friend = ["run", "--rm", "--network", "host", IMAGE]
    assert answers(site, *stranger) and answers(site, *friend)
    machine = f"{site.host.address.rpartition('.')[0]}.1"
    closed = {**ISOLATED, "xinference_firewall": "nftables", "xinference_firewall_clients": [machine]}
    assert changes(site.play("firewall", **closed)) == 1
    assert not answers(site, *stranger) and answers(site, *friend) and answers(site, "exec", site.host.container)
    assert changes(site.play("firewall", **closed)) == 0
    # Somebody changes the rules in force by hand.
    site.host.exec("nft", "flush", "chain", "inet", "airgap_xinference", "arriving")
    assert answers(site, *stranger)
    assert changes(site.play("firewall", **closed)) == 1
    assert not answers(site, *stranger)
    wrong = {**closed, "xinference_firewall_clients": ["everybody"]}
    assert "no address or network" in site.play("firewall", expect=1, **wrong)
    assert "airgap_xinference" in site.host.exec("nft", "list", "tables")
    assert changes(site.play("firewall", **ISOLATED)) == 1
    assert answers(site, *stranger) and "airgap_xinference" not in site.host.exec("nft", "list", "tables")
    assert changes(site.play("firewall", **ISOLATED)) == 0


def test_a_server_goes_back_to_the_network_and_to_the_user_of_its_image(site: Site) -> None:
    site.play("serve")
    assert "xinference-ingress-1" not in site.host.docker("ps", "--all", "--format", "{{.Names}}").split()
    assert site.container()["HostConfig"]["CapAdd"] == ["DAC_OVERRIDE"], "the directories are the other user's now"


def test_a_changed_file_recreates_the_container(site: Site) -> None:
    before = site.container()["Id"]
    site.host.exec("sh", "-c", "echo two > /etc/site.pem")
    site.play("serve")
    assert site.container()["Id"] != before
    assert site.inside("cat", "/etc/site.pem") == "two\n"


def test_a_server_that_ends_at_once_is_explained(site: Site) -> None:
    printed = site.play("serve", expect=1, xinference_server_arguments=["--nonsense"])
    assert f"{CONTAINER} ended" in printed and "No such option: --nonsense" in printed


def test_it_is_stopped_once(site: Site) -> None:
    assert changes(site.play("stop")) == 1
    assert not site.container()["State"]["Running"]
    assert changes(site.play("stop")) == 0
