# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure shipping beside what people would use instead, and write build/bench/ship.json.

2 GiB of random bytes, once in one file (`large`) and once in 2,000 files (`many`), go over SSH from this machine to a
host of the testbed on it. The ways, which take turns:

`ssh_cat`       plain OpenSSH: `ssh host 'cat > file' < file`; for many files one call for each, over a shared
                connection (ControlMaster), as a shell loop would do it
`rsync`         `rsync -W --inplace` (`-r` for many files) over SSH
`ansible_copy`  the task `ansible.builtin.copy`, with the ansible.cfg of this project (pipelining); a directory for many
`ours`          the task xinference_ship; the host has verified everything when it ends

Of the first two the whole command counts, of the others the task, as Ansible's own junit callback measures it: making
the connection is part of it, starting ansible-playbook is not (`..._playbook_s` has that, too). The bundle was verified
on the controller before, which is done once for all hosts (`bundle_verification`). Before every run the files were read
(page cache), what the way before had brought is gone from the host, and nothing waits to be written to the disk. A way
that takes more than two minutes is taken once. After each run of ours comes a second one (`second_run`, the slower of
the two bundles).

`memory` is the most that processes have while one sparse file of 8 GiB is shipped: VmHWM of each, and the sum of all
of one side at a time (Pss, which counts a page that several have once). `--memory` measures this alone.

Needs root, and installs rsync where it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "integration")]

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from sites import REPOSITORY, make_bundle
from testbed.engine import docker
from testbed.hosts import Host, Testbed
from testbed.spec import HostSpec

REPORT = REPOSITORY / "build" / "bench" / "ship.json"
NAME = "bench-ship"
TOTAL = 2 * 1024**3
COUNTS = {"large": 1, "many": 2000}
HOLLOW = 8 * 1024**3
LONG_S = 120.0
"""A way that takes longer is taken once."""
MEMORY_LIMIT_MIB = 200
TARGET, ROOT = "/opt/target", "/opt/xinference"


class Took(NamedTuple):
    """Seconds that a way took; `playbook` with everything around the task."""

    seconds: float
    playbook: Optional[float] = None


@dataclass(frozen=True)
class Load:
    """What is shipped: the files of a directory, and a bundle of them (which has the same files, by hard links)."""

    name: str
    directory: Path
    bundle: Bundle

    @property
    def files(self) -> List[Path]:
        return sorted(self.directory.iterdir())


def make_load(place: Path, name: str, total: int) -> Load:
    """Random bytes in as many files as this load has."""
    directory = place / name / "model"
    directory.mkdir(parents=True)
    count = COUNTS[name]
    for number in range(count):
        left = total // count + (number < total % count)
        with (directory / f"{number:04}.bin").open("wb") as file:
            while left:
                left -= file.write(os.urandom(min(left, 1 << 20)))
    return Load(name, directory, Bundle.open(make_bundle(place / name, {"model": directory})))


class Bench:
    """The ways to a host."""

    def __init__(self, place: Path, host: Host, inventory: Path) -> None:
        self.place, self.host, self.inventory = place, host, inventory
        self.ways: Dict[str, Callable[[Load], Took]] = {
            "ssh_cat": self.ssh_cat,
            "rsync": self.rsync,
            "ansible_copy": self.ansible_copy,
            "ours": self.ours,
        }
        self.result: Dict[str, Any] = {}

    def measure(self, way: str, load: Load) -> Took:
        """Take one way to a host that has nothing."""
        self.host.exec("rm", "-rf", TARGET, ROOT)
        self.host.exec("mkdir", TARGET)
        subprocess.run(["cat", *map(str, load.files)], stdout=subprocess.DEVNULL, check=True)
        os.sync()
        took = self.ways[way](load)
        if way != "ours":
            sizes = [int(size) for size in self.host.exec("find", TARGET, "-type", "f", "-printf", "%s ").split()]
            if sorted(sizes) != sorted(path.stat().st_size for path in load.files):
                raise RuntimeError(f"{way} did not bring everything")
        return took

    def ssh_cat(self, load: Load) -> Took:
        """One call of ssh for each file."""
        ssh = self.host.ssh_command()
        if len(load.files) > 1:
            shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={self.place}/mux", "-o", "ControlPersist=60"]
            ssh[1:1] = shared
        began = time.monotonic()
        for path in load.files:
            with path.open("rb") as file:
                subprocess.run([*ssh, f"cat > {TARGET}/{path.name}"], stdin=file, check=True)
        took = Took(time.monotonic() - began)
        if len(load.files) > 1:
            subprocess.run([*ssh[:-1], "-O", "exit", ssh[-1]], stderr=subprocess.DEVNULL, check=True)
        return took

    def rsync(self, load: Load) -> Took:
        """One call of rsync."""
        *ssh, login = self.host.ssh_command()
        what = ["-r", f"{load.directory}/"] if len(load.files) > 1 else [str(load.files[0])]
        began = time.monotonic()
        command = ["rsync", "-W", "--inplace", "-e", shlex.join(ssh), *what, f"{login}:{TARGET}/"]
        subprocess.run(command, check=True)
        return Took(time.monotonic() - began)

    def ansible_copy(self, load: Load) -> Took:
        """The task everybody begins with."""
        source = f"{load.directory}/" if len(load.files) > 1 else str(load.files[0])
        return self.task("ansible.builtin.copy", {"src": source, "dest": f"{TARGET}/"})

    def ours(self, load: Load) -> Took:
        """The task of this collection."""
        took = self.task("airgap.xinference.xinference_ship", self.options(load))
        if not self.result["changed"] or self.result["transports"] != ["stream"]:
            raise RuntimeError(f"not what is to be measured: {self.result}")
        return took

    def options(self, load: Load) -> Dict[str, Any]:
        return {"bundle": str(load.bundle.root), "root": ROOT, "models": [{"source": {"path": "model"}}]}

    def task(self, action: str, options: Dict[str, Any], *arguments: str) -> Took:
        """A playbook of one task; its result is in `result` afterwards."""
        kept, measured = self.place / "result.json", self.place / "junit"
        keep = {"content": "{{ out | to_json }}", "dest": str(kept), "mode": "0600"}
        tasks = [
            {"name": "measured", action: options, "register": "out"},
            {
                "ansible.builtin.copy": keep,
                "delegate_to": "localhost",
                "connection": "local",
                "check_mode": False,
            },
        ]
        (self.place / "play.json").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
        surroundings = {
            **os.environ,
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / "build/collections"),
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.builtin.junit",
            "JUNIT_OUTPUT_DIR": str(measured),
            "JUNIT_HIDE_TASK_ARGUMENTS": "true",
            "XDG_CACHE_HOME": str(self.place / "cache"),
            # A directory of its own: the connection is made anew.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": tempfile.mkdtemp(prefix="cp", dir=self.place),
        }
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        command = [program, "-i", str(self.inventory), str(self.place / "play.json"), *arguments]
        began = time.monotonic()
        done = subprocess.run(
            command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        playbook = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(done.stdout)
        self.result = json.loads(kept.read_text())
        report = next(measured.iterdir())
        cases = ElementTree.parse(report).iter("testcase")
        seconds = next(float(case.attrib["time"]) for case in cases if case.attrib["name"].endswith(": measured"))
        report.unlink()
        return Took(seconds, playbook)

    def second(self, load: Load) -> Dict[str, Any]:
        """Ship once more what is there."""
        took = self.task("airgap.xinference.xinference_ship", self.options(load))
        return {
            "hashed_bytes": self.result["hashed_bytes"],
            "sent_bytes": self.result["sent_bytes"],
            "seconds": round(took.seconds, 2),
            "playbook_s": round(took.playbook or 0.0, 2),
        }

    def verify_bundle(self, load: Load) -> Dict[str, Any]:
        """Have the controller read all of the bundle, as it does before it ships a copied one for the first time."""
        options = {**self.options(load), "deep_bundle": True}
        took = self.task("airgap.xinference.xinference_ship", options, "--check")
        return {"hashed_bytes": self.result["hashed_bytes"], "seconds": round(took.seconds, 2)}

    def check(self, load: Load) -> None:
        """See that the host has every blob, bit for bit, and the tree every file."""
        names = [digest.partition(":")[2] for digest in load.bundle.blobs]
        text = "".join(f"{name}  {ROOT}/blobs/sha256/{name}\n" for name in names)
        docker("exec", "-i", self.host.container, "sha256sum", "--check", "--quiet", "--strict", "-", text=text)
        tree = self.result["artifacts"]["models"]["model"]["path"]
        if len(self.host.exec("ls", tree).split()) != len(load.files):
            raise RuntimeError(f"{tree} is not complete")


# --- memory -----------------------------------------------------------------------------------------------------------


class Memory(threading.Thread):
    """Looks at processes of two sides: what descends from this process, and what is in the container of a host."""

    def __init__(self, host: Host) -> None:
        super().__init__(daemon=True)
        self._container = docker("inspect", "--format", "{{.Id}}", host.container).strip().encode()
        self._done = threading.Event()
        self.peaks: Dict[str, Dict[str, float]] = {"controller": {}, "host": {}}
        self.totals = {"controller": 0.0, "host": 0.0}

    def run(self) -> None:
        while not self._done.wait(0.2):
            self._look()

    def stop(self) -> None:
        """Look no more."""
        self._done.set()
        self.join()

    def _look(self) -> None:
        parents, hosts = {}, []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if self._container in (path / "cgroup").read_bytes():
                    hosts.append(int(path.name))
        mine = [os.getpid()]
        for one in mine:
            mine += [child for child, parent in parents.items() if parent == one]
        for side, pids in (("controller", mine[1:]), ("host", hosts)):
            total = 0.0
            for pid in pids:
                name, peak, share = _memory_of(pid)
                total += share
                if peak:
                    self.peaks[side][name] = max(peak, self.peaks[side].get(name, 0.0))
            self.totals[side] = max(self.totals[side], total)


def _memory_of(pid: int) -> tuple[str, float, float]:
    """What a process is, the most memory it ever had, and its share now, in MiB; nothing when it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        status, rollup = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
    except OSError:
        return "", 0.0, 0.0
    name = Path(words[0].partition(":")[0]).name
    if any("exec(eval(" in word for word in words) and name != "ssh":
        name = "receiver"
    elif any(word.endswith("ansible-playbook") for word in words):
        name = "ansible-playbook"
    found = {}
    for line in (status + rollup).splitlines():
        key, _colon, rest = line.partition(":")
        if key in ("VmHWM", "Pss"):
            found[key] = int(rest.split()[0]) / 1024
    return name, found.get("VmHWM", 0.0), found.get("Pss", 0.0)


def measure_memory(bench: Bench, size: int) -> Dict[str, Any]:
    """Ship one sparse file and watch."""
    directory = bench.place / "hollow" / "model"
    directory.mkdir(parents=True)
    with (directory / "hollow.bin").open("wb") as file:
        file.truncate(size)
    print(f"Making a bundle of a sparse file of {size >> 20} MiB ...", flush=True)
    load = Load("hollow", directory, Bundle.open(make_bundle(directory.parent, {"model": directory})))
    bench.host.exec("rm", "-rf", ROOT)
    memory = Memory(bench.host)
    memory.start()
    began = time.monotonic()
    try:
        # The controller reads it all, too.
        bench.task("airgap.xinference.xinference_ship", {**bench.options(load), "deep_bundle": True})
    finally:
        memory.stop()
    bench.host.exec("rm", "-rf", ROOT)
    if "receiver" not in memory.peaks["host"] or "ansible-playbook" not in memory.peaks["controller"]:
        raise RuntimeError(f"not everybody was seen: {memory.peaks}")
    return {
        "blob_bytes": size,
        "seconds": round(time.monotonic() - began, 1),
        "peak_mib": {
            side: {name: round(peak, 1) for name, peak in sorted(peaks.items())} for side, peaks in memory.peaks.items()
        },
        "together_mib": {side: round(total, 1) for side, total in memory.totals.items()},
        "limit_mib": MEMORY_LIMIT_MIB,
        "kept": max(peak for peaks in memory.peaks.values() for peak in peaks.values()) < MEMORY_LIMIT_MIB,
    }


# --- the whole --------------------------------------------------------------------------------------------------------


def install_rsync() -> None:
    """Install rsync where it is missing, as the integration tests install what they need."""
    if shutil.which("rsync"):
        return
    if os.geteuid() != 0:
        sys.exit("Missing for this benchmark: rsync. Install it as root: apt-get install rsync")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "--quiet=2"], env=quiet, check=True)
    install = ["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", "rsync"]
    subprocess.run(install, env=quiet, check=True)


def compare(bench: Bench, load: Load, runs: int, ways: List[str]) -> tuple[Dict[str, Any], Dict[str, Any]]:
    """Take the ways in turns; medians for the ways, and for the second runs of ours."""
    took: Dict[str, List[Took]] = {way: [] for way in ways}
    seconds = []
    for number in range(runs):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            if took[way] and took[way][0].seconds > LONG_S:
                continue
            took[way].append(bench.measure(way, load))
            rate = load.bundle.size / took[way][-1].seconds / 1e6
            busy = os.getloadavg()[0]
            print(f"{load.name} {way}: {took[way][-1].seconds:.2f} s, {rate:.0f} MB/s, load {busy:.1f}", flush=True)
            if way == "ours":
                if number == 0:
                    bench.check(load)
                seconds.append(bench.second(load))
                print(f"{load.name} second run: {seconds[-1]}", flush=True)
    measured: Dict[str, Any] = {}
    for way, each in took.items():
        measured[f"{way}_s"] = round(statistics.median(one.seconds for one in each), 2)
    for way, each in took.items():
        playbooks = [one.playbook for one in each if one.playbook is not None]
        if playbooks:
            measured[f"{way}_playbook_s"] = round(statistics.median(playbooks), 2)
    measured["runs"] = {way: [round(one.seconds, 2) for one in each] for way, each in took.items()}
    second = {name: statistics.median(one[name] for one in seconds) for name in seconds[0]} if seconds else {}
    return measured, second


def goals(report: Dict[str, Any]) -> Dict[str, bool]:
    """What was to be reached, and whether it was."""
    large, many, second = report["large"], report["many"], report["second_run"]
    return {
        "large: at most 1.25 times plain ssh": large["ours_s"] <= 1.25 * large["ssh_cat_s"],
        "large: at least 4 times as fast as ansible.builtin.copy": 4 * large["ours_s"] <= large["ansible_copy_s"],
        "many: at least 10 times as fast as ansible.builtin.copy": 10 * many["ours_s"] <= many["ansible_copy_s"],
        "second run: nothing hashed, nothing sent": second["hashed_bytes"] == second["sent_bytes"] == 0,
        "second run: at most 3 s": second["seconds"] <= 3,
    }


def measure_times(bench: Bench, loads: List[str], ways: List[str], runs: int, total: int) -> Dict[str, Any]:
    """Compare the ways for each load of so many bytes."""
    report: Dict[str, Any] = {"bytes": total, "processors": os.cpu_count(), "bundle_verification": {}}
    seconds = {}
    for name in loads:
        load = make_load(bench.place, name, total)
        report["bundle_verification"][name] = bench.verify_bundle(load)
        report[name], seconds[name] = compare(bench, load, runs, ways)
        shutil.rmtree(load.directory.parent)
    slowest = max(seconds.values(), key=lambda one: one.get("seconds", 0.0))
    return {**report, "second_run": {**slowest, **seconds}}


def mib(count: Optional[int], otherwise: int) -> int:
    """Bytes of so many MiB."""
    return otherwise if count is None else count << 20


def write(path: Path, report: Dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


@contextlib.contextmanager
def bench_on_a_host() -> Iterator[Bench]:
    """A host of the testbed and a directory, both gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="bench-ship-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    bed = Testbed(NAME)
    try:
        host = bed.up([HostSpec("host", engine=False, gpus=0)])["host"]
        yield Bench(place, host, bed.inventory)
    finally:
        bed.down()
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    """Run; the exit status says whether the goals were reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="how often each way is taken")
    parser.add_argument("--memory", action="store_true", help="measure the memory alone")
    parser.add_argument("--mib", type=int, help="another size than 2 and 8 GiB, to try things out")
    parser.add_argument("--ways", nargs="+", default=["ssh_cat", "rsync", "ansible_copy", "ours"], help="only these")
    parser.add_argument("--loads", nargs="+", default=list(COUNTS), choices=list(COUNTS), help="only these")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    # What was set up is taken away, too, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    report = json.loads(options.report.read_text()) if options.report.exists() else {}
    install_rsync()
    with bench_on_a_host() as bench:
        reached: Dict[str, bool] = {}
        if not options.memory:
            report.update(measure_times(bench, options.loads, options.ways, options.runs, mib(options.mib, TOTAL)))
            if len(options.loads) == len(COUNTS) and len(options.ways) == len(bench.ways):
                reached = goals(report)
            write(options.report, report)
        if options.memory or reached:
            report["memory"] = measure_memory(bench, mib(options.mib, HOLLOW))
            reached[f"memory: at most {MEMORY_LIMIT_MIB} MiB"] = report["memory"]["kept"]
    report["goals"] = {**report.get("goals", {}), **reached}
    write(options.report, report)
    print(json.dumps(report, indent=2))
    for goal, kept in reached.items():
        print(f"{'reached' if kept else 'MISSED '}  {goal}")
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
