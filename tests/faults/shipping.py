# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Do to shipping what goes wrong at sites, at random moments, and write build/bench/ship-faults.json.

Every try has a seed, which is printed and says it all: `--only FAULT --seed N` does the same again. A fault is survived
when the next run completes, what is on the host then is bit for bit right, and no more was sent than the fault had
cost. How much that is, is said at each fault; what was sent counts at the controller, so bytes that a dying connection
swallowed (IN_FLIGHT at most) are among it.

The host is an SSH server on this machine, behind a gate that can cut its connections and flip bits in them; for reboots
it is one of the testbed. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "integration")]

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from fleets import Fleet
from sites import REPOSITORY, Site, SshHost, make_bundle, make_model
from testbed.engine import SOCKET
from testbed.hosts import Host, Testbed
from testbed.spec import HostSpec

REPORT = REPOSITORY / "build" / "bench" / "ship-faults.json"
MIB = 1024 * 1024
FILES = {
    "weights.bin": 22 * MIB + 77,
    "adapter.bin": 7 * MIB + 5,
    "tokenizer.json": 3 * MIB,
    **{f"part{number:02}.bin": 300 + 3607 * number for number in range(40)},
    "empty.txt": 0,
}
ENTRIES = [{"model_uid": "m", "source": {"path": "/models/m"}}]
IN_FLIGHT = 8 * MIB
"""Bytes that are under way at most: in pipes, in ssh's window, in sockets."""
OVERHEAD = 2 * MIB
"""Bytes that Ansible itself and the receiver's program send at most until blobs travel."""
LIMIT_S = 240.0
"""Seconds that a run may take. Nothing here takes a tenth of it, but machines may be busy."""


class NotSurvived(Exception):
    """What was not as it has to be after a fault."""


def need(truth: bool, text: str) -> None:
    """Raise NotSurvived unless it is true."""
    if not truth:
        raise NotSurvived(text)


def wait_until(truth: Callable[[], bool], seconds: float = 60.0, step: float = 0.02) -> bool:
    """Wait for something to become true; whether it did."""
    deadline = time.monotonic() + seconds
    while not truth():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


class Gate:
    """Passes connections on to an SSH server, until it is told to cut them or to flip a bit in one.

    `passed` are the bytes it let through to the server.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.passed = 0
        self.fired = False
        self._lock = threading.Lock()
        self._ends: List[socket.socket] = []
        self._closed = False
        self._at: Optional[int] = None
        self._flip: Optional[int] = None
        self._stays_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, after: int, stays_closed: bool) -> None:
        """Cut all connections when so many more bytes have passed; let nobody in afterwards if it `stays_closed`."""
        self._arm(after, None, stays_closed)

    def flip(self, after: int, bit: int) -> None:
        """Flip one bit of the byte that comes after so many more."""
        self._arm(after, bit, False)

    def _arm(self, after: int, bit: Optional[int], stays_closed: bool) -> None:
        with self._lock:
            self._at, self._flip, self._stays_closed = self.passed + after, bit, stays_closed
            self.fired = False

    def open(self) -> None:
        """Do nothing to anybody any more."""
        with self._lock:
            self._closed, self._at = False, None

    def hang_up(self) -> None:
        """Cut what stands, at once."""
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            client, _address = self._listener.accept()
            if self._closed:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server))
            with self._lock:
                self._ends += [client, server]
            for pair, counted in (((client, server), True), ((server, client), False)):
                threading.Thread(target=self._pass_on, args=(*pair, counted), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if counted:
                    data = self._examine(data)
                target.sendall(data)
                if counted and self._closed:
                    break
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _examine(self, data: bytes) -> bytes:
        """What of some bytes is to pass, and how."""
        cut = False
        with self._lock:
            if self._at is not None and self.passed + len(data) > self._at:
                place = self._at - self.passed
                self._at, self.fired = None, True
                if self._flip is not None:
                    data = flipped(data, place, self._flip)
                else:
                    data, cut, self._closed = data[:place], True, self._stays_closed
            self.passed += len(data)
        if cut:
            self.hang_up()
        return data


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """Bytes with one bit changed."""
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def flip_in_file(path: Path, place: int, bit: int) -> None:
    """Flip a bit of a file in a way that nothing but reading it shows."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(flipped(byte, 0, bit))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class Root:
    """The root directory on a host, looked at from outside."""

    def __init__(self, path: str, prefix: List[str]) -> None:
        self.path, self._prefix = path, prefix

    def sh(self, script: str, text: str = "") -> str:
        """Run a shell script on the host. Raises NotSurvived."""
        done = subprocess.run(
            [*self._prefix, "sh", "-c", script], input=text, capture_output=True, text=True, check=False
        )
        need(done.returncode == 0, f"{script[:200]}: {done.stderr[-1000:] or done.stdout[-1000:]}")
        return done.stdout

    def arrived(self, bundle: Bundle) -> int:
        """Bytes of the bundle's blobs that are on the host, be it in the store or on the way into it."""
        script = f"find {self.path}/blobs {self.path}/partial -type f -printf '%f %s\\n' 2>/dev/null || true"
        count = {name: int(size) for name, size in (line.split() for line in self.sh(script).splitlines())}
        return sum(min(size, count.get(digest[7:], 0)) for digest, size in bundle.blobs.items())

    def check(self, bundle: Bundle, files: Dict[str, str]) -> None:
        """Every blob and every file of the model must be right, bit for bit."""
        blobs = [f"{digest[7:]}  {self.path}/blobs/sha256/{digest[7:]}" for digest in bundle.blobs]
        state = json.loads(self.sh(f"cat {self.path}/state/artifacts.json"))
        tree = state["models"]["m"]["path"]
        listed = [f"{digest}  {tree}/{name}" for name, digest in files.items()]
        self.sh("sha256sum --check --quiet --strict -", "\n".join([*blobs, *listed]) + "\n")
        found = self.sh(f"cd {tree} && find . -type f").split()
        need(sorted(found) == sorted(f"./{name}" for name in files), f"{tree} has other files: {found}")
        need(self.sh(f"ls {self.path}/partial") == "", "something is left in the receiving area")


@dataclass
class Lab:
    """What all tries share: a bundle, an SSH server and the gate before it."""

    place: Path
    bundle: Bundle
    files: Dict[str, str]
    server: SshHost
    gate: Gate
    stack: contextlib.ExitStack
    bed_host: Optional[Host] = None

    def host_that_reboots(self) -> Host:
        """A host of the testbed, brought up when it is first asked for."""
        if self.bed_host is None:
            bed = Testbed(f"faults-{os.getpid()}")
            self.stack.callback(bed.down)
            self.bed_host = bed.up([HostSpec("host", engine=False, gpus=0)])["host"]
        return self.bed_host


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """Set everything up, and take it all away."""
    place = Path(tempfile.mkdtemp(prefix="ship-faults-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        model = make_model(place / "m", FILES)
        bundle = Bundle.open(make_bundle(place, {"m": model}))
        files = {name: hashlib.sha256((model / name).read_bytes()).hexdigest() for name in FILES}
        server = SshHost(place / "server").start()
        stack.callback(server.stop)
        gate = Gate(server.port)
        stack.callback(gate.hang_up)
        yield Lab(place, bundle, files, server, gate, stack)


@dataclass
class Try:
    """One try of a fault."""

    lab: Lab
    seed: int
    random: random.Random = field(init=False)
    place: Path = field(init=False)
    site: Site = field(init=False)
    root: Root = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.place = Path(tempfile.mkdtemp(prefix="try-", dir=self.lab.place))
        self.site = Site(self.place, {**self.lab.server.variables(), "ansible_port": self.lab.gate.port})
        self.site.environment = {"XDG_CACHE_HOME": str(self.lab.place / "cache")}
        self.root = Root(str(self.site.root), [])

    @property
    def total(self) -> int:
        return self.lab.bundle.size

    def options(self, **more: Any) -> Dict[str, Any]:
        return {"bundle": str(self.lab.bundle.root), "root": self.root.path, "models": ENTRIES, **more}

    def ship(self, **more: Any) -> Dict[str, Any]:
        """Run the task; what it returned, or `failed`. Raises NotSurvived when it does not come to an end."""
        return run(self.site, self.options(**more))

    def begin(self, **more: Any) -> subprocess.Popen[str]:
        """Start a run that takes some seconds."""
        return begin(self.site, self.options(**{"rate_limit": "14M", **more}))

    def complete(self, most: int, **more: Any) -> Dict[str, Any]:
        """The next run has to complete and to send `most` bytes at most; what it returned."""
        result = self.ship(**more)
        need(not result.get("failed"), f"the next run failed: {result.get('msg', '')[-2000:]}")
        need(result["sent_bytes"] <= most, f"{result['sent_bytes']} bytes sent, {most} were lost")
        self.root.check(self.lab.bundle, self.lab.files)
        return result

    def lost(self) -> int:
        """What the host lacks, once nothing is received any more."""
        lock = f"{self.root.path}/state/receiving.lock"

        def held() -> bool:
            return subprocess.run(["fuser", "-s", lock], stderr=subprocess.DEVNULL, check=False).returncode == 0

        need(wait_until(lambda: not held(), 90, 0.1), "a receiver stays")
        return self.total - self.root.arrived(self.lab.bundle)

    def clean(self) -> None:
        """Leave nothing of this try."""
        self.lab.gate.open()
        self.lab.gate.hang_up()
        shutil.rmtree(self.place, ignore_errors=True)


def run(site: Site, options: Dict[str, Any]) -> Dict[str, Any]:
    """Run a playbook of the one task; what that returned, or `failed`. Raises NotSurvived after LIMIT_S."""
    process = begin(site, options)
    site.output = finish(process)
    if process.returncode:
        return {"failed": True, "msg": site.output}
    result: Dict[str, Any] = json.loads((site.place / "result.json").read_text())
    return result


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a playbook and return what it printed. Raises NotSurvived after LIMIT_S, when it hangs."""
    try:
        return process.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        for pid in family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise NotSurvived(f"a run hung for {LIMIT_S:.0f} s: {process.communicate()[0][-2000:]}") from None


def begin(site: Site, options: Dict[str, Any]) -> subprocess.Popen[str]:
    """Start a playbook of the one task."""
    return subprocess.Popen(
        site.command("xinference_ship", options, []),
        env=site.surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def family(pid: int) -> List[int]:
    """A process and all that descend from it."""
    listing = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True).split()
    parents = dict(zip(map(int, listing[::2]), map(int, listing[1::2])))
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


# --- the faults -------------------------------------------------------------------------------------------------------


def connection_killed(attempt: Try) -> str:
    """Every connection is cut after a random number of bytes; every other time nobody gets in again until the next run.

    Sent again: by the same run what was in flight, by the next one no byte that is on the host.
    """
    offset, stays = attempt.random.randrange(attempt.total + OVERHEAD), attempt.random.random() < 0.5
    gate = attempt.lab.gate
    gate.cut(offset, stays)
    before = gate.passed
    first = attempt.ship()
    fired = gate.fired
    gate.open()
    if not first.get("failed"):
        need(first["sent_bytes"] <= attempt.total + IN_FLIGHT, f"{first['sent_bytes']} bytes sent by the same run")
    attempt.complete(attempt.lost())
    travelled = gate.passed - before
    need(travelled <= attempt.total + IN_FLIGHT + 2 * OVERHEAD, f"{travelled} bytes travelled")
    ended = "failed" if first.get("failed") else "went on"
    return f"cut at {offset}{'' if fired else ' (never reached)'}, {'closed' if stays else 'open'}, the run {ended}"


def controller_killed(attempt: Try) -> str:
    """ansible-playbook gets SIGKILL, alone or with all its children, when a random number of bytes has arrived.

    Sent again: no byte that is on the host.
    """
    reached = attempt.random.randrange(attempt.total)
    alone = attempt.random.random() < 0.5
    process = attempt.begin()
    wait_until(lambda: process.poll() is not None or attempt.root.arrived(attempt.lab.bundle) >= reached, LIMIT_S)
    for pid in [process.pid] if alone else family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    lost = attempt.lost()
    attempt.complete(lost)
    return f"killed {'alone' if alone else 'with children'} at {attempt.total - lost}"


def host_rebooted(attempt: Try) -> str:
    """The host goes down at a random moment, by a power cut or in order, and comes up again.

    Sent again: no byte that is on the host. (The power cut is one for processes; the disk is the machine's.)
    """
    host = attempt.lab.host_that_reboots()
    variables = {
        "ansible_host": host.address,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(host.directory / "id_ed25519"),
        "ansible_ssh_common_args": f"-o UserKnownHostsFile={host.directory / 'known_hosts'}",
    }
    attempt.site.variables = variables
    inside = ["docker", "--host", f"unix://{SOCKET}", "exec", "-i", host.container]
    attempt.root = Root("/opt/xinference", inside)
    attempt.root.sh(f"rm -rf {attempt.root.path}")
    reached, cut = attempt.random.randrange(attempt.total), attempt.random.random() < 0.7
    process = attempt.begin()
    wait_until(lambda: process.poll() is not None or attempt.root.arrived(attempt.lab.bundle) >= reached, LIMIT_S)
    (host.kill if cut else host.stop)()
    time.sleep(attempt.random.random() * 2)
    host.start()
    finish(process)
    lost = attempt.total - attempt.root.arrived(attempt.lab.bundle)
    attempt.complete(lost)
    went = "went on by itself" if process.returncode == 0 else "failed"
    return f"{'power cut' if cut else 'shut down'} when {reached} had arrived, the run {went}"


def disk_filled(attempt: Try) -> str:
    """Somebody fills the disk of the host while it receives, and frees it after the run.

    Sent again: no byte that is on the host.
    """
    attempt.site.root.mkdir()
    size = (attempt.total + 6 * MIB) >> 10
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(attempt.site.root)], check=True)
    try:
        reached = attempt.random.randrange(attempt.total - 4 * MIB)
        process = attempt.begin()
        wait_until(lambda: process.poll() is not None or attempt.root.arrived(attempt.lab.bundle) >= reached, LIMIT_S)
        ballast = attempt.site.root / "ballast"
        stop = threading.Event()

        def fill() -> None:
            with ballast.open("wb", buffering=0) as file:
                while not stop.wait(0.01):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"x" * 16384)

        filler = threading.Thread(target=fill)
        filler.start()
        said = finish(process)
        stop.set()
        filler.join()
        told = " ".join(said.split())
        ended = "completed before" if process.returncode == 0 else "said so"
        if process.returncode and "are free" not in told:
            ended = "failed in another way"
            need("No space left on device" in told or "is full" in told, f"no word of the disk: {said[-2000:]}")
        ballast.unlink()
        lost = attempt.lost()
        attempt.complete(lost)
        return f"filled when {reached} had arrived, the run {ended}"
    finally:
        subprocess.run(["umount", "--lazy", str(attempt.site.root)], check=True)


def flipped_on_the_wire(attempt: Try) -> str:
    """A bit of what ssh sends is flipped; ssh notices and hangs up.

    Sent again: what was in flight, and by the next run no byte that is on the host.
    """
    offset = attempt.random.randrange(attempt.total + OVERHEAD // 4)
    attempt.lab.gate.flip(offset, attempt.random.randrange(8))
    first = attempt.ship()
    attempt.lab.gate.open()
    if not first.get("failed"):
        need(first["sent_bytes"] <= attempt.total + IN_FLIGHT, f"{first['sent_bytes']} bytes sent by the same run")
    attempt.complete(attempt.lost())
    return f"at {offset}, the run {'failed' if first.get('failed') else 'went on'}"


FLIPPER = """
import os, re, sys
token, kind, place, bit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seen = 0
armed = True
while True:
    data = os.read(0, 65536)
    if not data:
        break
    found = -1
    if kind == "bytes" and seen <= place < seen + len(data):
        found = place - seen
    elif kind == "header":
        heads = list(re.finditer(rb'[{]"blob":[^}]*[}]', data))
        if heads:
            found = heads[0].start() + place % len(heads[0].group())
    seen += len(data)
    if found >= 0 and armed:
        armed = False
        try:
            os.unlink(token)
        except OSError:
            pass
        else:
            data = data[:found] + bytes([data[found] ^ (1 << bit)]) + data[found + 1:]
    while data:
        data = data[os.write(1, data):]
"""


def flipped_behind_ssh(attempt: Try) -> str:
    """A bit is flipped where ssh does not see it: in a blob, or, one time in three, in the line before a blob.

    Sent again: the one blob; of a session that was misunderstood, whatever came after that line.
    """
    kind = "header" if attempt.random.random() < 1 / 3 else "bytes"
    # The program of the receiver comes first; when that is damaged nothing starts.
    place = attempt.random.randrange(130) if kind == "header" else attempt.random.randrange(MIB // 8, attempt.total)
    bit = attempt.random.randrange(7)
    token, flipper, ssh = attempt.place / "token", attempt.place / "flipper.py", attempt.place / "flipping-ssh"
    token.touch()
    flipper.write_text(FLIPPER)
    ssh.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"exec(eval("*) '
        f'{sys.executable} {flipper} {token} {kind} {place} {bit} | ssh "$@"; exit $?;; esac\n'
        'exec ssh "$@"\n'
    )
    ssh.chmod(0o755)
    attempt.site.variables["ansible_ssh_executable"] = str(ssh)
    first = attempt.ship()
    need(not token.exists(), "no bit was flipped")
    largest = max(attempt.lab.bundle.blobs.values())
    if not first.get("failed"):
        sent = first["sent_bytes"]
        most = 2 * attempt.total if kind == "header" else attempt.total + largest
        need(sent <= most + IN_FLIGHT, f"{sent} bytes sent by the same run")
        # It is right already.
        need(attempt.root.arrived(attempt.lab.bundle) == attempt.total, "the run was content with less than all")
    attempt.complete(attempt.lost() + largest)
    return f"{kind} {place}, bit {bit}, the run {'failed' if first.get('failed') else 'went on'}"


def flipped_in_a_partial(attempt: Try) -> str:
    """After a connection was killed, a bit of what arrived is flipped.

    Sent again: the one blob, whole.
    """
    # Of the largest blob, which is the first, something has arrived then.
    attempt.lab.gate.cut(attempt.random.randrange(OVERHEAD + IN_FLIGHT, 20 * MIB), True)
    first = attempt.ship()
    attempt.lab.gate.open()
    need(bool(first.get("failed")), "nothing was cut")
    lost = attempt.lost()
    partials = [path for path in (attempt.site.root / "partial").iterdir() if path.stat().st_size]
    need(bool(partials), "nothing had arrived")
    path = attempt.random.choice(sorted(partials))
    flip_in_file(path, attempt.random.randrange(path.stat().st_size), attempt.random.randrange(8))
    attempt.complete(lost + attempt.lab.bundle.blobs[f"sha256:{path.name}"])
    return f"in {path.name[:12]}, {attempt.total - lost} had arrived"


def flipped_in_a_blob(attempt: Try) -> str:
    """Bits of up to three blobs in the store are flipped, which no stamp shows; a deep run finds and repairs them.

    Sent again: these blobs.
    """
    first = attempt.ship()
    need(not first.get("failed"), f"{first.get('msg')}")
    blobs = [(digest, size) for digest, size in sorted(attempt.lab.bundle.blobs.items()) if size]
    chosen = attempt.random.sample(blobs, attempt.random.randrange(1, 4))
    for digest, size in chosen:
        path = attempt.site.root / "blobs/sha256" / digest[7:]
        flip_in_file(path, attempt.random.randrange(size), attempt.random.randrange(8))
    most = sum(size for _digest, size in chosen)
    result = attempt.complete(most, deep=True)
    found = {digest for row in result["deep"]["damaged"] for digest in [row.get("digest", row.get("blob"))]}
    need(len(result["deep"]["damaged"]) == len(chosen), f"{len(chosen)} blobs were damaged, {found} were found")
    return f"{len(chosen)} blobs of {most} bytes"


def peer_lies(attempt: Try) -> str:
    """One of three hosts has everything and passes on a wrong bit of up to two blobs, which no stamp shows.

    Sent by the controller: these blobs to both of the others, and what is too small to be worth asking a host for (less
    than a tenth).
    """
    variables = {"ansible_connection": "local", "ansible_host": "127.0.0.1", "xinference_models": ENTRIES}
    fleet = Fleet(attempt.place, attempt.lab.bundle.root, 3, variables, environment=attempt.site.environment)
    try:
        fleet.ship("--limit", "h1")
        blobs = sorted(attempt.lab.bundle.blobs.items(), key=lambda item: -item[1])
        chosen = attempt.random.sample(blobs[:6], attempt.random.randrange(1, 3))
        for digest, size in chosen:
            flip_in_file(fleet.blob("h1", digest), attempt.random.randrange(size), attempt.random.randrange(8))
        results = fleet.ship(check=False)
        told = fleet.output[-2000:]
        need(sorted(results) == fleet.names, f"a run failed: {told}")
        sent = sum(result["sent_bytes"] for result in results.values())
        most = 2 * sum(size for _digest, size in chosen) + attempt.total // 10
        need(sent <= most, f"{sent} bytes sent, at most {most} were needed")
        named = {name for name in ("h2", "h3") for row in results[name]["refused"] if "gave wrong bytes" in row["why"]}
        need(bool(named), f"nobody was told of the lie: {told}")
        for name in ("h2", "h3"):
            Root(str(fleet.root(name)), []).check(attempt.lab.bundle, attempt.lab.files)
        need(fleet.listening() == [], "somebody listens still")
        return f"{len(chosen)} blobs, {sent} of {attempt.total} bytes sent, told by {sorted(named)}"
    finally:
        for path in fleet.listening():
            with contextlib.suppress(OSError, ValueError, KeyError):
                os.kill(json.loads(Path(path).read_text())["pid"], signal.SIGKILL)


def two_controllers(attempt: Try) -> str:
    """A second controller begins at a random moment, and leaves or waits.

    Sent by both together, and by the next run: every blob once.
    """
    reached = attempt.random.randrange(-attempt.total // 4, attempt.total // 2)
    wait = attempt.random.choice([0, 600])
    (attempt.place / "other").mkdir()
    other = Site(attempt.place / "other", attempt.site.variables, attempt.site.environment)
    process = attempt.begin(rate_limit="5M")
    wait_until(lambda: process.poll() is not None or attempt.root.arrived(attempt.lab.bundle) >= reached, LIMIT_S)
    second = run(other, attempt.options(wait=wait))
    said = finish(process)
    sent = []
    if process.returncode == 0:
        sent.append(json.loads((attempt.place / "result.json").read_text())["sent_bytes"])
    else:
        # The second one was first, and this one does not wait for ever.
        need("Another controller is shipping" in " ".join(said.split()), f"the first failed: {said[-2000:]}")
    if second.get("failed"):
        told = " ".join(second["msg"].split())
        need(wait == 0 and "Another controller is shipping to this host" in told, f"the second failed: {told[-2000:]}")
        need(f"(process {process.pid})" in told, f"the other is not named: {told[-2000:]}")
        how = "left"
    else:
        sent.append(second["sent_bytes"])
        how = "waited" if "waiting for" in other.output else "did not meet it"
    need(bool(sent), "both failed")
    lost = attempt.lost()
    need(sum(sent) + lost <= attempt.total, f"{sent} bytes sent and {lost} missing of {attempt.total}")
    attempt.complete(lost)
    return f"at {reached}, the second {how}, sent {sent}"


@dataclass(frozen=True)
class Fault:
    """A fault, and how often it is tried."""

    name: str
    happen: Callable[[Try], str]
    tries: int


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("connection killed", connection_killed, 50),
        Fault("controller killed", controller_killed, 12),
        Fault("host rebooted", host_rebooted, 8),
        Fault("disk filled", disk_filled, 8),
        Fault("bit flipped on the wire", flipped_on_the_wire, 10),
        Fault("bit flipped behind ssh", flipped_behind_ssh, 16),
        Fault("bit flipped in a partial", flipped_in_a_partial, 8),
        Fault("bit flipped in a committed blob", flipped_in_a_blob, 8),
        Fault("peer lies", peer_lies, 6),
        Fault("two controllers", two_controllers, 10),
    )
}


def try_once(place: Lab, fault: Fault, seed: int) -> Optional[str]:
    """Try a fault; why it was not survived, or None."""
    attempt = Try(place, seed)
    began = time.monotonic()
    problem: Optional[str] = None
    try:
        told = fault.happen(attempt)
    except (NotSurvived, AssertionError) as error:
        problem = str(error)
        told = f"NOT SURVIVED: {problem}"
    finally:
        attempt.clean()
    print(f"{fault.name}, seed {seed}: {told} ({time.monotonic() - began:.1f} s)", flush=True)
    return problem


def main() -> int:
    """Run; the exit status says whether everything was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FAULTS), action="append", help="this fault (more than once: these)")
    parser.add_argument("--tries", type=int, help="how often each fault is tried, instead of its own number")
    parser.add_argument("--seed", type=int, help="the seed of the first try; those after it count up")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    # What was set up is taken away, too, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    rows, problems = [], []
    with lab() as place:
        for fault in FAULTS.values():
            if options.only and fault.name not in options.only:
                continue
            seeds = [seed + number for number in range(options.tries or fault.tries)]
            failures = {one: problem for one in seeds if (problem := try_once(place, fault, one)) is not None}
            rows.append(
                {"fault": fault.name, "tries": len(seeds), "survived": len(seeds) - len(failures), "seeds": seeds}
            )
            problems += [f"{fault.name}, seed {one}: {problem}" for one, problem in failures.items()]
            options.report.parent.mkdir(parents=True, exist_ok=True)
            options.report.write_text(json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(f"{row['fault']}: {row['survived']} of {row['tries']} survived")
    for problem in problems:
        print(f"NOT SURVIVED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
