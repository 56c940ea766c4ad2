# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Count every packet and every name query that leaves the hosts of a testbed and the containers on them.

A host without a route refuses to connect before there is a packet, and what was not sent cannot be counted. So the
hosts of such a test are given what a host with internet has, a default route and a name server (`leading_nowhere`);
both lead to the machine, which drops what arrives. Every attempt becomes packets, and zero means that nobody tried.

The packets are seen by the kernel's own means (AF_PACKET, see packet(7)) in the network namespace of every host and of
every container on it, from before its first process runs, and a third time where they would leave: on the machine's
bridge. Inside are loopback and the networks that a host is directly on: the testbed's, and those between a host and
its containers. These count, wherever they are seen:

* a packet to any other address, multicast as well;
* a question who has an address that is not inside (ARP);
* a name query (DNS, DNS over TLS, mDNS, LLMNR), to whatever address, also to Docker's own name server at 127.0.0.11,
  which would pass it on; not a question for a name that Docker itself answers, if the test names it;
* not what kernels say to set up a link (IGMP, and ICMPv6 to multicast addresses).

A packet that passes three places is counted at each. Packets that the counter could not read in time are an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import select
import socket
import struct
import threading
import time
from collections import Counter as Tally
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, Iterator, Optional, Set, Tuple

from .engine import TestbedError, docker
from .hosts import Host

# Addresses of RFC 5737, which nobody has: the name server that the hosts are told.
NAME_SERVER = "198.51.100.53"
DOCKERS_NAME_SERVER = ipaddress.IPv4Address("127.0.0.11")
NAME_PORTS = {53: "DNS", 853: "DNS over TLS", 5353: "mDNS", 5355: "LLMNR"}
# Seconds between two looks for new namespaces; a container is made some tenths before its first process runs.
PAUSE = 0.03

IP, ARP, IPV6 = 0x0800, 0x0806, 0x86DD
TCP, UDP, IGMP, ICMPV6 = 6, 17, 2, 58
ETH_P_ALL, SOL_PACKET, PACKET_STATISTICS, SO_ATTACH_FILTER, SO_RCVBUFFORCE = 3, 263, 6, 26, 33
CLONE_NEWNET = 0x40000000
ROOM = 64 * 1024 * 1024

Network = ipaddress.IPv4Network


@dataclass(frozen=True, order=True)
class Sent:
    """What was sent once or more often: seen where, what it was, to whom, and the name that was asked for."""

    place: str
    kind: str
    to: str
    port: int = 0
    name: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.kind} to {self.to}{f':{self.port}' if self.port else ''} {self.name}".rstrip()


# --- what a packet is -------------------------------------------------------------------------------------------------


def read(place: str, protocol: int, data: bytes) -> Sent:
    """What a packet is, by its link's protocol number and its bytes from there on (512 are enough)."""
    if protocol == ARP and len(data) >= 28:
        return Sent(place, "ARP", str(ipaddress.IPv4Address(data[24:28])))
    if protocol == IP and len(data) >= 20:
        to: Any = ipaddress.IPv4Address(data[16:20])
        return _carried(place, data[9], to, data[(data[0] & 15) * 4 :])
    if protocol == IPV6 and len(data) >= 40:
        return _carried(place, data[6], ipaddress.IPv6Address(data[24:40]), data[40:])
    return Sent(place, f"link protocol 0x{protocol:04x}", "?")


def _carried(place: str, carrier: int, to: Any, data: bytes) -> Sent:
    kinds = {TCP: "TCP", UDP: "UDP", IGMP: "IGMP", ICMPV6: "ICMPv6", 1: "ICMP"}
    if carrier not in (TCP, UDP) or len(data) < 4:
        return Sent(place, kinds.get(carrier, f"IP protocol {carrier}"), str(to))
    port = int.from_bytes(data[2:4], "big")
    # Docker changes the port on the way to its name server, before the packet can be seen.
    kind = "DNS" if to == DOCKERS_NAME_SERVER else NAME_PORTS.get(port, kinds[carrier])
    name = question(data[8:]) if carrier == UDP and kind in NAME_PORTS.values() else ""
    return Sent(place, kind, str(to), 0 if to == DOCKERS_NAME_SERVER else port, name)


def question(message: bytes) -> str:
    """The name that a DNS message asks for; empty when it asks for none."""
    labels, position = [], 12
    while position < len(message) and 0 < message[position] < 64:
        end = position + 1 + message[position]
        labels.append(message[position + 1 : end].decode("ascii", "replace"))
        position = end
    return ".".join(labels).lower()


def leaves(sent: Sent, inside: Collection[Network], own_names: Collection[str] = ()) -> bool:
    """Whether that counts. `own_names` are those that Docker's name server knows: containers of the same network."""
    if sent.to == "?":
        return True
    to = ipaddress.ip_address(sent.to)
    if sent.kind in NAME_PORTS.values():
        return not (to == DOCKERS_NAME_SERVER and sent.name in own_names)
    if sent.kind == "IGMP" or (sent.kind == "ICMPv6" and to.is_multicast):
        return False
    return not (to.is_loopback or any(to in network for network in inside))


# --- where packets are seen -------------------------------------------------------------------------------------------


def _only_sent() -> bytes:
    """A filter for the kernel (classic BPF): what is sent, without loopback but for Docker's name server."""
    protocol, kind, outgoing = 0xFFFFF000, 0xFFFFF004, 4  # SKF_AD_OFF and what follows there
    program = [
        (0x30, 0, 0, kind),
        (0x15, 0, 7, outgoing),  # if not: drop
        (0x28, 0, 0, protocol),
        (0x15, 0, 4, IP),  # if not: keep
        (0x20, 0, 0, 16),  # where it is sent to
        (0x15, 2, 0, int(DOCKERS_NAME_SERVER)),  # keep
        (0x54, 0, 0, 0xFF000000),
        (0x15, 1, 0, 0x7F000000),  # drop
        (0x06, 0, 0, 0xFFFF),  # keep
        (0x06, 0, 0, 0),  # drop
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _listen(bridge: str = "") -> socket.socket:
    """A socket that sees what arrives at a bridge, or what anyone sends in the namespace in which this thread is."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0 if bridge else socket.htons(ETH_P_ALL))
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
    made.setblocking(False)
    if bridge:
        made.bind((bridge, ETH_P_ALL))
    else:
        text = _only_sent()
        memory = ctypes.create_string_buffer(text, len(text))
        program = struct.pack("HL", len(text) // 8, ctypes.addressof(memory))
        made.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    return made


def _enter(descriptor: int) -> None:
    """Take this thread into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def connected(table: str) -> Iterator[Network]:
    """Networks that a namespace is directly on, by its /proc/net/route."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        target, gateway, mask = fields[1], fields[2], fields[7]
        bits = bin(int(mask, 16)).count("1")
        if int(gateway, 16) == 0 and bits:
            yield Network((int.from_bytes(bytes.fromhex(target)[::-1], "big"), bits), strict=False)


@contextlib.contextmanager
def leading_nowhere(host: Host) -> Iterator[None]:
    """A host with a default route and a name server, from which nothing comes back, until the end of the block."""
    machine = host.address.rpartition(".")[0] + ".1"
    before = host.exec("cat", "/etc/resolv.conf")
    _name_servers(host, f"nameserver {NAME_SERVER}\n")
    host.exec("ip", "route", "replace", "default", "via", machine)
    try:
        yield
    finally:
        host.exec("ip", "route", "del", "default")
        _name_servers(host, before)


def _name_servers(host: Host, text: str) -> None:
    # Docker mounts that file, so it is written to and not replaced.
    host.exec("sh", "-c", 'printf %s "$1" > /etc/resolv.conf', "sh", text)


class Counter:
    """Counts for as long as it is entered; the hosts have to run and may start and stop containers."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self.seen: Tally[Sent] = Tally()
        self.inside: Set[Network] = set()
        # Names of the namespaces that were looked into: hosts, and HOST/ID for what runs on them.
        self.places: Set[str] = set()
        self._hosts: Dict[str, Tuple[Path, str]] = {}
        for host in hosts:
            found = json.loads(docker("inspect", host.container))[0]
            network = found["NetworkSettings"]["Networks"][f"testbed-{host.testbed}"]["NetworkID"]
            self._hosts[host.name] = (Path(f"/proc/{found['State']['Pid']}"), f"br-{network[:12]}")
        self._sockets: Dict[socket.socket, str] = {}
        self._fault: Optional[BaseException] = None
        self._ready, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Counter:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._fault:
            raise TestbedError(f"The count of packets is not whole: {self._fault}") from self._fault

    def left(self, own_names: Collection[str] = ()) -> Dict[Sent, int]:
        """What left so far, and how often. Raises TestbedError when the counter does not run."""
        self._check()
        seen, inside = self.seen.copy(), set(self.inside)
        return {sent: number for sent, number in sorted(seen.items()) if leaves(sent, inside, own_names)}

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                for bridge in {bridge for _process, bridge in self._hosts.values()}:
                    self._sockets[stack.enter_context(_listen(bridge))] = f"network {bridge}"
                due = 0.0
                while not self._ended.is_set():
                    if time.monotonic() >= due:
                        self._look_for_namespaces(stack)
                        self._ready.set()
                        due = time.monotonic() + PAUSE
                    self._receive(PAUSE)
                self._receive(0)
                lost = sum(_lost(made) for made in self._sockets)
                if lost:
                    raise TestbedError(f"{lost} packets came faster than they were read")
            except BaseException as error:
                self._fault = error
            finally:
                self._ready.set()

    def _look_for_namespaces(self, stack: contextlib.ExitStack) -> None:
        for name, (process, _bridge) in self._hosts.items():
            self.inside.update(connected((process / "net/route").read_text()))
            found = {name: process / "ns/net"}
            with contextlib.suppress(FileNotFoundError):
                # The engine's own files of them; they are there before the first process of a container.
                for path in (process / "root/run/docker/netns").iterdir():
                    found[f"{name}/{path.name}"] = path
            for place, path in found.items():
                if place not in self.places and place != f"{name}/default":
                    self._open(place, path, stack)

    def _open(self, place: str, path: Path, stack: contextlib.ExitStack) -> None:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with path.open("rb") as namespace:
                _enter(namespace.fileno())
            try:
                self._sockets[stack.enter_context(_listen())] = place
                self.places.add(place)
            finally:
                _enter(home)
        except OSError:
            # Not yet or no longer one; a host's always is.
            if "/" not in place:
                raise
        finally:
            os.close(home)

    def _receive(self, seconds: float) -> None:
        for made in select.select(list(self._sockets), [], [], seconds)[0]:
            place = self._sockets[made]
            with contextlib.suppress(BlockingIOError):
                for _turn in range(1000):  # then the others have their turn
                    data, (_interface, protocol, kind, *_more) = made.recvfrom(512)
                    # What arrives in a namespace was sent in another, and what the machine sends is its own affair.
                    if (kind == socket.PACKET_OUTGOING) is not place.startswith("network "):
                        self.seen[read(place, protocol, data)] += 1


def _lost(made: socket.socket) -> int:
    _seen, lost = struct.unpack("II", made.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return int(lost)
