# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Search bytes, files and trees for secrets that a test planted, in the forms in which secrets leak.

A secret is found as it is and as base64 (wherever in a longer text it was encoded), hex, URL, JSON, YAML, shell and
HTML write it, reversed, and in UTF-16. Archives and databases are opened (`unpacked.py`). Names of files and targets
of links count as well.

A file may hold a secret when it is meant for it: a `Private` says which files are, and with which owner and modes.
Where a run leaves files, texts and processes is in `places.py`.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import shlex
import stat
import urllib.parse
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Collection, Dict, FrozenSet, Iterator, List, Mapping, Sequence, Set, Tuple

from .unpacked import unpacked

CHUNK = 4 * 1024 * 1024
# Shorter ones are met by chance in gigabytes of other people's bytes.
SHORTEST = 12
# How deep an archive in an archive is opened.
DEPTH = 4

Found = Set[Tuple[str, str]]
"""(name of the secret, name of the form it was found in)"""


@dataclass(frozen=True, order=True)
class Leak:
    """A secret where it must not be."""

    place: str
    secret: str
    form: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.secret} ({self.form}{', ' if self.why else ''}{self.why})"


@dataclass(frozen=True)
class Private:
    """Files that may hold secrets, if nobody else can read them."""

    # Of the place as a Leak shows it, for example `gpu-*:/opt/xinference/secrets/*`; `*` matches slashes as well.
    pattern: str
    owner: int = 0
    modes: FrozenSet[int] = field(default=frozenset({0o600, 0o400}))
    # The names of the secrets that belong there; none means any.
    secrets: FrozenSet[str] = frozenset()

    def refuses(self, name: str, status: os.stat_result) -> str:
        """Why the file may not hold that secret; empty when it may."""
        if self.secrets and name not in self.secrets:
            return "belongs elsewhere"
        if status.st_uid != self.owner:
            return f"owner {status.st_uid}"
        mode = stat.S_IMODE(status.st_mode)
        return "" if mode in self.modes else f"mode {mode:04o}"


def forms(value: str) -> Dict[bytes, str]:
    """What to search for to find a value: bytes -> name of the form."""
    found: Dict[bytes, str] = {}

    def add(name: str, text: str) -> None:
        found.setdefault(text.encode(), name)

    raw = value.encode()
    add("plain", value)
    for ascii_only in (True, False):
        escaped = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        add("JSON", escaped)
        add("JSON in JSON", json.dumps(escaped, ensure_ascii=ascii_only)[1:-1])
    add("Python", repr(value)[1:-1])
    for url in (urllib.parse.quote(value), urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value)):
        add("URL", url)
        add("URL", "".join(part[:2].lower() + part[2:] if number else part for number, part in _escapes(url)))
    add("shell", shlex.quote(value).strip("'"))
    add("shell", value.replace("'", "\\'"))
    add("YAML", value.replace("'", "''"))
    add("Compose", value.replace("$", "$$"))
    add("HTML", html.escape(value))
    add("hex", raw.hex())
    add("hex", raw.hex().upper())
    add("reversed", value[::-1])
    found.setdefault(value.encode("utf-16-le"), "UTF-16")
    # Encoded as part of something longer, its bytes may begin at each of three places of a group.
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw).rstrip(b"=")
        certain = encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        found.setdefault(certain, "base64")
        found.setdefault(certain.replace(b"+", b"-").replace(b"/", b"_"), "base64")
    return found


def _escapes(url: str) -> Iterator[Tuple[int, str]]:
    """The parts of a URL between percent signs, numbered; each but the first begins with an escape."""
    for number, part in enumerate(url.split("%")):
        yield number, ("%" + part if number else part)


class Search:
    """Looks for secrets, given by their names."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        """Of a text of several lines, such as a key in PEM, its middle line stands for all. Raises ValueError."""
        self._needles: List[Tuple[bytes, Tuple[str, str]]] = []
        for name, value in secrets.items():
            lines = [line for line in value.splitlines() if line.strip() and not line.startswith("-----")]
            wanted = lines[len(lines) // 2] if lines else ""
            if len(wanted) < SHORTEST:
                raise ValueError(f"secret {name} is too short to be told from chance (at least {SHORTEST} characters)")
            self._needles += [(needle, (name, form)) for needle, form in forms(wanted).items()]
        self._overlap = max(len(needle) for needle, _meaning in self._needles) - 1

    def in_bytes(self, data: bytes) -> Found:
        """What is found in bytes as they are."""
        return {found for needle, found in self._needles if needle in data}

    def in_text(self, place: str, text: str) -> List[Leak]:
        """What is found in a text, for example what a command printed."""
        return sorted(Leak(place, *found) for found in self.in_bytes(text.encode(errors="surrogateescape")))

    def in_stream(self, stream: IO[bytes], depth: int = DEPTH) -> Found:
        """What is found in a stream that can be sought, and in what it is the archive of."""
        found: Found = set()
        tail = b""
        while True:
            block = stream.read(CHUNK)
            if not block:
                break
            found |= self.in_bytes(tail + block)
            tail = (tail + block)[-self._overlap :]
        if depth:
            for inner in unpacked(stream):
                found |= self.in_stream(inner, depth - 1)
        return found

    def in_tree(
        self,
        root: Path,
        label: str,
        private: Sequence[Private] = (),
        skip: Collection[Path] = (),
        since: float = 0,
    ) -> List[Leak]:
        """Leaks in all files below a directory (or in one file), shown as `label` and the path below `root`.

        `skip` names directories that are left out; files last changed before `since` are, too. Links are not followed.
        Raises OSError when something cannot be read, unless it went away meanwhile.
        """
        leaks: Set[Leak] = set()
        seen: Set[Tuple[int, int]] = set()
        for path in _below(root, frozenset(skip)):
            below = path.relative_to(root)
            place = label if path == root else f"{label.rstrip('/')}/{below}"
            leaks.update(Leak(place, *found, "its name") for found in self.in_bytes(os.fsencode(str(below))))
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    target = os.fsencode(path.readlink())
                    leaks.update(Leak(place, *found, "its target") for found in self.in_bytes(target))
                elif stat.S_ISREG(status.st_mode) and status.st_size and status.st_ctime >= since:
                    # A blob and its names in the trees of models are one file.
                    if status.st_nlink > 1 and (status.st_dev, status.st_ino) in seen:
                        continue
                    with path.open("rb") as stream:
                        found = self.in_stream(stream)
                    if not found:
                        seen.add((status.st_dev, status.st_ino))
                    leaks.update(_judged(place, found, status, private))
        return sorted(leaks)


def _judged(place: str, found: Found, status: os.stat_result, private: Sequence[Private]) -> Iterator[Leak]:
    meant = [entry for entry in private if fnmatchcase(place, entry.pattern)]
    for name, form in found:
        refusals = [entry.refuses(name, status) for entry in meant]
        if "" not in refusals:
            yield Leak(place, name, form, ", ".join(refusals))


def _below(root: Path, skip: FrozenSet[Path]) -> Iterator[Path]:
    """Everything below a directory but directories; a file is below itself."""
    if not root.is_dir():
        yield root
        return

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, names, files in os.walk(root, onerror=fail):
        here = Path(folder)
        links = [name for name in names if (here / name).is_symlink()]
        names[:] = sorted(name for name in names if name not in links and here / name not in skip)
        yield from (here / name for name in sorted([*files, *links]))
