# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is inside of compressed files, archives and databases, so that a search is not blind to it.

gzip, bzip2, xz, zstd, zip and zipapp, tar, and SQLite, where a long value lies in pieces.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, Optional

# How much of an unpacked file stays in memory.
IN_MEMORY = 64 * 1024 * 1024
# What the libraries raise for a file that only looks packed, or ends too soon.
FAULTS = (
    *(EOFError, OSError, RuntimeError, ValueError, lzma.LZMAError, sqlite3.Error),
    *(tarfile.TarError, zipfile.BadZipFile),
)

Unpack = Callable[[IO[bytes]], Iterator[IO[bytes]]]


def unpacked(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """The contents of a stream that is packed, one after the other; nothing for any other stream.

    A stream that cannot be read to its end gives what is there. Raises RuntimeError without the program zstd.
    """
    stream.seek(0)
    start = stream.read(512)
    way: Optional[Unpack] = next((way for magic, way in WAYS.items() if start.startswith(magic)), None)
    if start[257:262] == b"ustar":
        way = _tar
    elif start[:2] in (b"PK", b"#!"):
        way = _zip  # a zipapp begins with a line for the shell
    if way is _zstd and not shutil.which("zstd"):
        raise RuntimeError("There is a file packed by zstd and no program zstd to look into it; install it.")
    if way is not None:
        stream.seek(0)
        with contextlib.suppress(*FAULTS):
            yield from way(stream)


@contextlib.contextmanager
def _kept(source: Any) -> Iterator[IO[bytes]]:
    """A copy that can be sought, of a stream as far as it can be read."""
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as copy:
        with contextlib.suppress(*FAULTS):
            # Not read(), which loses what it has when the end is missing.
            for block in iter(lambda: source.read1(64 * 1024), b""):
                copy.write(block)
        copy.seek(0)
        yield copy


def _gzip(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    with gzip.open(stream) as source, _kept(source) as copy:
        yield copy


def _bzip2(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    with bz2.open(stream) as source, _kept(source) as copy:
        yield copy


def _xz(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    with lzma.open(stream) as source, _kept(source) as copy:
        yield copy


def _zstd(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """By the program; Python 3.11 has nothing of its own."""
    with tempfile.TemporaryFile() as packed, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, packed)
        packed.seek(0)
        subprocess.run(["zstd", "-dcq"], stdin=packed, stdout=copy, stderr=subprocess.DEVNULL, check=False)
        copy.seek(0)
        yield copy


def _tar(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    with tarfile.open(fileobj=stream) as archive:
        for member in archive:
            source = archive.extractfile(member) if member.isreg() else None
            if source is not None:
                with _kept(source) as copy:
                    yield copy


def _zip(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(stream) as archive:
        for name in archive.namelist():
            with archive.open(name) as source, _kept(source) as copy:
                yield copy


def _sqlite(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """Every value of every table, each on a line."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        with copy.open("wb") as target:
            shutil.copyfileobj(stream, target)
        # What is not yet in the database itself lies in the log beside it, if the stream is a file.
        log = Path(f"{getattr(stream, 'name', '')}-wal")
        if log.is_file():
            shutil.copyfile(log, f"{copy}-wal")
        with contextlib.closing(sqlite3.connect(copy)) as database, tempfile.SpooledTemporaryFile(IN_MEMORY) as rows:
            database.text_factory = bytes
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for (table,) in tables:
                quoted = table.decode().replace('"', '""')
                for row in database.execute(f'SELECT * FROM "{quoted}"'):
                    rows.write(b"\n".join(cell if isinstance(cell, bytes) else str(cell).encode() for cell in row))
                    rows.write(b"\n")
            rows.seek(0)
            yield rows


WAYS: Dict[bytes, Unpack] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\x00": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"SQLite format 3\x00": _sqlite,
}
