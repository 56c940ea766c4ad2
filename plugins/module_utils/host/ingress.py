# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The way into a network that has no way out: passes TCP connections on, and begins none of its own.

Usage: ingress.py HOST:PORT PORT. Listens on PORT at all addresses and connects each caller with HOST:PORT. The name is
looked up anew for every caller, so the server behind it may come, go and change its address. Bytes pass as they are, in
both directions at once; the end of one direction is passed on alone, and a broken connection as a broken one, so that
nobody takes half an answer for a whole one.

Part of a release with an isolated server; needs nothing but Python's own library.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import sys
from typing import List, Optional, Set, Tuple

PIECE = 1 << 16
BACKLOG = 1024
CONNECT_LIMIT = 10.0
"""Seconds the server has to take a connection."""
BREATH = 0.1
"""Seconds without new callers when there are no more descriptors."""
BROKEN = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset."""
QUIET_ENDS = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
"""A peer that went away without a word is noticed after two minutes."""


async def serve(listener: socket.socket, server: Tuple[str, int]) -> None:
    """Pass on whoever connects to `listener`, until cancelled."""
    loop = asyncio.get_event_loop()
    guests: Set[asyncio.Task[None]] = set()
    try:
        while True:
            try:
                caller, _address = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(BREATH)
                continue
            guest = loop.create_task(_pass_on(caller, server))
            guests.add(guest)
            guest.add_done_callback(guests.discard)
    finally:
        # Once is not always enough: wait_for, before Python 3.12, may take a cancellation for itself.
        while guests:
            for guest in guests:
                guest.cancel()
            await asyncio.wait(set(guests), timeout=BREATH)


async def _pass_on(caller: socket.socket, server: Tuple[str, int]) -> None:
    """Connect a caller with the server for as long as both want it; whatever breaks is broken for both."""
    behind: Optional[socket.socket] = None
    whole = False
    try:
        behind = await asyncio.wait_for(_connect(*server), CONNECT_LIMIT)
        for one in (caller, behind):
            _prepare(one)
        whole = await _both_ways(caller, behind)
    except (OSError, asyncio.TimeoutError):
        pass
    finally:
        for side in filter(None, (caller, behind)):
            if not whole:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, BROKEN)
            side.close()


async def _connect(host: str, port: int) -> socket.socket:
    """A connection to the first address of a name that takes one. Raises OSError."""
    loop = asyncio.get_event_loop()
    fault = OSError(f"{host} has no address")
    for family, kind, protocol, _name, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        tried = socket.socket(family, kind, protocol)
        tried.setblocking(False)
        try:
            await loop.sock_connect(tried, address)
        except OSError as error:
            tried.close()
            fault = error
        except BaseException:
            tried.close()
            raise
        else:
            return tried
    raise fault


def _prepare(one: socket.socket) -> None:
    """Pass small pieces on at once, and notice who has gone."""
    one.setblocking(False)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in QUIET_ENDS:
        if hasattr(socket, name):
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _both_ways(one: socket.socket, other: socket.socket) -> bool:
    """Pass bytes on in both directions; returns whether both came to their own end."""
    loop = asyncio.get_event_loop()
    ways: List[asyncio.Task[None]] = [loop.create_task(_pump(one, other)), loop.create_task(_pump(other, one))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        return all(way.done() and way.exception() is None for way in ways)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes from one side until its end, which is passed on too."""
    loop = asyncio.get_event_loop()
    while True:
        piece = await loop.sock_recv(source, PIECE)
        if not piece:
            break
        await loop.sock_sendall(target, piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def listening(port: int) -> socket.socket:
    """A socket that listens on a port at all addresses, of IPv6 as well where there is one."""
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        family = socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("", port))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


async def run(listener: socket.socket, server: Tuple[str, int]) -> None:
    """Serve until told to stop."""
    loop = asyncio.get_event_loop()
    serving = loop.create_task(serve(listener, server))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def main(words: List[str]) -> int:
    """The program; its words are the server as HOST:PORT, and the port to listen on."""
    host, _colon, port = words[0].rpartition(":")
    with listening(int(words[1])) as listener:
        sys.stdout.write(f"Passing on port {words[1]} to {words[0]}\n")
        sys.stdout.flush()
        asyncio.run(run(listener, (host, int(port))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
