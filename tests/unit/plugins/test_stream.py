# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Streams to real receivers, run by a shell of this machine: whatever breaks, what arrived stays, the rest follows."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.action.xinference_ship import SLOWEST, rate_of
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import transfer_plan, travelling
from ansible_collections.airgap.xinference.plugins.plugin_utils import transport as transport_module
from ansible_collections.airgap.xinference.plugins.plugin_utils.feeding import RateLimit, Tally
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_process import Launcher, NotStarted
from ansible_collections.airgap.xinference.plugins.plugin_utils.progress import Progress
from ansible_collections.airgap.xinference.plugins.plugin_utils.shipping import ShippingError
from ansible_collections.airgap.xinference.plugins.plugin_utils.transport import (
    Hopeless,
    Overtaken,
    Session,
    Stream,
    TransportError,
    Unusable,
    launchers,
)

CHANCE = random.Random(7)
BIG = CHANCE.randbytes(5_000_000)
SMALL = [CHANCE.randbytes(size) for size in (0, 1, 100, 70_000)]
CONTENTS = {hash_bytes(content): content for content in (BIG, *SMALL)}
SIZES = {digest: len(content) for digest, content in CONTENTS.items()}
DIGEST = hash_bytes(BIG)
SHELL = Launcher(("/bin/sh", "-c"), own=False)

CUT = """
import os
left = 3_000_000
while left:
    data = os.read(0, min(65536, left))
    left -= os.write(1, data)
"""


class Site:
    """A bundle, a root directory, and streams from one to the other."""

    def __init__(self, place, sizes=SIZES):
        self.place, self.sizes, self.told = place, sizes, []
        self.bundle = Bundle(place / "bundle", [])
        self.store = Store(place / "root")
        for digest, content in CONTENTS.items():
            path = self.bundle.blob_path(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def stream(self, ways=(SHELL,), interpreter=sys.executable, **options):
        session = Session(str(self.store.root), **options)
        names = {DIGEST: "model/big.bin"}
        return Stream(list(ways), interpreter, self.bundle, session, self.told.append, names)

    def send(self, partial=None, turn=None, tally=None, **options):
        """Send what is wanted; what was counted while it was done."""
        tally = tally or Tally()
        steps = travelling(transfer_plan(self.sizes, (), partial or {}))
        self.stream(**options).send(steps, Progress("site1", sum(step.travels for step in steps), print), tally, turn)
        return tally

    def missing(self):
        store = Store(self.store.root)
        with store.locked():
            found = store.inventory(self.sizes)
        assert store.hashed_bytes == 0 or found.missing, "verified blobs are not read again"
        return found

    def script(self, name, text):
        path = self.place / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_everything_is_there_and_verified_when_it_returns(site):
    tally = site.send()
    total = sum(SIZES.values())
    assert (tally.sent_bytes, tally.hashed_bytes, tally.blobs) == (total, total, len(SIZES))
    assert site.missing().missing == {}
    assert all(site.store.blob_path(digest).read_bytes() == content for digest, content in CONTENTS.items())


def test_it_goes_on_at_the_last_byte(site):
    site.store.receive()
    site.store.partial_path(DIGEST).write_bytes(BIG[:3_000_001])
    tally = site.send({DIGEST: 3_000_001})
    assert tally.sent_bytes == sum(SIZES.values()) - 3_000_001 and not site.missing().missing


def test_a_partial_that_shrank_meanwhile_is_completed_in_the_same_session(site):
    site.store.receive()
    site.store.partial_path(DIGEST).write_bytes(BIG[:1000])
    tally = site.send({DIGEST: 4_000_000})
    assert tally.sent_bytes == 2 * len(BIG) - 4_000_000 - 1000 + sum(map(len, SMALL)) and not site.missing().missing


def test_a_damaged_partial_costs_this_blob_and_no_other(site):
    site.store.receive()
    site.store.partial_path(DIGEST).write_bytes(b"x" * 4_000_000)
    tally = site.send({DIGEST: 4_000_000})
    assert tally.sent_bytes == sum(SIZES.values()) + 1_000_000 and tally.blobs == len(SIZES)
    assert not site.missing().missing


def test_what_arrives_damaged_twice_is_named(site):
    site.bundle.blob_path(DIGEST).write_bytes(b"x" + BIG[1:])
    with pytest.raises(Hopeless, match=f"Arrived damaged twice: {DIGEST}: content received is"):
        site.send()
    assert site.missing().missing == {DIGEST: len(BIG)}


@pytest.mark.parametrize("old, new", [(DIGEST, hash_bytes(b"other")), ('"size":5', '"size":6')])
def test_what_reached_the_host_as_something_else_is_noticed_and_sent_again(site, old, new):
    """A bit that flips in the memory of a host, say: it receives something that nobody sends, and waits for more."""
    first = f'{{"blob":"{DIGEST}","size":{len(BIG)}'
    garble = site.place / "garble.py"
    garble.write_text(
        "import os\n"
        "while data := os.read(0, 65536):\n"
        f"    data = data.replace({first.encode()!r}, {first.replace(old, new).encode()!r})\n"
        "    while data: data = data[os.write(1, data):]\n"
    )
    shell = site.script("garbling", f'{sys.executable} {garble} | /bin/sh -c "$1"')
    with pytest.raises(TransportError, match="the host understood something else"):
        site.stream([Launcher((shell,), own=False)]).send(
            travelling(transfer_plan(site.sizes, (), {})), Progress("site1", 1, print), Tally()
        )
    site.send(site.missing().partial)
    assert not site.missing().missing


def test_a_bundle_that_goes_away_is_the_end(site):
    site.bundle.blob_path(DIGEST).unlink()
    with pytest.raises(Hopeless, match="the bundle cannot be read: No such file"):
        site.send()
    site.bundle.blob_path(DIGEST).write_bytes(BIG[:-1])
    with pytest.raises(Hopeless, match="is shorter than it was"):
        site.send()


def test_a_broken_connection_leaves_what_arrived_and_the_next_session_the_rest(site):
    python = shlex.quote(sys.executable)
    cut = site.script("cut", f'{python} -c {shlex.quote(CUT)} | {python} "$@"')
    with pytest.raises(TransportError, match="the connection to the receiver broke"):
        site.send(interpreter=cut)
    found = site.missing()
    got = found.partial[DIGEST]
    assert 2_900_000 < got < 3_000_000
    assert site.send(found.partial).sent_bytes == sum(SIZES.values()) - got and not site.missing().missing


def test_a_host_without_a_fitting_python_has_no_streams(site):
    with pytest.raises(Unusable, match=r"the receiver cannot be run: .*not found"):
        site.send(interpreter="/nowhere/python3")
    old = site.script("old", "echo this is python 2 >&2; exit 1")
    with pytest.raises(Unusable, match="this is python 2"):
        site.send(interpreter=old)


def test_little_goes_over_the_connection_that_stands_and_much_over_its_own(site, monkeypatch):
    def way(name, own):
        script = site.script(name, f'echo {name} >> {site.place}/used; shift; exec /bin/sh -c "$1"')
        return Launcher((script, "-c"), own=own)

    ways = [way("own", True), way("shared", False)]
    site.send(ways=ways)
    monkeypatch.setattr(transport_module, "WORTH_A_CONNECTION", 1000)
    site.send(ways=ways)
    assert (site.place / "used").read_text().split() == ["shared", "own"]


def test_the_second_way_is_tried_when_the_first_does_not_connect(site, monkeypatch):
    monkeypatch.setattr(transport_module, "WORTH_A_CONNECTION", 0)
    broken = Launcher((site.script("ssh", "echo no route to host >&2; exit 255"),))
    ways = [broken, SHELL]
    stream = site.stream(ways)
    stream.send(travelling(transfer_plan(SIZES, (), {})), Progress("site1", 1, print), Tally())
    assert not site.missing().missing
    # A connection that fails every time is no reason to think that streams cannot be had.
    with pytest.raises(TransportError, match="no route to host") as raised:
        site.send(ways=[broken])
    assert not isinstance(raised.value, Unusable)


def test_what_a_login_shell_says_first_does_not_matter(site):
    talkative = site.script("talkative", f'echo "Welcome!"; echo "{{}}"; exec {shlex.quote(sys.executable)} "$@"')
    site.send(interpreter=talkative)
    assert not site.missing().missing


def test_a_host_that_says_what_makes_no_sense_is_not_believed(site):
    liar = site.script(
        "liar", 'cat >/dev/null & echo \'{"ready":{"free_bytes":1,"token":"t"}}\'; echo nonsense; sleep 1'
    )
    with pytest.raises(TransportError, match="makes no sense"):
        site.send(interpreter=liar)


def test_several_streams_share_the_work_and_the_session(site, monkeypatch):
    monkeypatch.setattr(transport_module, "SMALL", 1000)
    monkeypatch.setattr(transport_module, "WORTH_A_CONNECTION", 1000)
    counter = site.script("count", f'echo x >> {site.place}/started; exec {shlex.quote(sys.executable)} "$@"')
    way = Launcher(("/bin/sh", "-c"), own=True)
    site.send(ways=[way], interpreter=counter, streams=3)
    assert not site.missing().missing
    # Two blobs are worth a stream of their own.
    assert (site.place / "started").read_text() == "x\n" * 2
    shutil.rmtree(site.store.root)
    once = site.script("once", f'mkdir {site.place}/lock || exit 1; exec {shlex.quote(sys.executable)} "$@"')
    site.send(ways=[way], interpreter=once, streams=3)
    assert not site.missing().missing and "stream 2 of 2 cannot be had" in site.told[0]


def test_a_second_controller_waits_or_leaves_with_the_name_of_the_first(site):
    first = threading.Thread(target=site.send, kwargs={"rate_limit": 4_000_000})
    first.start()
    while not list(site.store.partial.glob("*")):
        time.sleep(0.02)
    with pytest.raises(Hopeless, match=rf"Another controller is shipping to this host: .* \(process {os.getppid()}\)"):
        site.send()
    assert first.is_alive()
    with pytest.raises(Overtaken):
        site.send(wait=30)
    first.join()
    assert site.told and site.told[-1].startswith("waiting for ") and str(os.getppid()) in site.told[-1]


def test_whoever_asked_before_another_one_was_at_work_asks_again_and_sends_nothing(site):
    before = site.store.turn()
    tally = site.send(turn=before)
    assert before == 0 and tally.blobs == len(SIZES)
    inode = site.store.blob_path(DIGEST).stat().st_ino
    tally = Tally()
    with pytest.raises(Overtaken):
        site.send(turn=before, tally=tally)
    assert tally == Tally() and site.store.blob_path(DIGEST).stat().st_ino == inode
    site.send(turn=site.store.turn())


def test_a_sender_whose_playbook_was_killed_stops(site):
    stream = site.stream(rate_limit=1_000_000)
    stream._parent = 0
    with pytest.raises(Hopeless, match="ansible-playbook has ended"):
        stream.send(travelling(transfer_plan(SIZES, (), {})), Progress("site1", 1, print), Tally())


class Become:
    """What Ansible's sudo plugin is to us."""

    name, success, prompt, require_tty = "sudo", "BECOME-SUCCESS-abc", "[sudo via ansible] password:", False
    fail, missing = (b"Sorry, try again.",), (b"a password is required",)

    def __init__(self, program, password="open sesame"):
        self.program, self.password = program, password

    def build_become_command(self, command, _shell):
        marked = f"echo {self.success} ; {command}"
        return f"{self.program} -p {shlex.quote(self.prompt)} /bin/sh -c {shlex.quote(marked)}"

    def expect_prompt(self):
        return True

    def get_option(self, _name):
        return self.password

    def check_password_prompt(self, said):
        return self.prompt.encode() in said

    def check_incorrect_password(self, said):
        return any(text in said for text in self.fail)

    def check_missing_password(self, said):
        return any(text in said for text in self.missing)


SUDO = """
printf "%s" "$2" >&2
IFS= read -r given
[ "$given" = "open sesame" ] || { echo "Sorry, try again." >&2; exit 1; }
tr '\\0' ' ' < /proc/$$/cmdline > "$0.seen"
shift 2
exec "$@"
"""


def test_the_password_is_told_when_it_is_asked_for_and_never_in_a_command_line(site):
    sudo = site.script("sudo", SUDO)
    way = Launcher(("/bin/sh", "-c"), Become(sudo), None, False)
    site.send(ways=[way])
    assert not site.missing().missing
    assert "exec(eval(" in Path(f"{sudo}.seen").read_text() and "sesame" not in Path(f"{sudo}.seen").read_text()
    with pytest.raises(Unusable, match="sudo: the password is wrong"):
        site.send(ways=[Launcher(("/bin/sh", "-c"), Become(sudo, "guessed"), None, False)])


def test_a_become_that_ends_or_never_begins_is_told(site, monkeypatch):
    refusing = site.script("refusing", "echo sorry, you must have a tty to run sudo >&2; exit 1")
    with pytest.raises(Unusable, match="you must have a tty"):
        site.send(ways=[Launcher(("/bin/sh", "-c"), Become(refusing), None, False)])
    monkeypatch.setattr("ansible_collections.airgap.xinference.plugins.plugin_utils.host_process.START_SECONDS", 0.3)
    hanging = site.script("hanging", "sleep 5")
    with pytest.raises(NotStarted, match="did not begin"):
        Launcher(("/bin/sh", "-c"), Become(hanging), None, False).start("true")


def test_only_connections_that_can_run_a_process_have_streams():
    class Connection:
        transport, _shell = "local", None

    become = Become("sudo")
    assert [way.own for way in launchers(Connection(), None, False)] == [False]
    become.require_tty = True
    assert launchers(Connection(), become, False) == []
    Connection.transport = "community.docker.docker"
    assert launchers(Connection(), None, False) == []


def test_a_limit_holds_for_all_threads_together():
    limit = RateLimit(1_000_000)
    assert limit.piece < 1_000_000
    began = time.monotonic()

    def use():
        for _turn in range(4):
            limit.wait(50_000)

    threads = [threading.Thread(target=use) for _thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.3 < time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("text", "rate"), [(None, None), ("", None), ("16384", SLOWEST), ("50M", 50 * 1024**2), ("10 MB", 10**7)]
)
def test_a_limit_is_said_as_people_say_sizes(text, rate):
    assert rate_of(text) == rate


@pytest.mark.parametrize("text", ["0", "50", "16383", "-5M", "fast", "10 Mbit/s"])
def test_a_limit_that_lets_nothing_pass_or_is_none_is_refused(text):
    with pytest.raises(ShippingError, match=r"(too low to ship|is not a size).* Say 50M for 50 MiB a second"):
        rate_of(text)
