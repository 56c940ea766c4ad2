# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers of bytes as people read them."""

from __future__ import annotations

import re
from decimal import Decimal


def size_text(size: float) -> str:
    """A number of bytes with a binary unit and about three digits: ``90.9 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def bytes_of(text: str | int) -> int:
    """The number of bytes a person means, as coreutils read it: `G` and `GiB` are binary, `GB` decimal.

    Raises ValueError for what is no size.
    """
    match = _SIZE.match(str(text))
    if match is None:
        raise ValueError(f"{str(text)[:40]!r} is not a size; write 30G or 30GiB (binary), 32GB (decimal), or bytes")
    number, prefix, kind = match.groups()
    base = 1000 if kind in ("B", "b") and prefix else 1024
    return int(Decimal(number) * base ** " KMGT".index(prefix.upper() or " "))


_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([KMGTkmgt]?)(iB|ib|B|b|)\s*\Z")
