# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host is ready: each fact judged, everything reported together."""

from __future__ import annotations

import zipfile
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.action import xinference_preflight
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import (
    WHEELS_GLIBC,
    WHEELS_PLATFORM,
    WHEELS_PYTHON,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils import bundles
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import Finding, Needs, report
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness import (
    judge_gpus,
    judge_host,
    judge_models,
    judge_place,
    judge_port,
    judge_wheels,
    wanted_gpus,
    with_files,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness_disk import SLACK, judge_disk

ENTRY = {
    "model_uid": "minilm",
    "model_name": "x",
    "model_type": "embedding",
    "model_engine": "sentence_transformers",
    "source": {"path": "/data/minilm"},
}


def needs(**values):
    base = {"root": "/opt/x", "address": "127.0.0.1", "port": 9997, "gpus": [], "models": [ENTRY], "registrations": []}
    return Needs(**{**base, **values})


def facts(**values):
    """A host on which everything is right, but for `values` (part__key=value)."""
    base: dict = {
        "machine": {
            "architecture": "x86_64",
            "system": "Linux",
            "libc": "glibc",
            "libc_version": "2.36",
            "user": "ops",
        },
        "place": {
            "existing": "/opt",
            "obstacle": "",
            "owner": "root",
            "mode": "0755",
            "writable": True,
            "read_only": False,
            "noexec": False,
            "free_bytes": 10**12,
            "device": 1,
            "foreign": [],
        },
        "contents": {"blobs": {}, "partial": {}, "venvs": [], "lib": []},
        "listeners": [],
        "gpus": None,
        "memory": {"total": 64 * 2**30, "available": 60 * 2**30, "swap_total": 0, "swap_free": 0},
        "clock": 0.0,
        "clock_skew": 0.0,
        "selinux": {"mode": "disabled", "labels": True},
        "reached": [],
        "engine": None,
        "python": {"path": "/usr/bin/python3.11", "problem": ""},
    }
    for name, value in values.items():
        part, _underscores, key = name.partition("__")
        if key:
            base[part][key] = value
        else:
            base[part] = value
    return base


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    place = tmp_path_factory.mktemp("readiness")
    (place / "minilm").mkdir()
    (place / "minilm/weights").write_bytes(b"w" * 100_000)
    requests = [Request("models", "minilm", str(place / "minilm"))]
    for name in ("host", "server"):
        (place / name).mkdir()
        with zipfile.ZipFile(place / name / f"{name}-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("module.py", "0" * 5_000_000)
        marks = {WHEELS_PYTHON: "cp311", WHEELS_PLATFORM: "linux_x86_64", WHEELS_GLIBC: "2.28"}
        requests.append(Request("wheels", name, str(place / name), marks if name == "server" else {}))
    write_bundle(place / "bundle", requests)
    return Bundle.open(place / "bundle")


def test_a_host_on_which_everything_is_right_has_no_findings(bundle):
    gpus = {"list": [{"index": 0, "name": "L40S", "uuid": "GPU-aa"}], "problem": ""}
    assert judge_models(needs(), bundle) == []
    assert judge_host(needs(gpus=["0"]), facts(gpus=gpus), bundle, bundle.artifacts) == []


def test_models_are_judged_by_the_same_code_that_launches_them(bundle):
    entries = [{**ENTRY, "model_uid": "a/b"}, {**ENTRY, "source": {"path": "/data/other"}}, {**ENTRY, "gpus": [3]}]
    texts = [finding.found for finding in judge_models(needs(models=entries), bundle)]
    assert len(texts) == 4 and any("other" in text for text in texts) and any("GPU 3" in text for text in texts)
    off = {**ENTRY, "model_uid": "off", "enabled": False, "source": {"path": "/data/unused"}}
    assert judge_models(needs(models=[ENTRY, off]), bundle) == []
    assert judge_models(needs(models=[{**ENTRY, "source": {"path": "/data/other"}}]), None) == []


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"place__writable": False}, "/opt belongs to root (mode 0755)"),
        ({"place__read_only": True, "place__writable": False}, "/opt is mounted read-only"),
        ({"place__obstacle": "/opt/x"}, "/opt/x is not a directory"),
        ({"place__noexec": True}, "/opt is mounted noexec"),
    ],
)
def test_a_root_that_cannot_be_used(values, found):
    (finding,) = judge_place(needs(), facts(**values))
    assert finding.found == found and finding.cure


def test_only_a_custom_model_that_says_where_its_files_are_needs_no_source(bundle):
    spec = {"model_format": "pytorch", "model_id": "a/b"}
    bare = {"model_type": "embedding", "definition": {"model_name": "bare", "model_specs": [spec]}}
    full = {"definition": {"model_name": "full", "model_specs": [{**spec, "model_uri": "file:///data/full"}]}}
    assert with_files([bare, full, {"definition": "text"}]) == ["full"]
    entries = [{"model_uid": name, "model_name": name, "model_type": "embedding"} for name in ("bare", "full")]
    (finding,) = judge_models(needs(models=entries, registrations=with_files([bare, full])), bundle)
    assert "bare: model without source in the bundle" in finding.wanted + finding.found


def test_a_root_that_holds_what_others_made():
    (finding,) = judge_place(needs(root="/srv"), facts(place__foreign=["logs", "models"]))
    assert finding.found == "logs, models there already, and not from here" and "/srv/xinference" in finding.cure
    (finding,) = judge_place(needs(root="/"), facts(place__foreign=["home"]))
    assert "such as /xinference" in finding.cure


@pytest.mark.parametrize("root", ["srv/xinference", "~/xinference", ""])
def test_a_root_that_is_no_absolute_path(root):
    (finding,) = judge_place(needs(root=root), facts())
    assert finding.wanted == "an absolute path" and finding.found == (root or "nothing")


@pytest.mark.parametrize(
    ("values", "check"),
    [
        ({"machine__architecture": "aarch64"}, "machine"),
        ({"machine__libc_version": "2.17"}, "C library"),
        ({"machine__libc": "", "machine__libc_version": ""}, "C library"),
        ({"python": {"path": "", "problem": "The wheels need Python 3.11; there is none"}}, "python"),
    ],
)
def test_wheels_for_another_host(bundle, values, check):
    assert [finding.check for finding in judge_wheels(facts(**values), bundle.artifacts)] == [check]


def test_glibc_versions_are_numbers_not_texts(bundle):
    assert judge_wheels(facts(machine__libc_version="2.100"), bundle.artifacts) == []


def test_disk_needs_what_is_sent_and_what_is_unpacked(bundle):
    (finding,) = judge_disk(needs(), facts(place__free_bytes=900), bundle, bundle.artifacts)
    assert "needed" not in finding.wanted and "to send" in finding.wanted and "12.9 MiB to unpack" in finding.wanted
    assert finding.found == "900 B free in /opt"
    have = {"blobs": dict(bundle.blobs)}
    built = {
        "venvs": [bundle.find("wheels", "server").digest[7:19]],
        "lib": [bundle.find("wheels", "host").digest[7:19]],
    }
    full = facts(contents={**have, "partial": {}, **built}, place__free_bytes=0)
    assert judge_disk(needs(), full, bundle, bundle.artifacts) == []
    digest, size = next(item for item in bundle.blobs.items() if item[1] == 100_000)
    almost = dict(bundle.blobs)
    del almost[digest]
    state = {"blobs": almost, "partial": {digest: size - 10}, **built}
    assert judge_disk(needs(), facts(contents=state, place__free_bytes=SLACK + 10), bundle, bundle.artifacts) == []
    assert judge_disk(needs(), facts(contents=state, place__free_bytes=SLACK + 9), bundle, bundle.artifacts)


def listener(**values):
    base = {"address": "0.0.0.0", "user": "bob", "pid": 7, "program": "nginx: master", "ours": False}
    return {**base, **values}


def test_a_port_taken_by_another_program_is_named_and_ours_is_fine():
    (finding,) = judge_port(needs(), facts(listeners=[listener(), listener(ours=True)]))
    assert finding.found == "nginx: master (pid 7, user bob) listens on 0.0.0.0:9997"
    (finding,) = judge_port(needs(), facts(listeners=[listener(pid=None, program=None)]))
    assert "a program of user bob" in finding.found


def test_gpus_are_looked_up_by_number_or_uuid():
    there = {"list": [{"index": 0, "name": "L40S", "uuid": "GPU-aa"}], "problem": ""}
    assert judge_gpus(needs(gpus=["0", "gpu-AA"]), facts(gpus=there)) == []
    (finding,) = judge_gpus(needs(gpus=[0, 2], models=[{**ENTRY, "gpus": ["GPU-bb"]}]), facts(gpus=there))
    assert "GPU 2, GPU-bb" in finding.wanted and "0 (L40S)" in finding.found
    gone = {"list": [], "problem": "there is no nvidia-smi on the PATH"}
    assert judge_gpus(needs(gpus=[0]), facts(gpus=gone))[0].found == gone["problem"]
    assert judge_gpus(needs(), facts(gpus=None)) == [] and wanted_gpus(needs(models=["no entry", {"gpus": 3}])) == []


def test_gpus_of_alternatives_are_looked_up_too():
    models = [{"gpus": [0], "fallbacks": [{"gpus": [9]}, {"gpus": None}]}]
    assert wanted_gpus(needs(models=models, gpus=[])) == ["0", "9"]


def test_a_report_is_one_message_with_every_finding():
    text = report("site1", [Finding("port", "free", "taken", "stop it"), Finding("models", "", "a: bad", "")])
    assert text.splitlines() == [
        "site1 is not ready: 2 problems. Nothing was changed.",
        "  1. port",
        "       wanted: free",
        "       found:  taken",
        "       cure:   stop it",
        "  2. models: a: bad",
    ]


def test_a_host_needs_its_own_models_and_what_its_backend_needs(bundle):
    nonsense: Any = "nonsense"
    chosen = bundles.select(bundle, [ENTRY, {"source": {"modelscope": "org/Absent"}}], "native")
    assert [entry.reference for entry in chosen.artifacts] == ["wheels/host", "wheels/server", "models/minilm"]
    assert chosen.absent == ["models/Absent"]
    assert [entry.reference for entry in bundles.select(bundle, [], "docker").artifacts] == ["wheels/host"]
    off = [{**ENTRY, "enabled": value} for value in (False, "no", "false")]
    assert bundles.wanted_models([*off, {"model_path": "/x"}, nonsense, ENTRY, ENTRY]) == ["minilm"]


def test_alternatives_are_shipped_with_what_they_need(bundle):
    entry = {**ENTRY, "fallbacks": [{"source": {"path": "/b"}}, {"replica": 2}], "model_type": "audio"}
    speech = {"model_name": "SenseVoiceSmall", "source": {"modelscope": "iic/SenseVoiceSmall"}}
    assert bundles.wanted_models([entry, {**entry, "fallbacks": [speech]}]) == ["minilm", "b", "SenseVoiceSmall"]
    assert bundles.select(bundle, [entry], "native").absent == ["models/b"]
    assert bundles.wanted_companions([{**entry, "fallbacks": [speech]}]) == ["speech_fsmn_vad_zh-cn-16k-common-pytorch"]
    assert bundles.wanted_models([{**entry, "enabled": False}]) == []


def test_a_bundle_is_verified_once_and_its_stamps_go_where_they_can(bundle, tmp_path, monkeypatch):
    lines: list[str] = []
    assert bundles.verified(bundle, bundle.artifacts, str(tmp_path / "c"), lines.append) == ([], bundle.size)
    assert bundles.verified(bundle, bundle.artifacts, str(tmp_path / "c"), lines.append) == ([], 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("")
    assert bundles.verified(bundle, bundle.artifacts, str(tmp_path / "file/c"), lines.append) == ([], bundle.size)
    assert bundles.verified(bundle, bundle.artifacts, str(tmp_path / "file/c"), lines.append) == ([], 0)
    assert len(list((tmp_path / "home/airgap.xinference").iterdir())) == 1


def test_the_collection_that_starts_containers_is_missed_before_anything_is_sent(monkeypatch):
    monkeypatch.setattr(xinference_preflight, "find_spec", lambda name: None)
    (missing,) = xinference_preflight._controller(needs(backend="docker"))
    assert "requirements/docker.txt" in missing.cure
    assert xinference_preflight._controller(needs(backend="native")) == []
    monkeypatch.setattr(xinference_preflight, "find_spec", lambda name: name)
    assert xinference_preflight._controller(needs(backend="docker")) == []
