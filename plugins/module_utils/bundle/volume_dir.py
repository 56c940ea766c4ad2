# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Volumes where they lie: on sticks somebody carried, so nothing on them is believed before its digest was checked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

from .digest import hash_bytes
from .documents import DocumentError, parse, read_small
from .layout import INDEX_FILE, MAX_MANIFESTS, VOLUME_FILE, BundleError, artifacts_of, read_artifacts
from .manifest import Artifact, Blob
from .volumes import MANIFESTS_FILE, VolumeList, piece_path, read_list

_TITLE = re.compile(r".+-[0-9]+-of-[0-9]+\Z")


@dataclass(frozen=True)
class Contents:
    """What a bundle consists of: its index, the artifacts in it, and their manifests by digest."""

    index: bytes
    artifacts: list[Artifact]
    manifests: dict[str, bytes]


@dataclass(frozen=True)
class VolumeDir:
    """A volume that has its list: the directory and what the list says."""

    path: Path
    listed: VolumeList

    @classmethod
    def read(cls, path: Path) -> VolumeDir:
        """The volume in a directory. Raises DocumentError when its list is damaged, OSError when it has none."""
        return cls(path, read_list(read_small(path / VOLUME_FILE)))

    def __str__(self) -> str:
        title = self.listed.title
        return str(self.path) if self.path.name == title else f"{self.path} ({title})"

    def piece(self, number: int) -> Path:
        """The file of a piece, counted from 1."""
        return self.path / piece_path(number)

    def contents(self, problems: list[str]) -> Contents:
        """What the bundle consists of; what makes no sense is added to `problems`.

        Raises DocumentError when index or manifests are damaged on this volume, OSError when they are not there.
        """
        index = self._document(INDEX_FILE, self.listed.set.index)
        reader = _Manifests(self._document(MANIFESTS_FILE, self.listed.set.manifests))
        return Contents(index, artifacts_of(parse(index), reader, problems), reader.read)

    def _document(self, name: str, blob: Blob) -> bytes:
        try:
            raw = read_small(self.path / name, MAX_MANIFESTS)
        except DocumentError as error:
            raise DocumentError(f"{name}: {error}") from error
        if hash_bytes(raw) != blob.digest:
            raise DocumentError(f"{name} is damaged")
        return raw


class _Manifests:
    """The manifests in a row, by digest; they lie in the order in which the index names them."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0
        self.read: dict[str, bytes] = {}

    def __call__(self, blob: Blob, _where: str) -> bytes:
        if blob.digest not in self.read:
            self.read[blob.digest] = self._raw[self._at : self._at + blob.size]
            self._at += blob.size
        return self.read[blob.digest]


def find_volumes(places: Iterable[str | os.PathLike[str]], name: str, problems: list[str]) -> list[VolumeDir]:
    """The volumes in some directories, which are volumes or hold some; `name` chooses a set where it is not empty.

    Directories that look like volumes and cannot be used are named in `problems`. Raises BundleError for a directory
    that is not there.
    """
    found: list[VolumeDir] = []
    absent = [str(place) for place in places if not Path(place).is_dir()]
    if absent:
        raise BundleError(f"There is no directory {', '.join(absent)}; mount what the volumes are on, or name another.")
    for place in places:
        for path in _candidates(Path(os.path.abspath(place))):  # noqa: PTH100 - no link is followed
            try:
                volume = VolumeDir.read(path)
            except FileNotFoundError:
                problems.append(f"{path} has no {VOLUME_FILE}: it was not finished, or not copied to its end")
            except DocumentError as error:
                problems.append(f"{path / VOLUME_FILE} is damaged: {error}")
            except OSError as error:
                problems.append(f"{path / VOLUME_FILE} cannot be read: {error.strerror}")
            else:
                if not name or volume.listed.set.name == name:
                    found.append(volume)
    return found


def _candidates(place: Path) -> list[Path]:
    """The directory, if it is a volume, else what looks like one in it."""
    if os.path.lexists(place / VOLUME_FILE) or _TITLE.match(place.name):
        return [place]
    children = sorted(path for path in place.iterdir() if path.is_dir() and not path.is_symlink())
    return [path for path in children if os.path.lexists(path / VOLUME_FILE) or _TITLE.match(path.name)]


@dataclass(frozen=True)
class Base:
    """An earlier bundle, as far as a differential one needs it: the digest of its index, and its blobs."""

    index: str
    blobs: frozenset[str]


def read_base(path: str | os.PathLike[str]) -> Base:
    """What an earlier bundle has, from the bundle, from its index and manifests alone, or from any volume of it.

    Raises BundleError with everything that is wrong with it.
    """
    root = Path(path)
    root = root.parent if root.name == INDEX_FILE else root
    problems: list[str] = []
    digest = ""
    artifacts: list[Artifact] = []
    try:
        if os.path.lexists(root / VOLUME_FILE):
            volume = VolumeDir.read(root)
            artifacts, digest = volume.contents(problems).artifacts, volume.listed.set.index.digest
        else:
            artifacts = read_artifacts(root, problems, marked=False)
            digest = "" if problems else hash_bytes(read_small(root / INDEX_FILE))
    except DocumentError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}")
    if problems:
        raise BundleError(
            f"The earlier bundle {root} cannot be used; it takes a bundle, its {INDEX_FILE} with the manifests, or the "
            "lists of one of its volumes:",
            problems,
        )
    return Base(digest, frozenset(blob.digest for artifact in artifacts for blob in artifact.blobs))
