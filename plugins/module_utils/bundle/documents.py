# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""JSON from outside: read without following, waiting or swallowing more than a document can have, and parsed strictly.

What two readers could understand in two ways is refused: a key twice in one object, `NaN`, numbers without end. So is
what would only cost time: nesting and sizes no document of a bundle has.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from typing import Any, BinaryIO

MAX_DOCUMENT = 32 * 1024 * 1024
"""Bytes a manifest or the index may have; a model of 50,000 files needs less."""
MAX_DIGITS = 20
"""Digits of a number; a size of 64 bits has no more."""


class DocumentError(ValueError):
    """A document that is not what it should be; the message says in what way, not where it lies."""


def read_small(path: str | os.PathLike[str], limit: int = MAX_DOCUMENT) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises DocumentError for anything else, OSError when it cannot be read.
    """
    with open_regular(path) as source:
        size = os.fstat(source.fileno()).st_size
        if size > limit:
            raise DocumentError(f"{size} bytes is more than a manifest can have ({limit})")
        content = source.read(limit + 1)
    if len(content) != size:
        raise DocumentError("it changes while it is read")
    return content


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading: no link is followed, no device touched, no pipe waited for.

    What is opened is looked at again, so that nothing can be exchanged between the check and the reading. Raises
    DocumentError for what is no regular file, OSError when it cannot be opened.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise DocumentError("not a regular file")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DocumentError("not a regular file")
    return open(handle, "rb")  # noqa: PTH123 - the caller closes it


def parse(raw: bytes) -> Any:
    """The value of a JSON document. Raises DocumentError for what is none, or not one that every reader reads alike."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise DocumentError("not JSON (nested too deeply)") from error
    except ValueError as error:
        raise DocumentError(f"not JSON ({error})") from error


def shown(value: object) -> str:
    """A value from outside for a message: never longer than a line, without characters that a terminal obeys."""
    return _SHORT.repr(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _value in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


class _Short(reprlib.Repr):
    """`repr` that is bounded in every direction."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 2, 100, 100, 40
        self.maxdict = self.maxlist = self.maxtuple = 3


_SHORT = _Short()
