# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts of a host are judged right: nothing of a healthy one, and of a sick one what is wrong and what to do."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.airgap.xinference.plugins.module_utils.host.offline import SWITCHES
from ansible_collections.airgap.xinference.plugins.plugin_utils.diagnosis import blocks, judge
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import Finding

ROOT = Path(__file__).parents[3]
OURS = {"address": "127.0.0.1", "user": "root", "pid": 41, "program": "python", "ours": True}
STRANGER = {"address": "0.0.0.0", "user": "www", "pid": 4711, "program": "nginx", "ours": False}
HEALTHY: dict[str, Any] = {
    "root": "/opt/x",
    "problems": {},
    "place": {"existing": "/opt/x", "obstacle": "", "noexec": False},
    "user": "root",
    "installed": True,
    "shipped": True,
    "deployed": {
        "backend": "native",
        "home": "/opt/x/home",
        "addresses": ["127.0.0.1"],
        "port": 9997,
        "endpoint": "http://127.0.0.1:9997",
    },
    "server": {"release": "5d41402abc4b", "state": "running", "problem": ""},
    "container": False,
    "process": {"pid": 41, "uid": 0, "pids": [41], "started": 1.8e9, "exit": {}, "status": ""},
    "volumes": [
        {
            "path": "/opt/x",
            "what": "root directory",
            "there": True,
            "directory": True,
            "read_only": False,
            "free_bytes": 10**12,
            "free_files": 10**6,
            "device": 1,
        }
    ],
    "engine_data": None,
    "unseen": [],
    "image": True,
    "integrity": {
        "release": "",
        "dangling": False,
        "missing": [],
        "damaged": [],
        "trees": [],
        "venv": "",
        "problem": "",
        "unread_bytes": 0,
    },
    "log": {"since": 0.0, "errors": "", "up": True},
    "port": {"listeners": [OURS], "answers": True, "said": "", "took_s": 0.01, "bound": ["127.0.0.1"]},
    "permissions": {"readable": [], "writable": [], "strangers": [], "closed": [], "home": "0750", "user": "root"},
    "selinux": {"mode": "disabled", "labels": True, "mounts": {}},
    "denials": {"count": 0, "last": ""},
    "gpus": {"given": [], "host": None, "lost": [], "problem": "", "counted": None},
    "switches": {"release": SWITCHES, "running": SWITCHES},
    "access": {"auth": True, "needs_setup": False, "example": False, "config": ""},
    "keeper": {"state": "running", "problem": "", "doing": ""},
    "models": {"asked": True, "problem": "", "rows": [{"model_uid": "m", "state": "ready", "desired": True}]},
}


def changed(base: Any, path: str, value: Any) -> Any:
    facts = deepcopy(base)
    place = facts
    *way, last = path.split(".")
    for name in way:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    return facts


def facts(**changes: Any) -> dict[str, Any]:
    """A healthy host but for `changes`, whose names are paths with two underlines for dots."""
    found = HEALTHY
    for path, value in changes.items():
        found = changed(found, path.replace("__", "."), value)
    return found


def stopped(**changes: Any) -> dict[str, Any]:
    down = {
        "server__state": "stopped",
        "port__listeners": [],
        "port__answers": False,
        "port__bound": [],
        "process__pid": None,
        "models__rows": [{"model_uid": "m", "state": "unknown", "desired": True}],
        "access__auth": None,
        "access__needs_setup": None,
        "switches__running": None,
        "keeper__state": "silent",
    }
    return facts(**{**down, **changes})


def docker(**changes: Any) -> dict[str, Any]:
    base = {"deployed__backend": "docker", "container": True, "permissions__home": "0755"}
    return facts(**{**base, **changes})


def row(path: str, mode: str = "0644", owner: str = "root") -> dict[str, str]:
    return {"path": path, "mode": mode, "owner": owner}


def test_a_healthy_host_has_no_findings() -> None:
    assert judge(HEALTHY) == []
    assert judge(docker(access__auth=False)) == []


CASES: list[tuple[str, dict[str, Any], list[tuple[str, str, str]]]] = [
    # name, facts, findings: check, what is in what was found, what is in the cure
    ("read-only", facts(volumes__0__read_only=True), [("mounts", "read-only", "remount,rw")]),
    ("full", facts(volumes__0__free_bytes=2**20), [("mounts", "1.0 MiB are free", "cleanup.yml")]),
    ("no inodes", facts(volumes__0__free_files=3), [("mounts", "3 inodes", "cleanup.yml")]),
    ("noexec", facts(place__noexec=True), [("mounts", "noexec", "xinference_root")]),
    ("mount gone", docker(volumes__0__there=False, volumes__0__path="/data"), [("mounts", "not there", "ship.yml")]),
    ("unseen", docker(unseen=["/models/bge-m3"]), [("mounts", "does not see /models/bge-m3", "--force-recreate")]),
    (
        "engine's disk",
        docker(engine_data={"device": 2, "free_bytes": 5, "path": "/var/lib/docker"}),
        [("mounts", "5 B are free", "/var/lib/docker")],
    ),
    ("dangling", facts(integrity__dangling=True), [("integrity", "leads nowhere", "serve.yml")]),
    ("only shipped", stopped(server__release="", deployed__port=0), [("integrity", "only shipped", "serve.yml")]),
    ("altered release", facts(integrity__release="x"), [("integrity", "changed its files", "serve.yml")]),
    (
        "altered files",
        facts(integrity__release="x", integrity__changed=["models.json has other content"]),
        [("integrity", "changed its files: models.json has other content", "serve.yml")],
    ),
    (
        "damaged",
        facts(integrity__damaged=["models/a: weights.bin"]),
        [("integrity", "damaged: models/a: weights.bin", "xinference_ship_deep=true")],
    ),
    ("missing", facts(integrity__missing=["models/a: b"]), [("integrity", "missing: models/a: b", "ship.yml")]),
    ("changed tree", facts(integrity__trees=["/opt/x/models/a/1"]), [("integrity", "/opt/x/models/a/1", "ship.yml")]),
    ("venv", facts(integrity__venv="/opt/x/venvs/1"), [("integrity", "not whole", "serve.yml")]),
    ("image gone", docker(image=False), [("integrity", "not there", "ship.yml")]),
    ("unread", facts(integrity__unread_bytes=2**30), [("integrity", "1.0 GiB have no stamp", "deep=true")]),
    ("stopped", stopped(), [("start-up log", "does not run", "xinferencectl start")]),
    (
        "stopped on purpose",
        stopped(process__exit={"code": 0, "asked": True}),
        [("start-up log", "on purpose", "serve.yml")],
    ),
    ("died", stopped(process__exit={"code": -9, "lived": 7}), [("start-up log", "code -9 after 7 s", "start")]),
    (
        "died of a known cause",
        stopped(process__exit={"code": 1, "lived": 7}, log__errors="OSError: [Errno 98] address already in use"),
        [("start-up log", "ended with code 1 after 7 s. Another program listens", "ss -ltnp")],
    ),
    (
        "died of an unknown cause",
        stopped(log__errors="RuntimeError: something odd"),
        [("start-up log", "does not run. its last words: RuntimeError: something odd", "xinferencectl logs")],
    ),
    (
        "runs and never answered",
        facts(log__errors="ModuleNotFoundError: No module named 'torch'", port__answers=False, port__listeners=[]),
        [("start-up log", "package torch is not installed", "wheels of the bundle"), ("port", "nobody listens", "")],
    ),
    (
        "manager gone",
        facts(server__problem="its manager is gone, so nothing would start it again; run playbooks/serve.yml"),
        [("start-up log", "its manager is gone", "run playbooks/serve.yml")],
    ),
    (
        "container unhealthy",
        docker(process__status="x-server-1 is paused; docker unpause x-server-1", port__answers=False),
        [("start-up log", "paused", "logs --tail"), ("port", "does not answer", "--force-recreate")],
    ),
    (
        "no container",
        stopped(deployed__backend="docker", container=False),
        [("start-up log", "there is no container", "serve.yml")],
    ),
    (
        "old errors of a server that answers",
        facts(log__errors="RuntimeError: out of memory"),
        [],
    ),
    (
        "port taken while down",
        stopped(port__listeners=[STRANGER]),
        [("start-up log", "does not run", ""), ("port", "nginx (pid 4711, user www)", "xinference_port")],
    ),
    (
        "port taken by somebody unseen",
        stopped(port__listeners=[{**STRANGER, "pid": None, "program": None}]),
        [("start-up log", "", ""), ("port", "a program of user www listens", "ss -ltnp")],
    ),
    (
        "hangs",
        facts(port__answers=False, port__said="timed out"),
        [("port", "does not answer: timed out", "xinferencectl restart")],
    ),
    ("still starting", facts(port__answers=False, port__listeners=[]), [("port", "nobody listens", "wait a minute")]),
    ("an engine without a proxy", docker(port__listeners=[]), []),
    ("slow", facts(port__took_s=4.2), [("port", "4.2 s", "top")]),
    (
        "elsewhere",
        facts(deployed__addresses=["10.1.2.3"]),
        [("port", "it listens on 127.0.0.1", "restart")],
    ),
    (
        "secret read by others",
        facts(permissions__readable=[row("/opt/x/home/auth/auth.db")]),
        [("permissions", "auth.db (mode 0644", "chmod o-rwx /opt/x/home/auth/auth.db")],
    ),
    ("home open", facts(permissions__home="0755"), [("permissions", "mode 0755", "chmod 0750 /opt/x/home")]),
    (
        "home written by all",
        facts(permissions__home="0777", permissions__writable=[row("/opt/x/home", "0777")]),
        [("permissions", "everyone may change /opt/x/home (mode 0777", "chmod o-w /opt/x/home")],
    ),
    (
        "closed",
        facts(permissions__closed=[row("/opt/x/home", "0000")]),
        [("permissions", "mode 0000", "chmod u+rwx /opt/x/home")],
    ),
    (
        "wrong owner",
        facts(permissions__strangers=[row("/opt/x/home/auth", "0700", "nobody")]),
        [("permissions", "owner nobody", "chown -R root /opt/x/home")],
    ),
    (
        "unlabelled",
        docker(selinux={"mode": "enforcing", "labels": True, "mounts": {"/m": "u:r:default_t:s0"}}),
        [("SELinux", "/m (u:r:default_t:s0)", "xinference_server_selinux: true")],
    ),
    (
        "labelled",
        docker(selinux={"mode": "enforcing", "labels": True, "mounts": {"/m": "u:r:container_file_t:s0"}}),
        [],
    ),
    (
        "no labels",
        docker(selinux={"mode": "enforcing", "labels": False, "mounts": {}}),
        [("SELinux", "none", "context=")],
    ),
    ("permissive", docker(selinux={"mode": "permissive", "labels": True, "mounts": {"/m": "x"}}), []),
    ("denied", facts(denials={"count": 2, "last": "avc: denied"}), [("SELinux", "2 times", "audit2why")]),
    (
        "no driver",
        facts(gpus__given=["0"], gpus__host={"list": [], "problem": "nvidia-smi ended with status 9"}),
        [("GPUs", "status 9", "driver")],
    ),
    (
        "container lost its GPU",
        docker(gpus__given=["0"], gpus__host={"list": [], "problem": ""}, gpus__problem="The container has lost GPU 0"),
        [("GPUs", "lost GPU 0", "serve.yml")],
    ),
    (
        "GPU gone",
        facts(gpus__given=["0", "1"], gpus__host={"list": [{"index": 0}], "problem": ""}, gpus__lost=["1"]),
        [("GPUs", "no GPU 1; it has 0", "xinference_gpus")],
    ),
    (
        "GPUs not counted",
        facts(gpus__given=["0", "1"], gpus__host={"list": [], "problem": ""}, gpus__counted=1),
        [("GPUs", "counts 1 of its 2", "restart")],
    ),
    (
        "switch missing in the release",
        facts(
            switches__release={name: value for name, value in SWITCHES.items() if name != "HF_HUB_OFFLINE"},
            switches__running={name: value for name, value in SWITCHES.items() if name != "HF_HUB_OFFLINE"},
        ),
        [("offline switches", "HF_HUB_OFFLINE", "xinference_server_environment")],
    ),
    (
        "switch missing in the server only",
        facts(switches__running={**SWITCHES, "DO_NOT_TRACK": "0"}),
        [("offline switches", "the running server lacks DO_NOT_TRACK", "restart")],
    ),
    (
        "open",
        facts(access__auth=False, port__bound=["0.0.0.0"]),
        [("authentication", "0.0.0.0:9997", "xinference_server_auth: true")],
    ),
    ("closed to others", facts(access__auth=False), []),
    (
        "no account",
        facts(access__needs_setup=True),
        [("authentication", "everyone on the host", "/v1/admin/setup")],
    ),
    (
        "no account and reachable",
        facts(access__needs_setup=True, deployed__addresses=["10.0.0.1"], port__bound=["10.0.0.1"]),
        [("authentication", "everyone who reaches it", "/v1/admin/setup")],
    ),
    (
        "accounts of the manual",
        facts(access__example=True, access__config="/opt/x/auth.json"),
        [("authentication", "/opt/x/auth.json", "serve.yml")],
    ),
    ("keeper silent", facts(keeper__state="silent"), [("keeper", "nothing for minutes", "keeper start")]),
    ("keeper never ran", docker(keeper__state="absent"), [("keeper", "never ran", "up -d")]),
    ("keeper stopped", facts(keeper__state="ended"), [("keeper", "on purpose", "keeper start")]),
    ("no keeper", facts(keeper__state="off"), []),
    (
        "keeper in trouble",
        facts(keeper__problem="the login was refused"),
        [("keeper", "login was refused", "xinference_password")],
    ),
    (
        "model missing",
        facts(models__rows=[{"model_uid": "m", "state": "missing", "desired": True, "error": "not on the server"}]),
        [("models", "missing. not on the server", "models.yml")],
    ),
    (
        "model failed for a known cause",
        facts(models__rows=[{"model_uid": "m", "state": "failed", "desired": True, "error": "CUDA: out of memory"}]),
        [("models", "memory of the GPU", "another GPU")],
    ),
    ("somebody's model", facts(models__rows=[{"model_uid": "m", "state": "failed", "desired": False}]), []),
    (
        "model without answer",
        facts(
            models__rows=[
                {"model_uid": "m", "state": "ready", "desired": True, "verified": {"ok": False, "detail": "HTTP 500"}}
            ]
        ),
        [("models", "HTTP 500", "models.yml")],
    ),
    (
        "models not told",
        facts(models={"asked": False, "problem": "Not authenticated", "rows": []}),
        [("models", "Not authenticated", "xinference_password")],
    ),
    (
        "no library",
        facts(models={"asked": False, "problem": "the library requests is not there", "rows": []}),
        [("models", "requests", "ship.yml")],
    ),
    (
        "few rights",
        facts(problems={"integrity": "PermissionError: [Errno 13] Permission denied"}),
        [("rights", "root may not look at everything: integrity", "ansible_become: true")],
    ),
    (
        "hardly any rights",
        facts(
            server__problem="There is no release in force: [Errno 13] Permission denied: 'x'; run playbooks/serve.yml",
            server__state="unknown",
            deployed__port=0,
            problems={"release": "PermissionError: x", "permissions": "PermissionError: y", "models": "odd"},
        ),
        [("models", "odd", "mend that"), ("rights", "everything: integrity, permissions", "ansible_become: true")],
    ),
    (
        "engine down",
        docker(problems={"engine": "DockerError: Cannot connect to the Docker daemon"}),
        [("engine", "Cannot connect", "systemctl start docker")],
    ),
    ("never installed", facts(installed=False), [("mounts", "nothing of this collection is below /opt/x", "site.yml")]),
    (
        "somebody else's directory",
        facts(shipped=False, server__release=""),
        [("mounts", "nothing of this collection", "xinference_root")],
    ),
]


@pytest.mark.parametrize(("seen", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_found(seen: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    found = judge(seen)
    assert [one.check for one in found] == [check for check, _found, _cure in expected], found
    for one, (_check, text, cure) in zip(found, expected):
        assert text in one.found and cure in one.cure, one


@pytest.mark.parametrize("seen", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_every_finding_says_what_to_do(seen: dict[str, Any]) -> None:
    assert all(one.cure and one.found for one in judge(seen))


def test_the_site_may_say_that_it_is_open() -> None:
    seen = facts(access__auth=False, port__bound=["0.0.0.0"])
    assert judge(seen) and not judge(seen, open_allowed=True)


def test_the_worst_comes_first_and_otherwise_the_order_of_the_walk() -> None:
    seen = facts(volumes__0__free_bytes=2**30, port__took_s=9.0, keeper__state="silent", integrity__venv="/v")
    assert [(one.check, one.severity) for one in judge(seen)] == [
        ("integrity", "problem"),
        ("keeper", "problem"),
        ("mounts", "warning"),
        ("port", "warning"),
    ]


def test_one_block_a_host_and_a_sentence_at_the_end() -> None:
    one = Finding("port", "a free port", "nginx has it", "stop nginx").row()
    two = Finding("mounts", "", "tight", "clean up", "warning").row()
    assert blocks({"gpu1": [one, two], "gpu2": []}) == [
        "gpu1: 2 findings",
        "  1. port",
        "     wanted: a free port",
        "     found:  nginx has it",
        "     cure:   stop nginx",
        "  2. mounts (warning)",
        "     found:  tight",
        "     cure:   clean up",
        "",
        "gpu2: nothing was found",
        "",
        "Diagnosed 2 hosts: 2 findings on 1 of them, 1 of which is a problem.",
    ]
    assert blocks({"gpu1": []})[-1] == "Diagnosed 1 host: nothing was found."


def test_the_switches_are_those_that_the_role_sets() -> None:
    told = yaml.safe_load((ROOT / "roles/xinference_server/vars/main.yml").read_text())["__xinference_server_offline"]
    assert {name: value for name, value in told.items() if name != "XINFERENCE_MODEL_SRC"} == SWITCHES
