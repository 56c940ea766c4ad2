# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Having a host read all again: in parts that are asked for one after the other, and told in a line at the end."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Blob, Bundle, File
from ansible_collections.airgap.xinference.plugins.plugin_utils.bundles import verified
from ansible_collections.airgap.xinference.plugins.plugin_utils.rereading import (
    FIRST_PART,
    PART,
    Reread,
    names_of,
    read_again,
    rows,
    told,
)

MANIFEST, CONFIG, WEIGHTS = (hash_bytes(name) for name in (b"manifest", b"config", b"weights"))
MODEL = Artifact(
    "models",
    "m",
    MANIFEST,
    10,
    "",
    files=(File("a.bin", WEIGHTS, 10), File("b.bin", WEIGHTS, 10)),
    blobs=(Blob(MANIFEST, 1), Blob(CONFIG, 2), Blob(WEIGHTS, 10)),
)


class Host:
    """A host that reads so many bytes in every part."""

    def __init__(self, *parts: int, damaged: dict[int, dict[str, str]] | None = None) -> None:
        self.parts, self.damaged = parts, damaged or {}
        self.asked: list[tuple[str, float]] = []

    def __call__(self, after: str, seconds: float) -> dict[str, Any]:
        place = len(self.asked)
        self.asked.append((after, seconds))
        damaged = self.damaged.get(place, {})
        before = {digest for each in range(place) for digest in self.damaged.get(each, {})}
        return {
            "deep": {
                "files": place + 1,
                "of_files": len(self.parts),
                "read_bytes": sum(self.parts[: place + 1]),
                "of_bytes": sum(self.parts),
                "after": f"place {place}" if place + 1 < len(self.parts) else "",
            },
            "hashed_bytes": self.parts[place],
            "damaged": damaged,
            "missing": dict.fromkeys([*damaged, *before], 7),
            "faults": [],
            "made": ["/site/lib/1"] if place + 1 == len(self.parts) and self.damaged else [],
        }


def test_all_parts_are_asked_for_and_counted():
    host = Host(5, 6, 7)
    lines: list[str] = []
    found = read_again(host, "site1", lines.append, iter([0.0, 4.0]).__next__)
    assert host.asked == [("", FIRST_PART), ("place 0", PART), ("place 1", PART)]
    assert (found.files, found.read_bytes, found.hashed_bytes, found.seconds) == (3, 18, 18, 4.0)
    assert (found.damaged, found.missing, found.made, lines) == ({}, {}, [], [])


def test_what_is_damaged_is_gathered_from_all_parts():
    found = read_again(Host(1, 1, damaged={0: {WEIGHTS: "bits"}, 1: {CONFIG: "lost"}}), "site1", print)
    assert found.damaged == {WEIGHTS: "bits", CONFIG: "lost"} and found.missing == {WEIGHTS: 7, CONFIG: 7}
    assert found.made == ["/site/lib/1"]


def test_how_far_it_is_can_be_watched():
    class Watching:
        seen: list[tuple[str, int, int]] = []

        def watch(self, progress: Any) -> bool:
            self.progress = progress
            return True

        def __call__(self, line: str) -> None:
            raise AssertionError(line)

    watching, host = Watching(), Host(5, 6)

    def ask(after: str, seconds: float) -> dict[str, Any]:
        if after:
            one = watching.progress
            watching.seen.append((one.label, one.done, one.total))
        return host(after, seconds)

    read_again(ask, "site1", watching)
    assert watching.seen == [("site1: verifying", 5, 11)] and watching.progress.done == 11


def test_a_second_pass_is_added():
    found = Reread(3, 100, 100, 2.0, {MANIFEST: "bits"}, {MANIFEST: 1}, ["a"])
    found.add(Reread(5, 300, 300, 3.0, {WEIGHTS: "bits"}, {WEIGHTS: 10}, ["a", "b"]))
    assert (found.files, found.read_bytes, found.hashed_bytes, found.seconds) == (5, 300, 400, 5.0)
    assert set(found.damaged) == {MANIFEST, WEIGHTS} and found.made == ["a", "b"]


def test_blobs_are_named_as_people_know_them():
    assert names_of([MODEL], WEIGHTS) == ["models/m: a.bin", "models/m: b.bin"]
    assert names_of([MODEL], MANIFEST) == ["models/m: manifest"]
    assert names_of([MODEL], CONFIG) == ["models/m: configuration"]
    assert names_of([MODEL], hash_bytes(b"other")) == []
    found = Reread(damaged={CONFIG: "lost", WEIGHTS: "bits"})
    assert {row["why"]: row["files"] for row in rows(found, [MODEL])} == {
        "lost": ["models/m: configuration"],
        "bits": ["models/m: a.bin", "models/m: b.bin"],
    }


@pytest.mark.parametrize(
    ("found", "repaired", "line"),
    [
        (Reread(2, 2048, 2048, 2.0), True, "read 2.0 KiB again in 2.0 s (1.0 KiB/s): nothing is damaged"),
        (
            Reread(2, 0, 0, 0.0, {CONFIG: "lost"}, {}, []),
            False,
            "read 0 B again in 0.0 s: 1 damaged blobs (models/m: configuration) would be removed and sent anew",
        ),
        (
            Reread(2, 0, 0, 0.0, {}, {}, ["/site/lib/1"]),
            True,
            "read 0 B again in 0.0 s: damaged files in /site/lib/1 were replaced. A server that has an old file open "
            "keeps it until it is started again (playbooks/stop.yml, then site.yml)",
        ),
        (
            Reread(2, 0, 0, 0.0, {}, {}, ["/site/models/m/1"], ["models/m: a.bin is missing"]),
            False,
            "read 0 B again in 0.0 s: changed files (models/m: a.bin is missing) would be replaced",
        ),
    ],
)
def test_it_is_told_in_a_line(found, repaired, line):
    assert told(found, [MODEL], repaired) == line


def test_of_many_damaged_files_some_are_shown():
    digests = [hash_bytes(str(number).encode()) for number in range(9)]
    assert told(Reread(damaged=dict.fromkeys(digests, "bits")), [], True).count("sha256:") == 5
    assert " and 4 more)" in told(Reread(damaged=dict.fromkeys(digests, "bits")), [], True)


# --- the bundle -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    for name in ("model", "wheels"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/weights.bin").write_bytes(b"weights" * 100)
    with zipfile.ZipFile(tmp_path / "wheels/x-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("x/__init__.py", "")
    requests = [Request("models", "m", str(tmp_path / "model")), Request("wheels", "host", str(tmp_path / "wheels"))]
    write_bundle(tmp_path / "bundle", requests)
    return Bundle.open(tmp_path / "bundle")


def test_what_is_doubted_in_the_bundle_is_read_once_for_all_hosts(bundle: Bundle, tmp_path: Path) -> None:
    cache, run = str(tmp_path / "stamps"), tmp_path / "run"
    assert verified(bundle, bundle.artifacts, cache, print) == ([], bundle.size)
    assert verified(bundle, bundle.artifacts, cache, print) == ([], 0)
    weights = hash_bytes(b"weights" * 100)
    assert verified(bundle, bundle.artifacts, cache, print, [weights, hash_bytes(b"other")], run) == ([], 700)
    assert verified(bundle, bundle.artifacts, cache, print, [weights], run) == ([], 0)
    # The rest, for a host that asks for everything; and nothing for the next one.
    assert verified(bundle, bundle.artifacts, cache, print, bundle.blobs, run) == ([], bundle.size - 700)
    assert verified(bundle, bundle.artifacts, cache, print, bundle.blobs, run) == ([], 0)


def test_a_doubted_blob_that_is_damaged_is_found_in_spite_of_its_stamp(bundle: Bundle, tmp_path: Path) -> None:
    cache = str(tmp_path / "stamps")
    verified(bundle, bundle.artifacts, cache, print)
    weights = hash_bytes(b"weights" * 100)
    path = bundle.blob_path(weights)
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert verified(bundle, bundle.artifacts, cache, print) == ([], 0)
    (damaged,), _read = verified(bundle, bundle.artifacts, cache, print, [weights])
    assert damaged.digest == weights and damaged.files == ("models/m: weights.bin",)
