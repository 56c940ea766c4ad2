# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blobs from host to host: what is there, what still grows, and nothing for strangers."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import peer_process, peer_server
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer import Credential, Peer, PeerError, fetch
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer_server import Server
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError

CONTENT = random.Random(7).getrandbits(8 * 3_000_000).to_bytes(3_000_000, "little")
DIGEST = hash_bytes(CONTENT)
SIZE = len(CONTENT)


@pytest.fixture(scope="module")
def credential(pem: str) -> Credential:
    return Credential(pem)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "root")
    made.receive()
    return made


@contextlib.contextmanager
def serving(store: Store, credential: Credential, **more: Any) -> Iterator[Server]:
    """A server in a thread; at the end of the block it ends by its idle time, when nobody is connected any more."""
    server = Server(store.root, credential, "127.0.0.1", **{"idle": 60, "patience": 1.0, **more})
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server._idle = 0.2
        thread.join(30)
        assert not thread.is_alive()


def got(server: Server, credential: Credential, offset: int = 0, size: int = SIZE, digest: str = DIGEST) -> bytes:
    return b"".join(fetch("127.0.0.1", server.port, credential, digest, offset, size, stall=5))


def test_a_blob_comes_whole_or_from_an_offset(store: Store, credential: Credential) -> None:
    store.blob_path(DIGEST).write_bytes(CONTENT)
    with serving(store, credential) as server:
        assert got(server, credential) == CONTENT
        assert got(server, credential, SIZE - 5) == CONTENT[-5:]
        assert got(server, credential, SIZE) == b""
    assert server.sent == SIZE + 5


def test_one_connection_serves_many_requests(store: Store, credential: Credential) -> None:
    contents = [bytes([number]) * (number + 1) for number in range(40)]
    for content in contents:
        store.blob_path(hash_bytes(content)).write_bytes(content)
    with serving(store, credential) as server:
        peer = Peer("127.0.0.1", server.port, credential, 5)
        connections = set()
        for content in contents:
            assert b"".join(peer.fetch(hash_bytes(content), 0, len(content))) == content
            connections.add(peer._connection)
            with pytest.raises(PeerError, match="has no such blob"):
                list(peer.fetch(hash_bytes(content), 0, len(content) + 1))
        peer.close()
    assert len(connections) == 1


def test_a_connection_that_ended_meanwhile_is_made_again(store: Store, credential: Credential) -> None:
    store.blob_path(DIGEST).write_bytes(CONTENT)
    with serving(store, credential) as server:
        peer = Peer("127.0.0.1", server.port, credential, 5)
        list(peer.fetch(DIGEST, SIZE - 1, SIZE))
        assert peer._connection is not None
        peer._connection.shutdown(socket.SHUT_RDWR)
        assert b"".join(peer.fetch(DIGEST, SIZE - 1, SIZE)) == CONTENT[-1:]
        peer.close()


def test_a_blob_that_still_grows_is_passed_on_at_once_and_survives_its_new_name(
    store: Store, credential: Credential
) -> None:
    partial = store.partial_path(DIGEST)
    partial.write_bytes(CONTENT[:1000])
    arrived = bytearray()

    def take() -> None:
        for chunk in fetch("127.0.0.1", server.port, credential, DIGEST, 0, SIZE, stall=5):
            arrived.extend(chunk)

    with serving(store, credential) as server:
        thread = threading.Thread(target=take)
        thread.start()
        for start in range(1000, SIZE, 400_000):
            deadline = time.monotonic() + 5
            while len(arrived) < start and time.monotonic() < deadline:
                time.sleep(0.005)
            assert len(arrived) == start, "bytes were not passed on before the next ones came"
            with partial.open("ab") as file:
                file.write(CONTENT[start : start + 400_000])
        partial.replace(store.blob_path(DIGEST))
        thread.join(10)
    assert bytes(arrived) == CONTENT


def test_a_chain_of_hosts_does_not_wait_for_the_end(tmp_path: Path, credential: Credential) -> None:
    stores = [Store(tmp_path / str(number)) for number in range(4)]
    for store in stores:
        store.receive()
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(serving(store, credential)) for store in stores]

        def pass_on(number: int) -> None:
            port = servers[number - 1].port
            with stores[number].partial_path(DIGEST).open("wb", buffering=0) as file:
                for chunk in fetch("127.0.0.1", port, credential, DIGEST, 0, SIZE, stall=5):
                    file.write(chunk)

        threads = [threading.Thread(target=pass_on, args=(number,)) for number in range(1, 4)]
        for thread in threads:
            thread.start()
        with stores[0].partial_path(DIGEST).open("wb", buffering=0) as file:
            file.write(CONTENT[:1_000_000])
            deadline = time.monotonic() + 10
            last = stores[3].partial_path(DIGEST)
            while time.monotonic() < deadline and not (last.exists() and last.stat().st_size == 1_000_000):
                time.sleep(0.01)
            assert last.stat().st_size == 1_000_000
            file.write(CONTENT[1_000_000:])
        for thread in threads:
            thread.join(10)
    assert stores[3].partial_path(DIGEST).read_bytes() == CONTENT


def test_what_is_not_there_yet_is_waited_for_while_something_arrives(store: Store, credential: Credential) -> None:
    def receive() -> None:
        other = store.partial / ("0" * 64)
        for number in range(12):
            other.write_bytes(b"x" * number)
            time.sleep(0.4)
        whole = store.partial / ("1" * 64)
        whole.write_bytes(CONTENT)
        whole.rename(store.blob_path(DIGEST))

    thread = threading.Thread(target=receive)
    thread.start()
    with serving(store, credential, patience=3) as server:
        assert got(server, credential) == CONTENT
    thread.join()


@pytest.mark.parametrize("there", ["nothing", "a blob of another size", "what an earlier run left"])
def test_what_does_not_come_is_refused_once_nothing_arrives(store: Store, credential: Credential, there: str) -> None:
    if there == "a blob of another size":
        store.blob_path(DIGEST).write_bytes(CONTENT + b"!")
    if there == "what an earlier run left":
        store.partial_path(DIGEST).write_bytes(CONTENT[:1000])
        os.utime(store.partial_path(DIGEST), (1, 1))
    began = time.monotonic()
    with serving(store, credential, patience=3) as server:
        with pytest.raises(PeerError, match="has no such blob"):
            got(server, credential)
        # A second question is not waited for again.
        first = time.monotonic() - began
        with pytest.raises(PeerError, match="has no such blob"):
            got(server, credential)
        assert time.monotonic() - began < first + 2.5


@pytest.mark.parametrize("fault", ["stops", "removed", "replaced"])
def test_a_blob_that_does_not_go_on_is_broken_off(store: Store, credential: Credential, fault: str) -> None:
    partial = store.partial_path(DIGEST)
    partial.write_bytes(CONTENT[:5000])
    arrived = b""
    with serving(store, credential) as server, pytest.raises(PeerError, match="broke off"):
        for chunk in fetch("127.0.0.1", server.port, credential, DIGEST, 0, SIZE, stall=5):
            arrived += chunk
            if fault != "stops":
                partial.unlink()
            if fault == "replaced":
                partial.write_bytes(CONTENT)
    assert arrived == CONTENT[:5000]


def test_what_leaves_the_store_is_kept_for_those_who_come_later(store: Store, credential: Credential) -> None:
    gone = hash_bytes(b"not kept")
    with serving(store, credential, keep=[DIGEST, gone], patience=0.3) as server:
        time.sleep(0.1)
        store.blob_path(DIGEST).write_bytes(CONTENT)
        deadline = time.monotonic() + 5
        while not server._kept and time.monotonic() < deadline:
            time.sleep(0.01)
        store.blob_path(DIGEST).unlink()
        assert got(server, credential) == CONTENT == got(server, credential)
        with pytest.raises(PeerError, match="has no such blob"):
            got(server, credential, digest=gone)


@pytest.mark.parametrize("there", [0, 5000])
def test_who_hangs_up_while_nothing_comes_is_not_waited_for(store: Store, credential: Credential, there: int) -> None:
    store.partial_path(DIGEST).write_bytes(CONTENT[:there])
    # The server ends in time only if it notices: it would wait for the blob for five minutes.
    with serving(store, credential, patience=300) as server:
        chunks = fetch("127.0.0.1", server.port, credential, DIGEST, 0, SIZE, stall=0.3)
        with pytest.raises(PeerError, match="no answer in time"):
            for _chunk in chunks:
                pass


def test_links_and_other_things_are_not_served(store: Store, credential: Credential, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    store.blob_path(DIGEST).symlink_to(secret)
    os.mkfifo(store.partial_path(DIGEST))
    with serving(store, credential) as server, pytest.raises(PeerError, match="has no such blob"):
        got(server, credential)


@pytest.mark.parametrize(
    "request_line",
    [
        "GET / HTTP/1.1",
        "GET /../../etc/passwd HTTP/1.1",
        f"GET /blobs/sha256/{'0' * 64} HTTP/1.1",
        f"GET /{'0' * 63}G HTTP/1.1",
        f"GET /{'0' * 65} HTTP/1.1",
        f"PUT /{'0' * 64} HTTP/1.1",
        f"GET /{'0' * 64} HTTP/1.1\r\nX: 1",
        "rubbish",
        "x" * 9000,
    ],
)
def test_nothing_but_blobs_can_be_asked_for(store: Store, credential: Credential, request_line: str) -> None:
    with serving(store, credential) as server:
        plain = socket.create_connection(("127.0.0.1", server.port), 5)
        with credential.client.wrap_socket(plain) as connection:
            connection.sendall(f"{request_line}\r\n\r\n".encode())
            try:
                answer = connection.recv(4096)
            except OSError:
                answer = b""
            assert not answer or answer.startswith(b"HTTP/1.1 400 ")


def test_strangers_are_not_let_in(store: Store, credential: Credential, key_pair: Callable[[], str]) -> None:
    store.blob_path(DIGEST).write_bytes(CONTENT)
    stranger = Credential(key_pair())
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    with serving(store, credential) as server:
        with pytest.raises(PeerError, match="is not who it should be") as caught:
            got(server, stranger)
        assert caught.value.gone
        # Who does not check the server, and shows another certificate, or none.
        for context in (unchecked, stranger.client):
            context.verify_mode = ssl.CERT_NONE
            plain = socket.create_connection(("127.0.0.1", server.port), 5)
            with pytest.raises(OSError), context.wrap_socket(plain) as connection:
                connection.sendall(f"GET /{DIGEST[7:]} HTTP/1.1\r\nRange: bytes=0-9\r\n\r\n".encode())
                if not connection.recv(100):
                    raise OSError("hung up")
        assert got(server, credential) == CONTENT
    assert server.sent == SIZE


def test_a_server_with_another_certificate_is_not_believed(
    store: Store, credential: Credential, key_pair: Callable[[], str]
) -> None:
    with serving(store, Credential(key_pair())) as server, pytest.raises(PeerError) as caught:
        got(server, credential)
    assert caught.value.gone


def test_silent_strangers_neither_block_nor_keep_it_alive(store: Store, credential: Credential) -> None:
    store.blob_path(DIGEST).write_bytes(CONTENT)
    silent = []
    with serving(store, credential) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port), 5) for _number in range(8)]
        assert got(server, credential) == CONTENT
    for connection in silent:
        connection.close()


def test_there_are_never_too_many_connections(
    store: Store, credential: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.blob_path(DIGEST).write_bytes(CONTENT)
    monkeypatch.setattr(peer_server, "CONNECTIONS", 2)
    with serving(store, credential) as server:
        peers = [Peer("127.0.0.1", server.port, credential, 5) for _number in range(3)]
        for peer in peers[:2]:
            assert list(peer.fetch(DIGEST, SIZE - 1, SIZE))
        with pytest.raises(PeerError) as caught:
            list(peers[2].fetch(DIGEST, SIZE - 1, SIZE))
        assert caught.value.gone
        for peer in peers:
            peer.close()


def test_a_peer_that_is_not_there_is_gone_within_seconds(credential: Credential) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(PeerError, match="cannot be reached") as caught:
        list(fetch("127.0.0.1", port, credential, DIGEST, 0, SIZE))
    assert caught.value.gone


class Fake:
    """A peer with the right credential that says what it likes."""

    def __init__(self, credential: Credential, *says: bytes, hold: float = 0) -> None:
        self.credential, self.says, self.hold = credential, says, hold
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _address = self.socket.accept()
                with contextlib.suppress(OSError), self.credential.server.wrap_socket(plain, server_side=True) as one:
                    one.recv(4096)
                    for text in self.says:
                        one.sendall(text)
                        time.sleep(0.02)
                    time.sleep(self.hold)


HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize(
    ("says", "hold", "message"),
    [
        ([HEAD, b"ab"], 0, "broke off"),
        ([HEAD, b"ab"], 3, "no answer in time"),
        ([HEAD + b"abcd"], 0, "sent too much"),
        ([b"HTTP/1.1 500 Oops\r\n\r\n"], 0, "answered 500"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], 0, "does not speak our language"),
        ([b"x" * 9000], 0, "said too much"),
        ([], 3, "no answer in time"),
        ([], 0, "hung up"),
    ],
)
def test_a_peer_that_does_not_keep_to_the_rules_is_left(
    credential: Credential, says: list[bytes], hold: float, message: str
) -> None:
    fake = Fake(credential, *says, hold=hold)
    with pytest.raises(PeerError, match=message):
        list(fetch("127.0.0.1", fake.port, credential, DIGEST, 0, 3, stall=0.4))
    fake.socket.close()


def test_answers_may_come_in_any_pieces(credential: Credential) -> None:
    wait = b"HTTP/1.1 102 Processing\r\n\r\n"
    for says in ([wait, wait + HEAD, b"abc"], [wait + wait + HEAD + b"ab", b"c"], [wait[:9], wait[9:] + HEAD + b"abc"]):
        fake = Fake(credential, *says)
        assert b"".join(fetch("127.0.0.1", fake.port, credential, DIGEST, 0, 3, stall=2)) == b"abc"
        fake.socket.close()


def test_only_a_whole_pair_is_a_credential(pem: str) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        Credential("rubbish")
    certificate = pem[pem.index("-----BEGIN CERTIFICATE") :]
    with pytest.raises(ValueError, match="cannot be used"):
        Credential(certificate)
    assert "PRIVATE" not in str(vars(Credential(pem)))


def test_the_key_is_loaded_without_memory_files_too(pem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Credential(pem).fingerprint and list(tmp_path.iterdir()) == []


# --- as a process of its own ------------------------------------------------------------------------------------------

RUN = "0123456789abcdef"


def ends(pid: int, seconds: float = 40) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_a_server_is_left_behind_and_ended(store: Store, credential: Credential) -> None:
    store.blob_path(DIGEST).write_bytes(CONTENT)
    found = peer_process.start(store, RUN, credential, "127.0.0.1", 0, 60, 60)
    process = Path(f"/proc/{found.pid}")
    try:
        assert peer_process.standing(store) == [found]
        assert b"".join(fetch("127.0.0.1", found.port, credential, DIGEST, 0, SIZE)) == CONTENT
        assert os.getsid(found.pid) != os.getsid(0) and os.readlink(process / "cwd") == "/"
        files = sorted(os.readlink(entry) for entry in (process / "fd").iterdir())
        assert len([name for name in files if name == os.devnull]) == 3
        assert [name for name in files if str(store.root) in name] == [
            f"{store.state}/peer-{RUN}.json",
            f"{store.state}/peer.log",
        ]
        assert len(files) <= 7, files
        assert (process / "comm").read_text() == "xinference-peer\n"
        assert {oct(path.stat().st_mode & 0o777) for path in store.state.glob("peer*")} == {"0o600"}
    finally:
        peer_process.stop(store, [found])
    assert ends(found.pid) and peer_process.standing(store) == []
    assert sorted(path.name for path in store.state.iterdir()) == ["peer.lock", "peer.log"]
    assert "listening on 127.0.0.1" in (store.state / "peer.log").read_text()


def test_it_ends_by_itself(store: Store, credential: Credential) -> None:
    for idle, limit in ((0.3, 60), (60, 0.3)):
        found = peer_process.start(store, RUN, credential, "127.0.0.1", 0, idle, limit)
        assert ends(found.pid) and peer_process.standing(store) == []
        assert "ending" in (store.state / "peer.log").read_text()


def test_runs_side_by_side_do_not_end_each_other(store: Store, credential: Credential) -> None:
    one = peer_process.start(store, RUN, credential, "127.0.0.1", 0, 60, 60)
    two = peer_process.start(store, RUN[::-1], credential, "127.0.0.1", 0, 60, 60)
    assert peer_process.standing(store) == [one, two]
    peer_process.stop(store, [one])
    assert peer_process.standing(store) == [two]
    peer_process.stop(store, [two])
    assert ends(one.pid) and ends(two.pid)


def test_what_a_crash_left_is_no_server(store: Store, credential: Credential) -> None:
    found = peer_process.start(store, RUN, credential, "127.0.0.1", 0, 60, 60)
    os.kill(found.pid, 9)
    assert ends(found.pid) and peer_process.standing(store) == [] and list(store.state.glob("peer-*"))
    peer_process.stop(store, [])
    assert not list(store.state.glob("peer-*"))
    again = peer_process.start(store, RUN, credential, "127.0.0.1", 0, 60, 60)
    assert peer_process.standing(store) == [again]
    peer_process.stop(store, [again, found])


def test_a_port_that_is_taken_or_an_address_of_others_is_told(store: Store, credential: Credential) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        peer_process.start(store, RUN, credential, "127.0.0.1", other.getsockname()[1], 60, 60)
    with pytest.raises(OSError, match="assign"):
        peer_process.start(store, RUN, credential, "198.51.100.7", 0, 60, 60)
    with pytest.raises(StoreError, match="name of a run"):
        peer_process.start(store, "../../etc", credential, "127.0.0.1", 0, 60, 60)
    assert peer_process.standing(store) == [] and not list(store.state.glob("peer-*"))


def test_the_address_is_one_that_others_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"here": ["127.0.1.1"], "both": ["127.0.1.1", "10.9.0.4"], "far": ["10.9.0.9"], "gate": ["198.51.100.7"]}
    monkeypatch.setattr(peer_process, "_addresses", lambda name: names.get(name, []))
    monkeypatch.setattr(peer_process, "_is_mine", lambda address: address in ("127.0.1.1", "127.0.0.1", "10.9.0.4"))
    monkeypatch.setattr(peer_process, "_way_to", lambda name: {"far": "10.9.0.4", "local": "127.0.0.1"}.get(name, ""))
    own = peer_process.own_address
    assert own("both", []) == "10.9.0.4"
    # A name that leads to the loopback (Debian gives hosts such a line) is no use to others.
    assert own("here", ["far"]) == "10.9.0.4"
    assert own("gate", ["far"]) == "10.9.0.4"
    assert own("gate", ["nowhere"], "10.1.1.1 5022 10.9.0.4 22") == "10.9.0.4"
    assert own("gate", ["nowhere"]) == ""
    assert own("here", []) == own("here", ["nowhere"], "127.0.0.1 5022 127.0.1.1 22") == ""
    # Hosts that are all on one machine.
    assert own("here", ["local"]) == "127.0.1.1"
    assert own("here", ["local", "far"]) == "10.9.0.4"


def test_it_never_listens_on_all_interfaces() -> None:
    for address in ("0.0.0.0", "::"):
        assert not peer_process._is_mine(address)
    assert peer_process.own_address("0.0.0.0", []) == ""
