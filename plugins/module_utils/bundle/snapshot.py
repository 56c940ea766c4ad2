# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A model of a hub as a directory: what is in it, what is missing, and nothing else.

The hub is any object with three methods (the client of ModelScope has them): `list_repo_revisions`,
`list_repo_files` and `download_file`. That client resumes a cut download and checks what it fetched against the hub's
own SHA-256; here is decided what it has to fetch at all. Stamps remember what was checked, so a second run reads and
fetches nothing. A record beside them remembers which files were asked for, so that files which are no longer wanted
can be told from files that are not ours.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable

from .digest import Stamps, free_bytes, hash_bytes, is_digest, write_atomically
from .layout import BundleError
from .manifest import path_problem, paths_problems
from .sizes import size_text

DEFAULT_REVISION = "master"
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_COMMIT_KEYS = ("CommitId", "commit_id", "Commit", "Sha", "sha")
_PARTIAL = re.compile(r"(\.incomplete|\.parallel_tmp|_\d+_\d+)\Z")


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it; size in bytes, digest empty where the hub gives none."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Wish:
    """What is asked for: model id, revision (branch, tag or commit), file patterns. Also the key of the record."""

    model: str
    revision: str
    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass
class Snapshot:
    """A wish resolved at the hub: the pinned revision and the files it has.

    `revision` is a commit id where the hub gives one, otherwise the name asked for and a digest over the file list,
    ``master+tree.<12 hex>``; `fetch_revision` is what to ask the hub for.
    """

    wish: Wish
    revision: str
    fetch_revision: str
    files: list[HubFile]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


@dataclass
class Comparison:
    """A directory against a snapshot: files to fetch (missing or not as the hub says) and files to remove."""

    fetch: list[HubFile] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    remove: list[str] = field(default_factory=list)


def resolve(hub: Any, wish: Wish) -> Snapshot:
    """Ask the hub what a wish means now. Raises BundleError when it means nothing, or nothing safe."""
    commit = wish.revision
    known: dict[str, str] = {}
    if not _COMMIT.match(wish.revision):
        for entry in hub.list_repo_revisions(wish.model, "model"):
            name = str(entry.get("Revision") or entry.get("name"))
            known[name] = next((str(entry[key]) for key in _COMMIT_KEYS if entry.get(key)), "")
        commit = known.get(wish.revision, "")
    try:
        listing = hub.list_repo_files(wish.model, "model", revision=commit or wish.revision)
    except Exception as error:
        if wish.revision in known or not known:
            raise
        # The hub's list of revisions need not be complete, so it is used to explain a failure and not to refuse.
        raise BundleError(
            f"{wish.model} has no revision {wish.revision!r} ({error}); it has: {', '.join(sorted(known))}. "
            "A commit id of 40 hex digits is also possible."
        ) from error
    files = select(listing, wish)
    tree = hash_bytes(json.dumps([asdict(file) for file in files]).encode()).partition(":")[2][:12]
    return Snapshot(wish, commit or f"{wish.revision}+tree.{tree}", commit or wish.revision, files)


def select(listing: Iterable[Any], wish: Wish) -> list[HubFile]:
    """The files of a hub's listing that a wish includes, in order of path. Raises BundleError with all problems."""
    entries = [entry for entry in listing if getattr(entry, "type", "blob") != "tree"]
    files = []
    problems = []
    for entry in entries:
        if not _matches(entry.path, wish.allow, True) or _matches(entry.path, wish.ignore, False):
            continue
        problem = path_problem(entry.path)
        digest = f"sha256:{str(entry.sha256 or '').lower()}"
        if problem:
            problems.append(problem)
        else:
            files.append(HubFile(entry.path, int(entry.size or 0), digest if is_digest(digest) else ""))
    problems += paths_problems([file.path for file in files])
    if problems:
        raise BundleError(f"The hub's list of files of {wish.model} cannot be used:", problems)
    if not files:
        seen = ", ".join(sorted(entry.path for entry in entries)[:10]) or "none"
        raise BundleError(f"No file of {wish.model} matches the patterns; files at {wish.revision}: {seen}")
    return sorted(files, key=lambda file: file.path)


def compare(directory: Path, snapshot: Snapshot, recorded: set[str], stamps: Stamps, hashing: bool) -> Comparison:
    """What has to happen so that `directory` holds the snapshot and nothing else.

    A file without a stamp is hashed when `hashing`, and otherwise trusted if its size is right (check mode). Raises
    BundleError when there are files that neither the hub nor an earlier run of ours knows.
    """
    result = Comparison()
    wanted = {file.path: file for file in snapshot.files}
    present = _present(directory)
    foreign = sorted(
        path for path in present if path not in wanted and path not in recorded and not _is_partial(path, wanted)
    )
    if foreign:
        raise BundleError(
            f"{directory} has files that are not part of {snapshot.wish.model}; remove them or choose another path:",
            foreign,
        )
    result.remove = sorted(path for path in present if path in recorded and path not in wanted)
    for file in snapshot.files:
        if file.path not in present:
            result.fetch.append(file)
        elif not _as_listed(directory / file.path, file, stamps, hashing):
            result.fetch.append(file)
            result.damaged.append(file.path)
    return result


def carry_out(
    directory: Path,
    snapshot: Snapshot,
    todo: Comparison,
    stamps: Stamps,
    download: Callable[[HubFile], Any],
    attempts: int,
    workers: int,
) -> None:
    """Remove, fetch (several files at a time, each tried `attempts` times) and stamp.

    Every file is tried even when others failed; what was fetched stays and is not fetched again. Raises BundleError
    with every file that failed, or at the start when the disk is too small.
    """
    needed = sum(file.size for file in todo.fetch)
    free = free_bytes(directory)
    if needed > free:
        raise BundleError(f"{directory} needs {size_text(needed)} and its file system has {size_text(free)} free.")
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*todo.remove, *todo.damaged]:
        (directory / path).unlink()

    def fetch(file: HubFile) -> str | None:
        error: Exception | None = None
        for _attempt in range(attempts):
            try:
                download(file)
                break
            except Exception as caught:  # the client has its own classes of error; all mean that this file failed
                error = caught
                if getattr(caught, "retryable", True) is False:
                    return f"{file.path}: {caught}"
        else:
            return f"{file.path}: {error} ({attempts} attempts)"
        if (directory / file.path).stat().st_size != file.size:
            return f"{file.path}: not {file.size} bytes after the download"
        if file.digest:
            stamps.record(directory / file.path, file.digest)
        return None

    with ThreadPoolExecutor(max_workers=workers) as pool:
        failures = [problem for problem in pool.map(fetch, todo.fetch) if problem]
    if failures:
        raise BundleError(
            f"{len(failures)} of {len(todo.fetch)} files of {snapshot.wish.model} could not be fetched "
            "(what is there is kept; run again to go on):",
            failures,
        )
    _tidy(directory, {file.path for file in snapshot.files})


class Record:
    """Which files an earlier run put, or began to put, into a directory; a small file in the cache."""

    def __init__(self, cache: Path, directory: Path) -> None:
        key = hashlib.sha256(os.path.abspath(directory).encode()).hexdigest()[:16]  # noqa: PTH100
        self.path = cache / "snapshots" / f"{key}.json"
        try:
            content = json.loads(self.path.read_text())
            self.files = {str(path) for path in content["files"]}
            self.content: dict[str, Any] = content
        except (OSError, ValueError, KeyError, TypeError):
            self.files, self.content = set(), {}

    def complete(self, wish: Wish) -> Snapshot | None:
        """The snapshot that fulfilled this wish, when it is pinned by a commit and so cannot have changed."""
        if not _COMMIT.match(wish.revision) or not self.content.get("complete"):
            return None
        if self.content.get("wish") != json.loads(json.dumps(asdict(wish))):
            return None
        files = [HubFile(path, entry["size"], entry["digest"]) for path, entry in self.content["files"].items()]
        return Snapshot(wish, self.content["revision"], wish.revision, files)

    def write(self, snapshot: Snapshot, complete: bool) -> None:
        """Remember a snapshot, before (not complete, earlier files still ours) or after it was fetched."""
        files = {file.path: {"size": file.size, "digest": file.digest} for file in snapshot.files}
        if not complete:
            files = {**{path: {"size": 0, "digest": ""} for path in sorted(self.files - set(files))}, **files}
        content = {
            "wish": asdict(snapshot.wish),
            "revision": snapshot.revision,
            "complete": complete,
            "files": files,
        }
        write_atomically(self.path, json.dumps(content, indent=1).encode() + b"\n")


def _matches(path: str, patterns: tuple[str, ...], without: bool) -> bool:
    """Whether a path matches one of the glob patterns (a trailing `/` means everything below); `without` if none."""
    if not patterns:
        return without
    return any(fnmatch.fnmatchcase(path, f"{each}*" if each.endswith("/") else each) for each in patterns)


def _present(directory: Path) -> set[str]:
    """Paths of everything below a directory that is not a directory."""
    found: set[str] = set()
    for place, _folders, names in os.walk(str(directory)):
        found.update((Path(place) / name).relative_to(directory).as_posix() for name in names)
    return found


def _is_partial(path: str, wanted: dict[str, HubFile]) -> bool:
    """Whether a file is an unfinished download of the client's (of any revision of a file we know or of none)."""
    base = _PARTIAL.sub("", path)
    return base != path and (base in wanted or path.endswith((".incomplete", ".parallel_tmp")))


def _as_listed(path: Path, file: HubFile, stamps: Stamps, hashing: bool) -> bool:
    """Whether a file that is there is what the hub lists."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    if not file.digest:
        return True
    known = stamps.vouches(path)
    if known is None and not hashing:
        return True
    return (known or stamps.digest_of(path)) == file.digest


def _tidy(directory: Path, wanted: set[str]) -> None:
    """Remove unfinished downloads and directories left empty."""
    for path in _present(directory) - wanted:
        (directory / path).unlink()
    for place, _folders, _names in os.walk(str(directory), topdown=False):
        if Path(place) != directory and not any(Path(place).iterdir()):
            Path(place).rmdir()
