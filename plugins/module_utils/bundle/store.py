# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The store of a host: every blob once, under its own digest, and never believed before it was read.

::

    <root>/blobs/sha256/<64 hex digits>   verified blobs, read-only
    <root>/partial/                       what is still being received: <64 hex digits>, pack-*.tar
    <root>/state/stamps.json              why a blob need not be read again
    <root>/state/receiving.lock           who is shipping to this host

A blob gets into `blobs` in one way only: its bytes are hashed and the finished file is renamed into place
(`Store.admit`). The receiving area may have belonged to another user (the one who logs in) than the store (the one who
becomes), so nothing in it is trusted: no links, no devices, no second name.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import stat
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Mapping, NamedTuple

from .digest import ALGORITHM, CHUNK, PRIVATE, Stamps, free_bytes, hash_file, is_digest
from .sizes import size_text

DIRECTORY_MODE = 0o755
BLOB_MODE = 0o444
RECEIVING_MODE = 0o700
PACK_PREFIX = "pack-"
UNREADABLE = (errno.EIO, errno.EUCLEAN, errno.ENODATA)
"""What a disk says that has lost a file's content."""


class StoreError(Exception):
    """A store that cannot be used; the message says what was wanted, what is there and what to do."""


@contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Say what was needed where, when a full disk ends the block; raises StoreError. `needed` is in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = "The quota is used up" if error.errno == errno.EDQUOT else "The disk is full"
        raise StoreError(
            f"{what}: {path} needs {size_text(needed)}, {size_text(free_bytes(path))} are free. Free some there, "
            "or choose another root directory (xinference_root), and run again; what arrived stays there."
        ) from error


class NotTaken(StoreError):
    """A received file that is not believed for what it is, whatever its content; it is gone."""


class Inventory(NamedTuple):
    """What the store has of the blobs somebody wants; sizes in bytes.

    `missing` has the size of each absent blob, `partial` the bytes already received of some of those, `damaged` why a
    blob or a received file was thrown away (or, in a dry run, would be).
    """

    missing: dict[str, int]
    partial: dict[str, int]
    damaged: dict[str, str]


class Store:
    """The blobs below one root directory. With `dry_run` nothing is written, not even a stamp.

    `adopted` counts the blobs that were verified and moved in, `hashed_bytes` what had to be read for it.
    """

    def __init__(self, root: str | os.PathLike[str], dry_run: bool = False) -> None:
        self.root = Path(root)
        if not self.root.is_absolute():
            raise StoreError(f"The root directory must be an absolute path, not {str(root)!r}.")
        self.dry_run = dry_run
        self.blobs = self.root / "blobs" / "sha256"
        self.partial = self.root / "partial"
        self.state = self.root / "state"
        self.stamps = Stamps(self.state / "stamps.json", PRIVATE)
        self.adopted = 0

    @property
    def hashed_bytes(self) -> int:
        """Bytes that had to be read because no stamp vouched for them."""
        return self.stamps.hashed_bytes

    def blob_path(self, digest: str) -> Path:
        """Where a blob is or will be. Raises StoreError for what is not a digest, so no path can leave the store."""
        return self.blobs / _encoded(digest)

    def partial_path(self, digest: str) -> Path:
        """Where the bytes of a blob are received."""
        return self.partial / _encoded(digest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for this process; a second one waits. A dry run reads and needs no lock."""
        if self.dry_run:
            yield
            return
        with self._alone():
            yield
            if self.adopted:
                # Stamps must not outlive the bytes they vouch for when the power goes.
                os.sync()
            self.stamps.save()

    def commit(self) -> None:
        """Make what was admitted so far last: for a process that does not hold the store while it works."""
        changes = self.stamps.changes()
        os.sync()
        with self._alone():
            self.stamps.save(changes)

    @property
    def receiving_lock(self) -> Path:
        """The file that belongs to whoever ships to this store."""
        return self.state / "receiving.lock"

    def turn(self) -> int:
        """A number that changes when somebody begins or ends to ship to this store; 0 when nobody ever did."""
        try:
            status = self.receiving_lock.stat()
        except FileNotFoundError:
            return 0
        return status.st_mtime_ns if status.st_size else 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.make_directory(self.state)
        with open(self.state / "store.lock", "w") as lock:  # noqa: PTH123 - the descriptor is what is wanted
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def inventory(self, wanted: Mapping[str, int]) -> Inventory:
        """Take in what was received, and say what of `wanted` (digest: size) is still missing.

        Blobs without a valid stamp are read again. Whatever does not verify is removed and named.
        """
        damaged: dict[str, str] = {}
        for digest in wanted:
            _encoded(digest)
        self._unpack()
        unknown = self._without_stamp(wanted.items())
        there = _names_in(self.blobs) if unknown else set()
        self._check([item for item in unknown if _encoded(item[0]) in there], damaged)
        absent = self._without_stamp(unknown)
        if absent and not self.dry_run:
            self._adopt(absent, damaged)
            absent = self._without_stamp(absent)
        received = self._received() if absent else {}
        partial = {digest: received[digest] for digest, _size in absent if received.get(digest)}
        return Inventory(dict(absent), partial, damaged)

    def _received(self) -> dict[str, int]:
        """Bytes of everything that was received and is no blob yet."""
        names = {name: _regular_size(self.partial / name) for name in _names_in(self.partial)}
        return {f"{ALGORITHM}:{name}": size for name, size in names.items() if size is not None}

    def sound(self, digests: Iterable[str]) -> set[str]:
        """Those of some blobs that are in the store and that a stamp vouches for."""
        return self.stamps.sound(self.blobs, digests)

    def has(self, digest: str) -> bool:
        """Whether there is something under the name of a blob, be it sound or not."""
        return os.path.lexists(self.blob_path(digest))

    def put(self, digest: str, content: bytes) -> None:
        """Put bytes where those of a blob are received; they are verified like all that is."""
        self.make_directory(self.partial, RECEIVING_MODE)
        _write_new(self.partial_path(digest), io.BytesIO(content))

    def receive(self, owner: int | None = None) -> Path:
        """Make the receiving area ready for user id `owner` (default: whoever runs this) and return it."""
        self.make_directory(self.blobs)
        self.make_directory(self.partial, RECEIVING_MODE)
        if os.geteuid() == 0:
            uid = 0 if owner is None else owner
            if self.partial.stat().st_uid != uid:
                os.chown(self.partial, uid, -1)
            for entry in os.scandir(self.partial):
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid != uid:
                    os.chown(entry.path, uid, -1, follow_symlinks=False)
        if stat.S_IMODE(self.partial.stat().st_mode) != RECEIVING_MODE:
            self.partial.chmod(RECEIVING_MODE)
        return self.partial

    def claim(self, digest: str, writing: bool = False) -> int:
        """Open what was received of a blob, and make it ours alone, to be read or (made if need be) to be `writing`.

        Everything afterwards goes through this one open file, so that what was read is what is kept. Raises NotTaken
        for a file that has a second name or is none, after removing it, and OSError.
        """
        source = self.partial_path(digest)
        how = os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY
        try:
            handle = os.open(source, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EACCES):
                raise
            _discard(source)
            raise NotTaken("what was received is no file of ours; it is not taken") from error
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                _discard(source)
                raise NotTaken("the received file has a second name; it is not taken")
            if status.st_uid != os.geteuid():
                os.fchown(handle, os.geteuid(), os.getegid())
            os.fchmod(handle, 0o600 if writing else BLOB_MODE)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def admit(self, digest: str, handle: int, found: str) -> str | None:
        """Make a claimed file whose content was `found` a blob of the store; why not, and the file is gone, or None.

        This is the one way into the store.
        """
        source, target = self.partial_path(digest), self.blob_path(digest)
        if found != digest:
            source.unlink(missing_ok=True)
            return f"content received is {found}"
        os.fchmod(handle, BLOB_MODE)
        status = os.fstat(handle)
        try:
            source.replace(target)
        except FileNotFoundError:
            # Another process may have read it to its end at the same time, and been first.
            if _inode(target) != status.st_ino:
                return "the received file was removed while it was read"
        if _inode(target) != status.st_ino:
            target.unlink()
            return "the received file was exchanged while it was read"
        self.stamps.record(target, digest, [status.st_size, status.st_mtime_ns, status.st_ino])
        return None

    def make_directory(self, path: Path, mode: int = DIRECTORY_MODE) -> None:
        """Make a directory of the store and those above it, with this mode whatever the umask is.

        Raises StoreError when something below the root is a link or no directory: it would lead out of the store.
        """
        missing = []
        place = path
        while not place.exists() and not place.is_symlink():
            missing.append(place)
            place = place.parent
        for parent in [path, *path.parents]:
            if parent == self.root or self.root not in parent.parents:
                break
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                raise StoreError(f"{parent} must be a plain directory of the store; remove it, or choose another root.")
        try:
            for place in reversed(missing):
                place.mkdir(exist_ok=True)
                place.chmod(mode if place == path else DIRECTORY_MODE)
        except OSError as error:
            raise StoreError(f"Cannot make the directory {path}: {error.strerror} ({error.filename}).") from error

    def _without_stamp(self, blobs: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        wanted = list(blobs)
        sound = self.sound(digest for digest, _size in wanted)
        return [item for item in wanted if item[0] not in sound]

    def _check(self, blobs: list[tuple[str, int]], damaged: dict[str, str]) -> None:
        """Read the blobs no stamp vouches for; remove those that are not what they are called.

        Raises StoreError for directories among them: whose they are is not known.
        """
        strange = [str(path) for path in (self.blob_path(digest) for digest, _size in blobs) if _is_directory(path)]
        if strange:
            raise StoreError(f"A directory where a blob should be; remove it: {', '.join(strange)}.")

        def found(item: tuple[str, int]) -> str | None:
            path = self.blob_path(item[0])
            size = _regular_size(path)
            if size != item[1]:
                return "not a regular file" if size is None else f"{size} bytes in the store, expected {item[1]}"
            try:
                content = self.stamps.digest_of(path)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                return f"the disk cannot read it: {error.strerror}"
            return None if content == item[0] else f"content in the store is {content}"

        for (digest, _size), problem in _side_by_side(found, blobs):
            if problem:
                damaged[digest] = problem
                self.stamps.forget(self.blob_path(digest))
                if not self.dry_run:
                    self.blob_path(digest).unlink()

    def _adopt(self, blobs: list[tuple[str, int]], damaged: dict[str, str]) -> None:
        """Verify received blobs that have all their bytes, and rename them into the store."""
        received = self._received()
        complete = [item for item in blobs if received.get(item[0]) == item[1]]
        too_long = [item for item in blobs if received.get(item[0], 0) > item[1]]
        for digest, size in too_long:
            damaged[digest] = f"more than its {size} bytes were received"
            self.partial_path(digest).unlink()
        if complete:
            self.make_directory(self.blobs)
        for (digest, _size), problem in _side_by_side(self._adopt_one, complete):
            if problem:
                damaged[digest] = problem
            else:
                self.adopted += 1

    def _adopt_one(self, item: tuple[str, int]) -> str | None:
        """Verify one received file and take it in; a problem, and the file is gone, or None."""
        digest, size = item
        try:
            handle = self.claim(digest)
        except NotTaken as problem:
            return str(problem)
        try:
            found = hash_file(f"/proc/self/fd/{handle}")
            self.stamps.count(size)
            return self.admit(digest, handle, found)
        finally:
            os.close(handle)

    def _unpack(self) -> None:
        """Take the small blobs out of received packs into the receiving area; a pack that was cut gives what it has."""
        if self.dry_run or not self.partial.is_dir():
            return
        for pack in sorted(self.partial.glob(f"{PACK_PREFIX}*.tar")):
            size = _regular_size(pack)
            if size is not None:
                with room_for(self.partial, size):
                    self._unpack_one(pack)
            pack.unlink()

    def _unpack_one(self, pack: Path) -> None:
        try:
            with tarfile.open(pack, "r|") as archive:
                for member in archive:
                    digest = f"sha256:{member.name}"
                    content = archive.extractfile(member) if member.isreg() and is_digest(digest) else None
                    if content is not None and not self.has(digest):
                        _write_new(self.partial_path(digest), content)
        except (tarfile.TarError, EOFError):
            # The rest of the pack is missing or garbage: its blobs stay missing and are asked for again.
            return


def _discard(path: Path) -> None:
    """Remove whatever has this name."""
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink()


def _inode(path: Path) -> int | None:
    """The inode of what has this name, or None when nothing has."""
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _write_new(path: Path, content: object) -> None:
    """Write a stream to a file that is ours alone, replacing whatever had its name."""
    if os.path.lexists(path):
        path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as target:
        while True:
            chunk = content.read(CHUNK)  # type: ignore[attr-defined]
            if not chunk:
                return
            target.write(chunk)


def _names_in(directory: Path) -> set[str]:
    """The names in a directory; none where there is no directory."""
    try:
        return set(os.listdir(directory))  # noqa: PTH208 - names are wanted, of tens of thousands
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _encoded(digest: str) -> str:
    """The hex part of a digest. Raises StoreError for anything else."""
    if not is_digest(digest):
        raise StoreError(f"{digest!r} is not a digest (sha256:<64 hex digits>).")
    return digest.partition(":")[2]


def _regular_size(path: Path) -> int | None:
    """Size of a regular file in bytes, or None when there is none (a link does not count)."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _side_by_side(work: object, items: list[tuple[str, int]]) -> list[tuple[tuple[str, int], str | None]]:
    """Run `work` on every item over all processors, the largest first; results with their items."""
    ordered = sorted(items, key=lambda item: (-item[1], item[0]))
    if not ordered:
        return []
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1, len(ordered))) as pool:
        return list(zip(ordered, pool.map(work, ordered)))  # type: ignore[arg-type]
