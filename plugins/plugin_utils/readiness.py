# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judging whether a host can be served from a bundle: facts in, findings out. Nothing here touches a host.

Each function looks at one thing and returns every problem it sees with it, so that they can be reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.alternatives import choices
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import WHEELS_GLIBC, WHEELS_PLATFORM
from ansible_collections.airgap.xinference.plugins.module_utils.host.ports import is_address
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError, parse

from .bundles import WHEELHOUSE
from .findings import WARNING, Facts, Finding, Needs
from .readiness_disk import judge_disk
from .readiness_docker import judge_docker
from .readiness_system import judge_system

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOGINS = {"missing": "a name or a password is missing", "short": "the password has less than 8 characters"}


def with_files(registrations: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the custom models whose definition says where their files are, so that entries need no source."""
    found = []
    for registration in registrations:
        definition = registration.get("definition")
        if isinstance(definition, Mapping):
            specs = [spec for spec in definition.get("model_specs") or [] if isinstance(spec, Mapping)]
            if any(part.get("model_uri") for part in (definition, *specs)):
                found.append(str(definition.get("model_name", "")))
    return found


def judge_models(needs: Needs, bundle: Bundle | None) -> list[Finding]:
    """Model entries that cannot be launched; with a bundle also those whose model is not in it."""
    paths = None
    if bundle is not None:
        paths = {entry.name: entry.name for entry in bundle.artifacts if entry.kind == "models"}
    try:
        parse(needs.models, needs.gpus, paths, needs.registrations)
    except SpecError as error:
        return [Finding("models", "", problem, "") for problem in error.problems]
    return []


def judge_access(needs: Needs) -> list[Finding]:
    """Whether the server would be open to everyone who reaches its port, or closed to its own administrator."""
    findings = []
    if not needs.open_allowed and needs.address not in LOOPBACK:
        cure = "set xinference_auth: true, listen on 127.0.0.1, or say xinference_server_allow_open: true"
        found = f"{needs.address}:{needs.port} open to everyone who reaches it"
        findings.append(
            Finding("access", "a server that asks who is there, or is reached from its host only", found, cure)
        )
    if needs.backend == "native" and needs.address not in LOOPBACK:
        found = f"the server's processes talk to each other on ports of {needs.address}, and "
        found += "ask nobody who is there without xinference_auth, or with an xoscar older than 0.12"
        cure = "let it listen on 127.0.0.1 behind a gateway, or let a firewall pass nothing but its port"
        findings.append(Finding("access", "", found, cure, WARNING))
    if needs.login:
        cure = "set xinference_username and xinference_password, best from a vault"
        findings.append(
            Finding("access", "an administrator for a server with authentication", LOGINS[needs.login], cure)
        )
    return findings


def judge_host(needs: Needs, facts: Facts, bundle: Bundle | None, artifacts: Sequence[Artifact]) -> list[Finding]:
    """Everything that is wrong with the host itself; `artifacts` are those it needs of the bundle."""
    return [
        *judge_place(needs, facts),
        *judge_wheels(facts, artifacts),
        *(judge_docker(needs, facts, bundle, bool(wanted_gpus(needs))) if needs.backend == "docker" else []),
        *(judge_disk(needs, facts, bundle, artifacts) if bundle is not None else []),
        *judge_signatures(facts),
        *judge_address(needs, facts),
        *judge_port(needs, facts),
        *judge_gpus(needs, facts),
        *judge_system(needs, facts, artifacts),
    ]


def judge_place(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether the root directory can be written and programs in it can be run."""
    place, user = facts["place"], facts["machine"]["user"]
    wanted = f"a directory {needs.root} that {user} can write"
    if not needs.root.startswith("/"):
        # The same path is given to services, containers and PYTHONPATH, which know neither ~ nor a current directory.
        cure = "write xinference_root with a slash at the start"
        return [Finding("root directory", "an absolute path", needs.root or "nothing", cure)]
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
    if place["foreign"]:
        # Shipping would write there, and a teardown would remove it.
        found = f"{', '.join(place['foreign'])} there already, and not from here"
        cure = f"choose a directory of its own for xinference_root, such as {needs.root.rstrip('/')}/xinference"
        findings.append(Finding("root directory", f"nobody else's files in {needs.root}", found, cure))
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


def judge_signatures(facts: Facts) -> list[Finding]:
    """Whether the host can see for itself who signed the bundle, where it has to."""
    found = facts.get("signatures") or ""
    cure = "do that, or have this host go by the controller's check alone: xinference_bundle_signers_on_host: false"
    return [Finding("signature", "an OpenSSH on the host that can check signatures", found, cure)] if found else []


def judge_address(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether address and port are such that a server of this host can have them."""
    findings = []
    if not 0 < needs.port < 65536:
        findings.append(Finding("port", "a port from 1 to 65535", str(needs.port), "correct xinference_port"))
    if needs.backend == "docker" and needs.address != "localhost" and not is_address(needs.address):
        wanted = "an IP address of the host (0.0.0.0 for all), or localhost"
        cure = "set xinference_host to one; the Docker Engine would take a name for all addresses"
        findings.append(Finding("address", wanted, needs.address, cure))
    elif facts.get("address_problem"):
        cure = "correct xinference_host; `ip address` on the host lists what it has"
        findings.append(Finding("address", f"{needs.address} on the host", str(facts["address_problem"]), cure))
    return findings


def judge_port(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether another program listens where the server shall, or another container has the port."""
    publishers = (facts.get("engine") or {}).get("publishers") or []
    ours = any(container["ours"] for container in publishers)
    taken = [
        f"the container {one['name']} ({one['image']}) publishes port {needs.port}"
        for one in publishers
        if not one["ours"]
    ]
    taken += [
        f"{_program(entry)} listens on {entry['address']}:{needs.port}"
        for entry in facts["listeners"]
        if not entry["ours"] and not (publishers and _forwards(entry, bool(ours)))
    ]
    cure = "stop that program, or set xinference_port to a free one"
    wanted = f"{needs.address}:{needs.port} free for the server"
    return [Finding("port", wanted, found, cure) for found in taken]


def _forwards(entry: Mapping[str, Any], ours: bool) -> bool:
    """Whether a listener only passes on to a container, which then is judged itself. Only root sees who listens."""
    if entry["pid"] is None:
        return ours and entry["user"] in ("root", "0")
    return "docker-proxy" in str(entry["program"]).partition(" ")[0]


def wanted_gpus(needs: Needs) -> list[str]:
    """The host's GPUs that the inventory names, for the server or for a model, each once."""
    named = [str(gpu).strip() for gpu in needs.gpus]
    for entry in (choice for one in needs.models if isinstance(one, Mapping) for choice in choices(one)):
        gpus = entry.get("gpus")
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


def _find(artifacts: Iterable[Artifact], reference: tuple[str, str]) -> Artifact | None:
    return next((entry for entry in artifacts if (entry.kind, entry.name) == reference), None)


def _program(entry: Mapping[str, Any]) -> str:
    if entry["pid"] is None:
        return f"a program of user {entry['user']} (not visible without root)"
    program = entry["program"] if len(entry["program"]) <= 80 else entry["program"][:77] + "..."
    return f"{program or 'a program'} (pid {entry['pid']}, user {entry['user']})"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
