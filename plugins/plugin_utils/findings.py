# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What preflight says: findings, what a host is to become, and the table over all hosts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .table import Row, draw

PROBLEM = "problem"
WARNING = "warning"
READY = "ready"
COLUMNS = ("host", "check", "state")

Facts = Mapping[str, Any]
"""What the module xinference_host_info returned."""


@dataclass(frozen=True)
class Finding:
    """One thing that was seen: what was looked at, what is wanted, what is there, and what to do. Texts may be empty.

    A `problem` is in the way, a `warning` is not.
    """

    check: str
    wanted: str
    found: str
    cure: str
    severity: str = PROBLEM

    def row(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


class Needs(NamedTuple):
    """What a host is to become: see the options of the module xinference_preflight."""

    root: str
    address: str
    port: int
    gpus: Sequence[Any]
    models: Sequence[Any]
    registrations: Sequence[str]
    backend: str = "native"
    open_allowed: bool = False
    login: str = ""
    image: str = ""
    tools: Sequence[str] = ()
    min_memory: int = 0
    max_clock_skew: float = 300.0
    require_airgap: bool = False


def rows_of(result: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The findings in the result of a host; a host that has none in it could not be checked, which is a finding."""
    if "findings" in result:
        return list(result["findings"])
    why = " ".join(str(result.get("msg") or "there is no result").split())
    return [Finding("preflight", "a host that can be checked", why, "mend that, then run again").row()]


def details(row: Mapping[str, str]) -> list[str]:
    """Lines that tell one finding: what was wanted, found, and what to do, as far as there are words."""
    told = [(label, row[label]) for label in ("wanted", "found", "cure") if row.get(label)]
    if len(told) == 1:
        return told[0][1].splitlines()
    return [f"{label + ':':<8}{text}" for label, text in told]


def table(results: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """One table over all hosts; `results` are the rows of findings by host. What several hosts share is told once."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for host, found in results.items():
        for row in found:
            shared.setdefault(tuple(row[key] for key in sorted(row)), []).append(host)
    told: set[tuple[str, ...]] = set()
    rows: list[Row] = []
    for host, found in results.items():
        if not problems(found):
            rows.append(((host, "-", READY), ()))
        for row in found:
            key = tuple(row[name] for name in sorted(row))
            if key not in told:
                rows.append(((named(shared[key], len(results)), row["check"], row["severity"]), details(row)))
            told.add(key)
    return [*draw(COLUMNS, rows), summary(results)]


def named(hosts: Sequence[str], total: int) -> str:
    """Several hosts in one cell."""
    if len(hosts) == total > 1:
        return "all hosts"
    return ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")


def summary(results: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """One line of totals."""
    ready = sum(not problems(found) for found in results.values())
    counts = [_count(results, severity) for severity in (PROBLEM, WARNING)]
    told = ", ".join(text for text in counts if text) or "nothing was found"
    return f"Ready: {ready} of {len(results)} {'host' if len(results) == 1 else 'hosts'}; {told}."


def problems(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The findings that are in the way."""
    return [row for row in rows if row["severity"] == PROBLEM]


def message(rows: Iterable[Mapping[str, str]]) -> str:
    """What is in the way of one host, one line a problem."""
    lines = []
    for row in problems(rows):
        told = (
            f"{row['wanted']}; found: {row['found']}"
            if row["wanted"] and row["found"]
            else row["wanted"] or row["found"]
        )
        lines.append(f"{row['check']}: {told}" + (f". Cure: {row['cure']}" if row["cure"] else ""))
    return "\n".join(lines)


def report(host: str, findings: Sequence[Finding]) -> str:
    """All findings of one host as one message."""
    count = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
    lines = [f"{host} is not ready: {count}. Nothing was changed."]
    for number, finding in enumerate(findings, 1):
        told = details(finding.row())
        if len(told) == 1:
            lines.append(f"{number:>3}. {finding.check}: {told[0]}")
            continue
        lines.append(f"{number:>3}. {finding.check}")
        lines += [f"       {line}" for line in told]
    return "\n".join(lines)


def _count(results: Mapping[str, Sequence[Mapping[str, str]]], severity: str) -> str:
    number = sum(row["severity"] == severity for found in results.values() for row in found)
    return f"{number} {severity}{'' if number == 1 else 's'}" if number else ""


def unusable(facts: Facts) -> Finding:
    """The finding of a host that was not reached, or ran no module at all; `facts` are what Ansible said instead."""
    text = str(facts.get("msg") or "") + " " + str(facts.get("module_stderr") or facts.get("module_stdout") or "")
    said = " ".join(text.split())[:400]
    if facts.get("unreachable"):
        cure = "switch it on, look at its network, at ansible_host and ansible_user, and at the key or password"
        return Finding("connection", "a connection to the host", said, cure)
    if "sudo" in said.lower() or "privilege escalation" in said.lower():
        cure = "give ansible_become_password (from a vault), or allow sudo without one, or log in as root"
        return Finding("become", "the rights of the user that ansible_become asks for", said, cure)
    cure = "install Python 3.8 or newer, and name it in ansible_python_interpreter when it is not found by itself"
    return Finding("python", "a Python for Ansible on the host", said, cure)
