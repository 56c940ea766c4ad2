# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who listens on a TCP port of this host, read from /proc (Linux)."""

from __future__ import annotations

import ipaddress
import os
import pwd
import socket
import struct
from pathlib import Path
from typing import Any, Iterable

from .native_run import MARK

_LISTEN = "0A"


def listeners(port: int, address: str, root: str, proc: str = "/proc") -> list[dict[str, Any]]:
    """The listeners that keep a server from `address`:`port`, one dictionary each.

    Keys: `address`, `user` (name or number), `pid` and `program` (None where this user may not see the process), and
    `ours`: whether the program runs from below `root`.
    """
    wanted = _addresses(address)
    found = []
    for bound, uid, inode in _sockets(port, Path(proc)):
        if not _clash(bound, wanted):
            continue
        pid = _process_of(inode, Path(proc))
        found.append(
            {
                "address": str(bound),
                "user": _user(uid),
                "pid": pid,
                "program": None if pid is None else " ".join(_words(Path(proc, str(pid), "cmdline"))),
                "ours": pid is not None and runs_from(pid, root, proc),
            }
        )
    return found


def is_address(text: str) -> bool:
    """Whether it is an IP address, of either version."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def cannot_listen(address: str) -> str:
    """Why no program of this host can listen on an address, empty when one can."""
    try:
        answers = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    problem = ""
    for family, kind, protocol, _name, place in answers:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.bind(place)
            return ""
        except OSError as error:
            problem = f"{address}: {error.strerror or error}"
    return problem


def runs_from(pid: int, root: str, proc: str = "/proc") -> bool:
    """True when a process is one of the server below `root`: by the mark in its environment, or by where it lies."""
    place = Path(proc, str(pid))
    tops = {root.rstrip("/"), os.path.realpath(root)}
    if any(f"{MARK}={top}" in _words(place / "environ") for top in tops):
        return True
    traces = _words(place / "cmdline")
    for link in ("cwd", "exe"):
        try:
            traces.append(os.readlink(place / link))
        except OSError:
            continue
    return any(trace == top or trace.startswith(f"{top}/") for trace in traces for top in tops)


def _addresses(address: str) -> list[Any]:
    """The IP addresses behind a name; an empty list (which clashes with everything) when it cannot be resolved."""
    try:
        answers = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [ipaddress.ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers]


def _clash(bound: Any, wanted: list[Any]) -> bool:
    """True when a socket on `bound` leaves no place for one on any of `wanted`."""
    if not wanted or bound.is_unspecified:
        return True
    plain = getattr(bound, "ipv4_mapped", None) or bound
    return any(address.is_unspecified or address == plain for address in wanted)


def _sockets(port: int, proc: Path) -> Iterable[tuple[Any, int, str]]:
    """Address, user id and inode of every listening socket on a port."""
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            place, _colon, number = fields[1].rpartition(":")
            if fields[3] == _LISTEN and int(number, 16) == port:
                yield _ip(place), int(fields[7]), fields[9]


def _ip(text: str) -> Any:
    """The address that /proc writes as hex words in the machine's byte order."""
    words = [struct.pack("=I", int(text[start : start + 8], 16)) for start in range(0, len(text), 8)]
    return ipaddress.ip_address(b"".join(words))


def _process_of(inode: str, proc: Path) -> int | None:
    """The process that has a socket open, if this user may see it."""
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(os.readlink(link) == f"socket:[{inode}]" for link in (entry / "fd").iterdir()):
                return int(entry.name)
        except OSError:
            continue
    return None


def _words(path: Path) -> list[str]:
    """The strings in a file of /proc that separates them by zero bytes; none when it has gone or is not for us."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape").rstrip("\0").split("\0")
    except OSError:
        return []


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
