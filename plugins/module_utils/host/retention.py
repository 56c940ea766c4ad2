# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host still needs, and what may go. Pure: data in, data out.

Needed is what the kept releases name, what was shipped last or is being shipped, and what anything uses at this moment.
Everything else that the collection made may go, and nothing that it did not make. What cannot be told for sure stays,
and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

FEWEST = 2
"""Releases that are kept at least: the one in force, and the one before, to which a rollback goes."""
SHORT = 12
"""Hex digits of a digest that name a directory."""
IMAGES = "images"
ENVIRONMENT = ("wheels", "server")
LIBRARY = ("wheels", "host")


class RetentionError(Exception):
    """A host about which it cannot be said what it needs; the text says why, and what to do."""


class Named(NamedTuple):
    """An artifact, as a list of what was shipped names it: the digest of its manifest, of an image its id too."""

    kind: str
    name: str
    digest: str
    image_id: str = ""

    @property
    def short(self) -> str:
        """What its directories are called."""
        return short(self.digest)

    @property
    def path(self) -> str:
        """The path of its directory below the root, where it has one."""
        return f"{self.kind}/{self.name}/{self.short}"


@dataclass(frozen=True)
class Release:
    """A release on the disk: what it names, the environments it runs from, and why it cannot be read (if so)."""

    id: str
    artifacts: Tuple[Named, ...] = ()
    venvs: FrozenSet[str] = frozenset()
    problem: str = ""


class Content(NamedTuple):
    """What a manifest in the store points at: blobs that belong to it, and layers that are there on their way only."""

    blobs: FrozenSet[str]
    layers: FrozenSet[str] = frozenset()


@dataclass(frozen=True)
class Tree:
    """A directory below the root: `blobs` are those its files are links of, `ours` whether shipping made it."""

    path: str
    ours: bool = True
    blobs: FrozenSet[str] = frozenset()


@dataclass(frozen=True)
class Image:
    """A name that shipping gave to an image it loaded; `id` is what the engine calls the image.

    `image_id` is the digest of its configuration, `digest` that of its manifest; `layers` have sizes in bytes.
    """

    reference: str
    image_id: str
    digest: str
    id: str
    layers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineImage:
    """An image as the engine has it, with its names and layers; `used` by a container, be it running or not."""

    id: str
    tags: FrozenSet[str] = frozenset()
    layers: FrozenSet[str] = frozenset()
    used: bool = False


@dataclass
class Standing:
    """What there is on a host.

    `releases` are in the order in which they were put in force, the last one first. `shipped` was shipped last,
    `arriving` is being shipped. `used` are paths below the root that something uses now, with what uses them. `library`
    is the one in use. `partial` are digests of unfinished blobs, `packs` files with several, `leftovers` paths that an
    interrupted run left. `loaded` are the images that shipping put into the engine, `engine` is all that the engine
    has; None where it could not be asked.
    """

    releases: List[Release] = field(default_factory=list)
    current: str = ""
    running: str = ""
    shipped: Tuple[Named, ...] = ()
    arriving: Tuple[Named, ...] = ()
    used: Dict[str, str] = field(default_factory=dict)
    contents: Dict[str, Content] = field(default_factory=dict)
    blobs: FrozenSet[str] = frozenset()
    trees: List[Tree] = field(default_factory=list)
    venvs: List[str] = field(default_factory=list)
    libraries: List[str] = field(default_factory=list)
    library: str = ""
    partial: List[str] = field(default_factory=list)
    packs: List[str] = field(default_factory=list)
    leftovers: List[str] = field(default_factory=list)
    loaded: List[Image] = field(default_factory=list)
    engine: Optional[List[EngineImage]] = None


@dataclass
class Plan:
    """What goes, in the order in which it has to: first what names things, then the things.

    `kept` are the releases that stay, `notes` say what else stays although nothing names it.
    """

    kept: List[str] = field(default_factory=list)
    releases: List[str] = field(default_factory=list)
    images: List[Image] = field(default_factory=list)
    venvs: List[str] = field(default_factory=list)
    trees: List[str] = field(default_factory=list)
    libraries: List[str] = field(default_factory=list)
    blobs: List[str] = field(default_factory=list)
    partial: List[str] = field(default_factory=list)
    packs: List[str] = field(default_factory=list)
    leftovers: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)


class Link(NamedTuple):
    """One name of a file: which file it is (device, inode), how many names that has, and its bytes on the disk."""

    file: Tuple[int, int]
    names: int
    bytes: int


def short(digest: str) -> str:
    """The part of a digest that names directories."""
    return digest.partition(":")[2][:SHORT]


def plan(there: Standing, keep: int) -> Plan:
    """What may go from a host that keeps so many releases. Raises RetentionError when that cannot be told."""
    if keep < FEWEST:
        raise RetentionError(
            f"{keep} releases are too few to keep: the one in force and the one before it stay. Ask for {FEWEST} or "
            "more (xinference_keep_releases)."
        )
    kept = _kept(there, keep)
    needed = _Needed(there, kept)
    names = {one.id for one in kept}
    result = Plan(kept=[one.id for one in kept], leftovers=list(there.leftovers), notes=needed.notes)
    result.releases = [one.id for one in there.releases if one.id not in names]
    result.trees = [tree.path for tree in there.trees if not needed.tree(tree)]
    result.venvs = [name for name in there.venvs if not needed.venv(name)]
    result.libraries = [name for name in there.libraries if name not in needed.libraries]
    result.images = _images(there, needed)
    result.blobs = sorted(there.blobs - needed.blobs)
    if needed.unknown:
        needed.notes.append("what is being received stays: some of its manifests have not arrived")
    else:
        result.partial = sorted(digest for digest in there.partial if digest not in needed.blobs)
        result.packs = [] if there.arriving else sorted(there.packs)
    return result


def freed(groups: Iterable[Iterable[Link]]) -> List[int]:
    """The bytes that each group of names frees when all of them go.

    A file's bytes are free when its last name goes, and count for the first group that has one of its names; where
    some name of it stays, nothing is free.
    """
    lists = [list(group) for group in groups]
    left: Dict[Tuple[int, int], int] = {}
    for link in (link for links in lists for link in links):
        left[link.file] = left.get(link.file, link.names) - 1
    counted: Set[Tuple[int, int]] = set()
    result = []
    for links in lists:
        own = {link.file: link.bytes for link in links if left[link.file] <= 0 and link.file not in counted}
        counted |= set(own)
        result.append(sum(own.values()))
    return result


def freed_by_images(going: Sequence[Image], engine: Sequence[EngineImage]) -> List[int]:
    """The bytes of layers that each image frees when all of them go; a layer that another image has stays."""
    gone = _gone(going, engine)
    stays = {layer for one in engine if one.id not in gone for layer in one.layers}
    result = []
    for image in going:
        own = {} if image.id not in gone else {name: size for name, size in image.layers.items() if name not in stays}
        stays |= set(own)
        result.append(sum(own.values()))
    return result


def _gone(going: Sequence[Image], engine: Sequence[EngineImage]) -> Set[str]:
    """The ids of the images that lose their last name with these."""
    names: Dict[str, Set[str]] = {}
    for image in going:
        names.setdefault(image.id, set()).add(image.reference)
    return {one.id for one in engine if one.id in names and one.tags <= names[one.id]}


def _kept(there: Standing, keep: int) -> List[Release]:
    """The releases that stay: the one in force, the one that runs, and the latest that can be read."""
    must = [one for one in there.releases if one.id in (there.current, there.running)]
    for one in must:
        if one.problem:
            raise RetentionError(
                f"The release {one.id} is in use and cannot be read ({one.problem}), so nobody knows what it needs. "
                "Run playbooks/serve.yml, which writes it again."
            )
    if there.current and there.current not in [one.id for one in must]:
        raise RetentionError(
            f"The release in force, {there.current}, is not there, so nobody knows what it needs. Run "
            "playbooks/serve.yml, which writes it again."
        )
    others = [one for one in there.releases if one.id != there.current and not one.problem]
    latest = others[: keep - 1] if there.current else others[:keep]
    return [one for one in there.releases if one in must or one in latest]


class _Needed:
    """Everything that has to stay, and `notes` about what stays although nothing names it."""

    def __init__(self, there: Standing, kept: Sequence[Release]) -> None:
        self.notes: List[str] = []
        self.unknown = False
        """Whether something is being shipped of which it is not known what it consists of."""
        self._there = there
        self.artifacts = {named for release in kept for named in release.artifacts} | {*there.shipped, *there.arriving}
        self._venvs = {name for release in kept for name in release.venvs}
        self._venvs |= {one.short for one in self.artifacts if (one.kind, one.name) == ENVIRONMENT}
        self.libraries = {one.short for one in self.artifacts if (one.kind, one.name) == LIBRARY} | {there.library}
        self._paths = {one.path for one in self.artifacts if one.kind != IMAGES}
        self.blobs = {one.digest for one in self.artifacts}
        self._manifests: Dict[str, List[str]] = {}
        for digest in there.blobs:
            self._manifests.setdefault(short(digest), []).append(digest)
        for one in sorted(self.artifacts):
            self._keep_content(one)

    def tree(self, tree: Tree) -> bool:
        """Whether a directory has to stay; then the blobs its files are links of stay too."""
        user = _user(self._there.used, tree.path)
        named = tree.path in self._paths
        if not named and user:
            self.notes.append(f"{tree.path} stays: {user} uses it")
        elif not named and not tree.ours:
            self.notes.append(f"{tree.path} stays: shipping did not make it")
        if not named and not user and tree.ours:
            return False
        self.blobs |= tree.blobs
        if tree.ours:
            self.blobs.update(self._manifests.get(tree.path.rpartition("/")[2], ()))
        return True

    def venv(self, name: str) -> bool:
        """Whether an environment has to stay."""
        user = _user(self._there.used, f"venvs/{name}")
        if user and name not in self._venvs:
            self.notes.append(f"venvs/{name} stays: {user} uses it")
        return name in self._venvs or bool(user)

    def image(self, image: Image) -> bool:
        """Whether anything that stays names an image."""
        return any(
            one.kind == IMAGES and (image.digest == one.digest or (one.image_id and image.image_id == one.image_id))
            for one in self.artifacts
        )

    def _keep_content(self, one: Named) -> None:
        content = self._there.contents.get(one.digest)
        latest = one in self._there.shipped or one in self._there.arriving
        if content is not None:
            self.blobs |= content.blobs
            # The engine has the layers of older images; those of these may be on their way to it.
            self.blobs |= content.layers if latest else frozenset()
        elif one in self._there.arriving:
            self.unknown = True
        elif one.kind != IMAGES:
            self.notes.append(f"{one.path} has lost its manifest; it stays, with what its files are links of")


def _images(there: Standing, needed: _Needed) -> List[Image]:
    """The images that go; one that has another name only loses ours."""
    candidates = [image for image in there.loaded if not needed.image(image)]
    if there.engine is None:
        if candidates:
            needed.notes.append("images stay: the Docker Engine could not be asked")
        return []
    known = {one.id: one for one in there.engine}
    result = []
    for image in candidates:
        found = known.get(image.id)
        if found is None or (found.tags and image.reference not in found.tags):
            continue
        if found.used:
            needed.notes.append(f"the image {image.reference} stays: a container uses it")
        else:
            result.append(image)
    return result


def _user(used: Mapping[str, str], path: str) -> str:
    """Who uses a path or something in it, empty for nobody."""
    return next((user for place, user in used.items() if place == path or place.startswith(f"{path}/")), "")
