# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure ways in which hosts can pass blobs on to each other, and write build/bench/peer_ways.json.

Four hosts of the testbed, from memory to memory. Each way moves one blob of 1 GiB from the first host to the second,
2,000 blobs of 64 KiB likewise, and one of 512 MiB from the first host through the second and third to the fourth. The
times are seconds, medians of `--runs`. The figures stand in docs/shipping.md. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "integration")]

from ansible_collections.airgap.xinference.plugins.plugin_utils.credential import new_credential
from ansible_collections.airgap.xinference.plugins.plugin_utils.program import pack
from sites import REPOSITORY
from testbed.hosts import Host, Testbed
from testbed.spec import HostSpec

REPORT = REPOSITORY / "build" / "bench" / "peer_ways.json"
PLACE = "/memory"
STORE = f"{PLACE}/store"
BLOBS = f"{STORE}/blobs/sha256"
LARGE, CHAINED, SMALL, COUNT = 1024, 512, 64 * 1024, 2000
"""MiB, MiB, bytes, blobs."""
MAKE = f"""
import os, pathlib
place = pathlib.Path("{BLOBS}"); place.mkdir(parents=True)
pathlib.Path("{STORE}/partial").mkdir()
def fill(name, pieces, size):
    with place.joinpath(name).open("wb") as file:
        for _piece in range(pieces): file.write(os.urandom(size))
fill("{"a" * 64}", {LARGE}, 1 << 20)
fill("{"b" * 64}", {CHAINED}, 1 << 20)
for number in range({COUNT}): fill("%064x" % number, 1, {SMALL})
"""
SERVE = f"""
import sys; sys.path.insert(0, "{PLACE}/peer.zip")
from pathlib import Path
from airgap_xinference.bundle.peer import Credential
from airgap_xinference.bundle.peer_process import start
from airgap_xinference.bundle.store import Store
store = Store("{STORE}")
store.receive()
print(start(store, "0123456789abcdef", Credential(Path("{PLACE}/pem").read_text()), sys.argv[1], 5998, 600, 3600).pid)
"""
FETCH = f"""
import sys; sys.path.insert(0, "{PLACE}/peer.zip")
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from airgap_xinference.bundle.peer import Credential, Peer
credential = Credential(Path("{PLACE}/pem").read_text())
address, size, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:] or ["%064x" % number for number in range({COUNT})]
def work(first):
    peer = Peer(address, 5998, credential)
    for name in names[first::4]:
        with open("{STORE}/partial/" + name, "wb", 0) as file:
            for chunk in peer.fetch("sha256:" + name, 0, size): file.write(chunk)
with ThreadPoolExecutor(4) as pool: list(pool.map(work, range(4)))
"""
SSH = "ssh -i /root/.ssh/throwaway -o StrictHostKeyChecking=no -o LogLevel=ERROR"


def shell(host: Host, script: str) -> List[str]:
    return ["docker", "exec", host.container, "bash", "-c", script]


def timed(*commands: List[str]) -> float:
    """Seconds until all of some commands, run side by side, have ended."""
    began = time.monotonic()
    processes = [subprocess.Popen(command) for command in commands]
    for process, command in zip(processes, commands):
        if process.wait(600):
            raise RuntimeError(f"{command} failed")
    return time.monotonic() - began


def python(host: Host, code: str, *arguments: str) -> List[str]:
    return ["docker", "exec", host.container, "python3", "-c", code, *arguments]


def ours(hosts: List[Host]) -> Dict[str, Callable[[], float]]:
    one, two, three, four = hosts
    return {
        "large": lambda: timed(python(two, FETCH, one.address, str(LARGE << 20), "a" * 64)),
        "small": lambda: timed(python(two, FETCH, one.address, str(SMALL))),
        "chain": lambda: timed(
            *(
                python(to, FETCH, source.address, str(CHAINED << 20), "b" * 64)
                for source, to in ((one, two), (two, three), (three, four))
            )
        ),
    }


def rsync(hosts: List[Host]) -> Dict[str, Callable[[], float]]:
    one, two, three, four = hosts

    def get(source: Host, to: Host, pattern: str, place: str) -> List[str]:
        names = f"{source.address}:{place}/"
        return shell(
            to, f"rsync -W --inplace --include='{pattern}' --exclude='*' -r -e '{SSH}' {names} {STORE}/partial/"
        )

    return {
        "large": lambda: timed(get(one, two, "a*", BLOBS)),
        "small": lambda: timed(get(one, two, "0*", BLOBS)),
        # It copies what is there when it comes to a file, so that each host has to wait for the one before.
        "chain": lambda: (
            timed(get(one, two, "b*", BLOBS))
            + timed(get(two, three, "b*", f"{STORE}/partial"))
            + timed(get(three, four, "b*", f"{STORE}/partial"))
        ),
    }


def ssh(hosts: List[Host]) -> Dict[str, Callable[[], float]]:
    one, two, three, four = hosts

    def tail(source: Host, to: Host, place: str) -> List[str]:
        # The file may not be there yet, and grows.
        follow = f"while ! [ -e {place}/{'b' * 64} ]; do sleep 0.02; done; tail -c +1 -f -s 0.02 {place}/{'b' * 64}"
        end = f"head -c {CHAINED << 20} <&3 > {STORE}/partial/{'b' * 64}; kill $!"
        return shell(to, f"exec 3< <({SSH} {source.address} '{follow}'); {end}")

    return {
        "large": lambda: timed(shell(two, f"{SSH} {one.address} cat {BLOBS}/{'a' * 64} > {STORE}/partial/{'a' * 64}")),
        "small": lambda: timed(shell(two, f"{SSH} {one.address} 'cd {BLOBS}; tar c 0*' | tar x -C {STORE}/partial")),
        "chain": lambda: timed(
            tail(one, two, BLOBS), tail(two, three, f"{STORE}/partial"), tail(three, four, f"{STORE}/partial")
        ),
    }


def prepare(hosts: List[Host]) -> None:
    """Blobs on the first host, an empty store on the others; both kinds of keys on all."""
    archive, pem = pack(["bundle.peer_process", "bundle.peer", "bundle.store"]), new_credential()
    for number, host in enumerate(hosts):
        for name, content in (("peer.zip", archive), ("pem", pem.encode())):
            command = ["docker", "exec", "-i", host.container, "sh", "-c", f"umask 077; cat > {PLACE}/{name}"]
            subprocess.run(command, input=content, check=True)
        host.exec(
            "python3", "-c", MAKE if number == 0 else f"import os; os.makedirs('{BLOBS}'); os.mkdir('{STORE}/partial')"
        )
        host.exec("python3", "-c", SERVE, host.address)
    key = hosts[0].exec("sh", "-c", "ssh-keygen -qt ed25519 -N '' -f /root/.ssh/throwaway; cat /root/.ssh/throwaway")
    public = hosts[0].exec("cat", "/root/.ssh/throwaway.pub")
    for host in hosts:
        script = f"umask 077; cat > /root/.ssh/throwaway; echo '{public.strip()}' >> /root/.ssh/authorized_keys"
        subprocess.run(["docker", "exec", "-i", host.container, "sh", "-c", script], input=key.encode(), check=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the medians are reported")
    options = parser.parse_args()
    bed = Testbed("ways")
    try:
        bed.up([HostSpec(f"host-{number}", engine=False, gpus=0) for number in range(1, 5)])
        hosts = list(bed.hosts.values())
        for host in hosts:
            host.exec("sh", "-c", f"mkdir {PLACE} && mount -t tmpfs -o size=3g tmpfs {PLACE}")
        prepare(hosts)
        report: Dict[str, Dict[str, float]] = {}
        for name, way in (("tls", ours(hosts)), ("rsync", rsync(hosts)), ("ssh", ssh(hosts))):
            report[name] = {}
            for case, work in way.items():
                seconds = []
                for _run in range(options.runs):
                    for host in hosts:
                        host.exec("sh", "-c", f"rm -f {STORE}/partial/*")
                    seconds.append(work())
                report[name][case] = round(statistics.median(seconds), 2)
                print(f"{name} {case}: {' '.join(f'{each:.2f}' for each in seconds)} s", flush=True)
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps(report, indent=2) + "\n")
        print(f"on {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}: {json.dumps(report)}")
    finally:
        bed.down()


if __name__ == "__main__":
    main()
