# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The loop that ships a host: it ends complete, or with a message, whatever happens on the way."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import Artifact, Blob
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import Step
from ansible_collections.airgap.xinference.plugins.plugin_utils.feeding import Tally
from ansible_collections.airgap.xinference.plugins.plugin_utils.progress import Progress, duration_text
from ansible_collections.airgap.xinference.plugins.plugin_utils.shipping import (
    ROUNDS,
    ShippingError,
    missing_blobs,
    ship,
    summary,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.transport import (
    DiskFull,
    Hopeless,
    Overtaken,
    PutFile,
    TransportError,
    Unusable,
)

MANIFEST, ONE, TWO = (hash_bytes(name) for name in (b"manifest", b"one", b"two"))
SIZES = {MANIFEST: 10, ONE: 1000, TWO: 2000}
ARTIFACT = Artifact("models", "m", MANIFEST, 3000, "", blobs=tuple(Blob(*item) for item in SIZES.items()))


class Host:
    """A host as the store module describes it: it only asks for blobs once it has the manifest."""

    def __init__(self, free=10**9):
        self.has, self.partial, self.damaged, self.free, self.questions = set(), {}, {}, free, 0
        self.fault = None

    @property
    def turn(self):
        return self.questions

    def ask(self):
        self.questions += 1
        wanted = SIZES if MANIFEST in self.has else {MANIFEST: 10}
        missing = {digest: size for digest, size in wanted.items() if digest not in self.has}
        damaged, self.damaged = self.damaged, {}
        return {
            "changed": bool(missing or damaged or self.questions > 1),
            "missing": missing,
            "partial": {digest: got for digest, got in self.partial.items() if digest in missing},
            "damaged": damaged,
            "hashed_bytes": 7,
            "given_bytes": 0,
            "blobs": 1,
            "made": [],
            "artifacts": {},
            "receive": {"path": "/site/partial", "free_bytes": self.free, "turn": self.turn, "aes": False},
        }


class Way:
    """A transport that delivers to a Host, after going through `faults`, one for each call."""

    def __init__(self, host, name="way", resumes=True, faults=()):
        self.host, self.name, self.resumes, self.faults, self.sent = host, name, resumes, list(faults), []

    def send(self, steps, progress, tally, turn):
        assert turn == self.host.turn
        fault = self.faults.pop(0) if self.faults else None
        if fault:
            tally.sent_bytes += fault(self.host, steps) or 0
            if isinstance(self.host.fault, Exception):
                fault, self.host.fault = self.host.fault, None
                raise fault
        tally.sent_bytes += sum(step.travels for step in steps)
        self.sent.append([(step.digest, step.travels) for step in steps])
        self.host.has.update(step.digest for step in steps if step.digest not in self.host.damaged)
        progress.add(sum(step.travels for step in steps))


def cut(arrived, kind=TransportError):
    """A transfer that breaks off when `arrived` bytes of the first blob are there."""

    def fault(host, steps):
        host.partial[steps[0].digest] = arrived
        host.fault = kind("the line was cut")
        return arrived - steps[0].offset

    return fault


def spoil(host, steps):
    """A transfer in which the first blob is damaged."""
    host.damaged[steps[0].digest] = "content received is wrong"


def run(host, *ways, lines=None):
    return ship([ARTIFACT], host.ask, lambda answer: list(ways), "site1", (lines if lines is not None else []).append)


def test_a_line_that_breaks_again_and_again_is_put_up_with_as_long_as_something_arrives():
    host = Host()
    host.has.add(MANIFEST)
    way = Way(host, faults=[cut(number) for number in range(20, 20 + 3 * ROUNDS)])
    done = run(host, way)
    assert done.answer["missing"] == {} and way.faults == [] and done.sent_bytes == 3000


def test_manifests_first_then_blobs_then_done():
    host = Host()
    way = Way(host)
    done = run(host, way)
    assert way.sent == [[(MANIFEST, 10)], [(ONE, 1000), (TWO, 2000)]] and host.questions == 3
    assert (done.sent_bytes, done.hashed_bytes, done.blobs, done.transports) == (3010, 21, 3, ["way"])


def test_a_complete_host_costs_one_question_and_no_transport():
    host = Host()
    host.has.update(SIZES)
    done = ship([ARTIFACT], host.ask, lambda _answer: pytest.fail("connected"), "site1", print)
    assert (host.questions, done.sent_bytes, done.changed) == (1, 0, False)
    assert summary(done, 3010, 0.1) == "2.9 KiB are there already; nothing was sent or read"


def test_what_is_missing_counts_whole_artifacts_while_their_manifest_is_unknown():
    assert missing_blobs([ARTIFACT], Host().ask()) == SIZES


def test_a_cut_transfer_goes_on_where_it_stopped():
    host = Host()
    way = Way(host, faults=[None, cut(400), cut(900)])
    done = run(host, way)
    assert way.sent[-1] == [(ONE, 100), (TWO, 2000)] and done.sent_bytes == 3010


def test_a_transport_that_cannot_resume_begins_the_blob_again():
    host = Host()
    way = Way(host, resumes=False, faults=[None, cut(400)])
    run(host, way)
    assert way.sent[-1] == [(ONE, 1000), (TWO, 2000)]


def test_a_transport_that_moves_nothing_twice_gives_way_to_the_next():
    host = Host()
    lines: list[str] = []
    first, second = Way(host, "stream", faults=[None, cut(0), cut(0)]), Way(host, "put_file")
    done = run(host, first, second, lines=lines)
    assert len(first.sent) == 1 and done.transports == ["stream", "put_file"]
    assert lines == [
        "site1: the line was cut; going on where it stopped",
        "site1: the line was cut; going on with put_file",
    ]


def test_a_transport_that_cannot_be_used_gives_way_at_once_and_for_good():
    host = Host()
    ways: list[Any] = [Way(host, "stream", faults=[cut(0, Unusable)]), Way(host, "put_file")]
    lines: list[str] = []
    done = ship([ARTIFACT], host.ask, lambda answer: ways, "site1", lines.append)
    assert done.transports == ["put_file"] and [way.name for way in ways] == ["put_file"]
    assert lines == ["site1: the line was cut; going on with put_file"]


def test_after_another_controller_the_host_is_asked_again():
    def overtake(host, steps):
        host.has.update(step.digest for step in steps)
        host.fault = Overtaken("another controller was at work")

    host = Host()
    lines: list[str] = []
    done = run(host, Way(host, faults=[None, overtake]), lines=lines)
    assert (done.sent_bytes, host.questions, lines) == (10, 3, [])


def test_what_no_attempt_can_mend_is_the_end():
    host = Host()
    way = Way(host, faults=[cut(0, Hopeless)])
    with pytest.raises(ShippingError, match="the line was cut"):
        run(host, way, Way(host, "put_file"))
    assert host.questions == 1


def test_when_nothing_moves_any_more_the_reason_is_the_message():
    host = Host()
    with pytest.raises(ShippingError, match=r"the line was cut\. Nothing more arrived"):
        run(host, Way(host, faults=[None, *[cut(100)] * 5]))


def test_a_blob_damaged_on_the_way_is_sent_once_more_and_then_named():
    host = Host()
    way = Way(host, faults=[None, spoil])
    run(host, way)
    assert way.sent[-1] == [(ONE, 1000)]
    host = Host()
    with pytest.raises(ShippingError, match=f"damaged twice: {ONE}"):
        run(host, Way(host, faults=[None, spoil, spoil]))


def test_too_little_disk_is_known_before_anything_is_sent():
    host = Host(free=2000)
    way = Way(host)
    with pytest.raises(ShippingError, match=r"2\.9 KiB are needed, 2\.0 KiB are free"):
        run(host, way)
    assert way.sent == []


def test_a_disk_that_fills_up_on_the_way_is_told_in_numbers():
    def fill(host, steps):
        host.partial[ONE], host.free = 400, 5000
        host.fault = kind("write: No space left on device (28)")

    kind: type[TransportError] = TransportError
    host = Host()
    with pytest.raises(ShippingError, match=r"2\.5 KiB are needed, 4\.9 KiB are free .*\(28\).*what arrived stays"):
        run(host, Way(host, faults=[None, fill]), Way(host, "put_file"))
    kind = DiskFull
    host = Host()
    with pytest.raises(ShippingError, match=r"2\.5 KiB are needed, 4\.9 KiB are free\. .*what arrived stays"):
        run(host, Way(host, faults=[None, fill]), Way(host, "put_file"))


def test_a_disk_too_full_for_an_answer_is_told_as_full():
    class Choked(Host):
        def ask(self):
            if self.questions == 2:
                raise ShippingError("cannot write stamps.json")
            return super().ask()

    host = Choked()
    with pytest.raises(ShippingError, match="the line was cut"):
        run(host, Way(host, faults=[None, cut(5, DiskFull)]))


def test_a_full_controller_is_told_as_such(tmp_path, monkeypatch):
    def fill(*_group):
        raise OSError(errno.ENOSPC, "No space left on device")

    nobody: Any = None
    way = PutFile(nobody, nobody, "/site/partial", str(tmp_path))
    monkeypatch.setattr(way, "_write_pack", fill)
    with pytest.raises(TransportError, match=r"on the controller is full: 2\.9 KiB are needed, .* local_tmp"):
        way.send([Step("send", ONE, 1000), Step("send", TWO, 2000)], Progress("site1", 3000, print), Tally())


def test_it_never_goes_on_for_ever():
    class Forgetful(Host):
        def ask(self):
            self.has.clear()
            return super().ask()

    host = Forgetful()
    with pytest.raises(ShippingError, match=f"after {ROUNDS} attempts"):
        run(host, Way(host))


def test_progress_speaks_at_intervals_only():
    now = [0.0]
    lines: list[str] = []
    progress = Progress("site1", 900, lines.append, interval=5, clock=lambda: now[0])
    for second in range(1, 11):
        now[0] = second
        progress.add(90)
    assert lines == ["site1: 450 B of 900 B (50 %), 90 B/s, 5.0 s left", "site1: 900 B of 900 B (100 %), 90 B/s"]
    progress.reach(400)
    assert progress.done == 900


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (12.4, "12 s"), (185, "3 min 5 s"), (7620, "2 h 7 min")]
)
def test_durations_are_for_people(seconds, text):
    assert duration_text(seconds) == text
