# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The docker backend on a real air-gapped host with the real Xinference 4.1.0: a story in steps, told in order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from . import images
from .engine import compose_plugin
from .hosts import Host, Testbed
from .spec import HostSpec, gpu_uuid

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDED = REPOSITORY / "tests/unit/module_utils/host/compose"
NAME = f"docker-{os.getpid()}"
IMAGE = "testbed/xinference:4.1.0-cpu"
# Pure Python, small, and not in the image.
PACKAGE = "emoji"
CONTAINER = "xinference-server-1"
KEEPER = "xinference-keeper-1"
SECRET = "s3cr'et $HOME"


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


class Site:
    """One host, its inventory, and playbooks run against it."""

    def __init__(self, host: Host, place: Path, chat: Path) -> None:
        self.host, self.place = host, place
        self.variables: Dict[str, Any] = {
            "xinference_bundle_dir": str(place / "bundle"),
            "xinference_bundle_engine_requirements": [PACKAGE],
            "xinference_backend": "docker",
            "xinference_image": IMAGE,
            "xinference_engines": "bundle",
            # The other way round than the host numbers them.
            "xinference_gpus": [1, 0],
            "xinference_server_ulimits": {"stack": 67108864},
            "xinference_server_secrets": {"SITE_TOKEN": SECRET},
            "xinference_server_mounts": [{"source": "/etc/site.pem", "target": "/etc/site.pem"}],
            "xinference_verify_report": "",
            "xinference_models": [
                {
                    "model_uid": "chat",
                    "model_name": "qwen2.5-instruct",
                    "model_engine": "transformers",
                    "model_format": "pytorch",
                    "model_size_in_billions": "0_5",
                    "quantization": "none",
                    "gpus": [gpu_uuid(NAME, host.name, 1)],
                    "virtual_env_packages": [PACKAGE],
                    "source": {"path": str(chat), "name": "chat"},
                }
            ],
        }

    def play(self, *playbooks: str, expect: int = 0, **variables: Any) -> str:
        """Run playbooks; returns what they printed."""
        settings = self.place / "variables.json"
        settings.write_text(json.dumps({**self.variables, **variables}))
        bed = self.host.directory / "inventory/hosts.yml"
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(bed), "-e", f"@{settings}"]
        command += [str(REPOSITORY / "playbooks" / f"{name}.yml") for name in playbooks]
        surroundings = {**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")}
        surroundings["ANSIBLE_COLLECTIONS_PATH"] = str(REPOSITORY / "build/collections")
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd=REPOSITORY, check=False)
        assert (done.returncode == 0) is (expect == 0), done.stdout + done.stderr
        return done.stdout

    def inside(self, *command: str) -> str:
        """Run a command in the server's container."""
        return self.host.docker("exec", CONTAINER, *command)

    def container(self) -> Dict[str, Any]:
        """The container as the engine shows it."""
        found: List[Dict[str, Any]] = json.loads(self.host.docker("inspect", CONTAINER))
        return found[0]


def changes(printed: str) -> int:
    """How many tasks changed something, by the recaps."""
    return sum(map(int, re.findall(r"changed=(\d+)", printed)))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    images.build()
    place = tmp_path_factory.mktemp("docker")
    made = subprocess.run(
        [sys.executable, str(REPOSITORY / "molecule/shared/models.py"), "chat"],
        capture_output=True,
        text=True,
        check=True,
    )
    bed = Testbed(NAME)
    try:
        host = bed.up([HostSpec("gpu-1")])["gpu-1"]
        host.exec("sh", "-c", "echo one > /etc/site.pem")
        found = Site(host, place, Path(json.loads(made.stdout.splitlines()[-1])["chat"]))
        found.play("bundle", "ship")
        yield found
    finally:
        bed.down()


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


def test_secrets_arrive_and_are_in_no_file_that_others_can_read(site: Site) -> None:
    environments = site.inside("sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null; true").split("\0")
    assert f"SITE_TOKEN={SECRET}" in environments, "the server's processes have it"
    assert "SITE_TOKEN" not in json.dumps(site.container()) + site.inside("env")
    readable = site.host.exec("find", "-L", "/opt/xinference/current", "-type", "f", "-perm", "/044").split()
    assert "/opt/xinference/current/compose.yaml" in readable
    assert site.host.exec("grep", "-lF", "s3cr", *readable, check=False) == ""


def test_a_launch_gets_from_the_bundle_what_the_image_lacks(site: Site) -> None:
    missing = site.host.docker("exec", CONTAINER, "python3", "-c", f"import {PACKAGE}; print(1)", check=False)
    assert missing == ""
    assert "default" not in site.host.exec("ip", "route")
    site.play("models")
    found = site.inside("find", "/root/.xinference/virtualenv", "-type", "d", "-name", PACKAGE)
    assert "/qwen2.5-instruct/transformers/" in found
    launched = json.loads(site.host.exec("cat", "/opt/xinference/state/launched.json"))
    assert '"gpu_idx": [1]' in json.dumps(launched) and '"/models/chat/' in json.dumps(launched)


def test_a_second_run_changes_nothing(site: Site) -> None:
    assert changes(site.play("ship", "serve", "models")) == 0


def test_a_change_of_the_models_leaves_the_container_alone(site: Site) -> None:
    before = site.container()["Id"]
    off = [{**entry, "enabled": False} for entry in site.variables["xinference_models"]]
    assert changes(site.play("serve", xinference_models=off)) == 1  # the release
    assert site.container()["Id"] == before
    site.play("serve")


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
    site.play("serve")


def test_settings_that_cannot_be_are_refused_while_the_server_runs_on(site: Site) -> None:
    before, release = site.container()["Id"], site.host.exec("readlink", "/opt/xinference/current")
    refused: List[Tuple[Dict[str, Any], str]] = [
        ({"xinference_server_shm_size": "lots"}, "Compose does not take"),
        ({"xinference_server_container_options": {"nonsense": 1}}, "nonsense is not allowed"),
        ({"xinference_port": 70000}, "must be from 1 to 65535"),
        ({"xinference_host": "gpu.site", "xinference_server_allow_open": True}, "must be an IP address"),
        ({"xinference_server_mounts": [{"source": "/etc", "target": "/models"}]}, "/models is taken"),
    ]
    for settings, told in refused:
        assert told in site.play("serve", expect=1, **settings)
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
