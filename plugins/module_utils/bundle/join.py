# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Making a bundle out of the volumes it was split into, as they come: all at once, or one stick after another.

::

    <bundle>/blobs/sha256/     blobs that are whole and verified
    <bundle>/partial/          blobs of which a volume is still to come, and joining.json: which bytes of them are right

Nothing is believed before it was hashed, and the index comes last: until then the directory is no bundle, or still the
one that was there. Whatever a damaged volume has that is right stays, so its mended copy is read only where it was bad.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Sequence

from .digest import Stamps, copy_and_hash, device_of, free_bytes, write_atomically
from .documents import DocumentError
from .layout import (
    INDEX_FILE,
    LAYOUT_FILE,
    LAYOUT_VERSION,
    PARTIAL,
    BundleError,
    blob_path,
    cache_dir,
    index_lines,
)
from .lock import locked
from .manifest import Artifact
from .pack import encode
from .partials import Partials
from .pieces import PieceReader
from .sizes import size_text
from .volume_dir import Contents, VolumeDir, find_volumes
from .volumes import Part, Piece, Row, VolumeSet, piece_path, plan_problems, shares

TAKEN, TO_COME, DAMAGED = "taken", "to come", "damaged"
REMEMBER = 10.0
"""Seconds after which it is written down what was done, for a run that is killed."""
_HEX = re.compile(r"[0-9a-f]{64}\Z")


@dataclass
class JoinOutcome:
    """What `join_volumes` did; sizes in bytes.

    `complete` says that the bundle is whole and in force. `volumes` are all of the set: taken, still to come, or
    damaged. `lacking` is one line for each artifact that is not whole yet.
    """

    set: str
    changed: bool = False
    complete: bool = False
    volumes: list[Row] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    joined_bytes: int = 0
    base_bytes: int = 0
    hashed_bytes: int = 0
    dropped_bytes: int = 0

    @property
    def to_come(self) -> list[str]:
        """The names of the volumes that are needed and were not there."""
        return [row.title for row in self.volumes if row.state == TO_COME]


class JoinError(BundleError):
    """Volumes that are damaged. What was right is kept; `details` say beside the problems how far it came."""

    def __init__(self, summary: str, problems: list[str], outcome: JoinOutcome) -> None:
        super().__init__(summary, problems)
        self.details.update(to_come=outcome.to_come, lacking=outcome.lacking, changed=outcome.changed)


def join_volumes(
    path: str | os.PathLike[str],
    places: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None = None,
    name: str = "",
    cache: str | os.PathLike[str] | None = None,
    check: bool = False,
) -> JoinOutcome:
    """Take what the volumes in `places` bring into the bundle at `path`; with `check` say what would happen.

    `base` is another bundle on this machine that has what a differential set leaves out (default: the bundle at `path`
    itself), `name` chooses a set where volumes of several lie about. Raises BundleError, before anything is written,
    when there are no volumes, when they belong to several sets, when what they say cannot be true, when the bundle
    they build on is not there (all that is missing is named), and for too little disk; JoinError, after all that is
    right was taken, for what is damaged.
    """
    root = Path(os.path.abspath(path))  # noqa: PTH100 - no link in the path is followed
    cache = Path(cache) if cache else cache_dir(root)
    damage: list[str] = []
    volumes = _of_one_set(find_volumes(places, name, damage), places, damage)
    contents = _contents(volumes, damage)
    _refuse_strange_directory(root)
    joiner = _Joiner(root, volumes, contents, Path(base) if base else None, cache, damage)
    if check:
        return joiner.rehearse()
    with locked(cache / "build.lock", f"{root} is being built, split or joined"):
        return joiner.run()


def _of_one_set(
    volumes: list[VolumeDir], places: Sequence[str | os.PathLike[str]], damage: list[str]
) -> list[VolumeDir]:
    """The volumes in order of their numbers. Raises BundleError unless they are of one set."""
    where = ", ".join(map(str, places))
    if not volumes:
        raise BundleError(f"There is no volume of a bundle in {where} that can be used.", damage)
    sets = {volume.listed.set.id for volume in volumes}
    if len(sets) > 1:
        raise BundleError(
            f"There are volumes of {len(sets)} different bundles or splits in {where}; name directories that hold one "
            "set, or choose by its name:",
            sorted(f"{volume}: set {volume.listed.set.id[:19]}" for volume in volumes),
        )
    return sorted(volumes, key=lambda volume: (volume.listed.number, str(volume.path)))


def _contents(volumes: list[VolumeDir], damage: list[str]) -> Contents:
    """What the bundle consists of, from the first volume on which that is not damaged. Raises BundleError."""
    problems: list[str] = []
    for volume in volumes:
        try:
            contents = volume.contents(problems)
        except DocumentError as error:
            damage.append(f"{volume}: {error}")
        except OSError as error:
            damage.append(f"{volume}: {error.filename}: {error.strerror}")
        else:
            problems.extend(plan_problems(volume.listed.set, contents.artifacts))
            if problems:
                raise BundleError(
                    f"The bundle on {volume.listed.title} cannot be used ({len(problems)} found wrong):", problems
                )
            return contents
    raise BundleError("What the bundle consists of cannot be read from any volume; copy one of them again:", damage)


def _refuse_strange_directory(root: Path) -> None:
    """Raises BundleError when the bundle would get into a directory with something else, or out of its own."""
    if os.path.lexists(root) and not root.is_dir():
        raise BundleError(f"{root} is not a directory.")
    if root.is_dir() and not (root / LAYOUT_FILE).exists():
        others = sorted(entry.name for entry in root.iterdir() if entry.name not in ("blobs", PARTIAL))
        if others:
            raise BundleError(
                f"{root} is not empty and not a bundle ({', '.join(others[:3])}); choose an empty or a new directory."
            )
    for place in (root / "blobs", root / "blobs" / "sha256", root / PARTIAL):
        if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
            raise BundleError(f"{place} must be a plain directory; remove it, or choose another bundle directory.")


class _Joiner:
    """One bundle being joined from the volumes of one set."""

    def __init__(
        self,
        root: Path,
        volumes: list[VolumeDir],
        contents: Contents,
        base: Path | None,
        cache: Path,
        damage: list[str],
    ) -> None:
        self._root, self._volumes, self._contents, self._base, self._damage = root, volumes, contents, base, damage
        self._set: VolumeSet = volumes[0].listed.set
        self._artifacts: list[Artifact] = contents.artifacts
        self._stamps = Stamps(cache / "stamps.json")
        self._saved = time.monotonic()
        manifests = {artifact.digest for artifact in self._artifacts}
        blobs = {blob.digest: blob.size for artifact in self._artifacts for blob in artifact.blobs}
        self._wanted = {digest: size for digest, size in blobs.items() if digest not in manifests}
        self._carried = self._set.carried
        self._there: set[str] = set()
        self._partials = Partials(root / PARTIAL)
        self._reader = PieceReader(self._partials, self._set, self._wanted, self._admit, self._stamps.count)
        self._from_base: dict[str, Path] = {}
        self._outcome = JoinOutcome(self._set.id)

    # --- looking ------------------------------------------------------------------------------------------------------

    def rehearse(self) -> JoinOutcome:
        """What a run would do as far as sizes tell; nothing is hashed."""
        self._look(lambda path, digest: True)
        self._outcome.before = index_lines(self._root)
        seen = {volume.listed.number for volume in self._volumes}
        parts = list(self._lacking_parts())
        late = [(number, part) for number, part in parts if number not in seen]
        expected = set(self._wanted) - {part.digest for _number, part in late}
        whole = len(expected) == len(self._wanted)
        self._outcome.changed = len(late) < len(parts) or bool(self._from_base) or (whole and not self._is_in_force())
        self._conclude(expected, {number for number, _part in late})
        self._outcome.after = self._lines(expected)
        return self._outcome

    def _lacking_parts(self) -> Iterable[tuple[int, Part]]:
        """The parts on all volumes that are not here, with the number of their volume."""
        for number, pieces in enumerate(self._set.volumes, 1):
            for piece in pieces:
                for part in piece:
                    if part.digest not in self._there and not self._partials.has(part):
                        yield number, part

    def _look(self, is_sound: Callable[[Path, str], bool]) -> None:
        """Find out what is there already. Raises BundleError when what the set builds on is not."""
        self._there = self._stamps.sound(self._root / "blobs" / "sha256", self._wanted)
        unknown = list(self._files(self._root, (digest for digest in self._wanted if digest not in self._there)))
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            sound = pool.map(lambda item: is_sound(item[1], item[0]), unknown)
            self._there.update(digest for (digest, _path), good in zip(unknown, sound) if good)
        self._partials.load({digest: size for digest, size in self._carried.items() if digest not in self._there})
        lacking = [digest for digest in self._wanted if digest not in self._there and digest not in self._carried]
        self._from_base = dict(self._sound_in_base(self._base, lacking, is_sound)) if self._base else {}
        missing = [digest for digest in lacking if digest not in self._from_base]
        if missing:
            self._refuse_missing_base(missing)

    def _files(self, root: Path, digests: Iterable[str]) -> Iterable[tuple[str, Path]]:
        """Those of some blobs that are regular files of the right size below a bundle.

        Raises BundleError for a directory in the place of one.
        """
        for digest in digests:
            path = blob_path(root, digest)
            try:
                status = path.lstat()
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                raise BundleError(f"{path} is a directory where a blob should be; remove it.")
            if stat.S_ISREG(status.st_mode) and status.st_size == self._wanted[digest]:
                yield digest, path

    def _sound_in_base(
        self, base: Path, digests: list[str], is_sound: Callable[[Path, str], bool]
    ) -> Iterable[tuple[str, Path]]:
        """Those of some blobs that another bundle has, with their files."""
        stamps = Stamps(cache_dir(base) / "stamps.json")
        for digest, path in self._files(base, digests):
            if stamps.vouches(path) == digest or is_sound(path, digest):
                yield digest, path

    def _refuse_missing_base(self, missing: list[str]) -> None:
        where = f"neither {self._root} nor {self._base} has" if self._base else f"{self._root} does not have"
        built_on = f" (the one whose index is {self._set.base})" if self._set.base else ""
        rows = shares(self._artifacts, missing)
        error = BundleError(
            f"These volumes bring only what an earlier bundle{built_on} lacks, and {where} the rest of it, "
            f"{size_text(sum(self._wanted[digest] for digest in missing))}. Join that bundle here first or name it as "
            f"base, or split again without one. {self._root} was not touched. Missing:",
            [str(row) for row in rows],
        )
        error.details["missing"] = [row._asdict() for row in rows]
        raise error

    # --- doing --------------------------------------------------------------------------------------------------------

    def run(self) -> JoinOutcome:
        """Take in what is there; the bundle comes into force when everything is."""
        outcome = self._outcome
        outcome.before = index_lines(self._root)
        self._look(lambda path, digest: self._stamps.digest_of(path) == digest)
        self._refuse_small_disk()
        try:
            for digest, source in self._from_base.items():
                self._take_from_base(digest, source)
            for number in sorted({volume.listed.number for volume in self._volumes}):
                self._take_volume([volume for volume in self._volumes if volume.listed.number == number])
            if len(self._there) == len(self._wanted):
                self._put_in_force()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise BundleError(
                f"The disk is full: {self._root} has {size_text(free_bytes(self._root))} free. Free some and run "
                "again; what was taken stays there."
            ) from error
        finally:
            # What cannot be written down costs the next run time and nothing else.
            with suppress(OSError):
                self._remember(now=True)
            outcome.hashed_bytes, outcome.joined_bytes = self._stamps.hashed_bytes, self._reader.taken
        self._conclude(self._there, {number for number, _part in self._lacking_parts()})
        outcome.after = self._lines(self._there)
        if self._damage and not outcome.complete:
            raise JoinError(
                f"Some of what the volumes of {self._set.name} should bring is damaged or missing; what is right was "
                f"taken.{_still(outcome.to_come)} Copy what is named here again from where it was made and run the "
                "same command again:",
                self._damage,
                outcome,
            )
        return outcome

    def _refuse_small_disk(self) -> None:
        place = self._root
        while not place.exists():
            place = place.parent
        needed = sum(size for digest, size in self._carried.items() if digest not in self._there)
        needed -= self._partials.received
        if self._base and device_of(place) != device_of(self._base):
            needed += sum(self._wanted[digest] for digest in self._from_base)
        free = free_bytes(self._root)
        if needed > free:
            raise BundleError(
                f"The bundle {self._root} needs {size_text(needed)} more for all its volumes and its file system has "
                f"{size_text(free)} free. Free some space or choose another directory; nothing was taken."
            )

    def _take_from_base(self, digest: str, source: Path) -> None:
        target = blob_path(self._root, digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_file(target)
        try:
            os.link(source, target)
        except OSError:
            partial = self._partials.path(digest)
            if copy_and_hash(source, partial) != digest:
                raise BundleError(f"{source} changed while it was read.") from None
            partial.chmod(0o644)
            partial.replace(target)
        self._keep(digest, target)
        self._outcome.base_bytes += self._wanted[digest]

    def _take_volume(self, copies: list[VolumeDir]) -> None:
        """Take the pieces of one volume, of which there may be several copies."""
        listed = copies[0].listed
        for number, piece in enumerate(listed.pieces, 1):
            said: list[str] = []
            for copy in copies:
                if not self._needed(piece):
                    break
                digest = copy.listed.digests[number - 1]
                problem = self._reader.take(copy.piece(number), piece, digest, self._needed(piece))
                self._outcome.changed = self._outcome.changed or self._reader.taken > 0
                self._remember()
                if problem is None:
                    break
                said.append(f"{copy}: {piece_path(number)} {problem}")
            if self._needed(piece):
                what = ", ".join(map(str, shares(self._artifacts, {part.digest for part in self._needed(piece)})))
                self._damage.extend(f"{line} ({what})" for line in said)

    def _needed(self, piece: Piece) -> list[Part]:
        """The parts of a piece that are not here yet."""
        return [part for part in piece if part.digest not in self._there and not self._partials.has(part)]

    def _admit(self, digest: str, source: Path) -> None:
        """Make a verified file a blob of the bundle; there may be a damaged one in its place."""
        target = blob_path(self._root, digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.chmod(0o644)
        source.replace(target)
        self._keep(digest, target)

    def _keep(self, digest: str, target: Path) -> None:
        self._stamps.record(target, digest)
        self._there.add(digest)
        self._outcome.changed = True

    # --- the end ------------------------------------------------------------------------------------------------------

    def _put_in_force(self) -> None:
        """Write manifests, then the index, then remove what nothing refers to any more."""
        for digest, content in self._contents.manifests.items():
            path = blob_path(self._root, digest)
            if not _has(path, content):
                write_atomically(path, content)
                self._outcome.changed = True
        # What the index names has to be on the disk before it, should the power go.
        if self._outcome.changed or not self._is_in_force():
            os.sync()
        for name, content in self._documents().items():
            self._outcome.changed = self._outcome.changed or not _has(self._root / name, content)
            write_atomically(self._root / name, content)
        self._partials.clear()
        used = {digest.partition(":")[2] for digest in (*self._wanted, *self._contents.manifests)}
        for path in (self._root / "blobs" / "sha256").glob("*"):
            if _HEX.match(path.name) and path.name not in used and path.is_file():
                self._outcome.dropped_bytes += path.stat().st_size
                self._stamps.forget(path)
                path.unlink()

    def _documents(self) -> dict[str, bytes]:
        marker = encode({"imageLayoutVersion": LAYOUT_VERSION})
        return {LAYOUT_FILE: marker, INDEX_FILE: self._contents.index}

    def _is_in_force(self) -> bool:
        """Whether the index of the bundle is that of the volumes."""
        return all(_has(self._root / name, content) for name, content in self._documents().items())

    def _conclude(self, there: set[str], incomplete: set[int]) -> None:
        """Say what is whole and what is still to come; `incomplete` are the numbers of volumes with more to bring."""
        outcome = self._outcome
        lacking = [digest for digest in self._wanted if digest not in there]
        outcome.complete = not lacking
        outcome.lacking = [str(row) for row in shares(self._artifacts, lacking)]
        paths = {volume.listed.number: str(volume.path) for volume in reversed(self._volumes)}
        for number in range(1, len(self._set.volumes) + 1):
            state = (DAMAGED if number in paths else TO_COME) if number in incomplete else TAKEN
            outcome.volumes.append(self._set.row(number, paths.get(number, ""), state, self._artifacts))

    def _lines(self, there: set[str]) -> list[str]:
        """One line for each artifact, as in the lines of an index; what is not whole says so."""
        lines = []
        for artifact in self._artifacts:
            files = [blob for blob in artifact.blobs if blob.digest != artifact.digest]
            have = sum(blob.digest in there for blob in files)
            note = "" if len(there) == len(self._wanted) else f" ({have} of {len(files)} files joined)"
            lines.append(f"{artifact.reference} {artifact.digest}{note}")
        return sorted(lines)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _remember(self, now: bool = False) -> None:
        """Write down what need not be done again, from time to time; only what is on the disk is vouched for."""
        if not now and time.monotonic() - self._saved < REMEMBER:
            return
        if self._outcome.changed:
            os.sync()
        self._stamps.save()
        self._partials.save()
        self._saved = time.monotonic()


def _still(to_come: list[str]) -> str:
    return f" Still to come: {', '.join(to_come)}." if to_come else ""


def _has(path: Path, content: bytes) -> bool:
    try:
        return path.is_file() and not path.is_symlink() and path.read_bytes() == content
    except OSError:
        return False


def _remove_file(path: Path) -> None:
    if os.path.lexists(path):
        path.unlink()
