# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The way to an isolated server passes on every byte and every end, over real sockets."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Iterator, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import ingress

LIMIT = 60.0
RESET = struct.pack("ii", 1, 0)


def listening() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(LIMIT)
    return listener


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def free_port() -> int:
    with closing(listening()) as listener:
        return port_of(listener)


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=LIMIT)


def everything(one: socket.socket) -> bytes:
    """What comes until the end."""
    return b"".join(iter(lambda: one.recv(1 << 16), b""))


@pytest.fixture(name="server")
def a_server() -> Iterator[socket.socket]:
    with closing(listening()) as listener:
        yield listener


@pytest.fixture(name="way")
def a_way(server: socket.socket) -> Iterator[int]:
    """The port of an ingress to `server`, which knows it by name."""
    with way_to(port_of(server)) as (port, _process):
        yield port


class way_to:
    """An ingress as the release runs it, to a port of this machine; gives its port and its process."""

    def __init__(self, server: int) -> None:
        self.server = server

    def __enter__(self) -> Tuple[int, subprocess.Popen[str]]:
        port = free_port()
        command = [sys.executable, "-E", "-s", str(Path(ingress.__file__)), f"localhost:{self.server}", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"Passing on port {port} to localhost:{self.server}\n"
        return port, self.process

    def __exit__(self, *_error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(LIMIT) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_small_pieces_pass_at_once_both_ways(server: socket.socket, way: int) -> None:
    """As a streamed answer and a WebSocket need it: nothing waits for more."""
    with connected(way) as caller, closing(server.accept()[0]) as behind:
        behind.settimeout(LIMIT)
        for number in range(100):
            caller.sendall(b"ask %d" % number)
            assert behind.recv(100) == b"ask %d" % number
            behind.sendall(b"answer %d" % number)
            assert caller.recv(100) == b"answer %d" % number


def test_a_large_upload_arrives_whole_while_its_answer_begins(server: socket.socket, way: int) -> None:
    sent = os.urandom(1 << 20) * 32
    with connected(way) as caller, closing(server.accept()[0]) as behind:
        behind.settimeout(LIMIT)
        behind.sendall(b"going on")
        got = []
        reader = threading.Thread(target=lambda: got.append(hashlib.sha256(everything(behind)).digest()))
        reader.start()
        caller.sendall(sent)
        caller.shutdown(socket.SHUT_WR)
        reader.join(LIMIT)
        assert got == [hashlib.sha256(sent).digest()]
        behind.sendall(b", done")
        behind.close()
        assert everything(caller) == b"going on, done"


def test_the_end_of_one_direction_leaves_the_other(server: socket.socket, way: int) -> None:
    with connected(way) as caller, closing(server.accept()[0]) as behind:
        behind.settimeout(LIMIT)
        behind.shutdown(socket.SHUT_WR)
        assert caller.recv(1) == b""
        caller.sendall(b"still there")
        assert behind.recv(100) == b"still there"
        caller.close()
        assert behind.recv(1) == b""


def test_a_broken_connection_is_broken_on_the_other_side_too(server: socket.socket, way: int) -> None:
    with connected(way) as caller, closing(server.accept()[0]) as behind:
        behind.sendall(b"half of")
        assert caller.recv(100) == b"half of"
        behind.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        behind.close()
        with pytest.raises(ConnectionResetError):
            caller.recv(1)


def test_a_caller_who_leaves_is_gone_for_the_server(server: socket.socket, way: int) -> None:
    """So that nothing is generated for nobody."""
    caller = connected(way)
    with closing(server.accept()[0]) as behind:
        behind.settimeout(LIMIT)
        caller.close()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                behind.sendall(b"data: token\n\n" * 100)


def test_the_server_may_come_back_elsewhere_and_the_ingress_stays() -> None:
    port = free_port()
    with way_to(port) as (way, _process):
        with connected(way) as early, pytest.raises(ConnectionResetError):
            early.recv(1)
        for answer in (b"one", b"two"):
            with closing(socket.create_server(("127.0.0.1", port))) as server:
                server.settimeout(LIMIT)
                with connected(way) as caller, closing(server.accept()[0]) as behind:
                    behind.sendall(answer)
                    assert caller.recv(100) == answer


def test_many_callers_at_once_each_get_their_own_answer(server: socket.socket, way: int) -> None:
    callers = [connected(way) for _each in range(200)]
    behinds = [server.accept()[0] for _each in callers]
    for number, caller in enumerate(callers):
        caller.sendall(b"%d" % number)
    for behind in behinds:
        behind.settimeout(LIMIT)
        behind.sendall(b"for " + behind.recv(100))
        behind.close()
    for number, caller in enumerate(callers):
        assert everything(caller) == b"for %d" % number
        caller.close()


def test_it_ends_when_told_also_in_the_middle_of_a_conversation(server: socket.socket) -> None:
    with way_to(port_of(server)) as (way, _process):
        caller = connected(way)
        behind = server.accept()[0]
        caller.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        caller.recv(1)
    behind.close()
    caller.close()
