# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is on a host and who uses it, as `retention` wants to know it. Reads only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Set, Tuple

from ..bundle.digest import is_digest
from ..bundle.keep import ARRIVING
from ..bundle.loaded import loaded_images
from ..bundle.manifest import Artifact
from ..bundle.reference import familiar
from ..bundle.store import PACK_PREFIX, Store, StoreError
from ..bundle.trees import TREE_KINDS, read_artifact
from . import native_run
from .compose import MODELS
from .docker_cli import Docker, DockerError
from .docker_release import COMPOSE_FILE
from .release import RELEASES, current, history
from .retention import Content, EngineImage, Image, Named, Release, RetentionError, Standing, Tree, short

PLUGIN_PLACES = (Path("/usr/local/lib/docker"), Path("~/.docker"))
"""Where the Docker client of a user looks for plugins, below `cli-plugins`."""
_SHORT = re.compile(r"[0-9a-f]{12}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_BUILDING = re.compile(r"\.[0-9a-f]{12}\.(?:new|old)\Z")
_SCRATCH = re.compile(r"[0-9a-f]{12}\.(?!lock\Z)")
_ASIDE = re.compile(r"\.(?:new|old)-")
_MAPPED = re.compile(r"([0-9a-f]+-[0-9a-f]+) \S+ \S+ \S+ (\d+)\s*(.*)")

File = Tuple[int, int]
"""Which file something is: device and inode."""


def inspect(store: Store, docker: Callable[[], Docker]) -> Standing:
    """Look at everything that cleaning up is about. `docker` is called only where an engine has to do with it.

    Raises RetentionError for a list that cannot be read but has to be, DockerError when the engine cannot be asked what
    it uses.
    """
    root = store.root
    there = Standing(current=current(root) or "", library=_link_name(root / "lib" / "python"))
    there.releases = [_release(root, name) for name in history(root)]
    there.shipped = _shipped(root)
    there.arriving = _arriving(root)
    named = {one for release in there.releases for one in release.artifacts} | {*there.shipped, *there.arriving}
    there.contents = _contents(store, named)
    blobs = _blobs(store)
    there.blobs = frozenset(blobs.values())
    files = _trees(store, there, blobs)
    _rest(store, there)
    there.running = _running(root)
    there.loaded = [
        Image(one.reference, one.image_id, one.digest, one.id, one.layers) for one in loaded_images(store.state)
    ]
    there.used = dict.fromkeys(_launched(root), "the record of launched models")
    there.used.update(dict.fromkeys(_plugins(root), "the Docker client"))
    if there.loaded or any((root / RELEASES / one.id / COMPOSE_FILE).exists() for one in there.releases):
        there.engine, mounted = _engine(docker(), root)
        there.used.update(mounted)
    # A file that a directory in force has too says nothing about the others that have it.
    now = {one.path for release in there.releases if release.id == there.current for one in release.artifacts}
    now |= {one.path for one in there.shipped}
    there.used.update(users(root, {file: paths for file, paths in files.items() if not now & set(paths)}))
    return there


def _release(root: Path, name: str) -> Release:
    """A release with what it names; its problem where that cannot be read."""
    directory = root / RELEASES / name
    try:
        listed = _named(json.loads((directory / "artifacts.json").read_text(encoding="utf-8")))
        service = directory / "service.json"
        text = service.read_text(encoding="utf-8") if service.exists() else ""
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        return Release(name, problem=f"artifacts.json: {error}")
    return Release(name, listed, frozenset(re.findall(re.escape(f"{root}/venvs/") + r"([0-9a-f]{12})", text)))


def _named(catalogue: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Tuple[Named, ...]:
    """The artifacts of a list of what was shipped. Raises ValueError, TypeError, KeyError or AttributeError."""
    found = [
        Named(kind, name, str(entry["digest"]), str(entry.get("image_id", "")))
        for kind, entries in catalogue.items()
        for name, entry in entries.items()
    ]
    strange = [one.digest for one in found if not is_digest(one.digest)]
    if strange:
        raise ValueError(f"{strange[0]!r} is not a digest")
    return tuple(sorted(found))


def _shipped(root: Path) -> Tuple[Named, ...]:
    return _listed(root / "state" / "artifacts.json", _named)


def _arriving(root: Path) -> Tuple[Named, ...]:
    def named(rows: Sequence[Mapping[str, Any]]) -> Tuple[Named, ...]:
        found = [Named(str(row["kind"]), str(row["name"]), str(row["digest"])) for row in rows]
        if not all(is_digest(one.digest) for one in found):
            raise ValueError("not digests")
        return tuple(sorted(found))

    return _listed(root / "state" / ARRIVING, named)


def _listed(path: Path, read: Callable[[Any], Tuple[Named, ...]]) -> Tuple[Named, ...]:
    """What a list in the state directory names; nothing where there is none."""
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RetentionError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so nobody knows what was shipped. Run "
            "playbooks/ship.yml, which writes it again."
        ) from error


def _contents(store: Store, named: Set[Named]) -> Dict[str, Content]:
    """What the manifests of artifacts point at, as far as they are in the store and make sense."""
    found = {}
    for one in sorted(named):
        try:
            path = store.blob_path(one.digest)
            artifact = read_artifact(store, one.kind, one.name, one.digest, path.stat().st_size)
        except (StoreError, OSError):
            continue
        found[one.digest] = _content(artifact)
    return found


def _content(artifact: Artifact) -> Content:
    layers = frozenset(layer.digest for layer in artifact.layers)
    return Content(frozenset(blob.digest for blob in artifact.blobs) - layers, layers)


def _blobs(store: Store) -> Dict[File, str]:
    """The digest of each blob by the file it is."""
    found = {}
    for entry in _entries(store.blobs):
        if _HEX.match(entry.name):
            status = entry.stat(follow_symlinks=False)
            found[status.st_dev, status.st_ino] = f"sha256:{entry.name}"
    return found


def _trees(store: Store, there: Standing, blobs: Mapping[File, str]) -> Dict[File, Tuple[str, ...]]:
    """Find the directories of artifacts, and the paths of those that have a file, by the file."""
    files: Dict[File, Tuple[str, ...]] = {}
    manifests = {short(digest) for digest in blobs.values()}
    for kind in TREE_KINDS:
        for name in _entries(store.root / kind):
            for entry in _entries(Path(name.path)) if name.is_dir(follow_symlinks=False) else ():
                path = f"{kind}/{name.name}/{entry.name}"
                if _BUILDING.match(entry.name):
                    there.leftovers.append(path)
                elif _SHORT.match(entry.name) and entry.is_dir(follow_symlinks=False):
                    own = list(_files(entry.path))
                    files.update({file: (*files.get(file, ()), path) for file in own})
                    linked = frozenset(blobs[file] for file in own if file in blobs)
                    ours = entry.name in manifests or (bool(own) and all(file in blobs for file in own))
                    there.trees.append(Tree(path, ours, linked))
    there.trees.sort(key=lambda tree: tree.path)
    return files


def _rest(store: Store, there: Standing) -> None:
    """Find environments, libraries, what was received of blobs, and what interrupted runs left."""
    root = store.root
    for entry in _entries(root / "venvs"):
        if entry.is_dir(follow_symlinks=False) and not _is_locked(root / "venvs" / f"{entry.name[:12]}.lock"):
            if _SHORT.match(entry.name):
                there.venvs.append(entry.name)
            elif _SCRATCH.match(entry.name):
                there.leftovers.append(f"venvs/{entry.name}")
    libraries = {entry.name for entry in _entries(root / "lib")}
    for name in sorted(libraries):
        if _SHORT.match(name):
            there.libraries.append(name)
        elif _BUILDING.match(name) or name == ".python.new" or (_is_listing(name) and name[1:13] not in libraries):
            there.leftovers.append(f"lib/{name}")
    for entry in _entries(store.partial):
        if _HEX.match(entry.name):
            there.partial.append(f"sha256:{entry.name}")
        elif entry.name.startswith(PACK_PREFIX) and entry.name.endswith(".tar"):
            there.packs.append(entry.name)
    there.leftovers += [f"{RELEASES}/{entry.name}" for entry in _entries(root / RELEASES) if _ASIDE.match(entry.name)]
    there.venvs.sort()


def _is_listing(name: str) -> bool:
    return name.startswith(".") and name.endswith(".json") and bool(_SHORT.match(name[1:-5]))


def _running(root: Path) -> str:
    """The release that the native server was started from, empty when none runs."""
    try:
        release = str(json.loads((root / native_run.STATE).read_text(encoding="utf-8"))["release"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    return release if next(native_run.family(root), None) is not None else ""


def _launched(root: Path) -> Iterator[str]:
    """The paths below the root that models were launched with; in a container they begin elsewhere."""
    path = root / "state" / "launched.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise RetentionError(
            f"{path} cannot be read ({error}), so nobody knows what the server uses. Run playbooks/models.yml, which "
            "writes it again."
        ) from error
    for text in _texts(told):
        if text.startswith(f"{root}/"):
            yield text[len(f"{root}/") :]
        elif text.startswith(f"{MODELS}/"):
            yield f"models/{text[len(f'{MODELS}/') :]}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _plugins(root: Path) -> Iterator[str]:
    """What of the root a Docker client has as a plugin."""
    for place in PLUGIN_PLACES:
        for entry in _entries(Path(os.path.expanduser(str(place))) / "cli-plugins"):  # noqa: PTH111 - no home, no error
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith(f"{root}/"):
                    yield target[len(f"{root}/") :]


def _engine(docker: Docker, root: Path) -> Tuple[List[EngineImage], Dict[str, str]]:
    """All images the engine has, and what of the root is mounted in a container."""
    containers = _inspected(docker, "container", "ps", "--all", "--quiet", "--no-trunc")
    used = {str(one.get("Image")) for one in containers}
    mounted = {}
    for one in containers:
        for mount in one.get("Mounts") or []:
            source = str(mount.get("Source") or "")
            if source.startswith(f"{root}/"):
                mounted[source[len(f"{root}/") :]] = f"the container {str(one.get('Name', '')).lstrip('/')}"
    images = [
        EngineImage(
            str(one["Id"]),
            frozenset(familiar(tag) for tag in one.get("RepoTags") or []),
            frozenset((one.get("RootFS") or {}).get("Layers") or []),
            str(one["Id"]) in used,
        )
        for one in _inspected(docker, "image", "image", "ls", "--all", "--quiet", "--no-trunc")
    ]
    # All models are mounted as one directory, whichever of them the server has in use.
    return images, {path: user for path, user in mounted.items() if path not in TREE_KINDS}


def _inspected(docker: Docker, kind: str, *listing: str) -> List[Dict[str, Any]]:
    """All containers or images, as the engine shows them; what goes away meanwhile is left out."""
    answer = docker.ask(*listing)
    if answer.code:
        raise DockerError(f"The Docker Engine cannot be asked what it uses: {answer.err.strip()}")
    names = list(dict.fromkeys(answer.out.split()))
    if not names:
        return []
    shown = docker.ask("inspect", "--type", kind, *names)
    if shown.code and "no such" not in shown.err.lower():
        raise DockerError(f"The Docker Engine cannot be asked what it uses: {shown.err.strip()}")
    found: List[Dict[str, Any]] = json.loads(shown.out or "[]")
    return found


def users(root: Path, files: Mapping[File, Sequence[str]]) -> Dict[str, str]:
    """The paths below the root of which some process has something open or mapped, with the process.

    `files` has the directories in which a file is. They are known again by device and inode, because a process
    in a container has them under another name. Processes of other users are looked at as far as we may.
    """
    found: Dict[str, str] = {}
    inodes = {inode for _device, inode in files}
    real = os.path.realpath(str(root))
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        used = {*_open(process, files), *_mapped(process, files, inodes, real), *_called(process, str(root))}
        name = f"process {process.name} ({_comm(process)})" if used else ""
        for path in used:
            found.setdefault(path, name)
    return found


def _open(process: Path, files: Mapping[File, Sequence[str]]) -> Iterator[str]:
    for entry in _entries(process / "fd"):
        with contextlib.suppress(OSError):
            status = os.stat(entry.path)  # noqa: PTH116 - the file behind it
            if (status.st_dev, status.st_ino) in files:
                yield from files[status.st_dev, status.st_ino]


def _mapped(process: Path, files: Mapping[File, Sequence[str]], inodes: Set[int], root: str) -> Iterator[str]:
    try:
        lines = (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for place, inode, path in (match.groups() for match in map(_MAPPED.match, lines) if match):
        if path.startswith(f"{root}/"):
            yield path[len(f"{root}/") :]
        elif int(inode) in inodes:
            with contextlib.suppress(OSError):
                status = os.stat(process / "map_files" / place)  # noqa: PTH116
                if (status.st_dev, status.st_ino) in files:
                    yield from files[status.st_dev, status.st_ino]


def _called(process: Path, root: str) -> Iterator[str]:
    """What of the root is in the command line of a process: its interpreter, which is a link out of there."""
    with contextlib.suppress(OSError):
        for word in (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0"):
            if word.startswith(f"{root}/venvs/"):
                yield word[len(f"{root}/") :]


def _comm(process: Path) -> str:
    try:
        return (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "ended"


def _files(directory: str) -> Iterator[File]:
    for place, _directories, names in os.walk(directory):
        for name in names:
            status = os.lstat(os.path.join(place, name))  # noqa: PTH118 - 100,000 of them
            yield status.st_dev, status.st_ino


def _entries(directory: Path) -> List[os.DirEntry[str]]:
    """The entries of a directory, none where there is no such one or it may not be read."""
    try:
        return sorted(os.scandir(str(directory)), key=lambda entry: entry.name)
    except OSError:
        return []


def _is_locked(path: Path) -> bool:
    """Whether a build holds a lock file."""
    try:
        with path.open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _link_name(path: Path) -> str:
    try:
        return Path(os.readlink(str(path))).name
    except OSError:
        return ""
