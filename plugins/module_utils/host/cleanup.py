# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cleaning up a host: have `retention` say what may go of what is there, and remove that.

What names things goes before the things: first a release, then what only it named. A directory loses its name before it
loses its files. So a run that is killed anywhere leaves nothing under its name that is only half there, and the next
run finds what is left.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from ..bundle import frames
from ..bundle.loaded import forget_loaded, loaded_images
from ..bundle.places import remove
from ..bundle.receive import Failure, Session
from ..bundle.sizes import size_text
from ..bundle.store import Store, StoreError
from .docker_cli import Docker
from .inspection import inspect
from .native_ctl import locked
from .release import RELEASES
from .retention import Image, Link, Plan, Standing, freed, freed_by_images, plan

_TREES = {"models": "model", "wheels": "wheels", "tools": "tool"}


@dataclass(frozen=True)
class Row:
    """Something that goes: what it is, its name, how many files or directories, and the bytes that are free then."""

    what: str
    name: str
    count: int
    bytes: int


@dataclass
class _Job:
    """A row before its bytes are known: paths below the root, and what removes it."""

    what: str
    name: str
    paths: List[Path]
    act: Callable[[], None]
    count: int = 1
    image: Optional[Image] = None


@dataclass
class Cleaned:
    """What went, or in a dry run would go. `kept` are the releases that stay, `notes` tell what else does, and why."""

    rows: List[Row] = field(default_factory=list)
    kept: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        """Bytes of all rows together."""
        return sum(row.bytes for row in self.rows)

    def summary(self, rehearsed: bool) -> str:
        """One line about it."""
        if not self.rows:
            return "nothing to clean up"
        counts: Dict[str, int] = {}
        for row in self.rows:
            counts[row.what] = counts.get(row.what, 0) + row.count
        words = ", ".join(f"{count} {_plural(what, count)}" for what, count in counts.items())
        return f"{size_text(self.freed_bytes)} {'would be' if rehearsed else 'are'} free again: {words}"

    def listing(self) -> str:
        """All of it, a line each."""
        width = max((len(row.name) for row in self.rows), default=0)
        return "".join(f"{row.what:<11}  {row.name:<{width}}  {size_text(row.bytes):>8}\n" for row in self.rows)


def clean(store: Store, keep: int, docker_host: Optional[str] = None, wait: float = 0.0) -> Cleaned:
    """Remove what a host does not need that keeps so many releases; nothing at all in a dry run of the store.

    Waits `wait` seconds for a controller that ships to this host. Raises RetentionError when it cannot be told what is
    needed, StoreError when somebody ships all the time, DockerError.
    """
    with _alone(store, wait):
        there = inspect(store, lambda: Docker(docker_host))
        what_goes = plan(there, keep)
        cleaned = Cleaned(kept=what_goes.kept, notes=what_goes.notes)
        jobs = list(_jobs(store, there, what_goes, docker_host))
        sizes = freed([[link for path in job.paths for link in links(path)] for job in jobs])
        images = iter(freed_by_images(what_goes.images, there.engine or []))
        for job, size in zip(jobs, sizes):
            size = next(images) if job.image else size
            try:
                if not store.dry_run:
                    job.act()
            except _Stays as reason:
                cleaned.notes.append(str(reason))
                continue
            cleaned.rows.append(Row(job.what, job.name, job.count, size))
        if not store.dry_run:
            _forget_images(store, there, [row.name for row in cleaned.rows if row.what == "image"])
        return cleaned


def links(path: Path) -> Iterator[Link]:
    """Every name of a file that goes with a path."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            yield _link(os.lstat(str(path)))
        return
    for place, directories, names in os.walk(str(path)):
        for name in [*names, *directories]:
            status = os.lstat(os.path.join(place, name))  # noqa: PTH118 - 100,000 of them
            if not stat.S_ISDIR(status.st_mode):
                yield _link(status)


def _link(status: os.stat_result) -> Link:
    return Link((status.st_dev, status.st_ino), status.st_nlink, status.st_blocks * 512)


class _Stays(Exception):
    """Something that could not be removed and is no danger; the text says why."""


@contextlib.contextmanager
def _alone(store: Store, wait: float) -> Iterator[None]:
    """Hold the host against everybody who changes releases, blobs, or what is being received; a dry run need not."""
    if store.dry_run or not store.root.is_dir():
        yield
        return
    store.make_directory(store.state)
    opening = frames.Open(
        str(store.root), f"{socket.gethostname()} (clean-up)", f"uid {os.geteuid()}", os.getpid(), wait
    )
    session = Session(store, opening)
    try:
        try:
            session.enter(lambda _holder: None, time.sleep)
        except Failure as error:
            raise StoreError(f"{error}, and clean up then.") from error
        with locked(store.root), store.locked():
            yield
    finally:
        session.close()


def _jobs(store: Store, there: Standing, plan: Plan, docker_host: Optional[str]) -> Iterator[_Job]:
    """What is to be done, in order."""
    root = store.root
    for name in plan.releases:
        yield _moved("release", name, root / RELEASES / name, f".old-{name}")
    for image in plan.images:
        yield _Job("image", image.reference, [], partial(_remove_image, image, there, docker_host), 1, image)
    for name in plan.venvs:
        yield _moved("environment", f"venvs/{name}", root / "venvs" / name, f"{name}.gone")
    for name in plan.trees:
        path = root / name
        yield _moved(_TREES[name.partition("/")[0]], name, path, f".{path.name}.old", parent=True)
    for name in plan.libraries:
        path = root / "lib" / name
        listing = path.with_name(f".{name}.json")
        yield _moved("library", f"lib/{name}", path, f".{name}.old", before=listing)
    blobs = [store.blob_path(digest) for digest in plan.blobs]
    if blobs:
        yield _Job("blobs", "that nothing needs", blobs, partial(_unlink, blobs), len(blobs))
    unfinished = [store.partial_path(digest) for digest in plan.partial] + [store.partial / name for name in plan.packs]
    if unfinished:
        yield _Job("unfinished", "blobs that nobody wants", unfinished, partial(_unlink, unfinished), len(unfinished))
    leftovers = [root / name for name in plan.leftovers]
    if leftovers:
        yield _Job("leftovers", "of interrupted runs", leftovers, partial(_remove_all, leftovers), len(leftovers))


def _moved(what: str, name: str, path: Path, aside: str, parent: bool = False, before: Optional[Path] = None) -> _Job:
    """A directory that is renamed and removed then; `before` goes first, and an empty directory above it afterwards."""

    def act() -> None:
        if before is not None:
            remove(before)
        target = path.with_name(aside)
        remove(target)
        path.replace(target)
        remove(target)
        if parent:
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    return _Job(what, name, [path, *([before] if before is not None else [])], act)


def _remove_image(image: Image, there: Standing, docker_host: Optional[str]) -> None:
    """Take our name from an image; with its last name the engine removes it."""
    tags = next((one.tags for one in there.engine or [] if one.id == image.id), frozenset())
    answer = Docker(docker_host).ask("image", "rm", image.reference if image.reference in tags else image.id)
    if answer.code and "no such image" not in answer.err.lower():
        raise _Stays(f"the image {image.reference} stays: {answer.err.strip()}")


def _forget_images(store: Store, there: Standing, removed: List[str]) -> None:
    """Forget what was removed, and what the engine does not have any more."""
    if there.engine is None:
        return
    names: Dict[str, Tuple[str, ...]] = {one.id: tuple(one.tags) for one in there.engine}
    gone = [
        (one.reference, one.id)
        for one in loaded_images(store.state)
        if one.id not in names or (names[one.id] and one.reference not in names[one.id])
    ]
    gone += [(one.reference, one.id) for one in there.loaded if one.reference in removed]
    forget_loaded(store.state, gone)


def _unlink(paths: List[Path]) -> None:
    for path in paths:
        path.unlink()


def _remove_all(paths: List[Path]) -> None:
    for path in paths:
        remove(path)


def _plural(what: str, count: int) -> str:
    return what if what.endswith("s") or count == 1 else {"library": "libraries"}.get(what, f"{what}s")
