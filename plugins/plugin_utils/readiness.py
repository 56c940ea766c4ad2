# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judging whether a host can be served from a bundle: facts in, findings out. Nothing here touches a host.

Each function looks at one thing and returns every problem it sees with it, so that they can be reported together.
"""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from typing import Any, Iterable, Mapping, NamedTuple, Sequence

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import WHEELS_GLIBC, WHEELS_PLATFORM
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.places import short
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import transfer_plan
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError, parse, source_name

from .bundles import LIBRARIES, WHEELHOUSE

BYTECODE = 1.35
"""An unpacked wheel with its compiled modules, as a multiple of the unpacked wheel (measured with Xinference's own)."""
SLACK = 64 * 1024**2
"""Bytes that must stay free for logs, records and the blocks that files round up to."""

Facts = Mapping[str, Any]
"""What the module xinference_host_info returned."""


@dataclass(frozen=True)
class Finding:
    """One thing in the way: what was looked at, what is wanted, what is there, and what to do. Texts may be empty."""

    check: str
    wanted: str
    found: str
    cure: str

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


def judge_models(needs: Needs, bundle: Bundle | None) -> list[Finding]:
    """Model entries that cannot be launched; with a bundle also those whose model is not in it."""
    paths = None
    if bundle is not None:
        paths = {entry.name: entry.name for entry in bundle.artifacts if entry.kind == "models"}
        # What is switched off need not be in the bundle.
        off = [entry for entry in needs.models if isinstance(entry, Mapping) and entry.get("enabled") is False]
        paths.update({name: name for name in map(source_name, off) if name})
    try:
        parse(needs.models, needs.gpus, paths, needs.registrations)
    except SpecError as error:
        return [Finding("models", "", problem, "") for problem in error.problems]
    return []


def judge_host(needs: Needs, facts: Facts, bundle: Bundle | None, artifacts: Sequence[Artifact]) -> list[Finding]:
    """Everything that is wrong with the host itself; `artifacts` are those it needs of the bundle."""
    return [
        *judge_place(needs, facts),
        *judge_wheels(facts, artifacts),
        *(judge_disk(needs, facts, bundle, artifacts) if bundle is not None else []),
        *judge_port(needs, facts),
        *judge_gpus(needs, facts),
    ]


def judge_place(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether the root directory can be written and programs in it can be run."""
    place, user = facts["place"], facts["machine"]["user"]
    wanted = f"a directory {needs.root} that {user} can write"
    findings = []
    if place["obstacle"]:
        cure = "move that file, or choose another xinference_root"
        findings.append(Finding("root directory", wanted, f"{place['obstacle']} is not a directory", cure))
    elif place["read_only"]:
        cure = "mount it writable, or choose another xinference_root"
        findings.append(Finding("root directory", wanted, f"{place['existing']} is mounted read-only", cure))
    elif not place["writable"]:
        found = f"{place['existing']} belongs to {place['owner']} (mode {place['mode']})"
        cure = "set ansible_become: true, or choose an xinference_root in a directory of this user"
        findings.append(Finding("root directory", wanted, found, cure))
    if place["noexec"]:
        cure = "mount it without noexec, or choose another xinference_root"
        wanted = f"programs below {needs.root} can run"
        findings.append(Finding("root directory", wanted, f"{place['existing']} is mounted noexec", cure))
    return findings


def judge_wheels(facts: Facts, artifacts: Iterable[Artifact]) -> list[Finding]:
    """Whether the wheelhouse of the server is for a Python and a machine like this one."""
    wheelhouse = _find(artifacts, WHEELHOUSE)
    if wheelhouse is None:
        return []
    findings = []
    machine = facts["machine"]
    platform = wheelhouse.annotations.get(WHEELS_PLATFORM, "any")
    here = f"{machine['system'].lower()}_{machine['architecture']}"
    if platform not in ("any", here):
        cure = f"build the bundle's wheelhouse on a {here} machine, or take this host out of the group"
        findings.append(Finding("machine", f"{platform}, which the wheels in the bundle are for", here, cure))
    needed = wheelhouse.annotations.get(WHEELS_GLIBC)
    has = machine["libc_version"] if machine["libc"] == "glibc" else ""
    if needed and (not has or _numbers(has) < _numbers(needed)):
        found = f"glibc {has}" if has else f"no glibc ({machine['libc'] or 'another C library'})"
        cure = "build the bundle on a system as old as this host, or serve this host with docker"
        findings.append(
            Finding("C library", f"glibc {needed} or newer, which the wheels in the bundle need", found, cure)
        )
    python = facts["python"]
    if python and python["problem"]:
        findings.append(Finding("python", "", python["problem"], ""))
    return findings


def judge_disk(needs: Needs, facts: Facts, bundle: Bundle, artifacts: Sequence[Artifact]) -> list[Finding]:
    """Whether there is room for the blobs that will be sent and for what will be unpacked from them."""
    contents = facts["contents"]
    wanted = Bundle(bundle.root, list(artifacts)).blobs
    present = [digest for digest, size in wanted.items() if contents["blobs"].get(digest) == size]
    sent = sum(step.travels for step in transfer_plan(wanted, present, contents["partial"]))
    unpacked = 0
    for reference, directories in ((WHEELHOUSE, contents["venvs"]), (LIBRARIES, contents["lib"])):
        artifact = _find(artifacts, reference)
        if artifact is not None and short(artifact.digest) not in directories:
            unpacked += round(unpacked_size(bundle, artifact) * BYTECODE)
    needed, free = sent + unpacked + SLACK if sent + unpacked else 0, facts["place"]["free_bytes"]
    if needed <= free:
        return []
    return [
        Finding(
            "disk",
            f"{size_text(needed)} for {needs.root} ({size_text(sent)} to send, {size_text(unpacked)} to unpack)",
            f"{size_text(free)} free in {facts['place']['existing']}",
            f"free {size_text(needed - free)} there, or choose an xinference_root on a larger disk",
        )
    ]


def unpacked_size(bundle: Bundle, artifact: Artifact) -> int:
    """Bytes of the files in the wheels of an artifact, from their tables of contents; a damaged one counts as is."""
    total = 0
    for file in artifact.files:
        try:
            with zipfile.ZipFile(bundle.blob_path(file.digest)) as archive:
                total += sum(member.file_size for member in archive.infolist())
        except (OSError, zipfile.BadZipFile):
            total += file.size
    return total


def judge_port(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether another program listens where the server shall."""
    return [
        Finding(
            "port",
            f"{needs.address}:{needs.port} free for the server",
            f"{_program(entry)} listens on {entry['address']}:{needs.port}",
            "stop that program, or set xinference_port to a free one",
        )
        for entry in facts["listeners"]
        if not entry["ours"]
    ]


def wanted_gpus(needs: Needs) -> list[str]:
    """The host's GPUs that the inventory names, for the server or for a model, each once."""
    named = [str(gpu).strip() for gpu in needs.gpus]
    for entry in needs.models:
        gpus = entry.get("gpus") if isinstance(entry, Mapping) else None
        named += [str(gpu).strip() for gpu in (gpus if isinstance(gpus, (list, tuple)) else [])]
    return list(dict.fromkeys(named))


def judge_gpus(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether the host has the GPUs that the inventory names."""
    wanted = wanted_gpus(needs)
    if not wanted or facts["gpus"] is None:
        return []
    there = facts["gpus"]["list"]
    known = {str(gpu["index"]) for gpu in there} | {gpu["uuid"].lower() for gpu in there}
    absent = [gpu for gpu in wanted if gpu.lower() not in known]
    if not absent:
        return []
    listed = ", ".join(f"{gpu['index']} ({gpu['name']})" for gpu in there) or "none"
    found = facts["gpus"]["problem"] or f"the host has {listed}"
    cure = "correct xinference_gpus and the models' gpus, or look with nvidia-smi -L why the GPU is gone"
    return [Finding("gpu", f"GPU {', '.join(absent)}, named in the inventory", found, cure)]


def report(host: str, findings: Sequence[Finding]) -> str:
    """All findings of a host as one message."""
    count = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
    lines = [f"{host} is not ready: {count}. Nothing was changed."]
    for number, finding in enumerate(findings, 1):
        details = [("wanted", finding.wanted), ("found", finding.found), ("cure", finding.cure)]
        told = [(label, text) for label, text in details if text]
        if len(told) == 1:
            lines.append(f"{number:>3}. {finding.check}: {told[0][1]}")
            continue
        lines.append(f"{number:>3}. {finding.check}")
        lines += [f"       {label + ':':<8}{text}" for label, text in told]
    return "\n".join(lines)


def _find(artifacts: Iterable[Artifact], reference: tuple[str, str]) -> Artifact | None:
    return next((entry for entry in artifacts if (entry.kind, entry.name) == reference), None)


def _program(entry: Mapping[str, Any]) -> str:
    if entry["pid"] is None:
        return f"a program of user {entry['user']} (not visible without root)"
    program = entry["program"] if len(entry["program"]) <= 80 else entry["program"][:77] + "..."
    return f"{program or 'a program'} (pid {entry['pid']}, user {entry['user']})"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
