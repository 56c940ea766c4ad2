# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write plain data as YAML that people can read, without a library: hosts have none that is sure to be there.

Only what a Compose file needs: mappings, lists, texts, numbers, truth values and null, always in the same form.
"""

from __future__ import annotations

import json
import re
from typing import Any, Iterator, List, Mapping, Tuple

_KEY = re.compile(r"(\"(?:[^\"\\]|\\.)*\"|[A-Za-z_/][A-Za-z0-9_/.@-]*):(?: (.*))?\Z")
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.@-]*\Z")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def yaml_text(content: Mapping[str, Any]) -> str:
    """The document of a mapping, its keys in the order they have."""
    return "".join(f"{line}\n" for line in _block(content))


def _block(content: Any) -> Iterator[str]:
    """The lines of a mapping or list that is not empty."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _entry(f"{_scalar(str(key))}:", value)
        return
    for value in content:
        if isinstance(value, Mapping) and value:
            lines = list(_block(value))
            yield f"- {lines[0]}"
            yield from (f"  {line}" for line in lines[1:])
        else:
            yield from _entry("-", value)


def _entry(head: str, value: Any) -> Iterator[str]:
    if isinstance(value, (Mapping, list, tuple)) and value:
        yield head
        yield from (f"  {line}" for line in _block(value))
    else:
        yield f"{head} {_scalar(value)}"


def _scalar(value: Any) -> str:
    """One value on one line; a text in quotes unless nobody could take it for something else."""
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return "[]"
    if isinstance(value, str) and _PLAIN.match(value) and value.lower() not in _WORDS:
        return value
    # What JSON writes is YAML; beyond ASCII it is left as it is, but for the separators that YAML takes for line ends.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(_UNSAFE.get(character, character) for character in text)


_UNSAFE = {character: f"\\u{ord(character):04x}" for character in "\x7f\x85\u2028\u2029\ufeff"}


def plain_data(text: str) -> Any:
    """What `yaml_text` wrote, as data again; comments are left out. Raises ValueError for any other YAML."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, rest = _read_block(lines, 0, 0)
    if rest != len(lines):
        raise ValueError(f"not a document of this collection: {lines[rest][:80]!r}")
    return found


def _read_block(lines: List[str], at: int, depth: int) -> Tuple[Any, int]:
    """The mapping or list that begins in a line, and the line after it."""
    pad = " " * depth
    mapping, items = {}, []
    while at < len(lines) and lines[at].startswith(pad) and lines[at][depth : depth + 1] not in ("", " "):
        line = lines[at][depth:]
        if line == "-" or line.startswith("- "):
            if _KEY.match(line[2:]):
                lines[at] = f"{pad}  {line[2:]}"
                value, at = _read_block(lines, at, depth + 2)
            else:
                value, at = _read_value(line[2:], lines, at, depth)
            items.append(value)
            continue
        key = _KEY.match(line)
        if not key or items:
            raise ValueError(f"not a document of this collection: {line[:80]!r}")
        mapping[_read_scalar(key.group(1))], at = _read_value(key.group(2) or "", lines, at, depth)
    return items or mapping, at


def _read_value(text: str, lines: List[str], at: int, depth: int) -> Tuple[Any, int]:
    """What stands behind a key or a dash: on its line, or deeper below it."""
    return (_read_scalar(text), at + 1) if text else _read_block(lines, at + 1, depth + 2)


def _read_scalar(text: str) -> Any:
    return text if _PLAIN.match(text) and text.lower() not in _WORDS else json.loads(text)
