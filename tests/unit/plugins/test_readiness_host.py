# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host's engine, driver, disk, memory, clock and air gap are judged right, and how it is told."""

from __future__ import annotations

import json

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import Artifact, Blob
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import Finding, Needs, message, table
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness import judge_address, judge_port
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness_disk import SLACK, judge_disk, new_layers
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness_docker import (
    judge_compose,
    judge_driver,
    judge_engine,
    judge_labels,
    judge_nvidia,
    numbers,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness_system import (
    judge_airgap,
    judge_clock,
    judge_memory,
    judge_swap,
    skew,
)

GIB = 2**30


def needs(**values):
    base = {
        "root": "/opt/x",
        "address": "127.0.0.1",
        "port": 9997,
        "gpus": ["0"],
        "models": [],
        "registrations": [],
        "backend": "docker",
        "image": "xprobe/xinference:v4.1.0",
    }
    return Needs(**{**base, **values})


def engine(**values):
    """An engine on which everything is right, but for `values`."""
    base: dict = {
        "client": "/usr/bin/docker",
        "version": "20.10.24",
        "problem": "",
        "containerd": False,
        "security": [],
        "data": {"path": "/var/lib/docker", "device": 2, "free_bytes": 10**12},
        "compose": {"v2": "2.26.1", "v1": ""},
        "nvidia": {"runtime": False, "hook": "/usr/bin/nvidia-container-runtime-hook", "cdi": []},
        "images": [],
        "publishers": [],
    }
    return {**base, **values}


def facts(**values):
    base: dict = {
        "engine": engine(),
        "gpus": {"list": [{"index": 0, "name": "L40S", "uuid": "GPU-aa", "driver": "580.65.06"}], "problem": ""},
        "memory": {"total": 64 * GIB, "available": 60 * GIB, "swap_total": 0, "swap_free": 0},
        "clock_skew": 0.0,
        "selinux": {"mode": "disabled", "labels": True},
        "reached": [],
        "listeners": [],
        "place": {"existing": "/opt", "device": 1, "free_bytes": 10**12},
        "contents": {"blobs": {}, "partial": {}, "venvs": [], "lib": []},
    }
    return {**base, **values}


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        ({}, None),
        ({"version": "28.2.2"}, None),
        ({"version": "19.03.15"}, "newer"),
        ({"client": "", "problem": "there is no docker on the PATH"}, "install Docker Engine"),
        ({"problem": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."}, "systemctl start docker"),
        ({"problem": "permission denied while trying to connect to the Docker daemon socket"}, "group docker"),
    ],
)
def test_an_engine_that_cannot_be_used_has_its_own_cure(values, cure):
    found = judge_engine(engine(**values), "ops")
    assert [cure in finding.cure for finding in found] == ([True] if cure else [])


@pytest.mark.parametrize(
    ("compose", "carried", "found"),
    [
        ({"v2": "2.26.1", "v1": ""}, False, None),
        ({"v2": "2.26.1", "v1": "1.29.2"}, False, None),
        ({"v2": "2.2.3", "v1": ""}, False, "Compose 2.2.3"),
        ({"v2": "", "v1": "1.29.2"}, False, "Compose v1 (1.29.2)"),
        ({"v2": "", "v1": ""}, False, "no command"),
        ({"v2": "", "v1": "1.29.2"}, True, None),
    ],
)
def test_compose_is_the_plugin_or_comes_with_the_bundle(compose, carried, found):
    findings = judge_compose(engine(compose=compose), carried)
    assert [found in finding.found for finding in findings] == ([True] if found else [])


def test_any_way_to_gpus_will_do_and_none_is_a_problem():
    none = {"runtime": False, "hook": "", "cdi": []}
    for way in ({"runtime": True}, {"hook": "/usr/bin/x"}, {"cdi": ["/etc/cdi/nvidia.yaml"]}):
        assert judge_nvidia(engine(nvidia={**none, **way})) == []
    assert "nvidia-ctk" in judge_nvidia(engine(nvidia=none))[0].cure


@pytest.mark.parametrize(
    ("image", "driver", "wanted"),
    [
        ("xprobe/xinference:v4.1.0", "580.65.06", None),
        ("xprobe/xinference:v4.1.0", "575.51.03", "580"),
        ("xprobe/xinference:v2.12.0", "575.51.03", None),
        ("xprobe/xinference:v2.12.0", "570.86.15", "575"),
        ("xprobe/xinference:v1.8.1", "550.54.15", None),
        ("xprobe/xinference:v1.8.1-cu128", "550.54.15", "570"),
        ("xprobe/xinference:latest", "575.51.03", "580"),
        ("xprobe/xinference:v4.1.0-cpu", "470.1", None),
        ("registry.site:5000/xinference:v4.1.0", "575.1", "580"),
        ("", "470.1", None),
    ],
)
def test_the_driver_has_to_be_new_enough_for_the_image(image, driver, wanted):
    there = {"list": [{"index": 0, "name": "L4", "uuid": "GPU-a", "driver": driver}], "problem": ""}
    found = judge_driver(needs(image=image), facts(gpus=there))
    assert [f"driver {wanted} or newer" in finding.wanted for finding in found] == ([True] if wanted else [])


def test_selinux_matters_where_containers_are_confined_and_files_have_no_labels():
    bad = {"mode": "enforcing", "labels": False}
    confined = engine(security=["name=seccomp,profile=default", "name=selinux"])
    assert judge_labels(needs(), facts(selinux=bad, engine=confined))
    assert judge_labels(needs(), facts(selinux=bad)) == []
    assert judge_labels(needs(), facts(selinux={**bad, "labels": True}, engine=confined)) == []
    assert judge_labels(needs(), facts(selinux={**bad, "mode": "permissive"}, engine=confined)) == []


def listener(**values):
    proxy = "/usr/bin/docker-proxy -proto tcp -host-ip 127.0.0.1 -host-port 9997"
    return {"address": "127.0.0.1", "user": "root", "pid": 7, "program": proxy, "ours": False, **values}


@pytest.mark.parametrize(
    ("listeners", "publishers", "taken"),
    [
        ([listener()], [True], 0),
        ([listener()], [False], 1),
        ([], [False], 1),
        ([listener(pid=None, program=None)], [True], 0),
        ([listener(pid=None, program=None, user="bob")], [True], 1),
        ([listener(program="nginx")], [True], 1),
        ([listener()], [], 1),
    ],
)
def test_a_port_that_our_own_container_publishes_is_free(listeners, publishers, taken):
    containers = [{"name": f"c{ours}", "image": "i", "ours": ours} for ours in publishers]
    assert len(judge_port(needs(), facts(listeners=listeners, engine=engine(publishers=containers)))) == taken


def blob(name, size):
    return Blob("sha256:" + name * 64, size)


@pytest.fixture
def image(tmp_path):
    """A bundle with an image of three layers: 1 GiB, 1 GiB, 10 MiB."""
    config, manifest = blob("c", 500), blob("d", 300)
    layers = [blob("1", GIB), blob("2", GIB), blob("3", 10 * 2**20)]
    path = tmp_path / "blobs/sha256" / ("c" * 64)
    path.parent.mkdir(parents=True)
    history = {"rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]}}
    path.write_text(json.dumps({"architecture": "amd64", "os": "linux", **history}))
    made = Artifact("images", "x", manifest.digest, 2 * GIB, "", blobs=(manifest, config, *layers))
    return Bundle(tmp_path, [made]), made


def test_only_layers_the_engine_lacks_count(image):
    bundle, artifact = image
    layers = [layer.digest for layer in artifact.layers]
    assert list(new_layers(bundle, [artifact], engine())) == layers
    other = {"id": "sha256:other", "tags": [], "layers": [*layers[:2], "sha256:else"]}
    assert list(new_layers(bundle, [artifact], engine(images=[other]))) == layers[2:]
    assert list(new_layers(bundle, [artifact], engine(images=[other], containerd=True))) == layers
    same = {"id": artifact.blobs[1].digest, "tags": [], "layers": layers}
    assert new_layers(bundle, [artifact], engine(images=[same])) == {}
    assert new_layers(bundle, [artifact], engine(problem="down")) == {} == new_layers(bundle, [artifact], None)


def test_root_and_engine_need_room_for_an_image_each_on_its_own_disk(image):
    bundle, artifact = image
    small = {"path": "/var/lib/docker", "device": 2, "free_bytes": 3 * GIB}
    (finding,) = judge_disk(needs(), facts(engine=engine(data=small)), bundle, [artifact])
    assert finding.wanted == "4.1 GiB for the Docker Engine's /var/lib/docker while images are loaded"
    assert finding.found == "3.0 GiB free in /var/lib/docker" and "docker image prune" in finding.cure
    place = {"existing": "/opt", "device": 1, "free_bytes": 2 * GIB + 2 * 800 + 10 * 2**20 + SLACK}
    assert judge_disk(needs(), facts(place=place), bundle, [artifact]) == []
    (finding,) = judge_disk(needs(), facts(place={**place, "free_bytes": GIB}), bundle, [artifact])
    assert finding.wanted.startswith("2.1 GiB for /opt/x")


def test_the_largest_pack_of_small_blobs_is_there_twice(tmp_path):
    blobs = tuple(Blob(f"sha256:{number:064d}", 2**20) for number in range(100))
    model = Artifact("models", "m", blobs[0].digest, 100 * 2**20, "", blobs=blobs)
    bundle = Bundle(tmp_path, [model])
    free = 164 * 2**20 + SLACK
    place = {"existing": "/opt", "device": 1, "free_bytes": free}
    assert judge_disk(needs(), facts(place=place), bundle, [model]) == []
    assert judge_disk(needs(), facts(place={**place, "free_bytes": free - 1}), bundle, [model])


def test_one_disk_for_root_and_engine_needs_room_for_both(image):
    bundle, artifact = image
    same = {"path": "/var/lib/docker", "device": 1, "free_bytes": 5 * GIB}
    place = {"existing": "/opt", "device": 1, "free_bytes": 5 * GIB}
    (finding,) = judge_disk(needs(), facts(engine=engine(data=same), place=place), bundle, [artifact])
    assert finding.wanted.startswith("6.1 GiB for /opt/x") and "/var/lib/docker" in finding.wanted


def test_weights_need_memory_where_no_gpu_takes_them():
    model = {"model_uid": "m", "source": {"path": "/data/alpha"}}
    artifact = Artifact("models", "alpha", "sha256:" + "d" * 64, 70 * GIB, "", blobs=(blob("1", 70 * GIB),))
    assert judge_memory(needs(models=[model]), facts(), [artifact]) == []
    (finding,) = judge_memory(needs(models=[model], gpus=[]), facts(), [artifact])
    assert finding.wanted == "71.0 GiB for the server and 70.0 GiB of weights that no GPU takes"
    assert judge_memory(needs(models=[{**model, "enabled": False}], gpus=[]), facts(), [artifact]) == []
    smaller = {**model, "source": {"path": "/data/small"}, "fallbacks": [{"source": {"path": "/data/alpha"}}]}
    (finding,) = judge_memory(needs(models=[smaller], gpus=[]), facts(), [artifact])
    assert "70.0 GiB of weights" in finding.wanted
    (finding,) = judge_memory(needs(min_memory=100 * GIB), facts(), [])
    assert "xinference_preflight_min_memory" in finding.wanted


def test_swap_in_use_is_a_warning():
    memory = {"total": 64 * GIB, "available": 2 * GIB, "swap_total": 16 * GIB, "swap_free": GIB}
    assert [finding.severity for finding in judge_swap(facts(memory=memory))] == ["warning"]
    assert judge_swap(facts(memory={**memory, "swap_free": 15 * GIB})) == []


def test_a_clock_is_judged_by_what_is_beyond_the_time_the_question_took():
    assert skew(100.0, 90.0, 110.0) == 0.0 and skew(200.0, 90.0, 110.0) == 90.0 and skew(0.0, 90.0, 110.0) == -90.0
    assert judge_clock(needs(), facts(clock_skew=-299)) == []
    assert judge_clock(needs(), facts(clock_skew=-3600))[0].found == "3600 s behind it"


def test_a_way_out_is_reported_and_refused_where_the_site_says_so():
    open_host = facts(reached=["huggingface.co:443"])
    assert judge_airgap(needs(), open_host)[0].severity == "warning"
    assert judge_airgap(needs(require_airgap=True), open_host)[0].severity == "problem"
    assert judge_airgap(needs(require_airgap=True), facts()) == []


def test_versions_are_compared_as_numbers():
    assert numbers("2.9.0") < numbers("2.18.0") and numbers("28.2.2") > numbers("20.10")
    assert numbers("20.10.24+dfsg1") == [20, 10]


def test_one_table_tells_what_hosts_share_once():
    down = Finding("docker engine", "an engine", "down", "start it").row()
    open_host = Finding("air gap", "no way out", "huggingface.co:443", "close it", "warning").row()
    assert table({"gpu-1": [open_host], "gpu-2": [down], "gpu-3": [down]}) == [
        "HOST          CHECK          STATE",
        "gpu-1         -              ready",
        "gpu-1         air gap        warning",
        "  wanted: no way out",
        "  found:  huggingface.co:443",
        "  cure:   close it",
        "gpu-2, gpu-3  docker engine  problem",
        "  wanted: an engine",
        "  found:  down",
        "  cure:   start it",
        "Ready: 1 of 3 hosts; 2 problems, 1 warning.",
    ]
    assert table({"gpu-1": []})[-1] == "Ready: 1 of 1 host; nothing was found."


def test_the_message_of_a_host_has_causes_and_cures_of_problems():
    rows = [Finding("models", "", "a: bad", "").row(), Finding("port", "free", "taken", "stop it").row()]
    assert message(rows) == "models: a: bad\nport: free; found: taken. Cure: stop it"


@pytest.mark.parametrize(
    ("address", "port", "backend", "problem", "checks"),
    [
        ("127.0.0.1", 1, "docker", "", []),
        ("localhost", 65535, "docker", "", []),
        ("::1", 9997, "docker", "", []),
        ("gpu-1.site", 9997, "native", "", []),
        ("gpu-1.site", 9997, "docker", "", ["address"]),
        ("10.9.9.9", 9997, "docker", "10.9.9.9: Cannot assign requested address", ["address"]),
        ("10.9.9.9", 70000, "native", "10.9.9.9: Cannot assign requested address", ["port", "address"]),
        ("127.0.0.1", 0, "docker", "", ["port"]),
    ],
)
def test_an_address_or_a_port_that_no_server_can_have_is_a_problem(address, port, backend, problem, checks):
    wanted = needs(address=address, port=port, backend=backend)
    assert [finding.check for finding in judge_address(wanted, facts(address_problem=problem))] == checks
