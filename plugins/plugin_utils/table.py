# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one way tables are drawn on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[Sequence[str], Sequence[str]]
"""The cells of a row, and lines that stand below it."""


def draw(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Rows as lines below a heading, each column as wide as its widest text; details are indented below their row."""
    heading = tuple(column.upper() for column in columns)
    cells = [heading, *(cells for cells, _details in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    shown = ["  ".join(text.ljust(width) for text, width in zip(heading, widths)).rstrip()]
    for line, details in rows:
        shown.append("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
        shown.extend(f"  {detail}" for detail in details)
    return shown
