# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a running server can be wrong, as facts for `diagnose`: who listens, what it printed, GPUs, switches, access.

Reads only. The server is asked a few public questions without credentials, which no server counts as a refused login.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..server.log import startup
from . import container, facts, native_run, offline, ports, server_log
from .deployed import Deployed
from .docker_cli import Docker
from .native_ctl import Native
from .standing import seconds

PATIENCE = 5.0
"""Seconds that the server has for one answer."""
LOG_BEFORE = 2.0
"""Seconds by which the clock of a log may be behind the start that it tells of."""
EXAMPLE_KEYS = ("09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",)
EXAMPLE_PASSWORDS = ("secret1", "secret2")
"""What Xinference's manual has in its example of `--auth-config`, and everybody knows."""


def processes(root: Path, seen: Deployed, container_seen: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """The server's own process: `pid` and `uid` (None when it does not run or nobody knows), `pids`, and `started`.

    `exit` is how the last native server ended.
    """
    found: Dict[str, Any] = {"pid": None, "uid": None, "pids": [], "started": None, "exit": {}, "status": ""}
    if seen.backend == "native":
        native = Native(root)
        now = native.state()
        found.update(exit=native.last_exit(), pids=sorted(native_run.family(root)))
        if now.active:
            found.update(pid=now.pid, started=now.started)
            with contextlib.suppress(OSError):
                found["uid"] = Path(f"/proc/{now.pid}").stat().st_uid
    elif container_seen:
        state = container_seen["State"]
        found["status"] = container.judge(container_seen, int(container_seen.get("RestartCount") or 0))
        found["restarts"] = int(container_seen.get("RestartCount") or 0)
        if state.get("Running"):
            found.update(pid=state.get("Pid"), started=seconds(str(state.get("StartedAt"))))
    return found


def log(root: Path, docker_host: Optional[str], process: Mapping[str, Any]) -> Dict[str, Any]:
    """The errors of the server's last start: `errors` as text, `since` when.

    Of a server that answered, those from before it did; of one that did not, all of them.
    """
    started, ended = process.get("started"), process.get("exit") or {}
    if not started and ended.get("ended"):
        started = float(ended["ended"]) - float(ended.get("lived") or 0.0)
    since = max(0.0, float(started or 0.0) - LOG_BEFORE)
    return {"since": since, **startup(server_log.reader(root, docker_host)(since), since)}


def port(root: Path, seen: Deployed, container_seen: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """Who listens where the server is to: `listeners` as `ports` tells them, with `ours` for a container's too.

    `answers` says whether the server speaks HTTP there, `said` what came instead, `took_s` how long that took.
    """
    found: Dict[str, Any] = {"listeners": [], "answers": False, "said": "", "took_s": 0.0, "bound": []}
    if not seen.port:
        return found
    published = _published(container_seen, seen.port) if container_seen else []
    clashing = {one["address"] for address in seen.addresses for one in ports.listeners(seen.port, address, str(root))}
    for one in ports.listeners(seen.port, "0.0.0.0", str(root)):
        words = str(one["program"] or "").partition(" ")[0]
        forwards = "docker-proxy" in words or (one["pid"] is None and one["user"] in ("root", "0"))
        one["ours"] = one["ours"] or (bool(published) and forwards) or _in_container(one["pid"], container_seen)
        # A command line may hold a password.
        one["program"] = words.rpartition("/")[2] or None
        if one["ours"] or one["address"] in clashing:
            found["listeners"].append(one)
    found["bound"] = published or sorted({one["address"] for one in found["listeners"] if one["ours"]})
    began = time.monotonic()
    code, said = _ask(f"{seen.endpoint}/status")
    found.update(answers=0 < code < 500, said=said, took_s=round(time.monotonic() - began, 3))
    return found


def _in_container(pid: Optional[int], container_seen: Optional[Mapping[str, Any]]) -> bool:
    """Whether a process is one of the container's, which shares the network of the host."""
    if not pid or not container_seen:
        return False
    with contextlib.suppress(OSError):
        return str(container_seen["Id"]) in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    return False


def _published(seen: Mapping[str, Any], number: int) -> List[str]:
    """The addresses of the host at which a container's port can be reached now."""
    rows = ((seen.get("NetworkSettings") or {}).get("Ports") or {}).values()
    found = (row for some in rows for row in some or [] if str(row.get("HostPort")) == str(number))
    return sorted({str(row.get("HostIp") or "0.0.0.0") for row in found})


def switches(root: Path, seen: Deployed, process: Mapping[str, Any], inside: Optional[Mapping[str, Any]]) -> Dict:
    """The offline switches of the `release` and of the `running` server; None where they cannot be read.

    Only these variables are ever told: any other may be a secret.
    """
    running: Optional[Dict[str, str]] = None
    if seen.backend == "native" and process.get("pid"):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process['pid']}/environ").read_bytes().decode("utf-8", "replace").split("\0")
            running = offline.switches(_variables(words))
    elif inside and inside["State"].get("Running"):
        running = offline.switches(_variables((inside.get("Config") or {}).get("Env") or []))
    return {"release": offline.switches(seen.environment) if seen.backend else None, "running": running}


def _variables(words: List[str]) -> Dict[str, str]:
    return {name: value for name, mark, value in (word.partition("=") for word in words) if mark}


def access(seen: Deployed, answers: bool = True) -> Dict[str, Any]:
    """Who may use the server: `auth` (None when it does not tell), `needs_setup`: whether there is no account yet.

    `example` is whether it goes by the accounts of Xinference's manual, `config` the file with accounts, if any. One
    that gives no `answers` is not asked.
    """
    found: Dict[str, Any] = {"auth": None, "needs_setup": None, "example": False, "config": ""}
    told = _json(f"{seen.endpoint}/v1/cluster/auth") if seen.endpoint and answers else None
    if isinstance(told, dict) and isinstance(told.get("auth"), bool):
        found["auth"] = told["auth"]
    if found["auth"]:
        setup = _json(f"{seen.endpoint}/v1/admin/setup/status")
        if isinstance(setup, dict) and isinstance(setup.get("needs_setup"), bool):
            found["needs_setup"] = setup["needs_setup"]
    found["config"] = auth_config(seen)
    if found["config"]:
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            content = json.loads(Path(found["config"]).read_text(encoding="utf-8"))
            passwords = [user.get("password") for user in content.get("user_config") or []]
            known = (content.get("auth_config") or {}).get("secret_key") in EXAMPLE_KEYS
            found["example"] = known or any(one in EXAMPLE_PASSWORDS for one in passwords)
            found["needs_setup"] = not passwords
    return found


def auth_config(seen: Deployed) -> str:
    """The file of accounts of a server before 3.0, as the host has it; empty where there is none."""
    words = list(seen.command)
    for place, word in enumerate(words):
        name, mark, value = word.partition("=")
        if name == "--auth-config":
            inside = value if mark else (words[place + 1] if place + 1 < len(words) else "")
            return str(seen.on_host(inside) or "") if inside else ""
    return ""


def gpus(seen: Deployed, docker: Optional[Docker], inside: Optional[Mapping[str, Any]], asked: bool) -> Dict[str, Any]:
    """The GPUs `given` to the server, those of the `host` (as `facts.gpus`), and what a container sees of them.

    `lost` and `problem` are as in `container.Gpus`; `counted` is what the server itself says when it is `asked`, None
    when it does not. One with authentication might take the question for a refused login.
    """
    found: Dict[str, Any] = {"given": [names[0] for names in seen.gpus], "host": None, "lost": [], "problem": ""}
    found["counted"] = None
    if not seen.gpus:
        return found
    found["host"] = facts.gpus()
    found["counted"] = container.counted(seen.endpoint) if asked else None
    if docker is not None and inside is not None and inside["State"].get("Running"):
        listed, said = container.listed(docker, str(inside["Id"]))
        told = container.compare(seen.gpus, listed, found["counted"], said)
        found.update(lost=told.lost, problem=told.problem)
    elif seen.backend == "native" and not found["host"]["problem"]:
        there = {str(gpu[key]) for gpu in found["host"]["list"] for key in ("index", "uuid")}
        found["lost"] = [names[0] for names in seen.gpus if not there & set(names)]
    return found


def unseen(docker: Docker, inside: Mapping[str, Any], seen: Deployed) -> List[str]:
    """What the host has of the mounted models and the running container does not see."""
    if not inside["State"].get("Running"):
        return []
    pairs = []
    for volume in seen.volumes:
        if volume["read_only"] and Path(volume["source"]).is_dir():
            names = sorted(entry.name for entry in os.scandir(volume["source"]) if not entry.name.startswith("."))
            pairs += [f"{volume['target']}/{name}" for name in names]
    if not pairs:
        return []
    script = 'for path; do [ -r "$path" ] || echo "$path"; done'
    answer = docker.inside(str(inside["Id"]), "sh", "-c", script, "sh", *pairs)
    return answer.out.splitlines() if answer.code == 0 else []


def _ask(url: str) -> Tuple[int, str]:
    """The status of an answer (0 for none) and what is to be told of one that is no success."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PATIENCE) as answer:
            return int(answer.status), ""
    except urllib.error.HTTPError as error:
        return error.code, f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return 0, str(getattr(error, "reason", error))


def _json(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PATIENCE) as answer:
            return json.loads(answer.read().decode())
    except (OSError, ValueError):
        return None
