# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure shipping to several hosts behind one slow link, and write build/bench/fanout.json.

The hosts are those of the testbed, without engines. The controller is this machine: what it says to the hosts, and they
to it, passes the bridge's own interface, which is shaped to 100 Mbit/s in both directions; what hosts say to each other
passes from port to port of the bridge and is not. Both are checked: a transfer to one host, and one between two hosts,
are measured before anything else. The bytes that leave the controller are those the bridge's interface counted, so
Ansible's own are among them. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "integration")]

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from sites import REPOSITORY, make_bundle, make_model
from testbed.hosts import Host, Testbed
from testbed.spec import HostSpec

REPORT = REPOSITORY / "build" / "bench" / "fanout.json"
NAME = "fanout"
RATE = 100
"""Mbit/s."""
FILES = {f"part-{number:02}.safetensors": 14 * 1024 * 1024 for number in range(9)}
FILES.update(
    {"last.safetensors": 2 * 1024 * 1024 - 20 * 700, **{f"config-{number:02}.json": 700 for number in range(20)}}
)
PROBE = 16 * 1024 * 1024
ROOT = "/opt/xinference"


def run(*command: str, check: bool = True) -> str:
    """Run a program of this machine."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}")
    return done.stdout


class Link:
    """The controller's way to the hosts: the interface of the bridge itself, and a shaped one for what comes in."""

    def __init__(self, network: str) -> None:
        found = json.loads(run("docker", "network", "inspect", network))[0]
        self.bridge = found["Options"].get("com.docker.network.bridge.name") or f"br-{found['Id'][:12]}"
        self.incoming = f"ifb{os.getpid() % 100000}"

    @property
    def sent(self) -> int:
        """Bytes that left this machine for the hosts."""
        return int(Path(f"/sys/class/net/{self.bridge}/statistics/tx_bytes").read_text())

    @contextlib.contextmanager
    def shaped(self) -> Iterator[None]:
        """Let RATE pass in each direction, for as long as the block lasts."""
        bucket = ["tbf", "rate", f"{RATE}mbit", "burst", "256kb", "latency", "100ms"]
        try:
            run("tc", "qdisc", "add", "dev", self.bridge, "root", *bucket)
            run("ip", "link", "add", self.incoming, "type", "ifb")
            run("ip", "link", "set", self.incoming, "up")
            run("tc", "qdisc", "add", "dev", self.incoming, "root", *bucket)
            run("tc", "qdisc", "add", "dev", self.bridge, "ingress")
            everything = ["protocol", "all", "u32", "match", "u32", "0", "0"]
            aside = ["action", "mirred", "egress", "redirect", "dev", self.incoming]
            run("tc", "filter", "add", "dev", self.bridge, "parent", "ffff:", *everything, *aside)
            yield
        finally:
            run("tc", "qdisc", "del", "dev", self.bridge, "ingress", check=False)
            run("tc", "qdisc", "del", "dev", self.bridge, "root", check=False)
            run("ip", "link", "del", self.incoming, check=False)


def mbit(size: int, seconds: float) -> float:
    return 8 * size / seconds / 1e6


def check_link(link: Link, one: Host, other: Host) -> None:
    """See that the link is as slow as it should be, the hosts' is not, and the counter counts the one alone."""
    before, began = link.sent, time.monotonic()
    head = ["head", "-c", str(PROBE), "/dev/urandom"]
    with subprocess.Popen(head, stdout=subprocess.PIPE) as source:
        subprocess.run([*one.ssh_command(), "cat > /dev/null"], stdin=source.stdout, check=True)
    down, counted = mbit(PROBE, time.monotonic() - began), link.sent - before
    before = link.sent
    listen = (
        f"import socket as s;l=s.create_server(('{other.address}',5999));c=l.accept()[0]\nwhile c.recv(1<<16): pass"
    )
    speak = (
        f"import socket as s,time;c=s.create_connection(('{other.address}',5999));b=time.time();"
        f"[c.sendall(bytes(1<<20)) for _ in range({8 * PROBE >> 20})];c.close();print(time.time()-b)"
    )
    with subprocess.Popen(["docker", "exec", other.container, "python3", "-c", listen]) as listener:
        time.sleep(1)
        across = mbit(8 * PROBE, float(one.exec("python3", "-c", speak)))
        listener.wait(30)
    leaked = link.sent - before
    print(f"controller to host: {down:.0f} Mbit/s, {counted} bytes counted for {PROBE}", flush=True)
    print(f"host to host: {across:.0f} Mbit/s, {leaked} bytes counted for {8 * PROBE}", flush=True)
    if not 0.7 * RATE < down < 1.1 * RATE or not PROBE < counted < 1.2 * PROBE:
        raise RuntimeError("The link of the controller is not shaped as it should be.")
    if across < 5 * RATE or leaked > PROBE / 100:
        raise RuntimeError("The hosts' link to each other is not free.")


def playbook(bed: Testbed, place: Path, count: int, *more: str) -> str:
    """Ship to the first hosts; what Ansible says."""
    surroundings = {
        **os.environ,
        "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(place / "cp"),
        "XDG_CACHE_HOME": str(place / "cache"),
    }
    limit = ",".join(list(bed.hosts)[:count])
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    command = [program, "-i", str(bed.inventory), "--limit", limit, "-e", f"@{place / 'variables.json'}", *more]
    done = subprocess.run(
        [*command, str(REPOSITORY / "playbooks/ship.yml")],
        env=surroundings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout)
    return done.stdout


def check_hosts(hosts: List[Host], bundle: Bundle) -> None:
    """See that every host has every blob, bit for bit, and nothing listens there but SSH."""
    names = " ".join(sorted(digest[7:] for digest in bundle.blobs))
    for host in hosts:
        found = host.exec("sh", "-c", f"cd {ROOT}/blobs/sha256 && sha256sum {names} | awk '$1 != $2'")
        if found.strip():
            raise RuntimeError(f"{host.name} has blobs that are not what they are called: {found}")
        sockets = [line.split()[3] for line in host.exec("ss", "-Hltn").splitlines()]
        # The name server is the engine's that runs this host.
        if [name for name in sockets if not name.endswith(":22") and not name.startswith("127.0.0.11:")]:
            raise RuntimeError(f"Something still listens on {host.name}: {sockets}")


def measure(bed: Testbed, link: Link, place: Path, bundle: Bundle, count: int) -> Dict[str, Any]:
    """Ship to `count` hosts that have nothing."""
    hosts = list(bed.hosts.values())[:count]
    for host in hosts:
        host.exec("rm", "-rf", ROOT)
    playbook_started = time.monotonic()
    before = link.sent
    said = playbook(bed, place, count)
    seconds, sent = time.monotonic() - playbook_started, link.sent - before
    print(f"{count} hosts: {seconds:.1f} s, {sent / bundle.size:.2f} bundles from the controller", flush=True)
    check_hosts(hosts, bundle)
    if os.environ.get("BENCH_OUTPUT"):
        print(said, flush=True)
    return {"controller_bytes": sent, "seconds": round(seconds, 2)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs for each number of hosts; the medians are reported")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of hosts")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="bench-fanout-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    bed = Testbed(NAME)
    try:
        model = make_model(place / "model", FILES)
        bundle = Bundle.open(make_bundle(place, {"model": model}))
        variables = {
            "xinference_bundle_dir": str(bundle.root),
            "xinference_models": [{"model_uid": "m", "source": {"path": "model"}}],
        }
        (place / "variables.json").write_text(json.dumps(variables))
        bed.up([HostSpec(f"host-{number}", engine=False, gpus=0) for number in range(1, max(*options.hosts, 2) + 1)])
        link = Link(f"testbed-{NAME}")
        with link.shaped():
            check_link(link, *list(bed.hosts.values())[:2])
            # The bundle is verified once; that is no part of shipping to any number of hosts.
            playbook(bed, place, 1, "--check")
            found: Dict[str, Any] = {}
            for count in options.hosts:
                runs = [measure(bed, link, place, bundle, count) for _run in range(options.runs)]
                found[str(count)] = {
                    "controller_bytes": int(statistics.median(each["controller_bytes"] for each in runs)),
                    "seconds": statistics.median(each["seconds"] for each in runs),
                }
        report = {"bundle_bytes": bundle.size, "hosts": found}
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))
    finally:
        bed.down()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
