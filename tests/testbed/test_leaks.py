# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The search for leaked secrets is not blind: what is planted on purpose is found, in every form and kind of place."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import sqlite3
import subprocess
import tarfile
import urllib.parse
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Callable, Dict

import pytest

from .leaks import CHUNK, Leak, Private, Search, forms
from .unpacked import WAYS

SECRET = "pa$s 'w\"ord/Zürich&4711"
OTHER = "sk-0123456789abcdef"
SEARCH = Search({"password": SECRET, "key": OTHER})
PEM = "-----BEGIN X-----\n" + "\n".join(f"{number:064d}" for number in range(8)) + "\n-----END X-----\n"


def zipped(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", data)
    return target.getvalue()


def tarred(data: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo("inner")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


def by_zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q"], input=data, stdout=subprocess.PIPE, check=True).stdout


WRITTEN: Dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "JSON": lambda text: json.dumps({"password": text}).encode(),
    "JSON in JSON": lambda text: json.dumps({"log": json.dumps({"password": text})}).encode(),
    "Python": lambda text: repr({"password": text}).encode(),
    "URL": lambda text: urllib.parse.urlencode({"password": text}).encode(),
    "hex": lambda text: text.encode().hex().encode(),
    "reversed": lambda text: text[::-1].encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Basic, first": lambda text: base64.b64encode(f"adm:{text}".encode()),
    "Basic, second": lambda text: base64.b64encode(f"admi:{text}x".encode()),
    "Basic, third": lambda text: base64.b64encode(f"admin:{text}xy".encode()),
    "URL-safe base64": lambda text: base64.urlsafe_b64encode(f"{text}".encode()),
}
PACKED: Dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": by_zstd,
    "zip": zipped,
    "zipapp": lambda data: b"#!/usr/bin/env python3\n" + zipped(data),
    "tar": tarred,
    "tar.gz": lambda data: gzip.compress(tarred(data)),
    "gzip in zip in tar": lambda data: tarred(zipped(gzip.compress(data))),
    "cut gzip": lambda data: gzip.compress(data + os.urandom(100_000))[:-50_000],
}


def found(path: Path) -> Dict[str, str]:
    """Secret -> form, of what is found below a path."""
    return {leak.secret: leak.form for leak in SEARCH.in_tree(path, "here:/")}


@pytest.mark.parametrize("way", WRITTEN)
def test_a_secret_is_found_however_it_was_written(way: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\x00 before " + WRITTEN[way](SECRET) + b" after \xfe")
    assert set(found(tmp_path)) == {"password"}
    (tmp_path / "file").write_bytes(b"\xff\x00 before " + WRITTEN[way](SECRET.replace("ord", "ard")) + b" after \xfe")
    assert found(tmp_path) == {}


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_is_opened(kind: str, tmp_path: Path) -> None:
    if "zstd" in kind and not shutil.which("zstd"):
        pytest.skip("the program zstd is not installed")
    (tmp_path / "file").write_bytes(PACKED[kind](f"token={OTHER}\n".encode() * 3))
    assert found(tmp_path) == {"key": "plain"}
    (tmp_path / "file").write_bytes(PACKED[kind](b"token=none\n" * 3))
    assert found(tmp_path) == {}


def test_what_only_looks_packed_is_searched_as_it_is(tmp_path: Path) -> None:
    starts = [*WAYS, b"PK\x03\x04", b"#!", b"x" * 257 + b"ustar"]
    for number, start in enumerate(starts):
        (tmp_path / str(number)).write_bytes(start + OTHER.encode())
    assert len(SEARCH.in_tree(tmp_path, "here:/")) == len(starts)


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_rows_of_a_database_are_found_though_they_lie_in_pieces(tmp_path: Path, journal: str) -> None:
    with closing(sqlite3.connect(tmp_path / "auth.db")) as database:
        database.execute(f"PRAGMA journal_mode = {journal}")
        database.execute('CREATE TABLE "a ""table" (number INTEGER, content TEXT)')
        # Over the border of a page of 4096 bytes, at whatever place in it the row begins.
        content = "".join(f"{'x' * 1021}{SECRET}" for _row in range(20))
        database.execute('INSERT INTO "a ""table" VALUES (1, ?)', (content,))
        database.commit()
        assert found(tmp_path) == {"password": "plain"}


def test_a_database_alone_is_found_in_its_rows(tmp_path: Path) -> None:
    """Written so that no page holds the value in one piece."""
    with closing(sqlite3.connect(tmp_path / "db")) as database:
        database.execute("PRAGMA page_size = 512")
        database.execute("CREATE TABLE t (content TEXT)")
        long = "".join(f"{number:07d}-" for number in range(200))
        database.execute("INSERT INTO t VALUES (?)", (long,))
        database.commit()
    assert long.encode() not in (tmp_path / "db").read_bytes()
    assert {leak.secret for leak in Search({"long": long}).in_tree(tmp_path, "here:/")} == {"long"}


@pytest.mark.parametrize("shift", [-len(OTHER), -5, -1, 0])
def test_a_secret_over_the_border_of_two_reads_is_found(tmp_path: Path, shift: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * (CHUNK + shift) + OTHER.encode() + b"y" * 100)
    assert found(tmp_path) == {"key": "plain"}


def test_names_and_targets_of_links_count_and_links_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "file").write_text(OTHER)
    (inside / "link").symlink_to(outside)
    assert SEARCH.in_tree(inside, "here:/") == []
    (inside / f"log-{OTHER}").touch()
    (inside / "to").symlink_to(f"/nowhere/{OTHER}")
    whys = {leak.place: leak.why for leak in SEARCH.in_tree(inside, "here:/")}
    assert whys == {f"here:/log-{OTHER}": "its name", "here:/to": "its target"}


def test_a_second_name_of_a_file_that_holds_one_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(OTHER)
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert [leak.place for leak in SEARCH.in_tree(tmp_path, "here:/")] == ["here:/a", "here:/b"]


def test_a_directory_may_be_left_out_and_a_file_be_searched_alone(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers/file").write_text(OTHER)
    assert SEARCH.in_tree(tmp_path, "here:/", skip=[tmp_path / "layers"]) == []
    changed = (tmp_path / "layers/file").stat().st_ctime
    assert SEARCH.in_tree(tmp_path, "here:/", since=changed + 1) == [] != SEARCH.in_tree(tmp_path, "", since=changed)
    assert SEARCH.in_tree(tmp_path / "layers/file", "the output") == [Leak("the output", "key", "plain")]


def test_a_private_file_may_hold_a_secret_if_nobody_else_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "etc/token"
    path.parent.mkdir()
    path.write_text(OTHER)
    private = Private("gpu-*:/etc/token", owner=os.getuid())

    def whys(entry: Private, label: str = "gpu-1:/") -> list:
        return [leak.why for leak in SEARCH.in_tree(tmp_path, label, [Private("*:/other"), entry])]

    for mode, wanted in ((0o600, []), (0o400, []), (0o640, ["mode 0640"]), (0o644, ["mode 0644"])):
        path.chmod(mode)
        assert whys(private) == wanted
    path.chmod(0o600)
    assert whys(private, "controller:/") == [""]
    assert whys(Private("*/token", owner=os.getuid() + 1)) == [f"owner {os.getuid()}"]
    assert whys(Private("*/token", owner=os.getuid(), secrets=frozenset({"password"}))) == ["belongs elsewhere"]
    assert whys(Private("*/token", owner=os.getuid(), secrets=frozenset({"key"}))) == []


def test_a_key_of_several_lines_is_found_by_one_of_them() -> None:
    search = Search({"tls": PEM})
    indented = "\n".join("    " + line for line in PEM.splitlines())
    assert search.in_text("yaml", indented) and search.in_text("json", json.dumps(PEM))
    assert not search.in_text("other", "-----BEGIN X-----")


def test_a_secret_too_short_to_be_told_from_chance_is_refused() -> None:
    with pytest.raises(ValueError, match="secret pin is too short"):
        Search({"pin": "4711"})
    with pytest.raises(ValueError, match="secret pem is too short"):
        Search({"pem": "-----BEGIN X-----\n"})


def test_no_form_is_so_short_that_it_is_met_by_chance() -> None:
    assert min(map(len, forms(OTHER))) >= len(OTHER)
    assert min(map(len, forms(SECRET))) >= 20


def test_a_leak_tells_where_and_how_and_not_what() -> None:
    told = str(Leak("gpu-1:/tmp/x", "key", "base64", "mode 0644"))
    assert told == "gpu-1:/tmp/x: key (base64, mode 0644)" and OTHER not in told
