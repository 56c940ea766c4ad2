# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Streams that may be compressed: what they are is seen from their first bytes, never from a name.

gzip is Python's own. For zstd the program `zstd` is used: until Python 3.14 the language has none, a wheel for it would
be compiled code for every Python and platform, and a process beside ours decompresses while we hash.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import zlib
from typing import Iterable, Iterator

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_OUTPUT = 4 * 1024 * 1024


class CompressionError(Exception):
    """A compressed stream that cannot be read; the message says why."""


def plain(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of a stream, decompressed where it begins like gzip or zstd; the source is read to its end.

    Raises CompressionError while it is read.
    """
    source = iter(chunks)
    head = b""
    while len(head) < len(_ZSTD):
        chunk = next(source, None)
        if chunk is None:
            break
        head += chunk
    if head.startswith(_GZIP):
        return _gunzip(_joined(head, source))
    if head.startswith(_ZSTD):
        return _unzstd(_joined(head, source))
    return _joined(head, source)


def _joined(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from rest


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """gzip, of several members too; zeros after the last one are padding."""
    engine = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            data = chunk
            while data:
                if engine.eof:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    engine = zlib.decompressobj(wbits=31)
                content = engine.decompress(data, _OUTPUT)
                if content:
                    yield content
                data = engine.unused_data if engine.eof else engine.unconsumed_tail
    except zlib.error as error:
        raise CompressionError(f"the gzip data is damaged ({error})") from error
    if not engine.eof:
        raise CompressionError("the gzip data ends too early")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """zstd by its program, fed by a thread."""
    program = shutil.which("zstd")
    if program is None:
        raise CompressionError("it is compressed with zstd and the program zstd is not on this machine; install it")
    failure: list[BaseException] = []
    with subprocess.Popen(
        [program, "--decompress", "--stdout", "--quiet"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        if not (process.stdin and process.stdout and process.stderr):
            raise ValueError(f"{program} was started without its pipes")
        feeder = threading.Thread(target=_feed, args=(process.stdin, chunks, failure), daemon=True)
        feeder.start()
        try:
            while True:
                content = process.stdout.read(_OUTPUT)
                if not content:
                    break
                yield content
            said = process.stderr.read().decode(errors="replace").strip()
            feeder.join()
        finally:
            if process.poll() is None:
                process.kill()
    if failure:
        raise failure[0]
    if process.returncode:
        raise CompressionError(f"the zstd data is damaged ({said or f'status {process.returncode}'})")


def _feed(target: object, chunks: Iterator[bytes], failure: list[BaseException]) -> None:
    """Write the chunks; what goes wrong with reading them is kept for the one who waits."""
    try:
        with target:  # type: ignore[attr-defined]
            for chunk in chunks:
                target.write(chunk)  # type: ignore[attr-defined]
    except BrokenPipeError:
        pass  # The program has ended; its own message says why.
    except BaseException as error:
        failure.append(error)
