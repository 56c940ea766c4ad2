# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the system of a host is like: memory, clock, SELinux, and whether there is a way out. Reads only."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple


def memory(proc: str = "/proc") -> Dict[str, int]:
    """Bytes of memory and swap; `available` is what programs can still get without swapping."""
    names = {"total": "MemTotal", "available": "MemAvailable", "swap_total": "SwapTotal", "swap_free": "SwapFree"}
    lines = Path(proc, "meminfo").read_text(encoding="ascii").splitlines()
    told = {name: int(rest.split()[0]) * 1024 for name, _colon, rest in (line.partition(":") for line in lines)}
    return {key: told.get(name, 0) for key, name in names.items()}


def aes(proc: str = "/proc") -> bool:
    """Whether the processor computes AES by itself, so that ciphers made of it are the fastest ones."""
    try:
        lines = Path(proc, "cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    rows = (line.partition(":") for line in lines)
    return any("aes" in rest.split() for name, _colon, rest in rows if name.strip() in ("flags", "Features"))


def clock() -> float:
    """Seconds since 1970, as this host believes."""
    return time.time()


def volume(path: str) -> Dict[str, Any]:
    """The file system that `path` lies on, or will lie on: its number, free bytes, and the directory looked at."""
    directory = Path(path)
    while not directory.is_dir() and directory != directory.parent:
        directory = directory.parent
    while True:
        try:
            status, numbers = directory.stat(), os.statvfs(str(directory))
            return {"path": str(directory), "device": status.st_dev, "free_bytes": numbers.f_bavail * numbers.f_frsize}
        except OSError:
            if directory == directory.parent:
                raise
            directory = directory.parent


def selinux(path: str, system: str = "/sys/fs/selinux", proc: str = "/proc") -> Dict[str, Any]:
    """`mode` is enforcing, permissive or disabled; `labels` whether the file system of `path` keeps labels."""
    try:
        mode = "enforcing" if Path(system, "enforce").read_text().strip() == "1" else "permissive"
    except OSError:
        return {"mode": "disabled", "labels": True}
    return {"mode": mode, "labels": "seclabel" in _mount_options(path, Path(proc, "self", "mounts"))}


def _mount_options(path: str, mounts: Path) -> List[str]:
    """Options of the mount that `path` lies on."""
    place = os.path.realpath(path)
    best: Tuple[int, List[str]] = (-1, [])
    for line in mounts.read_text(errors="replace").splitlines():
        _source, point, _kind, options = line.split()[:4]
        point = point.replace("\\040", " ").rstrip("/")
        if (place == point or place.startswith(f"{point}/")) and len(point) >= best[0]:
            best = (len(point), options.split(","))
    return best[1]


def reached(addresses: Sequence[str], timeout: float) -> List[str]:
    """Which of `addresses` (`host:port`) answer a TCP connection within `timeout` seconds.

    Nothing is sent. All are tried at once; a name server that does not answer holds up nobody.
    """
    found: List[str] = []

    def call(address: str) -> None:
        name, _colon, port = address.rpartition(":")
        with contextlib.suppress(OSError, ValueError), socket.create_connection((name.strip("[]"), int(port)), timeout):
            found.append(address)

    threads = [threading.Thread(target=call, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [address for address in addresses if address in found]
