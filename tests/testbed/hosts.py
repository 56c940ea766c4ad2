# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Air-gapped GPU hosts as containers: up, reboot, look inside, down.

A host is a container with its own Docker Engine and SSH server on an internal network: the machine reaches it and its
published ports, and it reaches nothing but the machine and its neighbours. All that belongs to a testbed carries its
name as a label, and everything with the label goes when it is taken down, however far `up` came.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from . import engine, images
from .engine import TestbedError, docker, run, say
from .spec import NAME, HostSpec, gpu_table, inventory, subnets

LABEL = "airgap.xinference.testbed"
READY_LIMIT = 60.0
# What an engine inside a container needs. `--privileged` asks for more than some machines have to give.
CAPABILITIES = (
    *("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "SYS_MODULE", "MKNOD", "SYS_CHROOT", "SETPCAP", "AUDIT_WRITE"),
    *("NET_RAW", "DAC_READ_SEARCH", "LINUX_IMMUTABLE", "IPC_LOCK", "SYS_NICE"),
)
REQUESTS = "/var/log/simulated-gpus.jsonl"
LOST = "/usr/local/share/simulated-gpus/lost"


@dataclass(frozen=True)
class Host:
    """One running (or stopped) host of a testbed."""

    testbed: str
    spec: HostSpec
    address: str
    directory: Path

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def container(self) -> str:
        return f"testbed-{self.testbed}-{self.name}"

    def exec(self, *command: str, check: bool = True, timeout: float = 300) -> str:
        """Run a command as root on the host, not over SSH; returns its standard output. Raises TestbedError."""
        return docker("exec", self.container, *command, check=check, timeout=timeout)

    def docker(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        """Call the host's own engine."""
        return self.exec("docker", *arguments, check=check, timeout=timeout)

    def ssh_command(self, user: Optional[str] = None) -> List[str]:
        """The ssh command line that logs in; a command to run there may be added."""
        options = [f"UserKnownHostsFile={self.directory / 'known_hosts'}", "StrictHostKeyChecking=yes", "BatchMode=yes"]
        flags = [part for option in options for part in ("-o", option)]
        key = str(self.directory / "id_ed25519")
        return ["ssh", "-F", "none", "-i", key, *flags, f"{user or self.spec.login}@{self.address}"]

    def ssh(self, command: str, *, user: Optional[str] = None, check: bool = True, timeout: float = 300) -> str:
        """Run a command on the host as Ansible would: over SSH; returns its standard output. Raises TestbedError."""
        return run([*self.ssh_command(user), command], check=check, timeout=timeout)

    def gpu_requests(self) -> List[Dict[str, Any]]:
        """Every device request that the nvidia hook of this host got, oldest first."""
        text = self.exec("sh", "-c", f"cat {REQUESTS} 2>/dev/null || true")
        return [json.loads(line) for line in text.splitlines()]

    def give_image(self, reference: str) -> None:
        """Load an image of the machine's engine into the host's, past everything that is being tested."""
        pipe = "docker --host unix://{0} save {1} | docker --host unix://{0} exec -i {2} docker load --quiet"
        run(["bash", "-o", "pipefail", "-c", pipe.format(engine.SOCKET, reference, self.container)])

    def lose_gpus(self, container: str) -> None:
        """Take the GPUs from a running container, as `systemctl daemon-reload` can; its next start has them again."""
        # From outside, because a server cannot write its own files.
        place = self.docker("inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", container).strip()
        self.exec("touch", f"{place}{LOST}")

    def stop(self) -> None:
        """Shut the host down."""
        docker("stop", "-t", "60", self.container)

    def kill(self) -> None:
        """Cut the host's power."""
        docker("kill", self.container)

    def start(self) -> None:
        """Switch the host on and wait until it is ready."""
        docker("start", self.container)
        self.wait()

    def reboot(self) -> None:
        """Shut down, switch on, wait until it is ready."""
        self.stop()
        self.start()

    def wait(self) -> None:
        """Wait until SSH answers, and Docker if the host has it running. Raises TestbedError after READY_LIMIT."""
        deadline = time.monotonic() + READY_LIMIT
        while True:
            waiting = self._waiting_for()
            if waiting is None:
                return
            if time.monotonic() > deadline:
                said = docker("logs", "--tail", "15", self.container, check=False)
                log = self.exec("tail", "-n", "15", "/var/log/docker.log", check=False)
                raise TestbedError(f"{self.name}: no {waiting} after {READY_LIMIT:.0f} s\n{said}\n{log}")
            time.sleep(0.2)

    def _waiting_for(self) -> Optional[str]:
        try:
            with socket.create_connection((self.address, 22), timeout=2) as connection:
                if not connection.recv(64).startswith(b"SSH-"):
                    return "SSH"
        except OSError:
            return "SSH"
        if self.spec.engine and not self.docker("version", "--format", "{{.Server.Version}}", check=False).strip():
            return "Docker"
        return None


class Testbed:
    """Hosts under one name. Several testbeds may stand side by side; a second `up` of a name replaces the first."""

    __test__ = False  # or pytest takes it for a test

    def __init__(self, name: str, directory: Optional[Path] = None) -> None:
        """`directory` gets the key, known_hosts and inventory/hosts.yml; by default it lies in the cache."""
        if not NAME.fullmatch(name):
            raise TestbedError(f"{name!r} is no name for a testbed (a-z, 0-9 and -, at most 32 characters)")
        self.name = name
        self._given = directory is not None
        self.directory = (directory or engine.cache() / "beds" / name).absolute()
        self.hosts: Dict[str, Host] = {}

    @property
    def inventory(self) -> Path:
        """Ansible's inventory of the hosts."""
        return self.directory / "inventory" / "hosts.yml"

    def up(self, specs: Sequence[HostSpec]) -> Dict[str, Host]:
        """Bring the hosts up and wait until they are ready. Nothing stays when that fails."""
        engine.ensure()
        image = images.host()
        self.down()
        try:
            return self._up(specs, image)
        except BaseException:
            self.down()
            raise

    def _up(self, specs: Sequence[HostSpec], image: str) -> Dict[str, Host]:
        say(f"Bringing up testbed {self.name}: {', '.join(spec.name for spec in specs)} ...")
        self.inventory.parent.mkdir(parents=True, exist_ok=True)
        key = self.directory / "id_ed25519"
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"testbed {self.name}", "-f", str(key)])
        prefix = self._network().rpartition(".")[0]
        if any(spec.internet for spec in specs):
            # Not Docker's own bridge, which another engine on this machine may have taken away.
            docker("network", "create", "--label", f"{LABEL}={self.name}", f"testbed-{self.name}-out")
        for number, spec in enumerate(specs):
            # .1 is the machine itself. Fixed addresses, because a host keeps its own over a reboot.
            host = Host(self.name, spec, f"{prefix}.{number + 10}", self.directory)
            self._create(host, image, key.with_suffix(".pub").read_text().strip())
            self.hosts[spec.name] = host
        for host in self.hosts.values():
            host.wait()
        keys = [f"{host.address} {_host_key(host)}\n" for host in self.hosts.values()]
        (self.directory / "known_hosts").write_text("".join(keys))
        pairs = [(host.spec, host.address) for host in self.hosts.values()]
        self.inventory.write_text(inventory(pairs, str(key), str(self.directory / "known_hosts")))
        state = {host.name: {**vars(host.spec), "address": host.address} for host in self.hosts.values()}
        (self.directory / "testbed.json").write_text(json.dumps(state, indent=2) + "\n")
        return self.hosts

    def load(self) -> Dict[str, Host]:
        """The hosts of a testbed that another process brought up. Raises TestbedError when there is none."""
        path = self.directory / "testbed.json"
        if not path.exists():
            raise TestbedError(f"There is no testbed {self.name} in {self.directory}; bring it up first.")
        self.hosts = {}
        for name, entry in json.loads(path.read_text()).items():
            address = entry.pop("address")
            self.hosts[name] = Host(self.name, HostSpec(**entry), address, self.directory)
        return self.hosts

    def down(self) -> None:
        """Remove every trace of the testbed. Does nothing when there is none."""
        if (self.directory / "testbed.json").exists():
            engine.start()  # or its containers would stay in the engine's data
        if engine.answers():
            mine = ["--filter", f"label={LABEL}={self.name}"]
            containers = docker("ps", "--all", "--quiet", *mine).split()
            if containers:
                docker("rm", "--force", "--volumes", *containers)
            for kind in ("volume", "network"):
                names = docker(kind, "ls", "--quiet", *mine).split()
                if names:
                    docker(kind, "rm", *names)
        for cgroup in list(self._cgroups()):
            _remove_cgroup(cgroup)
        for name in ("id_ed25519", "id_ed25519.pub", "known_hosts", "testbed.json", "inventory/hosts.yml"):
            (self.directory / name).unlink(missing_ok=True)
        # In a directory of someone else's there may be other files, for example molecule's.
        for directory in (self.inventory.parent, *([] if self._given else [self.directory])):
            with contextlib.suppress(OSError):
                directory.rmdir()
        self.hosts = {}

    def _network(self) -> str:
        """Make the internal network and return its subnet."""
        fault = ""
        for subnet in subnets(self.name):
            network = ["--internal", "--subnet", subnet, "--label", f"{LABEL}={self.name}", f"testbed-{self.name}"]
            try:
                docker("network", "create", *network)
                return subnet
            except TestbedError as error:
                fault = str(error)
                if "overlap" not in fault.lower():
                    raise
        raise TestbedError(f"No network is free for testbed {self.name}: {fault}")

    def _create(self, host: Host, image: str, public_key: str) -> None:
        spec = host.spec
        label = ["--label", f"{LABEL}={self.name}"]
        settings = {
            "AUTHORIZED_KEY": public_key,
            "COMPOSE": spec.compose,
            "NVIDIA": "yes" if spec.nvidia else "no",
            "GPUS": gpu_table(self.name, spec),
            "ENGINE": "yes" if spec.engine else "no",
            "INTERNET": "yes" if spec.internet else "no",
            "CGROUP": f"/{host.container}",
        }
        arguments = ["--name", host.container, "--hostname", spec.name, *label]
        arguments += ["--network", f"testbed-{self.name}", "--ip", host.address]
        for capability in CAPABILITIES:
            arguments += ["--cap-add", capability]
        for option in ("seccomp=unconfined", "apparmor=unconfined", "systempaths=unconfined"):
            arguments += ["--security-opt", option]
        arguments += ["--device-cgroup-rule", "a *:* rwm"]
        arguments += ["--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--cgroupns", "host", "--tmpfs", "/run"]
        if spec.engine_disk:
            arguments += ["--tmpfs", f"/var/lib/docker:exec,dev,suid,size={spec.engine_disk}"]
        else:
            docker("volume", "create", *label, host.container)
            arguments += ["--volume", f"{host.container}:/var/lib/docker"]
        if spec.disk:
            arguments += ["--tmpfs", f"/opt:exec,mode=755,size={spec.disk}"]
        for key, value in settings.items():
            arguments += ["--env", f"TESTBED_{key}={value}"]
        docker("create", *arguments, image)
        if spec.internet:
            docker("network", "connect", f"testbed-{self.name}-out", host.container)
        docker("start", host.container)

    def _cgroups(self) -> Iterator[Path]:
        """What engines of this testbed's hosts left in the machine's cgroup tree."""
        # Not those of a testbed whose name begins like this one's.
        others = {f"testbed-{name}-{host['host']}" for name, host in _containers()}
        top = Path("/sys/fs/cgroup")
        for parent in (top, *top.glob("*/")):
            for entry in parent.glob(f"testbed-{self.name}-*/"):
                if entry.name not in others:
                    yield entry


def _host_key(host: Host) -> str:
    return " ".join(host.exec("cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()[:2])


def _remove_cgroup(top: Path) -> None:
    """Remove a cgroup and those below it; one that still has processes stays."""
    for entry in sorted(top.glob("**/"), key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            entry.rmdir()


def _containers() -> Iterator[Any]:
    """(testbed, its host's name, state and status) of every container with the label."""
    if not engine.answers():
        return
    form = f'{{{{.Label "{LABEL}"}}}}\t{{{{.Names}}}}\t{{{{.State}}}}\t{{{{.Status}}}}'
    for line in docker("ps", "--all", "--filter", f"label={LABEL}", "--format", form).splitlines():
        name, container, state, status = line.split("\t")
        yield name, {"host": container[len(f"testbed-{name}-") :], "state": state, "status": status}


def standing() -> Dict[str, List[Dict[str, str]]]:
    """Testbeds on this machine: name -> its hosts with their container's state."""
    found: Dict[str, List[Dict[str, str]]] = {}
    for name, host in _containers():
        found.setdefault(name, []).append(host)
    return found
