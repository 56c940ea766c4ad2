# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judging a server: how it starts, its port, GPUs, offline switches, access, keeper, models. Facts in, findings out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.host import offline
from ansible_collections.airgap.xinference.plugins.module_utils.server.diagnose import diagnose

from .diagnosis_files import SERVE, refused, several
from .findings import WARNING, Facts, Finding

LOOPBACK = ("127.", "::1", "localhost")
SLOW = 3.0
"""Seconds after which an answer to `/status` is late."""
MODELS = "playbooks/models.yml"
LAST_LINES = 6
DOWN = ("stopped", "absent", "exited", "dead", "created")
"""States of a server that does not run."""


def judge_start(facts: Facts) -> list[Finding]:
    """Whether the server runs, and what its log tells of why it does not."""
    server, log = facts["server"] or {}, facts["log"] or {}
    if not server.get("release"):
        return []
    found = []
    runs = server.get("state") not in DOWN
    if server.get("problem") and not refused(server["problem"]):
        told, _mark, cure = server["problem"].rpartition("; ")
        found.append(Finding("start-up log", "a server as its release wants it", told or cure, cure if told else SERVE))
    cause, cure = _reason(log.get("errors") or "", facts)
    if not runs:
        told = ". ".join(text.rstrip(".") for text in (_ended(facts), cause) if text)
        found.append(
            Finding("start-up log", "a server that runs", told, " ".join(text for text in (cure, start(facts)) if text))
        )
        return found
    if (facts["port"] or {}).get("answers"):
        return found
    if (facts["process"] or {}).get("status"):
        told = facts["process"]["status"]
        found.append(Finding("start-up log", "a container that is healthy", told, f"{show_log(facts)} shows why"))
    if cause:
        found.append(Finding("start-up log", "a start without errors", cause, f"{cure} {restart(facts)}"))
    return found


def _reason(errors: str, facts: Facts) -> tuple[str, str]:
    """Why a server does not start, and what to do about that, by what it printed; empty when it printed no error."""
    known = diagnose(errors) if errors else None
    if known:
        return known.cause, f"{known.cure} Then"
    last = " | ".join(line.strip() for line in errors.splitlines()[-LAST_LINES:] if line.strip())
    return (f"its last words: {last[-600:]}" if last else ""), f"{show_log(facts)} shows more;"


def _ended(facts: Facts) -> str:
    """How a server that does not run came to its end."""
    process = facts["process"] or {}
    if process.get("status"):
        return str(process["status"])
    ended = process.get("exit") or {}
    if ended.get("asked"):
        return "it was stopped on purpose"
    if "code" in ended:
        return f"it ended with code {ended['code']} after {ended.get('lived', 0)} s"
    if facts["deployed"]["backend"] == "docker" and not facts.get("container"):
        return "there is no container"
    return "it does not run"


def judge_port(facts: Facts) -> list[Finding]:
    """Who has the server's port, on which addresses, and whether it answers."""
    seen, wanted = facts["port"] or {}, facts["deployed"]
    if not wanted["port"]:
        return []
    place = f"{several(wanted['addresses'])}:{wanted['port']}"
    free = f"stop that program (`ss -ltnp 'sport = :{wanted['port']}'` finds it), or set xinference_port to a free one"
    found = [
        Finding(
            "port",
            f"{place} is the server's",
            f"{_program(one)} listens on {one['address']}:{wanted['port']}",
            f"{free}, then {SERVE}",
        )
        for one in seen.get("listeners") or []
        if not one["ours"]
    ]
    runs = facts["server"].get("state") not in (*DOWN, "unknown")
    ours = any(one["ours"] for one in seen.get("listeners") or [])
    # An engine without a proxy of its own passes on to the container and listens nowhere.
    if runs and not ours and not found and not seen.get("answers"):
        told = "nobody listens there, though the server runs: it is still starting, or hangs"
        found.append(
            Finding("port", f"{place} is the server's", told, f"wait a minute and run again; then {show_log(facts)}")
        )
    elif runs and ours and not seen.get("answers"):
        told = f"it listens and does not answer: {seen.get('said') or 'no answer'}"
        found.append(Finding("port", f"an answer at {wanted['endpoint']}", told, restart(facts)))
    elif ours and seen.get("answers") and seen.get("took_s", 0) > SLOW:
        told = f"it took {seen['took_s']:.1f} s"
        cure = "look at `top` and `nvidia-smi` on the host; requests may be more than it can do"
        found.append(Finding("port", f"an answer at {wanted['endpoint']} at once", told, cure, WARNING))
    if ours and not _covers(seen.get("bound") or [], wanted["addresses"]):
        told = f"it listens on {several(seen.get('bound') or [])}"
        found.append(Finding("port", f"a server at {place}", told, restart(facts)))
    return found


def _covers(bound: list[str], wanted: list[str]) -> bool:
    """Whether every address that is wanted is one that is listened on."""
    if not bound or any(one in ("0.0.0.0", "::") for one in bound):
        return True
    names = {"localhost": "127.0.0.1"}
    return all(names.get(one, one) in bound or not one[:1].isdigit() for one in wanted)


def _program(entry: Mapping[str, Any]) -> str:
    if entry["pid"] is None:
        return f"a program of user {entry['user']}"
    return f"{entry['program'] or 'a program'} (pid {entry['pid']}, user {entry['user']})"


def judge_gpus(facts: Facts) -> list[Finding]:
    """Whether the GPUs that were given are there, on the host and for the server."""
    seen = facts["gpus"] or {}
    if not seen.get("given"):
        return []
    host = seen.get("host") or {}
    wanted = f"GPU {', '.join(seen['given'])} for the server"
    if host.get("problem"):
        cure = "install or load the NVIDIA driver (`modprobe nvidia`, `dmesg | grep -i nvrm`); after its update, reboot"
        return [Finding("GPUs", wanted, host["problem"], cure)]
    if seen.get("problem"):
        return [Finding("GPUs", wanted, seen["problem"], f"{SERVE} recreates a container that lost its GPUs")]
    if seen.get("lost"):
        there = several(str(gpu["index"]) for gpu in host.get("list") or []) or "none"
        told = f"the host has no GPU {', '.join(seen['lost'])}; it has {there}"
        return [Finding("GPUs", wanted, told, "look at `dmesg | grep -i xid` and the card; or correct xinference_gpus")]
    counted = seen.get("counted")
    if counted is not None and counted < len(seen["given"]):
        told = f"the server counts {counted} of its {len(seen['given'])}"
        return [Finding("GPUs", wanted, told, f"{restart(facts)}; if it stays so, the driver is too old for its CUDA")]
    return []


def judge_switches(facts: Facts) -> list[Finding]:
    """Switches that keep the server from looking for a network: those of the release, and those that it runs with."""
    seen, found = facts["switches"] or {}, []
    if seen.get("release") is None:
        return []
    lacking = offline.missing(seen["release"])
    if lacking:
        cure = f"take {several(lacking)} out of xinference_server_environment, then {SERVE}"
        found.append(
            Finding("offline switches", "all of them in the release", f"missing or turned: {several(lacking)}", cure)
        )
    if seen.get("running") is not None:
        gone = [name for name in offline.missing(seen["running"]) if name not in lacking]
        if gone:
            told = f"the running server lacks {several(gone)}"
            found.append(Finding("offline switches", "the server runs with those of its release", told, restart(facts)))
    return found


def judge_access(facts: Facts, open_allowed: bool) -> list[Finding]:
    """Whether somebody who should not can use the server."""
    seen, bound = facts["access"] or {}, (facts["port"] or {}).get("bound") or []
    outside = [one for one in bound if not one.startswith(LOOPBACK)]
    found = []
    if seen.get("auth") is False and outside and not open_allowed:
        told = f"everyone who reaches {several(outside)}:{facts['deployed']['port']} may use and change it"
        cure = f"set xinference_server_auth: true or xinference_host: 127.0.0.1, then {SERVE}"
        found.append(Finding("authentication", "a server that asks who is there", told, cure))
    if seen.get("needs_setup"):
        who = "everyone who reaches it" if outside else "everyone on the host"
        told = f"it has no account yet: the first of {who} (or who reads its log) becomes administrator"
        cure = f"{SERVE} makes the administrator; by hand: POST /v1/admin/setup with the token of the log"
        found.append(Finding("authentication", "an account that is the site's", told, cure))
    if seen.get("example"):
        told = f"{seen['config']} has the key or passwords of Xinference's manual, which everybody knows"
        found.append(Finding("authentication", "accounts of the site's own", told, f"put others into it, then {SERVE}"))
    return found


def judge_keeper(facts: Facts) -> list[Finding]:
    """Whether the keeper is at its work."""
    seen = facts["keeper"] or {}
    up = (facts["server"] or {}).get("state") not in DOWN
    if seen.get("state") in ("silent", "absent") and up:
        told = "it never ran" if seen["state"] == "absent" else "it wrote nothing for minutes"
        return [Finding("keeper", "a keeper that runs", told, keeper_start(facts))]
    if seen.get("state") == "ended" and up:
        return [Finding("keeper", "a keeper that runs", "it was stopped on purpose", keeper_start(facts), WARNING)]
    if seen.get("problem"):
        cure = (
            f"see docs/keeper.md; for a refused login correct xinference_username and xinference_password, then {SERVE}"
        )
        return [Finding("keeper", "a keeper without trouble", seen["problem"], cure)]
    return []


def judge_models(facts: Facts) -> list[Finding]:
    """Models that ought to serve and do not."""
    seen = facts["models"] or {}
    found = []
    if seen.get("problem"):
        told = f"the server does not tell: {seen['problem']}"
        cure = "set xinference_username and xinference_password; try once, a server bans who fails often"
        if "429" in seen["problem"]:
            cure = (
                "the server banned this host's address for too many refused credentials: find who sends wrong ones, "
                "then wait an hour, or start the server anew"
            )
        if "requests" in seen["problem"] and "not there" in seen["problem"]:
            cure = "playbooks/ship.yml brings the library"
        found.append(Finding("models", "a list of the models", told, cure, WARNING))
    for row in seen.get("rows") or []:
        if row["state"] in ("ready", "unknown", "starting", "stopping") or not row.get("desired"):
            continue
        why = str(row.get("error") or "")
        known = diagnose(" ".join([why, *(row.get("notes") or [])]))
        told = ". ".join(
            text.rstrip(".")
            for text in (row["state"], known.cause if known else why, *(row.get("notes") or [])[:2])
            if text
        )
        found.append(
            Finding("models", f"{row['model_uid']} serves", told, f"{known.cure} Then {MODELS}." if known else MODELS)
        )
    for row in seen.get("rows") or []:
        verified = row.get("verified") or {}
        if row["state"] == "ready" and verified and not verified.get("ok"):
            told = f"it does not pass its probe: {verified.get('detail')}"
            found.append(
                Finding(
                    "models", f"{row['model_uid']} answers as it should", told, f"look at the server's log; {MODELS}"
                )
            )
    return found


def start(facts: Facts) -> str:
    """How the server is started."""
    if facts["deployed"]["backend"] == "native":
        return f"{SERVE}, or on the host {facts['root']}/current/bin/xinferencectl start"
    return SERVE


def restart(facts: Facts) -> str:
    """How the server is started anew."""
    if facts["deployed"]["backend"] == "native":
        return f"on the host {facts['root']}/current/bin/xinferencectl restart"
    return f"on the host `docker compose -f {facts['root']}/current/compose.yaml up -d --force-recreate`"


def keeper_start(facts: Facts) -> str:
    """How the keeper is started."""
    if facts["deployed"]["backend"] == "native":
        return f"{SERVE}, or on the host {facts['root']}/current/bin/xinferencectl keeper start"
    return f"{SERVE}, or on the host `docker compose -f {facts['root']}/current/compose.yaml up -d`"


def show_log(facts: Facts) -> str:
    """How the server's log is read."""
    if facts["deployed"]["backend"] == "native":
        return f"{facts['root']}/current/bin/xinferencectl logs"
    return f"`docker compose -f {facts['root']}/current/compose.yaml logs --tail 100 server`"
