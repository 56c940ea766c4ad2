# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A receiver that gets blobs from other hosts, and what becomes of it when those fail, stall or lie."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import fetching, frames, receive
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer import Credential
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer_server import Server
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store

CONTENT = random.Random(3).getrandbits(8 * 2_000_000).to_bytes(2_000_000, "little")
DIGEST = hash_bytes(CONTENT)
SIZE = len(CONTENT)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are given up after half a second."""
    monkeypatch.setattr(receive, "Fetchers", lambda intake, pem: fetching.Fetchers(intake, pem, stall=0.5))


class Controller:
    """Talks to a receiver that runs in a thread, for a store of its own."""

    def __init__(self, root: Path, pem: str | None) -> None:
        self.store = Store(root)
        ours, self.target = os.pipe()
        self.source, theirs = os.pipe()
        self.receiver = receive.Receiver(ours, theirs, threads=2)
        self.thread = threading.Thread(target=self._run, args=(theirs,), daemon=True)
        self.thread.start()
        self.answers = frames.Answers()
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.say(frames.Open(str(root), "controller", "me", 1, credential=pem))
        self.hear(frames.READY)

    def _run(self, theirs: int) -> None:
        self.receiver.run()
        os.close(theirs)

    def say(self, command: Any, data: bytes = b"") -> None:
        content = frames.command_line(command) + data
        while content:
            content = content[os.write(self.target, content) :]

    def hear(self, *kinds: str) -> dict[str, Any]:
        """The next answer of one of some kinds."""
        while True:
            for number, (kind, frame) in enumerate(self.heard):
                if kind in kinds:
                    del self.heard[: number + 1]
                    return frame
            self.heard = self.answers.feed(os.read(self.source, 65536))

    def fetch(self, *peers: Any, digest: str = DIGEST, size: int = SIZE, offset: int = 0) -> None:
        self.say(frames.Fetch(digest, size, offset, tuple(("127.0.0.1", peer.port) for peer in peers)))

    def end(self) -> dict[str, Any]:
        self.say(frames.End())
        done = self.hear(frames.DONE)
        self.thread.join(10)
        return done[frames.DONE]


@pytest.fixture
def controller(tmp_path: Path, pem: str) -> Iterator[Controller]:
    made = Controller(tmp_path / "mine", pem)
    yield made
    os.close(made.target)
    made.thread.join(10)
    assert not made.thread.is_alive()


class Peer:
    """Another host: its store, and the server on it."""

    def __init__(self, root: Path, pem: str, **more: Any) -> None:
        self.store = Store(root)
        self.store.receive()
        self.server = Server(root, Credential(pem), "127.0.0.1", **{"idle": 60, "patience": 1, **more})
        self.port = self.server.port
        threading.Thread(target=self.server.serve, daemon=True).start()

    def has(self, content: bytes, digest: str = "") -> Peer:
        self.store.blob_path(digest or hash_bytes(content)).write_bytes(content)
        return self


class Nobody:
    """A port where nobody listens."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]


def test_a_blob_comes_from_a_peer_and_is_verified(controller: Controller, tmp_path: Path, pem: str) -> None:
    peer = Peer(tmp_path / "peer", pem).has(CONTENT)
    controller.fetch(peer)
    verified = controller.hear(frames.VERIFIED, frames.REFUSED)
    assert verified == {frames.VERIFIED: DIGEST, "size": SIZE, "source": f"127.0.0.1:{peer.port}"}
    assert controller.end() == {"adopted": 1, "hashed_bytes": SIZE, "from_peers_bytes": SIZE}
    assert controller.store.blob_path(DIGEST).read_bytes() == CONTENT
    assert Store(controller.store.root).sound([DIGEST]) == {DIGEST}


def test_many_small_ones_come_side_by_side(controller: Controller, tmp_path: Path, pem: str) -> None:
    contents = [b"", *(f"{number}".encode() * number for number in range(1, 300))]
    peer = Peer(tmp_path / "peer", pem)
    for content in contents:
        peer.has(content)
        controller.fetch(peer, digest=hash_bytes(content), size=len(content))
    for _content in contents:
        controller.hear(frames.VERIFIED)
    assert controller.end()["adopted"] == len(contents)
    assert all(controller.store.blob_path(hash_bytes(content)).read_bytes() == content for content in contents)


def test_what_is_there_already_is_not_fetched_again(controller: Controller, tmp_path: Path, pem: str) -> None:
    peer = Peer(tmp_path / "peer", pem).has(CONTENT)
    controller.store.partial_path(DIGEST).write_bytes(CONTENT[:1_500_000])
    controller.fetch(peer, offset=1_500_000)
    controller.hear(frames.VERIFIED)
    assert controller.end()["from_peers_bytes"] == SIZE - 1_500_000 == peer.server.sent


def test_blobs_from_peers_and_from_the_controller_at_once(controller: Controller, tmp_path: Path, pem: str) -> None:
    peer = Peer(tmp_path / "peer", pem).has(CONTENT)
    other = CONTENT[::-1]
    controller.fetch(peer)
    controller.say(frames.Blob(hash_bytes(other), SIZE, 0), other)
    found = {(each[frames.VERIFIED], each["source"]) for each in (controller.hear(frames.VERIFIED) for _both in "ab")}
    assert found == {(DIGEST, f"127.0.0.1:{peer.port}"), (hash_bytes(other), frames.CONTROLLER)}
    assert controller.end() == {"adopted": 2, "hashed_bytes": 2 * SIZE, "from_peers_bytes": SIZE}


def test_the_next_source_goes_on_where_the_one_before_broke_off(
    controller: Controller, tmp_path: Path, pem: str, hasty: None
) -> None:
    cut = Peer(tmp_path / "cut", pem, patience=0.6)
    cut.store.partial_path(DIGEST).write_bytes(CONTENT[:700_000])
    whole = Peer(tmp_path / "whole", pem).has(CONTENT)
    controller.fetch(Nobody(), cut, whole)
    assert controller.hear(frames.VERIFIED, frames.REFUSED).get("source") == f"127.0.0.1:{whole.port}"
    assert (cut.server.sent, whole.server.sent) == (700_000, SIZE - 700_000)
    assert controller.end()["from_peers_bytes"] == SIZE


def test_in_the_end_the_controller_is_asked_for_the_rest(controller: Controller, tmp_path: Path, pem: str) -> None:
    cut = Peer(tmp_path / "cut", pem, patience=0.6)
    cut.store.partial_path(DIGEST).write_bytes(CONTENT[:700_000])
    nobody = Nobody()
    controller.fetch(nobody, cut)
    refused = controller.hear(frames.REFUSED)
    assert (refused[frames.REFUSED], refused["offset"]) == (DIGEST, 700_000)
    assert f"127.0.0.1:{nobody.port} cannot be reached" in refused["why"]
    assert f"127.0.0.1:{cut.port} broke off" in refused["why"]
    controller.say(frames.Blob(DIGEST, SIZE, 700_000), CONTENT[700_000:])
    assert controller.hear(frames.VERIFIED)["source"] == frames.CONTROLLER
    assert controller.end()["from_peers_bytes"] == 700_000


def test_a_peer_that_lies_is_named_and_the_blob_taken_whole(controller: Controller, tmp_path: Path, pem: str) -> None:
    liar = Peer(tmp_path / "liar", pem).has(CONTENT[:-1] + b"!", DIGEST)
    controller.fetch(liar)
    refused = controller.hear(frames.REFUSED, frames.VERIFIED)
    assert refused["offset"] == 0 and refused["why"].startswith(f"127.0.0.1:{liar.port} gave wrong bytes: content")
    assert not controller.store.partial_path(DIGEST).exists()
    controller.say(frames.Blob(DIGEST, SIZE, 0), CONTENT)
    assert controller.hear(frames.VERIFIED)["source"] == frames.CONTROLLER
    assert controller.end()["adopted"] == 1


def test_a_lie_that_is_found_out_only_at_the_end_is_the_peers_too(
    controller: Controller, tmp_path: Path, pem: str
) -> None:
    liar = Peer(tmp_path / "liar", pem, patience=0.6)
    liar.store.partial_path(DIGEST).write_bytes(b"!" * 1000)
    controller.fetch(liar)
    assert controller.hear(frames.REFUSED)["offset"] == 1000
    controller.say(frames.Blob(DIGEST, SIZE, 1000), CONTENT[1000:])
    refused = controller.hear(frames.REFUSED, frames.VERIFIED, frames.DAMAGED)
    assert refused["offset"] == 0 and f"127.0.0.1:{liar.port} gave wrong bytes" in refused["why"]
    controller.say(frames.Blob(DIGEST, SIZE, 0), CONTENT)
    controller.hear(frames.VERIFIED)
    controller.end()


def test_a_peer_that_cannot_be_reached_is_tried_once(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    connect = socket.create_connection

    def watched(*where: Any) -> socket.socket:
        tried.append(where)
        return connect(*where)

    monkeypatch.setattr(socket, "create_connection", watched)
    nobody = Nobody()
    for number in range(50):
        controller.fetch(nobody, digest=f"sha256:{number:064x}", size=5)
    refused = [controller.hear(frames.REFUSED) for _number in range(50)]
    assert {frame["offset"] for frame in refused} == {0} and len({frame["why"] for frame in refused}) == 1
    assert len(tried) <= fetching.THREADS
    assert [path for path in controller.store.partial.iterdir() if path.stat().st_size] == []
    controller.end()


def test_a_peer_that_stalls_is_left(tmp_path: Path, pem: str, hasty: None) -> None:
    controller = Controller(tmp_path / "mine", pem)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peer = Nobody()
        peer.port = silent.getsockname()[1]
        began = time.monotonic()
        controller.fetch(peer)
        assert controller.hear(frames.REFUSED)["offset"] == 0 and time.monotonic() - began < 60
    controller.end()


def test_without_a_credential_nothing_is_fetched(tmp_path: Path) -> None:
    for pem, why in ((None, "there is no credential"), ("rubbish", "has no certificate")):
        controller = Controller(tmp_path / "mine", pem)
        controller.fetch(Nobody())
        assert why in controller.hear(frames.REFUSED)["why"]
        controller.end()


def test_a_full_disk_ends_the_session_with_the_reason(
    controller: Controller, tmp_path: Path, pem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(tmp_path / "peer", pem).has(CONTENT)

    def full(*_arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    controller.fetch(peer)
    failed = controller.hear(frames.FAILED)
    assert failed["kind"] == "full" and "The disk is full" in failed[frames.FAILED]
    monkeypatch.undo()


def test_a_controller_that_goes_away_ends_it_while_a_peer_is_waited_for(tmp_path: Path, pem: str) -> None:
    controller = Controller(tmp_path / "mine", pem)
    waiting = Peer(tmp_path / "peer", pem, patience=20)
    controller.fetch(waiting)
    time.sleep(0.3)
    os.close(controller.target)
    controller.thread.join(5)
    assert not controller.thread.is_alive()
