# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with a host that serves, or ought to: facts of the module xinference_diagnose in, findings out.

The order is that in which one thing keeps the next from working. Nothing here touches a host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .diagnosis_files import judge_denials, judge_integrity, judge_labels, judge_mounts, judge_rights, refused, several
from .diagnosis_server import (
    judge_access,
    judge_gpus,
    judge_keeper,
    judge_models,
    judge_port,
    judge_start,
    judge_switches,
)
from .findings import PROBLEM, WARNING, Facts, Finding, details

WORST_FIRST = {PROBLEM: 0}
AREAS = {
    "place": "mounts",
    "volumes": "mounts",
    "engine_data": "mounts",
    "unseen": "mounts",
    "release": "integrity",
    "integrity": "integrity",
    "image": "integrity",
    "engine": "engine",
    "container": "engine",
    "log": "start-up log",
    "port": "port",
    "permissions": "permissions",
    "selinux": "SELinux",
    "gpus": "GPUs",
    "switches": "offline switches",
    "access": "authentication",
    "keeper": "keeper",
    "models": "models",
}
"""What of the facts belongs to which check."""
CURES = {
    "engine": "start the Docker Engine (systemctl start docker), and look at `docker info` on the host",
    "container": "start the Docker Engine (systemctl start docker), and look at `docker info` on the host",
    "release": "playbooks/serve.yml makes the release anew",
}
"""What to do about areas without which nothing can work."""


def judge(facts: Facts, open_allowed: bool = False) -> list[Finding]:
    """All findings of a host, the worst first, otherwise in the order of the walk.

    `open_allowed` is whether the site said in so many words that the server may be open.
    """
    if not facts["installed"] or not (facts["shipped"] or facts["server"].get("release")):
        return [_absent(facts)]
    found = [
        *judge_mounts(facts),
        *judge_integrity(facts),
        *judge_start(facts),
        *judge_port(facts),
        *judge_rights(facts),
        *judge_labels(facts),
        *judge_denials(facts),
        *judge_gpus(facts),
        *judge_switches(facts),
        *judge_access(facts, open_allowed),
        *judge_keeper(facts),
        *judge_models(facts),
        *_unknown(facts),
    ]
    return sorted(dict.fromkeys(found), key=lambda finding: WORST_FIRST.get(finding.severity, 1))


def _absent(facts: Facts) -> Finding:
    """Nothing was ever installed where the inventory says."""
    place, root = facts["place"] or {}, facts["root"]
    cure = "playbooks/site.yml installs it; if it lies elsewhere, correct xinference_root"
    found = f"nothing of this collection is below {root}"
    if place.get("obstacle"):
        found, cure = f"{place['obstacle']} is not a directory", "move that file, or choose another xinference_root"
    return Finding("mounts", f"the root directory {root}", found, cure)


def _unknown(facts: Facts) -> list[Finding]:
    """What could not be looked at, which may hide anything. What was for want of rights is told once."""
    denied = {area: why for area, why in facts["problems"].items() if refused(why)}
    found = []
    for area, why in facts["problems"].items():
        if area in denied:
            continue
        cure, severity = CURES.get(area, "mend that, then run again"), PROBLEM if area in CURES else WARNING
        found.append(Finding(AREAS.get(area, area), "a host that can be looked at", why, cure, severity))
    if denied or refused((facts["server"] or {}).get("problem") or ""):
        checks = several(dict.fromkeys(AREAS.get(area, area) for area in denied)) or "the release"
        told = f"{facts['user']} may not look at everything: {checks}"
        wanted = f"a user who may read what is below {facts['root']}, and ask the Docker Engine"
        found.append(Finding("rights", wanted, told, "run as root: ansible_become: true", WARNING))
    return found


def blocks(results: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """One block a host, and a sentence at the end; `results` are the rows of findings by host."""
    lines: list[str] = []
    for host, rows in results.items():
        lines += [*([""] if lines else []), f"{host}: {count(rows)}"]
        for number, row in enumerate(rows, 1):
            mark = "" if row["severity"] == PROBLEM else f" ({row['severity']})"
            lines.append(f"{number:>3}. {row['check']}{mark}")
            lines += [f"     {line}" for line in details({**row, "severity": ""})]
    return [*lines, "", summary(results)]


def count(rows: Sequence[Mapping[str, str]]) -> str:
    """How many findings there are, in words."""
    return "nothing was found" if not rows else "1 finding" if len(rows) == 1 else f"{len(rows)} findings"


def summary(results: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The sentence at the end."""
    every = [row for rows in results.values() for row in rows]
    hosts = "1 host" if len(results) == 1 else f"{len(results)} hosts"
    if not every:
        return f"Diagnosed {hosts}: nothing was found."
    severe = sum(row["severity"] == PROBLEM for row in every)
    sick = sum(bool(rows) for rows in results.values())
    which = f"{severe} of which are problems" if severe > 1 else f"{'1' if severe else 'none'} of which is a problem"
    return f"Diagnosed {hosts}: {count(every)} on {sick} of them, {which}."
