# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a run on the testbed can leave a secret: the hosts, their engines and containers, and the processes of all.

Files of a host are read past it, in the machine's own directories: what it has beyond its image, the data of its
engine (volumes, logs, the writable layers of containers) and what it keeps in memory. Layers of images are left out;
they are the same before and after. A host of the testbed has no journal. The controller is this machine: its
directories are searched by `Search.in_tree`, and what a playbook printed by `Search.in_text`.

Processes are looked at again and again while the run lasts (`Watch`), those of hosts and containers and of the
controller alike. One that lives shorter than PAUSE can be missed.

    python -m testbed.places SECRETS REPORT     # watches until the file SECRETS is removed

SECRETS is JSON: `secrets`, name -> value, and `may_know`, as Watch takes it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from .engine import docker
from .hosts import Host
from .leaks import Leak, Private, Search

# Seconds between two looks at all processes.
PAUSE = 0.05
ENGINE = "/var/lib/docker"


def of_host(search: Search, host: Host, private: Sequence[Private] = ()) -> List[Leak]:
    """Leaks in the files of a running host and in what its engine tells; places are shown as `HOST:/path`."""
    leaks = [leak for place, text in _told(host) for leak in search.in_text(f"{host.name}: {place}", text)]
    for root, path, skip in _roots(host):
        leaks += search.in_tree(root, f"{host.name}:{path}", private, skip)
    return sorted(set(leaks))


def _told(host: Host) -> Iterator[Tuple[str, str]]:
    """What the host's engine tells of what it has: (command, its output), and the logs of containers."""
    for kind in ("container", "image", "volume", "network"):
        everything = ["--all"] if kind in ("container", "image") else []
        names = sorted(set(host.docker(kind, "ls", *everything, "--quiet").split()))
        if names:
            yield f"docker {kind} inspect", host.docker(kind, "inspect", *names)
        for name in names:
            if kind == "image":
                # An image that a later one is built on may have no history of its own.
                yield f"docker history {name}", host.docker("history", "--no-trunc", name, check=False)
            elif kind == "container":
                yield f"docker logs {name}", host.exec("sh", "-c", f"docker logs {name} 2>&1")


def _roots(host: Host) -> Iterator[Tuple[Path, str, List[Path]]]:
    """Directories of this machine that hold the host's files: (directory, where the host has it, what to leave out)."""
    found: Dict[str, Any] = json.loads(docker("inspect", host.container))[0]
    yield Path(found["GraphDriver"]["Data"]["UpperDir"]), "/", []
    inside = Path(f"/proc/{found['State']['Pid']}/root")
    kept = {entry["Destination"]: Path(entry["Source"]) for entry in found["Mounts"] if entry["Type"] == "volume"}
    kept.update({path: inside / path.lstrip("/") for path in _memory(found)})
    for path, root in sorted(kept.items()):
        yield root, path, [root / layer for layer in _image_layers(host)] if path == ENGINE else []
    running = host.docker("ps", "--quiet").split()
    for container in json.loads(host.docker("inspect", *running)) if running else []:
        root = inside / f"proc/{container['State']['Pid']}/root"
        for path in _memory(container):
            yield root / path.lstrip("/"), f"{container['Name']}:{path}", []


def _memory(container: Dict[str, Any]) -> Set[str]:
    """Directories that a container has in memory, as its engine shows it."""
    mounted = {entry["Destination"] for entry in container["Mounts"] if entry["Type"] == "tmpfs"}
    return {"/dev/shm", *(container["HostConfig"].get("Tmpfs") or {}), *mounted}


def _image_layers(host: Host) -> Set[str]:
    """Directories of the layers of images, below that of the engine."""
    names = set(host.docker("image", "ls", "--all", "--quiet").split())
    layers: Set[str] = set()
    for image in json.loads(host.docker("image", "inspect", *names)) if names else []:
        data = image["GraphDriver"]["Data"]
        for path in [data["UpperDir"], *data.get("LowerDir", "").split(":")]:
            layers.update([path[len(ENGINE) + 1 :]] if path else [])
    return layers


# --- processes --------------------------------------------------------------------------------------------------------


class Watch:
    """Looks for secrets in the command lines and environments of all processes for as long as it is entered."""

    def __init__(self, search: Search, may_know: Optional[Mapping[str, Sequence[str]]] = None) -> None:
        """`may_know`: pattern of a command line -> names of the secrets that the environment of such may hold."""
        self.leaks: Set[Leak] = set()
        self.processes = 0
        self._search, self._may_know = search, may_know or {}
        self._known: Dict[int, bytes] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PAUSE):
            self.look()

    def look(self) -> None:
        """Look once at every process that is new or became another program."""
        now: Dict[int, bytes] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    command = (folder / "cmdline").read_bytes()
                    now[int(folder.name)] = command
                    if command and self._known.get(int(folder.name)) != command:
                        self.processes += 1
                        self._judge(folder, command)
        self._known = now

    def _judge(self, folder: Path, command: bytes) -> None:
        place = f"process {folder.name} ({(folder / 'comm').read_text().strip()})"
        self.leaks.update(Leak(place, *found, "its command line") for found in self._search.in_bytes(command))
        shown = command.replace(b"\0", b" ").decode(errors="replace")
        known = {name for pattern, names in self._may_know.items() if fnmatchcase(shown, pattern) for name in names}
        for entry in (folder / "environ").read_bytes().split(b"\0"):
            for secret, form in self._search.in_bytes(entry):
                if secret not in known:
                    variable = entry.partition(b"=")[0].decode(errors="replace")
                    self.leaks.add(Leak(place, secret, form, f"its environment, {variable}"))


def main() -> int:
    """Watch for as long as the file with the secrets is there, and write again and again what was found."""
    secrets, report = map(Path, sys.argv[1:])
    told = json.loads(secrets.read_text())
    with Watch(Search(told["secrets"]), told["may_know"]) as watch:
        while secrets.exists():
            _write(report, watch, ended=False)
            time.sleep(0.2)
    _write(report, watch, ended=True)
    return 0


def _write(report: Path, watch: Watch, ended: bool) -> None:
    leaks = [asdict(leak) for leak in sorted(watch.leaks.copy())]
    partial = report.with_suffix(".partial")
    partial.write_text(json.dumps({"ended": ended, "processes": watch.processes, "leaks": leaks}, indent=2) + "\n")
    partial.rename(report)


if __name__ == "__main__":
    sys.exit(main())
