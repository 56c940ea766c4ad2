# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bundle cut into volumes for disks and sticks: which part of which blob lies where. Pure, no files here.

::

    <name>-<n>-of-<m>/       one volume
        index.json           the bundle's index        } the same on every volume, so that any one
        manifests            its manifests, in a row   } of them tells what the whole bundle is
        pieces/0001 ...      the blobs: one, a part of one, or many small ones in a row
        SHA256SUMS           of all other files, for `sha256sum -c`
        volume.json          what set this is, what lies where, and the digests of these pieces; written last

Small blobs go together, because forty thousand files on a stick cost hours and a third of its room. Where a piece lies
follows from the plan, so no name that comes from a stick is ever made a path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Sequence

from .digest import hash_bytes, is_digest
from .documents import MAX_DOCUMENT, DocumentError, parse, shown
from .layout import INDEX_FILE, VOLUME_FILE, BundleError
from .manifest import MAX_BLOB, Artifact, Blob, name_problem
from .pack import encode
from .sizes import size_text

MANIFESTS_FILE = "manifests"
PIECES = "pieces"
SUMS_FILE = "SHA256SUMS"
FORMAT = "airgap.xinference.volume.v1"

FAT32_FILE = 4 * 1024**3 - 1
"""Bytes the largest file on FAT32 can have."""
SMALL = 8 * 1024**2
"""Bytes: smaller blobs are put in a row and never cut, and no cut leaves less at the end of a volume."""
ROW = 256 * 1024**2
"""Bytes a row of small blobs may have: what is damaged together is carried again together."""
CLUSTER = 128 * 1024
"""Bytes: what a file takes is a multiple of this at worst (exFAT)."""
ENTRY = 320
"""Bytes that a part of a blob takes at most in the lists of a volume."""
MAX_VOLUMES = 9999


class Part(NamedTuple):
    """Bytes of a blob: from `start`, as many as `length`."""

    digest: str
    start: int
    length: int


Piece = Sequence[Part]
"""One file of a volume: parts in a row."""


def piece_size(piece: Piece) -> int:
    """Bytes of a piece."""
    return sum(part.length for part in piece)


def piece_path(number: int) -> str:
    """Where a volume keeps its piece of a number, counted from 1."""
    return f"{PIECES}/{number:04}"


class Limits(NamedTuple):
    """What pieces must obey, in bytes.

    `room` is what a volume has for them, `file` the largest file, `small` what is never cut, `row` the most of those
    in one piece, `cluster` what the size of a file is rounded up to.
    """

    room: int
    file: int = FAT32_FILE
    small: int = SMALL
    row: int = ROW
    cluster: int = CLUSTER


def cut(blobs: Mapping[str, int], limits: Limits) -> list[list[Piece]]:
    """The pieces of every volume that together hold `blobs` (digest: size), in few volumes and in their order.

    Small blobs come first, in rows. A large blob is cut where its volume or the largest file ends, at a multiple of
    `cluster`. At least one volume comes back. `limits` must let one small blob into a volume.
    """
    filler = _Filler(limits)
    row: list[Part] = []
    held = 0
    for digest, size in blobs.items():
        if size >= limits.small:
            continue
        if row and held + size > min(limits.row, limits.file, filler.room):
            filler.add(row)
            row, held = [], 0
        if size > filler.room:
            filler.next()
        row.append(Part(digest, 0, size))
        held += size
    if row:
        filler.add(row)
    for digest, size in blobs.items():
        start = 0 if size >= limits.small else size
        while start < size:
            length = filler.fitting(size - start)
            filler.add([Part(digest, start, length)])
            start += length
    return filler.volumes


class _Filler:
    """Volumes being filled one after another; `room` are the bytes left of the last one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._whole = limits.room // limits.cluster * limits.cluster
        if min(self._whole, limits.file) < max(limits.small, limits.cluster):
            raise ValueError(f"no small blob of up to {limits.small} bytes fits a volume of {limits.room}")
        self.volumes: list[list[Piece]] = [[]]
        self.room = self._whole

    def next(self) -> None:
        """Begin another volume."""
        self.volumes.append([])
        self.room = self._whole

    def add(self, piece: Piece) -> None:
        """Put a piece that fits on the last volume."""
        self.volumes[-1].append(tuple(piece))
        self.room -= -(-piece_size(piece) // self._limits.cluster) * self._limits.cluster

    def fitting(self, rest: int) -> int:
        """How much of `rest` bytes of a blob the next piece takes; begins another volume where too little is left."""
        if self.room < min(rest, self._limits.small):
            self.next()
        most = min(self.room, self._limits.file)
        return rest if rest <= most else most // self._limits.cluster * self._limits.cluster


class Row(NamedTuple):
    """A volume as people are told of it: where it is (if it is here), bytes of its files, its state, what it holds."""

    title: str
    path: str
    size: int
    state: str
    artifacts: tuple[str, ...]


@dataclass(frozen=True)
class VolumeSet:
    """A bundle in volumes. Two splits of the same bundle in the same way are the same set, with the same `id`.

    `index` is the bundle's index, `manifests` the file of all its manifests, `base` the digest of the index of the
    bundle that the site is expected to have (None: none), `volumes` the pieces of each.
    """

    name: str
    index: Blob
    manifests: Blob
    base: str | None
    volumes: tuple[tuple[Piece, ...], ...]

    @property
    def id(self) -> str:
        """The digest of everything that makes the set."""
        return hash_bytes(encode(self._values()))

    def title(self, number: int) -> str:
        """The name of a volume, counted from 1, and of its directory; names sort as numbers do."""
        count = len(self.volumes)
        return f"{self.name}-{number:0{len(str(count))}}-of-{count}"

    @property
    def carried(self) -> dict[str, int]:
        """The blobs on the volumes, manifests aside: digest and size in bytes."""
        sizes: dict[str, int] = {}
        for pieces in self.volumes:
            for piece in pieces:
                for part in piece:
                    sizes[part.digest] = max(sizes.get(part.digest, 0), part.start + part.length)
        return sizes

    def row(self, number: int, path: str, state: str, artifacts: Iterable[Artifact]) -> Row:
        """A volume as people are told of it."""
        digests = {part.digest for piece in self.volumes[number - 1] for part in piece}
        holds = tuple(share.reference for share in shares(artifacts, digests))
        return Row(self.title(number), path, self.volume_size(number), state, holds)

    def bearers(self, digests: Iterable[str]) -> dict[int, set[str]]:
        """The numbers of the volumes on which parts of some blobs lie, each with those blobs."""
        wanted = set(digests)
        found: dict[int, set[str]] = {}
        for number, pieces in enumerate(self.volumes, 1):
            here = {part.digest for piece in pieces for part in piece} & wanted
            if here:
                found[number] = here
        return found

    def volume_size(self, number: int) -> int:
        """Bytes of all files of a volume but its lists."""
        return self.index.size + self.manifests.size + sum(map(piece_size, self.volumes[number - 1]))

    def _values(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "index": list(self.index),
            "manifests": list(self.manifests),
            "base": self.base,
            "volumes": [[[list(part) for part in piece] for piece in pieces] for pieces in self.volumes],
        }


def plan_volumes(
    name: str,
    index: Blob,
    manifests: Blob,
    blobs: Mapping[str, int],
    size: int,
    max_file: int = 0,
    base: str | None = None,
    cluster: int = CLUSTER,
) -> VolumeSet:
    """Cut `blobs` (digest: size; without manifests) into volumes of at most `size` bytes, the lists on each included.

    `max_file` are the bytes the largest file may have, 0 for any number. Raises BundleError where a volume or a file is
    too small to hold anything beside the lists.
    """
    problem = name_problem(name)
    if problem:
        raise BundleError(f"Give the volumes another name: {problem}.")
    lists = _lists_size(index.size, manifests.size, blobs, size, max_file or MAX_BLOB, cluster)
    file, room = max_file or MAX_BLOB, size - lists
    if room < lists or room < 2 * cluster or file < max(cluster, index.size, manifests.size):
        least = size_text(max(2 * lists, lists + 2 * cluster))
        raise BundleError(
            f"Volumes of {size_text(size)} with files of {size_text(file)} at most are too small: what the bundle "
            f"consists of is listed on each, which takes {size_text(lists)}. Make them {least} or larger."
        )
    small = max(cluster, min(SMALL, file, room) // cluster * cluster)
    if small > file:
        small = file
    volumes = cut(blobs, Limits(room, file, small, max(small, min(ROW, file)), cluster))
    if len(volumes) > MAX_VOLUMES:
        raise BundleError(f"Volumes of {size_text(size)} would be {len(volumes)}, the limit is {MAX_VOLUMES}.")
    return VolumeSet(name, index, manifests, base, tuple(map(tuple, volumes)))


def _lists_size(index: int, manifests: int, blobs: Mapping[str, int], size: int, file: int, cluster: int) -> int:
    """Bytes that index, manifests and lists take on a volume at most, if they take less than half of it."""
    total = sum(blobs.values())
    cuts = sum(length // file for length in blobs.values()) + 2 * total // max(1, size) + 1
    lists = (len(blobs) + 2 * cuts) * ENTRY + 4096
    return sum(-(-length // cluster) * cluster for length in (index, manifests, lists, lists)) + 2 * cluster


@dataclass(frozen=True)
class VolumeList:
    """What volume.json of one volume says: the set, which of its volumes this is, the digests of its pieces."""

    set: VolumeSet
    number: int
    digests: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name of the volume."""
        return self.set.title(self.number)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of the volume; the one at position n has the number n + 1."""
        return self.set.volumes[self.number - 1]

    def encode(self) -> bytes:
        """The content of volume.json: what a person looks for comes first."""
        about = {"set": self.set.id, "volume": self.number, "of": len(self.set.volumes)}
        content = {**about, **self.set._values(), "digests": list(self.digests)}
        head = ",\n".join(f'"{key}":{encode(value).decode()}' for key, value in content.items())
        return f"{{\n{head}\n}}\n".encode()

    def sums(self) -> bytes:
        """The content of SHA256SUMS."""
        digests = {VOLUME_FILE: hash_bytes(self.encode())}
        digests.update({INDEX_FILE: self.set.index.digest, MANIFESTS_FILE: self.set.manifests.digest})
        digests.update({piece_path(number): digest for number, digest in enumerate(self.digests, 1)})
        return "".join(f"{digest.partition(':')[2]}  {path}\n" for path, digest in digests.items()).encode()


def read_list(raw: bytes) -> VolumeList:
    """What the content of a volume.json says. Raises DocumentError for one that is damaged or makes no sense."""
    content = parse(raw)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DocumentError(f"its format is not {FORMAT}")
    problem = name_problem(content.get("name"))
    if problem:
        raise DocumentError(problem)
    base = content.get("base")
    if base is not None and not is_digest(base):
        raise DocumentError(f"base {shown(base)} is not a digest")
    found = VolumeSet(
        name=content["name"],
        index=_document(content, "index"),
        manifests=_document(content, "manifests"),
        base=base,
        volumes=_volumes(content.get("volumes")),
    )
    number: Any = content.get("volume")
    digests: Any = content.get("digests")
    if found.id != content.get("set"):
        raise DocumentError("what it says is not what the set's digest was made of")
    if not _is_count(number, 1) or number > len(found.volumes) or content.get("of") != len(found.volumes):
        raise DocumentError(f"volume {shown(number)} of {shown(content.get('of'))} does not exist")
    if not isinstance(digests, list) or not all(map(is_digest, digests)):
        raise DocumentError("the digests of its pieces are none")
    if len(digests) != len(found.volumes[number - 1]):
        raise DocumentError(f"{len(digests)} digests are not one for each piece")
    return VolumeList(found, number, tuple(digests))


def _document(content: dict[str, Any], key: str) -> Blob:
    value = content.get(key)
    if not isinstance(value, list) or len(value) != 2 or not is_digest(value[0]) or not _is_count(value[1]):
        raise DocumentError(f"{key} {shown(value)} is not a digest and a size")
    if value[1] > (MAX_DOCUMENT if key == "index" else MAX_BLOB):
        raise DocumentError(f"{key} of {value[1]} bytes is larger than any")
    return Blob(value[0], value[1])


def _volumes(value: Any) -> tuple[tuple[Piece, ...], ...]:
    """The plan in a list, when every blob is in it exactly once from its first to its last byte."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_VOLUMES:
        raise DocumentError(f"volumes: {shown(value)} is no plan")
    volumes = tuple(tuple(map(_piece, _list(pieces))) for pieces in value)
    parts = sorted(part for pieces in volumes for piece in pieces for part in piece)
    before: Part | None = None
    for part in parts:
        same = before is not None and before.digest == part.digest
        expected = before.start + before.length if same and before is not None else 0
        empty = before is not None and not (part.length and before.length)
        if part.start != expected or (same and empty):
            raise DocumentError(f"byte {expected} of {part.digest} is in it twice or not at all")
        if part.start + part.length > MAX_BLOB:
            raise DocumentError(f"{part.digest} is larger than any blob")
        before = part
    return volumes


def _piece(value: Any) -> Piece:
    parts = []
    for entry in _list(value):
        if not isinstance(entry, list) or len(entry) != 3 or not is_digest(entry[0]):
            raise DocumentError(f"{shown(entry)} is not a part of a blob")
        if not _is_count(entry[1]) or not _is_count(entry[2]):
            raise DocumentError(f"{shown(entry)} is not a part of a blob")
        parts.append(Part(entry[0], entry[1], entry[2]))
    if not parts:
        raise DocumentError("a piece has nothing in it")
    return tuple(parts)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DocumentError(f"{shown(value)} is no list")
    return value


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def plan_problems(volumes: VolumeSet, artifacts: Iterable[Artifact]) -> Iterator[str]:
    """Where a set and the manifests on its volumes contradict each other."""
    artifacts = list(artifacts)
    sizes = {
        blob.digest: blob.size for artifact in artifacts for blob in artifact.blobs if blob.digest != artifact.digest
    }
    for digest, size in volumes.carried.items():
        if digest not in sizes:
            yield f"the volumes carry {digest}, which no artifact of the bundle has as a file"
        elif sizes[digest] != size:
            yield f"the volumes carry {size} bytes of {digest}, which has {sizes[digest]}"


class Share(NamedTuple):
    """How much of an artifact some blobs are: how many of its files, of how many, and their bytes."""

    reference: str
    files: int
    of: int
    size: int

    def __str__(self) -> str:
        return f"{self.reference}: {self.files} of {self.of} files, {size_text(self.size)}"


def shares(artifacts: Iterable[Artifact], digests: Iterable[str]) -> list[Share]:
    """Which artifacts some blobs belong to, and how much of each they are. A configuration counts as a file."""
    wanted = set(digests)
    found = []
    for artifact in artifacts:
        files = [blob for blob in artifact.blobs if blob.digest != artifact.digest]
        here = [blob.size for blob in files if blob.digest in wanted]
        if here:
            found.append(Share(artifact.reference, len(here), len(files), sum(here)))
    return found
