# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The receiver, driven through pipes: what arrives is verified and kept, whatever the controller does."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import stat
import threading
import time
from contextlib import contextmanager

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import receive as receive_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.frames import (
    Alive,
    Answers,
    Blob,
    End,
    Fetch,
    Open,
    command_line,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.receive import Receiver
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store

CONTENT = random.Random(4).getrandbits(8 * 3_000_000).to_bytes(3_000_000, "little")
DIGEST = hash_bytes(CONTENT)
WAIT = 20


class Line:
    """A controller, and a receiver in a thread at the other end of a pipe (or socket, as an SSH server has it)."""

    def __init__(self, root, kind="pipe", idle=WAIT, **opening):
        self.root = root
        if kind == "pipe":
            source, self.to_host = os.pipe()
        else:
            here, there = socket.socketpair()
            source, self.to_host = there.detach(), here.detach()
        self.from_host, target = os.pipe()
        self.answers = Answers()
        self.heard = []

        def run():
            Receiver(source, target, idle).run()
            os.close(target)
            os.close(source)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        self.say(Open(**{"root": str(root), "controller": "ctl", "user": "ops", "pid": 7, **opening}))

    def say(self, command, payload=b""):
        data = memoryview(command_line(command) + payload)
        while data:
            data = data[os.write(self.to_host, data) :]

    def send(self, content, offset=0, digest=None):
        self.say(Blob(digest or hash_bytes(content), len(content), offset), content[offset:])

    def hear(self, *kinds):
        """The next answer of one of these kinds."""
        while True:
            for place, (kind, frame) in enumerate(self.heard):
                if kind in kinds:
                    del self.heard[: place + 1]
                    return frame
            data = os.read(self.from_host, 65536)
            assert data, f"no {kinds}: {self.heard}"
            self.heard += self.answers.feed(data)

    def end(self):
        self.say(End())
        done = self.hear("done")["done"]
        self.gone()
        return done

    def hang_up(self):
        self.close()
        self.gone()

    def close(self):
        """Once: the number may be another file's by now."""
        if self.to_host >= 0:
            os.close(self.to_host)
        self.to_host = -1

    def gone(self):
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


@contextmanager
def line(*args, **kwargs):
    made = Line(*args, **kwargs)
    try:
        yield made
    finally:
        made.close()
        made.gone()


def is_in(root, content):
    """Whether a later question finds the blob, and without reading it."""
    store = Store(root)
    with store.locked():
        found = store.inventory({hash_bytes(content): len(content)})
    return not found.missing and store.hashed_bytes == 0


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_blobs_are_hashed_once_renamed_and_stamped(tmp_path, kind):
    small = [bytes([number]) * number for number in range(200)]
    with line(tmp_path / "root", kind) as host:
        ready = host.hear("ready")["ready"]
        assert ready["free_bytes"] > 0
        for content in (*small, CONTENT):
            host.send(content)
        names = {host.hear("verified")["verified"] for _blob in range(201)}
        assert names == {hash_bytes(content) for content in (*small, CONTENT)}
        done = host.end()
    size = sum(map(len, small)) + len(CONTENT)
    assert done == {"adopted": 201, "hashed_bytes": size, "from_peers_bytes": 0}
    assert all(is_in(tmp_path / "root", content) for content in (*small, CONTENT))
    assert list((tmp_path / "root/partial").iterdir()) == []
    blob = Store(tmp_path / "root").blob_path(DIGEST)
    assert blob.read_bytes() == CONTENT and stat.S_IMODE(blob.stat().st_mode) == 0o444


def test_a_cut_blob_goes_on_at_its_last_byte_and_verified_ones_stay(tmp_path):
    half = 1_234_567
    with line(tmp_path) as host:
        host.hear("ready")
        host.send(b"first")
        host.say(Blob(DIGEST, len(CONTENT), 0), CONTENT[:half])
        host.hang_up()
    assert is_in(tmp_path, b"first")
    partial = Store(tmp_path).partial_path(DIGEST)
    assert partial.read_bytes() == CONTENT[:half]
    with line(tmp_path) as host:
        host.hear("ready")
        host.send(CONTENT, offset=half)
        assert host.hear("verified")["verified"] == DIGEST
        assert host.end()["hashed_bytes"] == len(CONTENT)
    assert is_in(tmp_path, CONTENT)


def test_a_cut_in_the_middle_of_anything_does_no_harm(tmp_path):
    chance = random.Random(11)
    stream = command_line(Blob(DIGEST, len(CONTENT), 0)) + CONTENT + command_line(Blob(hash_bytes(b"z"), 1, 0)) + b"z"
    for number in range(10):
        root = tmp_path / str(number)
        cut = chance.choice([chance.randrange(200), chance.randrange(len(stream)), len(stream) - chance.randrange(200)])
        with line(root) as host:
            host.hear("ready")
            data = memoryview(stream)[:cut]
            while data:
                data = data[os.write(host.to_host, data) :]
            host.hang_up()
        store = Store(root)
        with store.locked():
            found = store.inventory({DIGEST: len(CONTENT)})
        assert not found.damaged, cut
        got = found.partial.get(DIGEST, 0)
        assert got == (0 if not found.missing else max(0, cut - len(command_line(Blob(DIGEST, len(CONTENT), 0))))), cut


def test_a_blob_that_does_not_verify_is_dropped_and_sent_again_in_the_same_session(tmp_path):
    root = tmp_path
    with line(root) as host:
        host.hear("ready")
        host.send(b"y" + CONTENT[1:], digest=DIGEST)
        damaged = host.hear("damaged")
        assert damaged["damaged"] == DIGEST and "content received is" in damaged["why"]
        assert not Store(root).partial_path(DIGEST).exists() and not Store(root).blob_path(DIGEST).exists()
        host.send(CONTENT)
        assert host.hear("verified")["verified"] == DIGEST
        assert host.end()["adopted"] == 1
    assert is_in(root, CONTENT)


def test_what_is_on_the_host_decides_where_a_blob_goes_on(tmp_path):
    store = Store(tmp_path)
    store.receive()
    store.partial_path(DIGEST).write_bytes(CONTENT[:1000])
    with line(tmp_path) as host:
        host.hear("ready")
        host.send(CONTENT, offset=2000)
        refused = host.hear("refused")
        assert (refused["refused"], refused["offset"]) == (DIGEST, 1000)
        host.send(CONTENT, offset=500)
        assert host.hear("verified")["verified"] == DIGEST
        host.end()
    assert is_in(tmp_path, CONTENT)


def test_links_and_second_names_in_the_receiving_area_lead_nowhere(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.write_bytes(b"untouched")
    store = Store(root)
    store.receive()
    others = [b"one" * 9, b"two" * 9, b"three" * 9]
    names = [store.partial_path(hash_bytes(content)) for content in others]
    names[0].symlink_to(outside)
    os.link(outside, names[1])
    names[2].mkdir()
    (names[2] / "file").touch()
    with line(root) as host:
        host.hear("ready")
        for content in others:
            host.send(content)
            assert host.hear("refused")["offset"] == 0
            host.send(content)
            assert host.hear("verified")["verified"] == hash_bytes(content)
        host.end()
    assert outside.read_bytes() == b"untouched"


def test_a_second_controller_waits_or_leaves_with_the_name_of_the_first(tmp_path):
    with line(tmp_path, controller="first", user="ann", pid=11) as one:
        token = one.hear("ready")["ready"]["token"]
        with line(tmp_path, controller="second") as other:
            busy = other.hear("busy")["busy"]
            assert (busy["controller"], busy["user"], busy["pid"]) == ("first", "ann", 11) and "token" not in busy
            failed = other.hear("failed")
            assert failed["kind"] == "busy" and "ann on first (process 11), since 2" in failed["failed"]
            other.gone()
        with line(tmp_path, token="guessed") as liar:
            assert liar.hear("failed")["kind"] == "busy"
        with line(tmp_path, token=token) as stream:
            assert stream.hear("ready")["ready"]["token"] == token
            stream.send(b"by the second stream")
            stream.hear("verified")
            with line(tmp_path, controller="third", wait=WAIT) as third:
                third.hear("busy")
                third.say(Alive())
                one.end()
                time.sleep(0.5)
                assert not third.heard
                stream.end()
                third.hear("ready")
                assert is_in(tmp_path, b"by the second stream")
                third.end()


def test_a_waiting_controller_that_goes_away_leaves_nothing_waiting(tmp_path):
    with line(tmp_path) as one:
        one.hear("ready")
        with line(tmp_path, wait=3600) as other:
            other.hear("busy")
            other.hang_up()
        one.end()


def test_silence_ends_the_session_and_signs_of_life_keep_it(tmp_path):
    with line(tmp_path, idle=0.4) as host:
        host.hear("ready")
        host.send(b"kept")
        host.hear("verified")
        for _sign in range(8):
            time.sleep(0.1)
            host.say(Alive())
        assert host.thread.is_alive()
        host.thread.join(WAIT)
        assert not host.thread.is_alive()
    assert is_in(tmp_path, b"kept")


def test_a_full_disk_is_told_in_numbers_and_what_arrived_stays(tmp_path, monkeypatch):
    real, written = os.pwrite, []

    def pwrite(handle, data, position):
        if position >= 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data))
        return real(handle, data[: 1_000_000 - position], position)

    with line(tmp_path) as host:
        host.hear("ready")
        host.send(b"fits")
        host.hear("verified")
        monkeypatch.setattr(os, "pwrite", pwrite)
        try:
            host.send(CONTENT)
        except OSError:
            pass
        failed = host.hear("failed")
        monkeypatch.undo()
        assert failed["kind"] == "full"
        assert failed["failed"].startswith(f"The disk is full: {tmp_path}/partial needs 1.9 MiB, ")
        host.gone()
    assert Store(tmp_path).partial_path(DIGEST).read_bytes() == CONTENT[:1_000_000] and is_in(tmp_path, b"fits")


def test_what_is_not_the_protocol_ends_the_session(tmp_path):
    with line(tmp_path) as host:
        host.hear("ready")
        os.write(host.to_host, b"GET / HTTP/1.1\r\n\r\n")
        assert "not a frame" in host.hear("failed")["failed"]
        host.gone()


def test_a_blob_that_another_process_took_in_meanwhile_is_in(tmp_path):
    with line(tmp_path) as host:
        host.hear("ready")
        host.say(Blob(DIGEST, len(CONTENT), 0), CONTENT[:-1])
        partial = Store(tmp_path).partial_path(DIGEST)
        while not partial.exists() or partial.stat().st_size < len(CONTENT) - 1:
            time.sleep(0.01)
        partial.rename(Store(tmp_path).blob_path(DIGEST))
        os.write(host.to_host, CONTENT[-1:])
        assert host.hear("verified", "damaged")["verified"] == DIGEST
        host.end()
    assert is_in(tmp_path, CONTENT)


def test_how_far_it_is_is_told_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(receive_module, "REPORT_EVERY", 0.05)
    with line(tmp_path) as host:
        host.hear("ready")
        host.say(Blob(DIGEST, len(CONTENT), 0), CONTENT[:1000])
        assert host.hear("got")["got"] == {DIGEST: 1000}
        host.hang_up()


def test_a_receiver_that_cannot_fetch_says_so(tmp_path):
    with line(tmp_path) as host:
        host.hear("ready")
        host.say(Fetch(DIGEST, len(CONTENT), 0, (("127.0.0.1", 1),)))
        assert host.hear("refused")["offset"] == 0
        host.end()


def test_stamps_of_two_processes_come_together(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    for store, content in ((one, b"one"), (two, b"two")):
        store.receive()
        store.partial_path(hash_bytes(content)).write_bytes(content)
        handle = store.claim(hash_bytes(content))
        assert store.admit(hash_bytes(content), handle, hash_bytes(content)) is None
        os.close(handle)
    one.commit()
    two.commit()
    assert is_in(tmp_path, b"one") and is_in(tmp_path, b"two")
    assert len(json.loads((tmp_path / "state/stamps.json").read_text())["files"]) == 2


def test_nobody_says_anything_after_the_end():
    source, to_host = os.pipe()
    from_host, target = os.pipe()
    os.close(to_host)
    receiver = Receiver(source, target)
    receiver.run()
    receiver.answer({"refused": "late"})
    os.close(target)
    assert os.read(from_host, 1000) == b""
