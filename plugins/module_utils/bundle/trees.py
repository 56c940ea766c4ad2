# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host makes of the blobs in its store: directories under the names that people and servers use.

::

    <root>/models/<name>/<first 12 digits>/   a model, hard links of its blobs
    <root>/wheels/<name>/<first 12 digits>/   a set of wheels, hard links of its blobs
    <root>/tools/<name>/<first 12 digits>/    programs, hard links of their blobs, executable
    <root>/lib/<first 12 digits>/             the wheels `host`, unpacked
    <root>/lib/.<first 12 digits>.json        their sizes and times, by which damage is noticed
    <root>/lib/python                         points at the one in use
    <root>/state/artifacts.json               what was shipped last, and where it is

A directory appears under its name only when it is complete, and other content is always another directory.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any, Iterable, Iterator

from .digest import PRIVATE, write_atomically
from .documents import DocumentError, parse, read_small
from .library import library_is_right, library_path, make_library
from .manifest import IMAGE_NAME, IMAGES, Artifact, File, artifact_from
from .places import exchange, fresh, remove, short
from .reference import image_problem
from .store import Store, StoreError, room_for

TREE_KINDS = ("models", "wheels", "tools")
EXECUTABLE_MODE = 0o555
LIBRARIES = ("wheels", "host")
"""The artifact whose wheels are unpacked for the collection's own modules."""


def read_artifact(store: Store, kind: str, name: str, digest: str, size: int) -> Artifact:
    """The artifact whose manifest is in the store, checked as strictly as on the way into the bundle.

    Raises StoreError when the manifest makes no sense.
    """
    problems: list[str] = []
    try:
        content = parse(read_small(store.blob_path(digest)))
    except (OSError, DocumentError) as error:
        raise StoreError(f"{kind}/{name}: the manifest {digest} cannot be read: {error}") from error
    artifact = artifact_from((kind, name), {"digest": digest, "size": size}, content, problems)
    if artifact is not None:
        problem = image_problem(artifact)
        problems.extend([problem] if problem else [])
    if artifact is None or problems:
        raise StoreError(f"{kind}/{name}: the manifest {digest} is refused: " + "; ".join(problems))
    return artifact


def tree_path(store: Store, artifact: Artifact) -> Path:
    """The directory of an artifact: it has the content's digest in it, so other content has another path."""
    return store.root / artifact.kind / artifact.name / short(artifact.digest)


def outdated(store: Store, artifacts: Iterable[Artifact]) -> list[str]:
    """The paths below the root that have to be made again for `artifacts`, whose blobs are all in the store."""
    artifacts = list(artifacts)
    paths = [
        tree_path(store, artifact)
        for artifact in artifacts
        if artifact.kind in TREE_KINDS and not _tree_is_right(store, artifact)
    ]
    libraries = _find(artifacts, *LIBRARIES)
    if libraries is not None and not library_is_right(store, libraries):
        paths.append(library_path(store, libraries))
    if _read_catalogue(store) != catalogue(store, artifacts):
        paths.append(_catalogue_path(store))
    return [str(path) for path in paths]


def refresh(store: Store, artifacts: Iterable[Artifact]) -> list[str]:
    """Make what `outdated` names, and return it, with other directories that were mended. All blobs must be there."""
    artifacts = list(artifacts)
    paths = outdated(store, artifacts)
    trees = {str(tree_path(store, artifact)) for artifact in artifacts}
    # First, because a directory that is not right yet is what brings us here again after an interruption.
    mended = _mend_others(store, trees) if trees & set(paths) else []
    for artifact in artifacts:
        if str(tree_path(store, artifact)) in paths:
            with room_for(tree_path(store, artifact), artifact.size):
                _make_tree(store, artifact)
    libraries = _find(artifacts, *LIBRARIES)
    if libraries is not None and str(library_path(store, libraries)) in paths:
        with room_for(library_path(store, libraries), libraries.size):
            make_library(store, libraries)
    if str(_catalogue_path(store)) in paths:
        content = json.dumps(catalogue(store, artifacts), indent=2, sort_keys=True)
        write_atomically(_catalogue_path(store), content.encode() + b"\n", PRIVATE)
    return [*paths, *mended]


def catalogue(store: Store, artifacts: Iterable[Artifact]) -> dict[str, Any]:
    """What artifacts.json says: by kind and name the digest, size, annotations, revision and path of each artifact."""
    content: dict[str, Any] = {kind: {} for kind in (*TREE_KINDS, IMAGES)}
    for artifact in artifacts:
        entry: dict[str, Any] = {
            "digest": artifact.digest,
            "size": artifact.size,
            "revision": artifact.revision,
            "annotations": artifact.annotations,
        }
        if artifact.kind == IMAGES:
            entry["image_id"] = artifact.blobs[1].digest
            entry["reference"] = artifact.annotations.get(IMAGE_NAME, "")
        if artifact.kind in TREE_KINDS:
            entry["path"] = str(tree_path(store, artifact))
        content.setdefault(artifact.kind, {})[artifact.name] = entry
    return content


def _catalogue_path(store: Store) -> Path:
    return store.state / "artifacts.json"


def _read_catalogue(store: Store) -> Any:
    try:
        return json.loads(_catalogue_path(store).read_text())
    except (OSError, ValueError):
        return None


def _find(artifacts: Iterable[Artifact], kind: str, name: str) -> Artifact | None:
    return next((entry for entry in artifacts if (entry.kind, entry.name) == (kind, name)), None)


def faults(store: Store, artifact: Artifact) -> Iterator[str]:
    """What is wrong with the directory of an artifact, file by file; nothing when it has its files and no others.

    A file is right when it is its blob by name, or by a stamp of its own.
    """
    # Names are put together as text: there may be tens of thousands, and this is asked in every run.
    root, blobs = str(tree_path(store, artifact)), str(store.blobs)
    if not Path(root).is_dir():
        yield "the directory is missing"
        return
    for file in artifact.files:
        path = f"{root}/{file.path}"
        try:
            status = os.lstat(path)
        except OSError:
            yield f"{file.path} is missing"
            continue
        if not stat.S_ISREG(status.st_mode):
            yield f"{file.path} is no file"
        elif not _is_blob(status, f"{blobs}/{file.digest[len('sha256:') :]}"):
            known = store.stamps.vouches(path)
            if known != file.digest:
                yield f"{file.path} {_other(status.st_size, file.size, bool(known))}"
    ours = {file.path for file in artifact.files}
    yield from (f"{name} does not belong to it" for name in sorted(_names(root) - ours))


def _is_blob(status: os.stat_result, blob: str) -> bool:
    try:
        return os.path.samestat(status, os.lstat(blob))
    except OSError:
        return False


def _other(size: int, wanted: int, read: bool) -> str:
    """How a file differs from its blob; `read` says whether anybody has read it as it is."""
    if size != wanted:
        return f"has {size} bytes instead of {wanted}"
    return "has other content" if read else "was replaced"


def _tree_is_right(store: Store, artifact: Artifact) -> bool:
    return next(faults(store, artifact), None) is None


def is_link_of(path: Path, blob: Path) -> bool:
    """Whether two names are those of one file. Raises OSError where one has none."""
    return os.path.samestat(path.lstat(), blob.lstat())


def _names(root: str) -> set[str]:
    """The files and links of a tree, but for what Python compiled from its code."""
    found: set[str] = set()
    waiting = [""]
    while waiting:
        place = waiting.pop()
        with os.scandir(f"{root}/{place}") as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    found.add(place + entry.name)
                elif entry.name != "__pycache__":
                    waiting.append(f"{place}{entry.name}/")
    return found


def _make_tree(store: Store, artifact: Artifact) -> None:
    """Build the directory beside its place and exchange it for what is there."""
    target = tree_path(store, artifact)
    store.make_directory(target.parent)
    building = fresh(store, target)
    copies: list[tuple[Path, str]] = []
    for directory in sorted({(building / file.path).parent for file in artifact.files}):
        store.make_directory(directory)
    for file in artifact.files:
        path = building / file.path
        if not _link(store.blob_path(file.digest), path):
            copies.append((target / file.path, file.digest))
        if artifact.kind == "tools":
            path.chmod(EXECUTABLE_MODE)
    exchange(building, target)
    for path, digest in copies:
        store.stamps.record(path, digest)


def _mend_others(store: Store, wanted: set[str]) -> list[str]:
    """Mend the directories that are not wanted now, but kept for a release to go back to, and return those mended.

    A blob that several directories share and that was damaged is the same file in all of them. Where it came anew, they
    get links of the new one.
    """
    manifests = {path.name[:12]: path for path in store.blobs.iterdir()} if store.blobs.is_dir() else {}
    mended = []
    for root in sorted(path for kind in TREE_KINDS for path in (store.root / kind).glob("*/*") if path.is_dir()):
        manifest = manifests.get(root.name)
        if manifest is None or str(root) in wanted:
            continue
        kind, name, digest = root.parent.parent.name, root.parent.name, f"sha256:{manifest.name}"
        try:
            artifact = read_artifact(store, kind, name, digest, manifest.stat().st_size)
        except (StoreError, OSError):
            continue
        stale = [file for file in artifact.files if _is_stale(store, root / file.path, file.digest)]
        for file in stale:
            _replace(store, artifact, file)
        if stale:
            mended.append(str(root))
    return mended


def _is_stale(store: Store, path: Path, digest: str) -> bool:
    """Whether a file of a directory is not the blob in the store any more, which is known to be good."""
    try:
        if is_link_of(path, store.blob_path(digest)) or not stat.S_ISREG(path.lstat().st_mode):
            return False
    except OSError:
        return False
    return store.stamps.vouches(path) != digest and bool(store.sound([digest]))


def _replace(store: Store, artifact: Artifact, file: File) -> None:
    """Put the blob in the place of one file of a directory, in one step."""
    path = tree_path(store, artifact) / file.path
    new = path.with_name(".relinked.new")
    remove(new)
    linked = _link(store.blob_path(file.digest), new)
    if artifact.kind == "tools":
        new.chmod(EXECUTABLE_MODE)
    new.replace(path)
    if not linked:
        store.stamps.record(path, file.digest)


def _link(blob: Path, path: Path) -> bool:
    """Give a blob a second name, or copy it where the file system allows no more names; True for a link."""
    try:
        os.link(blob, path)
        return True
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP):
            raise
    shutil.copyfile(blob, path)
    shutil.copymode(blob, path)
    return False
