# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What belongs to a backup of a host, and the archive it travels in. Pure: data in, data out.

An archive is a tar file that is written in one way only, so that every byte of it follows from its content::

    index.json          what it is of (`Index`), with size and SHA-256 of every file
    index.json.sha256   the SHA-256 of the index, as sha256sum writes it
    home/...            of XINFERENCE_HOME: accounts, registrations, databases
    state/...           of <root>/state
    release/...         the files of the release in force

Reading writes it again and compares, so that a changed byte is found wherever it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

FORMAT = 1
INDEX = "index.json"
SEAL = "index.json.sha256"
ACCOUNTS = "accounts"
REGISTRATIONS = "registrations"
RECORDS = "records"
CONFIGURATION = "configuration"
KINDS = (ACCOUNTS, REGISTRATIONS, RECORDS, CONFIGURATION)

LAUNCHED = "state/launched.json"
HISTORY = "home/launch_history.db"
AUTH = "home/auth/auth.db"

# Read in constants.py of 4.1.0 and 1.8.1. Left out: downloads that were going on, and what a worker notes for its own
# next start, which is of this one machine.
_DATABASES = re.compile(r"home/(?!download_tasks\.)[^/]+\.db\Z")
_SETTINGS = "home/system-settings.json"
_ACCOUNTS = re.compile(r"home/auth/(?!\.)[^/]+(?<!-wal)(?<!-shm)(?<!-journal)\Z")
# model/<type>/ of versions before 1.8, model/v2/<type>/ since, model/v2/builtin/<type>/ lists that were updated.
_REGISTRATIONS = re.compile(r"home/model/(?:[^/]+/){1,4}(?!\.)[^/]+\.json\Z")
_CONFIGURATION = re.compile(r"release/(?!bin/)[^/]+(?<!\.pyz)\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


class BackupError(Exception):
    """A backup that cannot be made or used; the text says why, and what to do."""


class Damaged(BackupError):
    """An archive that is not as it was written, or was never one."""


@dataclass(frozen=True)
class File:
    """One file of a backup; `size` in bytes."""

    name: str
    size: int
    sha256: str

    @property
    def kind(self) -> str:
        """Which part of a backup it belongs to, one of KINDS."""
        return str(kind_of(self.name))


@dataclass(frozen=True)
class Index:
    """What a backup is of: the host by its name in the inventory, and how it was then.

    `time` is UTC, like 2026-11-20T20:15:00Z. `server_version` is empty where it could not be told. `root` and `home`
    are paths on that host, `release` is the id of the release in force.
    """

    host: str
    time: str
    server_version: str
    backend: str
    root: str
    home: str
    release: str
    files: Tuple[File, ...] = ()

    @property
    def identity(self) -> str:
        """The SHA-256 of the index, and so of everything in the backup."""
        return hashlib.sha256(self.text()).hexdigest()

    def text(self) -> bytes:
        """The index as the archive has it."""
        told = {"format": FORMAT, **asdict(self), "files": [asdict(file) for file in self.files]}
        return (json.dumps(told, indent=1, sort_keys=True) + "\n").encode("utf-8")


def kind_of(name: str) -> Optional[str]:
    """Which part of a backup a file belongs to by its name in the archive; None for what belongs to none.

    Whatever would lead out of its directory belongs to none.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\\" in name:
        return None
    if _ACCOUNTS.match(name):
        return ACCOUNTS
    if _REGISTRATIONS.match(name):
        return REGISTRATIONS
    if name in (LAUNCHED, _SETTINGS) or _DATABASES.match(name):
        return RECORDS
    return CONFIGURATION if _CONFIGURATION.match(name) else None


def is_database(name: str) -> bool:
    """Whether a file is an SQLite database, which must never be copied as it is."""
    return name.endswith(".db")


def listed(contents: Mapping[str, bytes]) -> Tuple[File, ...]:
    """The list of files for an index."""
    return tuple(
        File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in sorted(contents.items())
    )


def pack(index: Index, contents: Mapping[str, bytes]) -> bytes:
    """The archive with these files, which must be those of the index. The same input gives the same bytes."""
    text = index.text()
    members = [(INDEX, text), (SEAL, f"{hashlib.sha256(text).hexdigest()}  {INDEX}\n".encode("ascii"))]
    members += [(file.name, contents[file.name]) for file in index.files]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o600
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def unpack(data: bytes) -> Tuple[Index, Dict[str, bytes]]:
    """What an archive holds. Raises Damaged for one with any byte changed, BackupError for one of a later format."""
    members = _members(data)
    text, seal = members.pop(INDEX, b""), members.pop(SEAL, b"")
    if not text:
        raise Damaged("it has no index, so it is no backup of this collection, or it is cut off")
    if seal.decode("ascii", "replace").split() != [hashlib.sha256(text).hexdigest(), INDEX]:
        raise Damaged("its index is not as it was written")
    index = read_index(text)
    names = [file.name for file in index.files]
    strange = [name for name in {*names, *members} if kind_of(name) is None]
    if strange:
        raise Damaged(f"it has {', '.join(sorted(map(repr, strange)))}, which no backup of this collection has")
    if sorted(members) != sorted(names):
        raise Damaged(f"{_some(sorted({*names} ^ {*members}))} is missing in it, or too much")
    wrong = [file.name for file in index.files if (file,) != listed({file.name: members[file.name]})]
    if wrong:
        raise Damaged(f"{_some(wrong)} in it is not as it was written")
    if pack(index, members) != data:
        raise Damaged("its bytes are not as they were written")
    return index, members


def read_index(text: bytes) -> Index:
    """The index of an archive. Raises BackupError for one of a later format, Damaged for none at all."""
    try:
        told: Dict[str, Any] = json.loads(text.decode("utf-8"))
        if told.pop("format") != FORMAT:
            raise BackupError(
                "it was made by another version of this collection, in a format that this one does not know. "
                "Restore it with the version that made it, or a later one"
            )
        files = tuple(File(**file) for file in told.pop("files"))
        index = Index(**told, files=files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"its index cannot be read ({type(error).__name__})") from error
    texts = [value for name, value in asdict(index).items() if name != "files"]
    right = all(isinstance(value, str) for value in texts) and all(
        isinstance(file.name, str) and isinstance(file.size, int) and _SHA256.match(str(file.sha256)) for file in files
    )
    if not right or len({file.name for file in files}) != len(files):
        raise Damaged("its index is not as this collection writes it")
    return index


def _members(data: bytes) -> Dict[str, bytes]:
    """The files of a tar file; raises Damaged for one that has anything else, or anything twice."""
    found: Dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isreg() else None
                if stream is None or member.name in found or member.issparse():
                    raise Damaged(f"it has {member.name!r}, which is no plain file, or is there twice")
                found[member.name] = stream.read()
    except (tarfile.TarError, ValueError, OSError, EOFError, RecursionError) as error:
        raise Damaged(f"it is no tar file ({error})") from error
    return found


def numbers(version: str) -> Tuple[int, ...]:
    """A version in a form that can be compared; empty for a text that is none."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()


def moved(name: str, content: bytes, places: Mapping[str, str]) -> bytes:
    """A JSON file as it has to be where directories have other names; `places` says which, from old to new.

    Only whole texts that begin with such a path change. What cannot be read stays as it is.
    """
    changing = {old: new for old, new in places.items() if old != new}
    if not changing or not name.endswith(".json"):
        return content
    try:
        before = json.loads(content.decode("utf-8"))
    except ValueError:
        return content
    after = _moved(before, changing)
    return content if after == before else (json.dumps(after, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def _moved(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _moved(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, places) for item in value]
    return moved_path(value, places) if isinstance(value, str) else value


def moved_path(text: str, places: Mapping[str, str]) -> str:
    """A path, or an address of a file, below another directory; any other text as it is."""
    for old in sorted(places, key=len, reverse=True):
        for prefix in ("", "file://"):
            if text == prefix + old or text.startswith(f"{prefix}{old}/"):
                return prefix + places[old] + text[len(prefix + old) :]
    return text


def _some(names: List[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
