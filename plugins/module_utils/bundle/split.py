# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writing a bundle, or what an earlier one lacks of it, onto volumes.

Every byte is read and hashed once, while it is copied; what stamps vouch for is not read at all. A volume gets its list
last, so one without is not finished, and a run that was cut goes on at the piece where it was cut.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Sequence

from .digest import CHUNK, Stamps, device_of, free_bytes, hash_bytes, write_atomically
from .documents import DocumentError, open_regular, parse, read_small
from .layout import INDEX_FILE, VOLUME_FILE, Bundle, BundleError, cache_dir, verify
from .lock import locked
from .manifest import Blob
from .sizes import bytes_of, size_text
from .trust import SIGNATURE_FILE
from .volume_dir import VolumeDir, read_base
from .volumes import (
    FAT32_FILE,
    MANIFESTS_FILE,
    PIECES,
    SUMS_FILE,
    Piece,
    Row,
    VolumeList,
    VolumeSet,
    piece_path,
    piece_size,
    plan_volumes,
)

WRITTEN, TO_WRITE, THERE = "written", "to write", "there already"
UNFINISHED_FILE = "unfinished"
"""File of a volume that is being written: the set it belongs to."""
REMEMBER = 10.0
"""Seconds after which it is written down what was done, for a run that is killed."""
SMALLEST = 1024 * 1024
"""Bytes below which a number without a unit was meant to have one."""


@dataclass
class SplitOutcome:
    """What `split_bundle` did; sizes in bytes. `omitted` are the blobs that the earlier bundle has."""

    changed: bool
    set: str
    count: int
    volumes: list[Row]
    before: list[str]
    after: list[str]
    copied_bytes: int = 0
    linked_bytes: int = 0
    hashed_bytes: int = 0
    omitted_bytes: int = 0


def volume_size(text: str) -> int:
    """The bytes of a volume as people write them. Raises ValueError for what is no size, or lacks its unit."""
    size, text = bytes_of(text), text.strip()
    if size < SMALLEST and re.fullmatch(r"[0-9.]+", text):
        raise ValueError(
            f"{text} without a unit means {size} bytes, which is no size of a volume. Write {text}G for {text} GiB, or "
            f"{text}M for MiB (xinference_carry_size)."
        )
    return size


def split_bundle(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    size: int,
    max_file: int = FAT32_FILE,
    base: str | os.PathLike[str] | None = None,
    name: str = "",
    numbers: Iterable[int] = (),
    cache: str | os.PathLike[str] | None = None,
    check: bool = False,
) -> SplitOutcome:
    """Write the bundle at `path` into `directory` as volumes of at most `size` bytes; with `check` say what would be.

    `max_file` are the bytes of the largest file a volume may have (0: any), `base` an earlier bundle that the site has,
    whose blobs are left out, `numbers` the volumes to write (default: all; the plan is the same). Raises BundleError,
    before anything is written, for a bundle that cannot be used, volumes of another set that are in the way, and too
    little disk; and after all that is sound was written, for blobs that are damaged.
    """
    root = Path(os.path.abspath(path))  # noqa: PTH100 - no link in the path is followed
    place = Path(os.path.abspath(directory))  # noqa: PTH100
    cache = Path(cache) if cache else cache_dir(root)
    if place == root or root in place.parents:
        raise BundleError(f"The volumes cannot lie inside the bundle {root}; choose another directory than {place}.")
    earlier = read_base(base) if base else None
    with locked(cache / "build.lock", f"{root} is being built, split or joined"):
        bundle = Bundle.open(root)
        index, manifests = _lists_of(bundle)
        listed = {artifact.digest for artifact in bundle.artifacts}
        blobs = {digest: length for digest, length in bundle.blobs.items() if digest not in listed}
        omitted = {digest for digest in blobs if earlier and digest in earlier.blobs}
        volumes = plan_volumes(
            name or root.name,
            Blob(hash_bytes(index), len(index)),
            Blob(hash_bytes(manifests), len(manifests)),
            {digest: length for digest, length in blobs.items() if digest not in omitted},
            size,
            max_file,
            earlier.index if earlier else None,
        )
        signature = {SIGNATURE_FILE: bundle.signature} if bundle.signature is not None else {}
        documents = {INDEX_FILE: index, MANIFESTS_FILE: manifests, **signature}
        splitter = _Splitter(bundle, volumes, place, cache, documents)
        outcome = splitter.run(_chosen(volumes, numbers), check)
        outcome.omitted_bytes = sum(blobs[digest] for digest in omitted)
        return outcome


def _lists_of(bundle: Bundle) -> tuple[bytes, bytes]:
    """The index of a bundle, and its manifests in the order in which the index names them."""
    index = read_small(bundle.root / INDEX_FILE)
    digests = dict.fromkeys(entry["digest"] for entry in parse(index)["manifests"])
    return index, b"".join(read_small(bundle.blob_path(digest)) for digest in digests)


def _chosen(volumes: VolumeSet, numbers: Iterable[int]) -> list[int]:
    """The numbers of the volumes to be written. Raises BundleError for one that there is not."""
    count = len(volumes.volumes)
    chosen = sorted(set(numbers)) or list(range(1, count + 1))
    strange = [str(number) for number in chosen if not 1 <= number <= count]
    if strange:
        raise BundleError(f"There is no volume {', '.join(strange)}: the bundle takes {count} of this size.")
    return chosen


class _Job:
    """One volume to be written: its directory, and the digests of those pieces that are there and right."""

    def __init__(self, number: int, path: Path, pieces: Sequence[Piece]) -> None:
        self.number, self.path, self.pieces = number, path, pieces
        self.finished: VolumeList | None = None
        self.known: dict[int, str] = {}

    @property
    def todo(self) -> list[int]:
        """The numbers of the pieces that have to be written."""
        return [number for number in range(1, len(self.pieces) + 1) if number not in self.known]


class _Splitter:
    """One set of volumes on its way into a directory."""

    def __init__(
        self, bundle: Bundle, volumes: VolumeSet, place: Path, cache: Path, documents: dict[str, bytes]
    ) -> None:
        self._bundle, self._volumes, self._place, self._documents = bundle, volumes, place, documents
        self._sources = Stamps(cache / "stamps.json")
        self._made = Stamps(cache / "volumes.json")
        self._saved = time.monotonic()
        self._damaged: list[str] = []
        self._bad: set[str] = set()
        self._whole = bundle.blobs
        self._unvouched = set(bundle.unvouched(self._sources))
        self._copied = self._linked = 0

    def run(self, numbers: list[int], check: bool) -> SplitOutcome:
        """Write these volumes, or with `check` tell what is to be written."""
        self._refuse_strangers()
        jobs = [self._look(number, check) for number in numbers]
        outcome = SplitOutcome(
            changed=any(job.finished is None or job.todo or not self._is_signed(job) for job in jobs),
            set=self._volumes.id,
            count=len(self._volumes.volumes),
            volumes=[self._row(job, check) for job in jobs],
            before=[self._line(job, bool(job.finished and not job.todo)) for job in jobs if job.finished or job.known],
            after=[self._line(job, True) for job in jobs],
        )
        if check:
            return outcome
        self._refuse_small_disk(jobs)
        try:
            self._refuse_damaged_parts(jobs)
            for job in jobs:
                outcome.changed = self._write(job) or outcome.changed
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise BundleError(
                f"The disk is full: {self._place} has {size_text(free_bytes(self._place))} free. Free some, or make "
                "the volumes smaller (another size is another set), and run again; what was written stays there."
            ) from error
        finally:
            self._remember(now=True)
        if self._damaged:
            raise BundleError(
                f"The bundle {self._bundle.root} is damaged; copy it again from where it was made, or build it again. "
                "What is sound was written; volumes that need the rest were not finished:",
                self._damaged,
            )
        outcome.copied_bytes, outcome.linked_bytes = self._copied, self._linked
        outcome.hashed_bytes = self._sources.hashed_bytes + self._made.hashed_bytes
        return outcome

    def _refuse_strangers(self) -> None:
        """Volumes of another set under the same name would be taken for ours, and are not ours to remove."""
        if not self._place.is_dir():
            return
        strangers = []
        # A stick may have our directories in other letters, and take them for the same.
        titles = (self._volumes.title(number) for number in range(1, len(self._volumes.volumes) + 1))
        ours = {path for path in map(self._place.joinpath, titles) if os.path.lexists(path)}
        for path in sorted(ours.union(self._place.glob(f"{self._volumes.name}-*-of-*"))):
            try:
                strange = VolumeDir.read(path).listed.set.id != self._volumes.id or (path / PIECES).is_symlink()
            except (DocumentError, OSError):
                strange = path.is_symlink() or not path.is_dir() or (path / PIECES).is_symlink()
            if strange:
                strangers.append(f"{path} is a volume of something else")
        if strangers:
            raise BundleError(
                f"Nothing was written to {self._place}; move what is there away (or remove it), or choose another "
                "directory or name:",
                strangers,
            )

    def _look(self, number: int, check: bool) -> _Job:
        """What is there of a volume. Pieces that no stamp vouches for are read, when there is a digest for them."""
        job = _Job(number, self._place / self._volumes.title(number), self._volumes.volumes[number - 1])
        try:
            job.finished = VolumeDir.read(job.path).listed
        except (DocumentError, OSError):
            try:
                ours = (job.path / UNFINISHED_FILE).read_text() == self._volumes.id
            except OSError:
                ours = False
            if not ours:
                return job
        for at, piece in enumerate(job.pieces):
            path = job.path / piece_path(at + 1)
            found = self._made.vouches(path)
            if job.finished and found != job.finished.digests[at]:
                found = None if check else self._read_again(path, piece_size(piece), job.finished.digests[at])
            if found is not None and not path.is_symlink():
                job.known[at + 1] = found
        return job

    def _read_again(self, path: Path, size: int, digest: str) -> str | None:
        """The digest, if the file has it."""
        try:
            status = path.lstat()
            return digest if status.st_size == size and self._made.digest_of(path) == digest else None
        except OSError:
            return None

    def _row(self, job: _Job, check: bool) -> Row:
        new = job.finished is None or job.todo or not self._is_signed(job)
        state = (TO_WRITE if check else WRITTEN) if new else THERE
        return self._volumes.row(job.number, str(job.path), state, self._bundle.artifacts)

    def _line(self, job: _Job, whole: bool) -> str:
        title, count = self._volumes.title(job.number), len(job.pieces)
        there = count if whole else len(job.known)
        return f"{title} {there} of {count} pieces, {size_text(self._volumes.volume_size(job.number))}"

    def _is_signed(self, job: _Job) -> bool:
        """Whether a volume has the signature of the bundle; one may be added, or made anew, after it was split."""
        signature = self._documents.get(SIGNATURE_FILE)
        return signature is None or _has(job.path / SIGNATURE_FILE, signature)

    def _refuse_small_disk(self, jobs: list[_Job]) -> None:
        place = self._place
        while not place.exists():
            place = place.parent
        linkable = device_of(place) == device_of(self._bundle.root)
        needed = 0
        for job in jobs:
            lists = 0 if job.finished else sum(map(len, self._documents.values()))
            pieces = [job.pieces[number - 1] for number in job.todo]
            needed += lists + sum(piece_size(piece) for piece in pieces if not (linkable and self._is_blob(piece)))
        free = free_bytes(self._place)
        if needed > free:
            raise BundleError(
                f"{self._place} needs {size_text(needed)} more for {_count(len(jobs), 'volume')} and has "
                f"{size_text(free)} free. Free some space, choose another directory, or write fewer volumes at a time "
                "(by number); nothing was written."
            )

    def _refuse_damaged_parts(self, jobs: list[_Job]) -> None:
        """Hash blobs that are cut and that no stamp vouches for; their parts could not be checked one by one."""
        cut = {
            part.digest
            for job in jobs
            for number in job.todo
            for part in job.pieces[number - 1]
            if part.length != self._whole[part.digest]
        }
        for blob in verify(self._bundle, self._sources, only=cut):
            self._damaged.append(str(blob))
            self._bad.add(blob.digest)
        self._unvouched -= cut - self._bad

    def _write(self, job: _Job) -> bool:
        """Write what a volume lacks; whether anything was written. A volume that stays incomplete gets no list."""
        todo = job.todo
        if job.finished is None:
            (job.path / PIECES).mkdir(parents=True, exist_ok=True)
            if (job.path / VOLUME_FILE).exists():
                (job.path / VOLUME_FILE).unlink()
            write_atomically(job.path / UNFINISHED_FILE, self._volumes.id.encode())
        for number in todo:
            piece = job.pieces[number - 1]
            if not any(part.digest in self._bad for part in piece):
                self._write_piece(job, number)
            self._remember()
        if job.todo:
            return bool(todo)
        return self._finish(job) or bool(todo)

    def _finish(self, job: _Job) -> bool:
        """Write the lists of a volume that has all its pieces, what says that it is finished last."""
        listed = VolumeList(self._volumes, job.number, tuple(job.known[at + 1] for at in range(len(job.pieces))))
        lists = {**self._documents, SUMS_FILE: self._sums(listed), VOLUME_FILE: listed.encode()}
        changed = False
        for name, content in lists.items():
            changed = changed or not _has(job.path / name, content)
            write_atomically(job.path / name, content)
        expected = {Path(piece_path(number)).name for number in job.known}
        for path in [*(job.path / PIECES).iterdir(), job.path / UNFINISHED_FILE]:
            if path.name not in expected and path.is_file():
                path.unlink()
        return changed

    def _sums(self, listed: VolumeList) -> bytes:
        return listed.sums(self._documents.get(SIGNATURE_FILE))

    def _write_piece(self, job: _Job, number: int) -> None:
        """Write one piece, unless a blob in it turns out to be damaged."""
        piece = job.pieces[number - 1]
        target = job.path / piece_path(number)
        if self._is_blob(piece) and self._vouched(piece[0].digest) and self._link(piece[0].digest, target):
            self._linked += piece[0].length
            job.known[number] = piece[0].digest
            self._made.record(target, piece[0].digest)
            return
        partial = target.with_name(f".{target.name}")
        try:
            digest, damaged = self._copy(piece, partial)
            if not damaged:
                partial.replace(target)
        finally:
            if os.path.lexists(partial):
                partial.unlink()
        self._damaged.extend(damaged)
        if not damaged:
            self._copied += piece_size(piece)
            self._made.count(piece_size(piece))
            self._made.record(target, digest)
            job.known[number] = digest

    def _copy(self, piece: Piece, target: Path) -> tuple[str, list[str]]:
        """Copy the parts of a piece into one file that is on the disk then; its digest, and what is damaged."""
        damaged: list[str] = []
        sha = hashlib.sha256()
        alone = self._is_blob(piece)
        with target.open("wb", buffering=0) as writer:
            for part in piece:
                own = None if alone or self._vouched(part.digest) else hashlib.sha256()
                source = self._bundle.blob_path(part.digest)
                status = source.stat()
                with open_regular(source) as reader:
                    reader.seek(part.start)
                    left = part.length
                    while left:
                        chunk = reader.read(min(CHUNK, left))
                        if not chunk:
                            raise BundleError(f"{source} became shorter while it was read; split again.")
                        left -= len(chunk)
                        for digest in (sha, own) if own else (sha,):
                            digest.update(chunk)
                        view = memoryview(chunk)
                        while len(view):
                            view = view[writer.write(view) :]
                found = f"sha256:{sha.hexdigest()}" if alone else f"sha256:{own.hexdigest()}" if own else part.digest
                if found != part.digest:
                    damaged.append(f"{part.digest} ({self._user_of(part.digest)}): content is {found}")
                elif own or part.digest in self._unvouched:
                    self._unvouched.discard(part.digest)
                    self._sources.record(source, found, [status.st_size, status.st_mtime_ns, status.st_ino])
            os.fsync(writer.fileno())
        return f"sha256:{sha.hexdigest()}", damaged

    def _is_blob(self, piece: Piece) -> bool:
        """Whether a piece is one whole blob."""
        return len(piece) == 1 and piece[0].length == self._whole[piece[0].digest]

    def _vouched(self, digest: str) -> bool:
        return digest not in self._unvouched

    def _link(self, digest: str, target: Path) -> bool:
        """Make a piece a hard link of the blob it is; False where the file system allows none."""
        if os.path.lexists(target):
            target.unlink()
        try:
            os.link(self._bundle.blob_path(digest), target)
            return True
        except OSError:
            return False

    def _user_of(self, digest: str) -> str:
        """Some file that a blob is."""
        for artifact in self._bundle.artifacts:
            for file in artifact.files:
                if file.digest == digest:
                    return f"{artifact.reference}: {file.path}"
        return next((item.reference for item in self._bundle.artifacts if digest in {b.digest for b in item.blobs}), "")

    def _remember(self, now: bool = False) -> None:
        """Write down what need not be done again, from time to time."""
        if now or time.monotonic() - self._saved > REMEMBER:
            self._sources.save()
            self._made.save()
            self._saved = time.monotonic()


def _has(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
