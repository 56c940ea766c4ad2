# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the processes of one run share: one key pair, notes about hosts, and nothing afterwards."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer import Credential, fetch
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer_server import Server
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store
from ansible_collections.airgap.xinference.plugins.plugin_utils.credential import Run, new_credential
from ansible_collections.airgap.xinference.plugins.plugin_utils.notes import Notes
from cryptography import x509

BLOBS = {f"sha256:{number:064x}": number for number in range(3)}


def worker(cache: Path, answers: Any) -> None:
    run = Run(cache)
    answers.put((run.name, run.credential()))


def test_all_workers_of_a_run_have_one_key_pair_that_nobody_else_can_read(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    workers = [fork.Process(target=worker, args=(tmp_path, answers)) for _number in range(6)]
    for each in workers:
        each.start()
    found = {answers.get(timeout=30) for _each in workers}
    for each in workers:
        each.join()
    run = Run(tmp_path)
    assert found == {(run.name, run.credential())}
    assert stat.S_IMODE(run.place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.place.iterdir()} == {0o600}
    run.close()
    assert not run.place.exists()
    assert run.credential() not in {pem for _name, pem in found}


def test_what_runs_left_that_are_over_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            theirs, mine = Run(tmp_path, other.pid), Run(tmp_path)
            theirs.credential()
            mine.credential()
            stale = mine.place.with_name(f"{other.pid}-1")
            stale.mkdir()
            mine.close()
            assert theirs.place.exists() and not stale.exists() and not mine.place.exists()
        finally:
            other.kill()
            other.wait()
    mine.close()
    assert not theirs.place.exists()


def test_runs_are_told_apart(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        assert Run(tmp_path, other.pid).name != Run(tmp_path).name == Run(tmp_path).name
        other.kill()


def test_closing_what_was_never_used_makes_nothing(tmp_path: Path) -> None:
    Run(tmp_path / "cache").close()
    assert not (tmp_path / "cache").exists()


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="belongs to somebody else"):
        Run(tmp_path).credential()


def test_the_certificate_names_nobody_vouches_for_nobody_and_is_always_valid(tmp_path: Path) -> None:
    pem = new_credential()
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert certificate.not_valid_after_utc.year == 9999 and certificate.not_valid_before_utc.year == 2000
    credential, content = Credential(pem), b"content"
    store = Store(tmp_path)
    store.receive()
    digest = "sha256:ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    store.blob_path(digest).write_bytes(content)
    server = Server(tmp_path, credential, "127.0.0.1", idle=5)
    pid = os.fork()
    if not pid:
        server.serve()
        os._exit(0)
    assert b"".join(fetch("127.0.0.1", server.port, credential, digest, 0, len(content))) == content
    server.close()
    os.waitpid(pid, 0)
    assert new_credential() != pem


def test_notes_say_what_hosts_told(tmp_path: Path) -> None:
    notes = Notes(Run(tmp_path))
    notes.missing("a", BLOBS)
    notes.missing("b", dict(reversed(list(BLOBS.items()))))
    notes.missing("c", {})
    notes.peer("a", "10.0.0.1", 4000, [])
    notes.peer("c", "10.0.0.3", 4000, BLOBS)
    read = Notes(Run(tmp_path))
    assert read.waiting(["b", "c", "d", "a"]) == ["b", "a"]
    members = read.members(["c", "a", "d", "b"])
    assert list(members) == ["c", "a", "b"]
    assert members["a"].missing == BLOBS and members["a"].peer == ("10.0.0.1", 4000)
    assert members["a"].missing is members["b"].missing and members["b"].peer is None
    assert set(members["c"].has) == set(BLOBS) and not members["c"].missing
    assert read.wanted(["a", "b", "c"]) == BLOBS


def test_what_is_there_for_a_while_only_is_known_of_all_hosts(tmp_path: Path) -> None:
    notes = Notes(Run(tmp_path))
    one, two, three = BLOBS
    notes.missing("a", {one: 1, two: 2}, [two, three])
    notes.missing("b", BLOBS, [three], {"sent_bytes": 7})
    notes.peer("b", "10.0.0.2", 4000, [])
    assert (notes.counted("b"), notes.counted("a"), notes.counted("c")) == ({"sent_bytes": 7}, {}, {})
    assert notes.passing(["a", "b", "c"]) == {two, three}


def test_a_new_note_voids_the_old_one(tmp_path: Path) -> None:
    notes = Notes(Run(tmp_path))
    notes.missing("a", BLOBS)
    notes.peer("a", "10.0.0.1", 4000, [])
    notes.missing("a", {"sha256:" + "f" * 64: 9})
    assert notes.members(["a"])["a"].peer is None and len(notes.wanted(["a"])) == 1
    notes.missing("a", {})
    assert notes.members(["a"]) == {} and notes.waiting(["a"]) == []


def test_a_run_in_which_nothing_is_missing_leaves_nothing_behind(tmp_path: Path) -> None:
    Notes(Run(tmp_path)).missing("a", {})
    assert list(tmp_path.iterdir()) == []


def test_notes_that_were_thrown_away_meanwhile_are_no_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    notes = Notes(run)
    notes.missing("a", BLOBS)
    for path in run.place.glob("blobs-*"):
        path.unlink()
    assert notes.members(["a"])["a"].missing == {}
    run.close()
    assert notes.members(["a"]) == {}


def test_notes_of_many_hosts_are_small(tmp_path: Path) -> None:
    blobs = {f"sha256:{number:064x}": number for number in range(40_000)}
    run = Run(tmp_path)
    notes = Notes(run)
    began = time.process_time()
    for number in range(50):
        notes.missing(f"h{number}", blobs)
    assert sum(path.stat().st_size for path in run.place.iterdir()) < 5_000_000
    assert len(notes.members([f"h{number}" for number in range(50)])) == 50
    assert time.process_time() - began < 10
