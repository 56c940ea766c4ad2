# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What to bring up: the description of one testbed host and of its simulated GPUs. Pure; nothing is started here."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, fields
from typing import Any, Dict, List, Sequence, Tuple

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
SIZE = re.compile(r"[1-9][0-9]*[kmg]")
LOGINS = ("root", "deploy", "plain")
COMPOSE = ("v2", "v1", "none")
TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


class SpecError(Exception):
    """A description of a host that cannot be brought up; the text names every fault."""


@dataclass(frozen=True)
class HostSpec:
    """One host. On the command line `NAME:KEY=VALUE,...`, for example `gpu-1:gpus=4,login=deploy`."""

    name: str
    # Who logs in by Ansible's inventory: root, deploy (sudo without password), plain (no sudo).
    # All three take the key.
    login: str = "root"
    # Simulated GPUs, the MiB of each, the MiB in use on each, and the driver that they report.
    gpus: int = 2
    gpu_memory: int = 24564
    gpu_used: int = 1
    driver: str = "580.65.06"
    cuda: str = "13.0"
    # Whether the engine takes nvidia device requests.
    nvidia: bool = True
    # v2: the plugin; v1: a stub of the old program; none: neither.
    compose: str = "v2"
    # Whether Docker is started.
    engine: bool = True
    # Whether there is a way out; such a host is not air-gapped.
    internet: bool = False
    # Size of /opt and of the engine's data, for example 300m; held in memory and lost at a reboot. Empty: no limit.
    disk: str = ""
    engine_disk: str = ""

    def __post_init__(self) -> None:
        faults = []
        if not NAME.fullmatch(self.name):
            faults.append(f"{self.name!r} is no host name (a-z, 0-9 and -, at most 32 characters)")
        if self.login not in LOGINS:
            faults.append(f"login is {self.login!r} and not one of {', '.join(LOGINS)}")
        if self.compose not in COMPOSE:
            faults.append(f"compose is {self.compose!r} and not one of {', '.join(COMPOSE)}")
        if not 0 <= self.gpus <= 16:
            faults.append(f"gpus is {self.gpus} and not between 0 and 16")
        if not 0 <= self.gpu_used <= self.gpu_memory:
            faults.append(f"gpu_used is {self.gpu_used} and not between 0 and gpu_memory, {self.gpu_memory}")
        for key in ("disk", "engine_disk"):
            value = getattr(self, key)
            if value and not SIZE.fullmatch(value):
                faults.append(f"{key} is {value!r} and not a size such as 300m or 2g")
        if faults:
            raise SpecError(f"host {self.name!r}: {'; '.join(faults)}")

    @classmethod
    def parse(cls, text: str) -> HostSpec:
        """The host that `NAME:KEY=VALUE,...` describes. Raises SpecError."""
        name, *rest = text.split(":", 1)
        kinds: Dict[str, Any] = {field.name: type(field.default) for field in fields(cls) if field.name != "name"}
        values: Dict[str, Any] = {}
        faults = []
        for setting in filter(None, ",".join(rest).split(",")):
            key, value = setting.partition("=")[::2]
            if key not in kinds:
                faults.append(f"{key!r} is not one of {', '.join(kinds)}")
            elif kinds[key] is bool and value not in TRUTH:
                faults.append(f"{key} is {value!r} and neither yes nor no")
            elif kinds[key] is int and not value.isdigit():
                faults.append(f"{key} is {value!r} and not a number")
            else:
                values[key] = TRUTH[value] if kinds[key] is bool else kinds[key](value)
        if faults:
            raise SpecError(f"host {text!r}: {'; '.join(faults)}")
        return cls(name, **values)


def parse_hosts(texts: Sequence[str]) -> List[HostSpec]:
    """The hosts of a command line. Raises SpecError, also for a name given twice."""
    hosts = [HostSpec.parse(text) for text in texts]
    names = [host.name for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"named more than once: {', '.join(twice)}")
    return hosts


def gpu_uuid(testbed: str, host: str, index: int) -> str:
    """UUID of a simulated GPU: the same every time, and another one on every host."""
    digest = hashlib.sha256(f"{testbed}/{host}/{index}".encode()).hexdigest()
    return f"GPU-{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"


def gpu_table(testbed: str, spec: HostSpec) -> str:
    """The table that the stubs of nvidia-smi and of the hook read: a line a GPU, fields parted by `|`."""
    lines = []
    for index in range(spec.gpus):
        uuid = gpu_uuid(testbed, spec.name, index)
        values = (index, uuid, "NVIDIA Simulated GPU", spec.gpu_memory, spec.gpu_used, spec.driver, spec.cuda)
        lines.append("|".join(map(str, values)))
    return "\n".join(lines)


def subnets(testbed: str) -> List[str]:
    """Networks to try for a testbed, in order; where the order starts depends on the name, to collide seldom."""
    first = int(hashlib.sha256(testbed.encode()).hexdigest()[:4], 16) % 250
    return [f"10.213.{(first + step) % 250}.0/24" for step in range(250)]


def inventory(hosts: Sequence[Tuple[HostSpec, str]], key: str, known_hosts: str) -> str:
    """Ansible's inventory (YAML) of (host, address) pairs, all in group `xinference`."""
    lines = [
        "# Written by tests/testbed; gone when the testbed is taken down.",
        "xinference:",
        "  vars:",
        f"    ansible_ssh_private_key_file: {key}",
        f"    ansible_ssh_common_args: -o UserKnownHostsFile={known_hosts} -o StrictHostKeyChecking=yes",
        "    ansible_python_interpreter: /usr/bin/python3",
        "  hosts:",
    ]
    for spec, address in hosts:
        lines += [f"    {spec.name}:", f"      ansible_host: {address}", f"      ansible_user: {spec.login}"]
        if spec.login == "deploy":
            lines.append("      ansible_become: true")
    return "\n".join(lines) + "\n"
