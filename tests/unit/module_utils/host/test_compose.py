# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Compose project of a server: what is in it, what is not, and what makes it another one."""

from __future__ import annotations

import dataclasses
import os
import stat
import tracemalloc
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    compose,
    docker_cli,
    docker_release,
    guarding,
    hardening,
    release,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_release import ContainerError
from ansible_collections.airgap.xinference.plugins.module_utils.host.gpus import Given
from ansible_collections.airgap.xinference.plugins.module_utils.server.engines import engines
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import features

RECORDED = Path(__file__).parent / "compose"
IMAGE = "sha256:" + "4" * 64

CPU = compose.Server(
    project="xinference",
    image=IMAGE,
    command=("xinference-local", "--host", "0.0.0.0", "--port", "9997", "--log-level", "INFO"),
    root=PurePosixPath("/opt/xinference"),
    home="/opt/xinference/home",
    host="127.0.0.1",
    port=9997,
    environment={"HF_HUB_OFFLINE": "1", "XINFERENCE_MODEL_SRC": "huggingface"},
    guard=(),
    gpus=(),
    engines=engines("image", features("4.1.0")),
    shm_size="16g",
    ulimits={},
    log_max_size="100m",
    log_max_files=10,
    stop_timeout=30,
    start_timeout=180,
)
GPU = replace(
    CPU,
    host="10.1.2.3",
    port=9998,
    gpus=(Given("0", 0, "GPU-a"), Given("GPU-c", 2, "GPU-c")),
    environment={**CPU.environment, "GREETING": 'it costs $5, "net"'},
    guard=guarding.FILES,
    ulimits={"memlock": -1, "stack": 67108864, "nofile": {"soft": 65536, "hard": 1048576}},
    selinux=True,
    mounts=(
        compose.Mount("/etc/ssl/certs/site.pem", "/etc/ssl/certs/site.pem"),
        compose.Mount("/srv/voices", "/voices", False),
    ),
    mounted="0123456789abcdef",
    options={"cpuset": "0-7", "healthcheck": {"interval": "30s"}, "labels": {"site": "north"}},
)
WHEELS = replace(
    CPU,
    engines=engines("bundle", features("4.1.0")),
    wheels="/opt/xinference/wheels/engines/00112233aabb",
    mounted="fedcba9876543210",
)
INDEX = replace(CPU, engines=engines("bundle", features("3.2.0")), index_image="sha256:" + "5" * 64, mounted="1" * 16)

KEPT = replace(CPU, keeper="1000:1000", selinux=True)
ISOLATED = replace(INDEX, keeper="0:0", user="1000:1000", isolated=True, host="10.1.2.3")

SERVERS: Dict[str, compose.Server] = {
    "cpu": CPU,
    "gpu": GPU,
    "wheels": WHEELS,
    "index": INDEX,
    "keeper": KEPT,
    "isolated": ISOLATED,
}

ARTIFACTS = {
    "images": {
        "xprobe-xinference-v4.1.0": {
            "reference": "docker.io/xprobe/xinference:v4.1.0",
            "image_id": IMAGE,
            "digest": "sha256:" + "6" * 64,
        }
    },
    "wheels": {"engines": {"path": "/opt/xinference/wheels/engines/00112233aabb"}},
}
OTHER = {"reference": "nginx:1.29", "image_id": "sha256:" + "7" * 64, "digest": "sha256:" + "8" * 64}


def text(server: compose.Server) -> str:
    """The Compose file of a server."""
    return docker_release.files(server, [], {}, {})[docker_release.COMPOSE_FILE].text


def service(server: compose.Server) -> Dict[str, Any]:
    return compose.project(server)["services"]["server"]


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_compose_files_are_as_recorded(name: str) -> None:
    """UPDATE_RECORDED=1 records them anew; read the difference before it is committed."""
    path = RECORDED / f"{name}.yaml"
    if os.environ.get("UPDATE_RECORDED"):
        path.write_text(text(SERVERS[name]), encoding="utf-8")
    assert text(SERVERS[name]) == path.read_text(encoding="utf-8")


GUARD = guarding.files({"HF_TOKEN": "hf_verysecret"}, {"username": "root", "password": "verysecret-2"}, "seed")


def test_the_project_does_not_know_release_models_or_secrets() -> None:
    one = docker_release.files(GPU, [{"model_uid": "a"}], {}, GUARD)
    two = docker_release.files(GPU, [{"model_uid": "b"}], {"models": {}}, GUARD)
    assert one["compose.yaml"] == two["compose.yaml"]
    assert release.identity(one) != release.identity(two)
    assert "verysecret" not in one["compose.yaml"].text + one["server.json"].text
    assert one["server.env"].mode == one["accounts.json"].mode == one["models.json"].mode == 0o400
    assert not [name for name, entry in one.items() if "verysecret" in entry.text and stat.S_IMODE(entry.mode) & 0o077]


def test_secrets_are_mounted_and_not_in_the_environment_that_the_engine_shows() -> None:
    made = service(GPU)
    assert "env_file" not in made and "secrets" not in made
    mounted = {one["source"]: one for one in made["volumes"] if one["target"].startswith(compose.GUARD)}
    assert list(mounted) == [f"/opt/xinference/current/{name}" for name in guarding.FILES]
    assert all(one["read_only"] for one in mounted.values())
    assert made["command"][3:6] == ["/etc/airgap/bin/guarded.py", "--closed", "xinference-local"]
    assert service(CPU)["command"][0] == "xinference-local"


def test_an_entrypoint_cannot_start_a_closed_server_open() -> None:
    told = compose.faults(replace(GPU, options={"entrypoint": ["xinference-local"]}))
    assert len(told) == 1 and "could start it without them" in told[0]
    assert compose.faults(replace(GPU, options={"entrypoint": []})) == compose.faults(GPU) == []
    assert compose.faults(replace(CPU, options={"entrypoint": ["tini", "--"]})) == []


def test_values_of_secrets_are_not_shown_in_a_difference() -> None:
    shown = release.difference({"server.env": 'HF_TOKEN="old"\n'}, {"server.env": GUARD["server.env"].text + 'A="1"\n'})
    assert (
        shown[0]["after"] == "HF_TOKEN=(hidden)\nXOSCAR_AUTH_KEY=(hidden)\nA=(hidden)\n"
        and "old" not in shown[0]["before"]
    )


def test_secrets_are_known_by_name_or_value() -> None:
    variables = {
        "HF_TOKEN": "x",
        "api_key": "x",
        "DB_PASSWORD": "x",
        "HTTP_PROXY": "http://me:secret@proxy:3128",
        "NO_PROXY": "http://proxy:3128",
        "TOKENIZERS_PARALLELISM": "false",
        "KEYBOARD": "de",
    }
    public, secret = compose.split_secrets(variables)
    assert sorted(secret) == ["DB_PASSWORD", "HF_TOKEN", "HTTP_PROXY", "api_key"]
    assert sorted(public) == ["KEYBOARD", "NO_PROXY", "TOKENIZERS_PARALLELISM"]


def test_gpus_are_a_list_of_ids_for_the_nvidia_driver() -> None:
    device = service(GPU)["deploy"]["resources"]["reservations"]["devices"][0]
    assert device == {"driver": "nvidia", "device_ids": ["0", "GPU-c"], "capabilities": ["gpu"]}
    assert "NVIDIA_VISIBLE_DEVICES" not in service(GPU)["environment"]


def test_described_gpus_are_named_as_nvidia_describes_them() -> None:
    device = service(dataclasses.replace(GPU, gpu_driver="cdi"))["deploy"]["resources"]["reservations"]["devices"][0]
    indexes = [f"nvidia.com/gpu={gpu.index}" for gpu in GPU.gpus]
    assert device == {"driver": "cdi", "device_ids": indexes, "capabilities": ["gpu"]} and len(indexes) == 2


def test_without_gpus_none_is_reserved_and_none_comes_by_default() -> None:
    assert "deploy" not in service(CPU)
    assert service(CPU)["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["127.0.0.1"]),
        ("0.0.0.0", ["0.0.0.0"]),
        ("10.1.2.3", ["10.1.2.3", "127.0.0.1"]),
    ],
)
def test_loopback_is_always_published(host: str, addresses: list) -> None:
    assert [port["host_ip"] for port in service(replace(CPU, host=host))["ports"]] == addresses


def test_mounts_are_what_the_server_keeps_and_needs() -> None:
    volumes = {volume["target"]: volume for volume in service(CPU)["volumes"]}
    assert volumes["/models"]["read_only"] and volumes["/models"]["source"] == "/opt/xinference/models"
    writable = [target for target, volume in volumes.items() if not volume.get("read_only")]
    assert writable == [
        "/root/.xinference",
        "/root/.cache/huggingface",
        "/root/.cache/modelscope",
        "/root/.cache/vllm",
        "/root/.cache/flashinfer",
        "/root/.triton",
    ]
    assert {volume["source"] for volume in volumes.values()} <= set(compose.directories(CPU))


def test_a_server_may_do_nothing_that_it_does_not_need() -> None:
    made = service(CPU)
    assert made["cap_drop"] == ["ALL"] and "cap_add" not in made and made["read_only"] and "user" not in made
    assert made["security_opt"] == ["no-new-privileges:true"] and made["pids_limit"] == hardening.PIDS
    assert made["environment"]["HOME"] == "/home/xinference" and made["environment"]["HF_HOME"].startswith("/root/")
    assert [one.partition(":")[0] for one in made["tmpfs"]] == ["/home/xinference", "/tmp"]
    assert service(replace(CPU, capabilities=("DAC_OVERRIDE",)))["cap_add"] == ["DAC_OVERRIDE"]


def test_one_whose_files_may_be_written_has_the_home_of_its_image() -> None:
    made = service(replace(CPU, read_only=False))
    assert "read_only" not in made and "tmpfs" not in made and "HOME" not in made["environment"]
    assert made["cap_drop"] == ["ALL"]


@pytest.mark.parametrize("read_only", [True, False])
def test_a_user_has_a_home_that_it_can_enter(read_only: bool) -> None:
    made = service(replace(CPU, user="1000:1001", read_only=read_only))
    assert made["user"] == "1000:1001" and made["environment"]["HOME"] == "/home/xinference"
    memory = [one for one in made["tmpfs"] if not one.startswith("/tmp")]
    assert [one.partition(":")[0] for one in memory] == ["/home/xinference", "/home/xinference/.cache"]
    assert all("mode=0700,uid=1000,gid=1001" in one for one in memory)
    assert not [text for text in made["environment"].values() if text.startswith("/root")]
    assert not [volume for volume in made["volumes"] if volume["target"].startswith("/root")]


def test_an_isolated_server_has_no_way_out_and_a_way_in() -> None:
    project = compose.project(ISOLATED)
    assert list(project["networks"]) == ["inside"] and project["networks"]["inside"]["internal"] is True
    services = project["services"]
    assert sorted(services) == ["engines-index", "ingress", "keeper", "server"]
    for name, made in services.items():
        assert made["networks"] == (["default", "inside"] if name == "ingress" else ["inside"])
        assert made["dns"] == ["127.0.0.1"] and ("ports" in made) is (name == "ingress")
    ingress = services["ingress"]
    assert [port["host_ip"] for port in ingress["ports"]] == ["10.1.2.3", "127.0.0.1"]
    assert ingress["entrypoint"][-2:] == ["server:9997", "9997"]
    assert [volume["source"] for volume in ingress["volumes"]] == ["/opt/xinference/current/bin/ingress.py"]
    for made in (ingress, services["keeper"]):
        assert {**made, **hardening.SEALED} == made
    assert ingress["user"] == "65534:65534"
    files = docker_release.files(ISOLATED, [], {}, {})
    assert files["bin/ingress.py"].mode == 0o444 and "def serve(" in files["bin/ingress.py"].text
    assert "bin/ingress.py" not in docker_release.files(CPU, [], {}, {})


def test_the_hosts_network_opens_no_more_than_the_inventory_says() -> None:
    host = replace(CPU, host="127.0.0.1", options={"network_mode": "host"})
    assert "say 0.0.0.0 there" in "\n".join(compose.faults(host))
    assert compose.faults(replace(host, host="0.0.0.0")) == []


@pytest.mark.parametrize("name", ["network_mode", "networks", "dns", "dns_search", "dns_opt", "extra_hosts"])
def test_an_isolated_server_is_given_no_other_network(name: str) -> None:
    told = compose.faults(replace(ISOLATED, options={name: "x"}))
    assert told == [f"xinference_server_container_options.{name} and xinference_server_isolated exclude each other"]
    assert not compose.faults(replace(ISOLATED, isolated=False, options={name: "x"}))


def test_selinux_labels_are_for_every_mount_or_none() -> None:
    assert {volume["bind"].get("selinux") for volume in service(GPU)["volumes"]} == {"z"}
    assert {volume["bind"].get("selinux") for volume in service(CPU)["volumes"]} == {None}


def test_options_of_the_inventory_come_last_and_leave_the_rest() -> None:
    made = service(GPU)
    assert made["cpuset"] == "0-7" and made["healthcheck"]["interval"] == "30s" and made["healthcheck"]["retries"] == 3
    assert made["labels"] == {compose.MOUNTED: GPU.mounted, "site": "north"}


def test_dollar_signs_are_literal() -> None:
    assert service(GPU)["environment"]["GREETING"] == 'it costs $$5, "net"'


def test_what_compose_would_misunderstand_is_refused() -> None:
    for server in SERVERS.values():
        assert not compose.faults(server, ["HF_TOKEN", "MY-TOKEN", "my.token"])
    mounts = (
        compose.Mount("/etc", "/models/"),
        compose.Mount("/etc", "here"),
        compose.Mount("/a", "/b"),
        compose.Mount("/c", "/b"),
        compose.Mount("/srv/hf", f"/root/{compose.CACHES['huggingface']}", False),
    )
    options = {"environment": {"A": "1"}, "labels": ["a=b"], "volumes": [], "shm_size": "1g", "healthcheck": None}
    wrong = replace(GPU, project="My Site", port=70000, host="gpu.site", mounts=mounts, options=options)
    wrong = replace(wrong, log_max_size="big", log_max_files=0)
    told = "\n".join(compose.faults(wrong, ["A B", "1ST_KEY", "\u00dc_KEY"]))
    assert [line.partition(" ")[0] for line in told.splitlines()] == [
        "xinference_server_service",
        "xinference_port",
        "xinference_host",
        "xinference_server_log_max_size",
        "xinference_server_log_max_files",
        "'A",
        "'1ST_KEY'",
        "'\u00dc_KEY'",
        "xinference_server_mounts:",
        "xinference_server_mounts:",
        "xinference_server_mounts:",
        "xinference_server_container_options.environment:",
        "xinference_server_container_options.labels",
        "xinference_server_container_options.volumes:",
    ]
    assert "/models is taken by the collection" in told and "/b is taken\n" in told
    with pytest.raises(ContainerError, match=r"Nothing was changed\. .*70000.*this host has no /srv/hf"):
        docker_release.refuse_faults(wrong, {})


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(ContainerError, match=r"xinference_host: 192\.0\.2\.1"):
        docker_release.refuse_faults(replace(CPU, host="192.0.2.1"), {})


def test_mounted_files_must_be_there_but_in_check_mode() -> None:
    server = replace(CPU, mounts=(compose.Mount("/not/there", "/x"),))
    docker_release.refuse_faults(server, {}, there=False)
    with pytest.raises(ContainerError, match="this host has no /not/there"):
        docker_release.refuse_faults(server, {})


def test_a_project_that_compose_does_not_take_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "docker-compose"
    plugin.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "invalid size: lots" >&2\nexit 15\n')
    plugin.chmod(0o755)
    docker: Any = docker_cli.Docker.__new__(docker_cli.Docker)
    docker._client = [str(plugin), "--host", "tcp://h"]
    for path, asked in (("", "--host tcp://h compose "), (str(plugin), "")):
        with pytest.raises(ContainerError, match=r"Nothing was changed\. .*invalid size: lots"):
            docker_release.refuse_project(docker, tmp_path, path)
        there = f"--project-directory {tmp_path} --file {tmp_path}/compose.yaml config --quiet\n"
        assert Path(f"{plugin}.asked").read_text() == asked + there
    plugin.write_text("#!/bin/sh\n")
    docker_release.refuse_project(docker, tmp_path)


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("xinference-server-1\t/opt/x/current", False),
        ("xinference-web-1\t/srv/xinference", True),
        ("xinference-web-1\t/opt/xinference", True),
    ],
)
def test_containers_of_a_project_of_somebody_else_are_not_taken_away(line: str, refused: bool) -> None:
    class Client:
        def ask(self, *arguments: str) -> docker_cli.Answer:
            assert "label=com.docker.compose.project=xinference" in arguments
            return docker_cli.Answer(0, f"{line}\n", "")

    client: Any = Client()
    if refused:
        with pytest.raises(ContainerError, match=r"Nothing was changed\. .*xinference-web-1 \(/.*docker compose down"):
            docker_release.refuse_strangers(client, Path("/opt/x"), "xinference")
    else:
        docker_release.refuse_strangers(client, Path("/opt/x"), "xinference")


def test_the_image_is_found_by_name_and_named_by_id() -> None:
    for name in ("", "xprobe/xinference:v4.1.0", "docker.io/xprobe/xinference:v4.1.0", "xprobe-xinference-v4.1.0"):
        assert docker_release.image_of(ARTIFACTS, name).ids == (IMAGE, "sha256:" + "6" * 64)


def test_an_image_that_is_not_there_or_not_the_only_one_is_refused() -> None:
    with pytest.raises(ContainerError, match=r"v9 was not shipped .* has docker.io/xprobe/xinference:v4.1.0"):
        docker_release.image_of(ARTIFACTS, "xprobe/xinference:v9")
    with pytest.raises(ContainerError, match="Several images"):
        docker_release.image_of({"images": {**ARTIFACTS["images"], "nginx": OTHER}}, "")
    with pytest.raises(ContainerError, match="has none"):
        docker_release.image_of({}, "")


@pytest.mark.parametrize(
    ("version", "reference", "source"),
    [
        ("", "xprobe/xinference:v4.1.0", "wheels"),
        ("", "testbed/xinference:4.1.0-cpu", "wheels"),
        ("", "localhost:5000/xinference:v2.3.0-cu128", "index"),
        ("", "xprobe/xinference:latest", "wheels"),
        ("1.8.1", "xprobe/xinference:latest", "image"),
    ],
)
def test_the_source_of_engines_is_chosen_by_version(version: str, reference: str, source: str) -> None:
    assert docker_release.features_of(version, reference).engine_source == source


def test_engines_from_the_bundle_replace_the_switches_of_installers() -> None:
    container = {
        "environment": {"XINFERENCE_ENABLE_VIRTUAL_ENV": "0", "UV_OFFLINE": "1", "A": "1"},
        "overrides": {"A": None, "B": "inventory"},
    }
    index, secret = docker_release.environment_of(container, INDEX.engines, {"B_WORD": "s"})
    assert index["XINFERENCE_ENABLE_VIRTUAL_ENV"] == "1" and "UV_OFFLINE" not in index and "A" not in index
    assert index["B"] == "inventory" and secret == {"B_WORD": "s"}
    wheels, _secret = docker_release.environment_of(container, WHEELS.engines, {})
    assert wheels["UV_OFFLINE"] == "1" and wheels["UV_NO_INDEX"] == "1" and wheels["UV_FIND_LINKS"] == "/wheels"
    assert docker_release.environment_of(container, CPU.engines, {})[0]["XINFERENCE_ENABLE_VIRTUAL_ENV"] == "0"


def test_secrets_come_before_all_other_variables_and_are_secret_whatever_their_name() -> None:
    container = {"environment": {"A_TOKEN": "ours", "WORD": "a"}, "overrides": {"A_TOKEN": "open", "B_KEY": "b"}}
    found = docker_release.environment_of(container, CPU.engines, {"A_TOKEN": "secret", "WORD": 7})
    assert found[1] == {"A_TOKEN": "secret", "WORD": "7", "B_KEY": "b"}
    assert "WORD" not in found[0]


def test_engines_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ContainerError, match=r"1\.8\.1 installs nothing at a launch"):
        docker_release.engines_of("bundle", features("1.8.1"), ARTIFACTS)
    with pytest.raises(ContainerError, match="none were shipped"):
        docker_release.engines_of("wheels", features("4.1.0"), {})
    assert docker_release.engines_of("wheels", features("4.1.0"), ARTIFACTS)[1] == WHEELS.wheels
    assert engines("image", features("1.8.1")).environment == {}


def test_the_keeper_is_a_service_of_its_own_that_may_write_its_state_and_nothing_else() -> None:
    services = compose.project(KEPT)["services"]
    assert services["server"] == service(replace(CPU, selinux=True)), "the server is the same with and without it"
    keeper = services["keeper"]
    assert keeper["image"] == IMAGE and keeper["pull_policy"] == "never" and keeper["user"] == "1000:1000"
    writable = [volume["target"] for volume in keeper["volumes"] if not volume.get("read_only")]
    assert writable == ["/opt/xinference/state"] and keeper["read_only"] and keeper["cap_drop"] == ["ALL"]
    assert (
        "deploy" not in keeper and "ports" not in keeper and keeper["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"
    )
    assert "network_mode" not in keeper and compose.inner_endpoint(KEPT) == "http://server:9997"
    assert keeper["entrypoint"][-2:] == ["/opt/xinference/current/bin/keeper.pyz", "/opt/xinference"]
    assert "/opt/xinference/state" in compose.directories(KEPT)


def test_the_keeper_is_where_the_server_can_be_reached() -> None:
    host = replace(KEPT, options={"network_mode": "host"})
    assert compose.project(host)["services"]["keeper"]["network_mode"] == "host"
    assert compose.inner_endpoint(host) == "http://127.0.0.1:9997"
    named = replace(KEPT, options={"networks": {"models": {"aliases": ["x"]}}})
    assert compose.project(named)["services"]["keeper"]["networks"] == ["models"]


@pytest.mark.parametrize(
    ("told", "user", "namespace"),
    [([], None, ""), (["name=seccomp,profile=default", "name=rootless"], "0:0", ""), (["name=userns"], None, "host")],
)
def test_the_keeper_runs_as_whoever_owns_its_files(tmp_path: Path, told: list, user: Any, namespace: str) -> None:
    mine = f"{os.getuid()}:{tmp_path.stat().st_gid}"
    assert docker_release.keeper_user(tmp_path, {"SecurityOptions": told}) == (user or mine, namespace)
    assert docker_release.keeper_user(tmp_path / "not/yet", {}) == (f"{os.geteuid()}:{os.getegid()}", "")


def test_the_content_of_mounted_files_counts_and_that_of_directories_does_not(tmp_path: Path) -> None:
    file = tmp_path / "a.pem"
    file.write_text("one")
    first = docker_release.content_hash([str(file), str(tmp_path)], {})
    (tmp_path / "b").write_text("new")
    assert docker_release.content_hash([str(tmp_path), str(file)], {}) == first
    file.write_text("two")
    assert docker_release.content_hash([str(file), str(tmp_path)], {}) != first
    assert docker_release.content_hash([str(tmp_path)], {}) == ""


def test_selinux_is_told_by_the_kernel(tmp_path: Path) -> None:
    enforce = tmp_path / "enforce"
    assert not docker_release.selinux_enforced(enforce)
    enforce.write_text("1")
    assert docker_release.selinux_enforced(enforce)


def test_the_view_tells_paths_and_numbers_as_the_server_has_them() -> None:
    view = docker_release.view(GPU)
    assert view["models"] == "/models" and view["endpoint"] == "http://127.0.0.1:9998"
    assert view["gpus"] == [{"index": 0, "names": ["0", "GPU-a"]}, {"index": 1, "names": ["2", "GPU-c"]}]


def test_a_large_mounted_file_is_not_read_into_memory(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as made:
        made.truncate(64 << 20)
    tracemalloc.start()
    assert docker_release.content_hash([str(file)], {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
