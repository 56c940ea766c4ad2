# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judging directories and files of a deployment: mounts and room, integrity, rights, labels. Facts in, findings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text

from .findings import WARNING, Facts, Finding

TIGHT, FULL = 2 * 2**30, 256 * 2**20
"""Bytes that ought to be free, and those without which a server soon cannot write."""
FEW_FILES = 1000
SERVE = "playbooks/serve.yml"
SHIP = "playbooks/ship.yml"
DEEP = "playbooks/ship.yml -e xinference_ship_deep=true"
CONTAINER_LABELS = ("container_file_t", "container_ro_file_t", "svirt_sandbox_file_t", "container_share_t", "nfs_t")
SHOWN = 5


def judge_mounts(facts: Facts) -> list[Finding]:
    """Directories that are not there or cannot be written, full disks, and mounts that the container does not see."""
    found: list[Finding] = []
    told: set[Any] = set()
    place, backend = facts["place"], facts["deployed"]["backend"]
    if place.get("noexec") and backend == "native":
        wanted = f"programs below {facts['root']} can run"
        found.append(
            Finding("mounts", wanted, "it is mounted noexec", "mount it without noexec, or move xinference_root")
        )
    for volume in facts["volumes"] or []:
        found += _volume(volume, facts, told)
    data = facts.get("engine_data")
    if data and data["device"] not in told:
        found += _room("Docker Engine", data["path"], data, facts, told)
    missing = facts.get("unseen") or []
    if missing:
        compose = f"`docker compose -f {facts['root']}/current/compose.yaml up -d --force-recreate`"
        cure = f"what was mounted was replaced since; recreate the container, on the host: {compose}"
        found.append(Finding("mounts", "models that the container sees", f"it does not see {several(missing)}", cure))
    return found


def _volume(volume: Mapping[str, Any], facts: Facts, told: set[Any]) -> list[Finding]:
    path, what, native = volume["path"], volume["what"], facts["deployed"]["backend"] == "native"
    if not volume["there"]:
        # A native server makes its home when it starts.
        if what == "home of the server" and native and facts["server"].get("state") != "running":
            return []
        cure = f"mount or make it; what the collection mounts comes back with {SHIP} and {SERVE}"
        return [Finding("mounts", f"{path} ({what})", "it is not there", cure)]
    found = []
    if volume["read_only"] and (what in ("root directory", "home of the server") or "cache" in path):
        cure = f"mount -o remount,rw {volume['path']}; look at `dmesg` for errors of the disk, which make it read-only"
        found.append(Finding("mounts", f"{path} ({what}) can be written", "it is mounted read-only", cure))
    return found + ([] if volume["device"] in told else _room(what, path, volume, facts, told))


def _room(what: str, path: str, volume: Mapping[str, Any], facts: Facts, told: set[Any]) -> list[Finding]:
    """What a file system lacks; each is told of once."""
    told.add(volume["device"])
    free = volume["free_bytes"]
    cure = f"playbooks/cleanup.yml removes what no release needs; `du -xh {path} | sort -h | tail` shows the rest"
    if free < TIGHT:
        severity = "problem" if free < FULL else WARNING
        return [
            Finding(
                "mounts", f"{size_text(TIGHT)} free on {path} ({what})", f"{size_text(free)} are free", cure, severity
            )
        ]
    if volume.get("free_files") is not None and volume["free_files"] < FEW_FILES:
        return [Finding("mounts", f"room for more files on {path}", f"{volume['free_files']} inodes are free", cure)]
    return []


def judge_integrity(facts: Facts) -> list[Finding]:
    """A release that was changed, and what was shipped and is not whole."""
    seen, found = facts["integrity"] or {}, []
    root = facts["root"]
    if seen.get("dangling"):
        found.append(
            Finding("integrity", f"{root}/current leads to a release", "it leads nowhere", f"{SERVE} makes it anew")
        )
    elif not facts["server"].get("release"):
        found.append(
            Finding("integrity", f"a release in force below {root}", "there is none; things were only shipped", SERVE)
        )
    if seen.get("release"):
        wanted = "a release as it was written"
        files = f": {several(seen['changed'])}" if seen.get("changed") else ""
        found.append(Finding("integrity", wanted, f"somebody changed its files{files}", f"{SERVE} makes it anew"))
    if seen.get("problem"):
        found.append(Finding("integrity", "a list of what was shipped", seen["problem"], SHIP))
    if seen.get("damaged"):
        wanted = "files with the bytes that were shipped"
        found.append(
            Finding(
                "integrity",
                wanted,
                f"damaged: {several(seen['damaged'])}",
                f"{DEEP}; if it comes back, the disk is failing (`smartctl -a`)",
            )
        )
    if seen.get("missing"):
        found.append(Finding("integrity", "all files that were shipped", f"missing: {several(seen['missing'])}", SHIP))
    if seen.get("trees"):
        wanted = "directories that have their files and no others"
        found.append(Finding("integrity", wanted, f"changed: {several(seen['trees'])}", SHIP))
    if seen.get("venv"):
        wanted = "the environment of the server as it was built"
        found.append(Finding("integrity", wanted, f"{seen['venv']} is not whole", f"{SERVE} builds it again"))
    if not facts["image"]:
        found.append(
            Finding(
                "integrity", "the image of the server in the Docker Engine", "it is not there", f"{SHIP}, then {SERVE}"
            )
        )
    if seen.get("unread_bytes"):
        wanted = "every file vouched for"
        told = f"{size_text(seen['unread_bytes'])} have no stamp, and there was no time to read them"
        found.append(Finding("integrity", wanted, told, "-e xinference_diagnose_deep=true reads everything", WARNING))
    return found


def judge_rights(facts: Facts) -> list[Finding]:
    """Secrets that others can read, what they can change, and what does not belong to the server's user."""
    seen, found = facts["permissions"] or {}, []
    user, home = seen.get("user") or "root", facts["deployed"]["home"]
    for row in seen.get("readable") or []:
        wanted = f"{row['path']} is read by nobody but its owner, as it has secrets"
        cure = f"chmod o-rwx {row['path']}; then change the secrets in it, others may have read them"
        found.append(Finding("permissions", wanted, _mode(row), cure))
    writable = seen.get("writable") or []
    if writable:
        paths = [row["path"] for row in writable]
        cure = f"chmod o-w {' '.join(paths[:SHOWN])}"
        found.append(
            Finding(
                "permissions",
                "files that only the server's user changes",
                f"everyone may change {several(map(_mode, writable))}",
                cure,
            )
        )
    elif seen.get("home") and facts["deployed"]["backend"] == "native" and int(seen["home"], 8) & 0o005:
        found.append(
            Finding(
                "permissions",
                f"{home} closed to others",
                f"everyone may look into it (mode {seen['home']})",
                f"chmod 0750 {home}",
            )
        )
    closed = seen.get("closed") or []
    if closed:
        cure = f"chmod u+rwx {' '.join(row['path'] for row in closed[:SHOWN])}, then {SERVE}"
        found.append(Finding("permissions", "directories that their owner may use", several(map(_mode, closed)), cure))
    strangers = seen.get("strangers") or []
    if strangers:
        top = home if all(row["path"].startswith(home) for row in strangers if home) else facts["root"]
        found.append(
            Finding(
                "permissions",
                f"files of the server belong to {user}, as whom it runs",
                several(map(_mode, strangers)),
                f"chown -R {user} {top}",
            )
        )
    return found


def judge_labels(facts: Facts) -> list[Finding]:
    """SELinux labels, without which a container that is confined reads nothing."""
    seen = facts["selinux"] or {}
    if seen.get("mode") != "enforcing":
        return []
    found = []
    if not seen.get("labels", True) and facts["deployed"]["backend"] == "docker":
        wanted = f"a file system that keeps SELinux labels at {facts['root']}"
        found.append(
            Finding(
                "SELinux", wanted, "this one keeps none", "mount it with a context= option, or move xinference_root"
            )
        )
    wrong = {
        path: label
        for path, label in (seen.get("mounts") or {}).items()
        if not any(known in label for known in CONTAINER_LABELS)
    }
    if wrong:
        told = several([f"{path} ({label})" for path, label in wrong.items()])
        at_once = f"chcon -R -t container_file_t {' '.join(list(wrong)[:SHOWN])}"
        cure = f"xinference_server_selinux: true, then {SERVE}; at once: {at_once}"
        found.append(Finding("SELinux", "mounts labelled for containers", told, cure))
    return found


def judge_denials(facts: Facts) -> list[Finding]:
    """What SELinux or AppArmor refused."""
    seen = facts["denials"] or {}
    if not seen.get("count"):
        return []
    times = "once" if seen["count"] == 1 else f"{seen['count']} times"
    cure = "`ausearch -m avc -ts recent | audit2why` explains it; for mounts set xinference_server_selinux: true"
    return [
        Finding(
            "SELinux", "a server that is refused nothing", f"refused {times} within a day, last: {seen['last']}", cure
        )
    ]


def several(texts: Iterable[str]) -> str:
    """A few of many."""
    every = list(texts)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def refused(text: str) -> bool:
    """Whether an error is one of missing rights."""
    return "permission denied" in text.lower() or "PermissionError" in text


def _mode(row: Mapping[str, Any]) -> str:
    return f"{row['path']} (mode {row['mode']}, owner {row['owner']})"
