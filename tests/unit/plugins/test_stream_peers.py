# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Streams to real receivers that fetch from real servers: the controller sends what nobody else gives."""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer import Credential
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer_server import Server
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import transfer_plan, travelling
from ansible_collections.airgap.xinference.plugins.plugin_utils.credential import new_credential
from ansible_collections.airgap.xinference.plugins.plugin_utils.fanout import Source
from ansible_collections.airgap.xinference.plugins.plugin_utils.feeding import Tally
from ansible_collections.airgap.xinference.plugins.plugin_utils.fleet import refusal_text, refusals
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_process import Launcher
from ansible_collections.airgap.xinference.plugins.plugin_utils.progress import Progress
from ansible_collections.airgap.xinference.plugins.plugin_utils.shipping import Shipment, summary, together
from ansible_collections.airgap.xinference.plugins.plugin_utils.transport import Session, Stream

CHANCE = random.Random(11)
CONTENTS = {hash_bytes(content): content for content in (CHANCE.randbytes(size) for size in (3_000_000, 2_000_000, 70))}
SIZES = {digest: len(content) for digest, content in CONTENTS.items()}
BIG, OTHER, TINY = SIZES
TOTAL = sum(SIZES.values())


@pytest.fixture(scope="module")
def pem() -> str:
    return new_credential()


class Site:
    """A bundle, a host, and others that have what the test gives them."""

    def __init__(self, place: Path, pem: str) -> None:
        self.place, self.pem = place, pem
        self.bundle = Bundle(place / "bundle", [])
        self.store = Store(place / "mine")
        self.progress: Progress
        for digest, content in CONTENTS.items():
            path = self.bundle.blob_path(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    @contextlib.contextmanager
    def peer(self, name: str, blobs: Mapping[str, bytes], patience: float = 1) -> Iterator[Source]:
        store = Store(self.place / name)
        store.receive()
        for digest, content in blobs.items():
            whole = len(content) == SIZES[digest]
            (store.blob_path(digest) if whole else store.partial_path(digest)).write_bytes(content)
        server = Server(store.root, Credential(self.pem), "127.0.0.1", idle=60, patience=patience)
        thread = threading.Thread(target=server.serve)
        thread.start()
        yield Source(name, "127.0.0.1", server.port)
        server._idle = 0.2
        thread.join(20)

    def send(self, sources: Mapping[str, List[Source]], partial: Mapping[str, int] | None = None, **more: Any) -> Tally:
        steps = travelling(transfer_plan(SIZES, (), partial or {}))
        self.progress = Progress("site1", sum(step.travels for step in steps), print)
        session = Session(str(self.store.root), credential=self.pem, **more)
        ways = [Launcher(("/bin/sh", "-c"), own=False)]
        tally = Tally()
        Stream(ways, sys.executable, self.bundle, session, print, {}, sources).send(steps, self.progress, tally)
        assert {digest: self.store.blob_path(digest).read_bytes() for digest in SIZES} == CONTENTS
        assert self.progress.done == self.progress.total
        return tally


@pytest.fixture
def site(tmp_path: Path, pem: str) -> Site:
    return Site(tmp_path, pem)


def nobody() -> Source:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Source("gone", "127.0.0.1", probe.getsockname()[1])


def test_only_what_nobody_else_gives_is_sent(site: Site) -> None:
    with site.peer("one", CONTENTS) as one, site.peer("two", CONTENTS) as two:
        tally = site.send({BIG: [one, two], OTHER: [two]})
    assert (tally.sent_bytes, tally.from_peers_bytes) == (70, TOTAL - 70)
    assert (tally.blobs, tally.hashed_bytes) == (3, TOTAL)
    assert sorted(tally.peers) == ["one", "two"] and tally.refused == {}
    assert site.progress.total == TOTAL


def test_what_a_peer_has_only_in_part_is_completed_from_here(site: Site) -> None:
    with site.peer("one", {BIG: CONTENTS[BIG][:1_000_000]}) as one:
        tally = site.send({BIG: [one]})
    assert (tally.sent_bytes, tally.from_peers_bytes) == (TOTAL - 1_000_000, 1_000_000)
    ((why, count),) = tally.refused.items()
    assert why == f"one (127.0.0.1:{one.port}) broke off" and count == 1 and site.progress.total == TOTAL


def test_what_is_there_in_part_is_fetched_from_there_on(site: Site) -> None:
    site.store.receive()
    site.store.partial_path(BIG).write_bytes(CONTENTS[BIG][:2_500_000])
    with site.peer("one", CONTENTS) as one:
        tally = site.send({BIG: [one]}, {BIG: 2_500_000})
    assert (tally.sent_bytes, tally.from_peers_bytes) == (2_000_070, 500_000)


def test_when_nobody_can_be_reached_everything_is_sent_and_the_reason_told_once(site: Site) -> None:
    source = nobody()
    tally = site.send({digest: [source] for digest in SIZES})
    assert (tally.sent_bytes, tally.from_peers_bytes, tally.peers) == (TOTAL, 0, [])
    ((why, count),) = tally.refused.items()
    assert why.startswith(f"gone (127.0.0.1:{source.port}) cannot be reached") and count == 3
    assert site.progress.total == TOTAL
    assert refusal_text(tally.refused) == f"3 blobs came from the controller instead of other hosts: {why}"


def test_a_liar_is_named_and_the_blob_sent_whole(site: Site) -> None:
    with site.peer("liar", {BIG: CONTENTS[BIG][:-1] + b"?"}) as liar:
        tally = site.send({BIG: [liar]})
    assert (tally.sent_bytes, tally.from_peers_bytes, tally.peers) == (TOTAL, 0, [])
    ((why, _count),) = tally.refused.items()
    assert why.startswith(f"liar (127.0.0.1:{liar.port}) gave wrong bytes: content received is sha256:")
    assert TOTAL <= site.progress.total <= TOTAL + SIZES[BIG]


def test_with_several_streams_every_blob_comes_once(site: Site) -> None:
    with site.peer("one", CONTENTS) as one:
        tally = site.send({BIG: [nobody(), one], TINY: [one]}, streams=3)
    assert (tally.sent_bytes, tally.from_peers_bytes) == (2_000_000, 3_000_070)


def test_reasons_are_told_by_their_number() -> None:
    assert refusals({"rare": 1, "often": 7}) == [{"why": "often", "blobs": 7}, {"why": "rare", "blobs": 1}]
    told = refusal_text({"rare": 1, "often": 7})
    assert told == "8 blobs came from the controller instead of other hosts: often (and another reason for 1)"


def test_shipments_add_up_and_are_told() -> None:
    counted: Dict[str, Any] = {"changed": True, "transports": ["stream"], "blobs": 2}
    one = Shipment(sent_bytes=1000, from_peers_bytes=3000, peers=["a"], refused={"why": 1}, **counted)
    two = Shipment(sent_bytes=24, from_peers_bytes=72, peers=["b", "a"], refused={"why": 2, "other": 1}, **counted)
    total = together([one, two])
    assert (total.sent_bytes, total.from_peers_bytes, total.peers) == (1024, 3072, ["a", "b"])
    assert total.refused == {"why": 3, "other": 1}
    told = summary(total, 5120, 2)
    assert "1.0 KiB sent by stream and 3.0 KiB got from other hosts in 2.0 s (2.0 KiB/s), 1.0 KiB were" in told
