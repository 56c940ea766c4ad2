# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a deployment's files can be wrong, as facts for `diagnose`: room, rights, owners, labels, digests.

Reads only, and judges nothing: whether a fact is trouble is for `plugin_utils/diagnosis_files`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from ..bundle.deep import Deep, File, files, read_again
from ..bundle.library import library_is_right, library_path
from ..bundle.manifest import Artifact
from ..bundle.store import Store, StoreError
from ..bundle.trees import LIBRARIES, TREE_KINDS, faults, read_artifact
from . import release, system_facts
from .deployed import Deployed
from .facts import user_name
from .guarded import ACCOUNTS, SECRETS
from .guarding import SEED
from .venv import complete

SECRET_FILES = ("service.json", "models.json", "registrations.json", "credentials.json", SECRETS, ACCOUNTS)
"""Files of a release that nobody but its owner may read."""
WALKED = 2000
"""Files of the server's own directories that are looked at."""
TOLD = 20
"""Files of one kind that are named."""
AUDIT = Path("/var/log/audit/audit.log")
AUDIT_END = 512 * 1024
DENIED_WITHIN = 24 * 3600.0
_DENIED = re.compile(r"avc: +denied|apparmor=\"DENIED\"")
_WHEN = re.compile(r"audit\((\d+)")


def volumes(root: Path, seen: Deployed) -> List[Dict[str, Any]]:
    """Each directory that the server needs, with the file system it lies on.

    Keys: `path`, `what` it is for, `there`, `directory`, `read_only`, `free_bytes`, `free_files` (None where the file
    system does not count them), `device`, and `mode` and `owner` where it is there.
    """
    wanted = [(str(root), "root directory")]
    if seen.backend:
        wanted.append((seen.home, "home of the server"))
    wanted += [(str(one["source"]), f"mounted at {one['target']}") for one in seen.volumes]
    return [_volume(path, what) for path, what in dict(reversed(wanted)).items()][::-1]


def _volume(path: str, what: str) -> Dict[str, Any]:
    numbers = os.statvfs(system_facts.volume(path)["path"])
    found: Dict[str, Any] = {
        **system_facts.volume(path),
        "path": path,
        "what": what,
        "there": os.path.lexists(path),
        "directory": Path(path).is_dir(),
        "read_only": bool(numbers.f_flag & os.ST_RDONLY),
        "free_files": numbers.f_favail if numbers.f_files else None,
    }
    with contextlib.suppress(OSError):
        status = os.stat(path)  # noqa: PTH116 - it may be a file
        found.update(mode=f"{status.st_mode & 0o7777:04o}", owner=user_name(status.st_uid))
    return found


def integrity(root: Path, seen: Deployed, deep: bool, seconds: float) -> Dict[str, Any]:
    """Whether the release and what was shipped for it are as they were made.

    `release` says what is wrong with it, `changed` in which files, as far as that is known, `dangling` whether the link
    in force leads nowhere. `missing` and `damaged` name blobs with the files they are; `trees` are files of directories
    that are not those blobs, `venv` an environment that is not whole. Files without a stamp, with `deep` all, are read
    for `seconds` (0: to the end); `unread_bytes` is what is left.
    """
    found: Dict[str, Any] = {"release": "", "dangling": False, "missing": [], "damaged": [], "trees": [], "venv": ""}
    found.update(unread_bytes=0, read_bytes=0, problem="", vouched=0, changed=[])
    link = root / release.CURRENT
    found["dangling"] = link.is_symlink() and not link.exists()
    try:
        release.in_force(root)
    except release.ReleaseError as error:
        found.update(release=str(error), changed=error.changed[:TOLD])
    catalogue = root / "current" / "artifacts.json"
    if not catalogue.exists():
        catalogue = root / "state" / "artifacts.json"
    if not catalogue.exists():
        return found
    try:
        listed = json.loads(catalogue.read_text(encoding="utf-8"))
        _artifacts(Store(root, dry_run=True), listed, deep, seconds, found)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        found["problem"] = f"{catalogue} cannot be read: {error}"
    if seen.backend == "native" and seen.command:
        venv = Path(seen.command[0]).parent.parent
        ours = venv.parent == root / "venvs"
        if not Path(seen.command[0]).exists() or (ours and complete(venv) is None):
            found["venv"] = str(venv)
    return found


def _artifacts(store: Store, listed: Mapping[str, Any], deep: bool, seconds: float, found: Dict[str, Any]) -> None:
    artifacts: List[Artifact] = []
    names: Dict[str, str] = {}
    sizes: Dict[str, int] = {}
    for kind in TREE_KINDS:
        for name, entry in sorted((listed.get(kind) or {}).items()):
            digest = str(entry["digest"])
            names[digest] = f"{kind}/{name}: its manifest"
            if not store.has(digest):
                found["missing"].append(names[digest])
                continue
            sizes[digest] = store.blob_path(digest).stat().st_size
            try:
                artifact = read_artifact(store, kind, name, digest, sizes[digest])
            except StoreError as error:
                found["damaged"].append(str(error))
                continue
            artifacts.append(artifact)
            names.update({file.digest: f"{kind}/{name}: {file.path}" for file in artifact.files})
            sizes.update(dict(artifact.blobs))
    there = {digest for digest in sizes if store.has(digest)}
    found["missing"] += sorted(names.get(digest, digest) for digest in set(sizes) - there)
    # Another size is damage that needs no reading.
    other = {digest for digest in there if os.lstat(store.blob_path(digest)).st_size != sizes[digest]}
    vouched = store.sound(there - other)
    asked = (there - other) if deep else (there - other - vouched)
    wanted = files(store, artifacts if deep else [], [(digest, sizes[digest]) for digest in asked])
    read = read_again(store, wanted, Deep(seconds=seconds)) if wanted else None
    left = _unread(wanted, read.files if read else 0)
    sound = store.sound(there - other)
    bad = other | {digest for digest in asked if digest not in sound and digest not in left}
    found["damaged"] += sorted(names.get(digest, digest) for digest in bad)
    found.update(vouched=len(vouched), read_bytes=read.read_bytes if read else 0)
    found["unread_bytes"] = sum(sizes[digest] for digest in left)
    broken = bad | left | (set(sizes) - there)
    whole = [one for one in artifacts if not broken & {blob.digest for blob in one.blobs}]
    for one in whole:
        found["trees"] += [f"{one.reference}: {fault}" for fault in islice(faults(store, one), TOLD)]
        if (one.kind, one.name) == LIBRARIES and not library_is_right(store, one):
            found["trees"].append(str(library_path(store, one)))


def _unread(wanted: List[File], done: int) -> set:
    """The digests of blobs that there was no time for."""
    names = (Path(file.path) for file in wanted[done:] if file.path.startswith("blobs/"))
    return {f"sha256:{path.name}" for path in names}


def permissions(root: Path, seen: Deployed, uid: Optional[int]) -> Dict[str, Any]:
    """Files with rights or owners that they ought not to have; `uid` is the native server's user, None for unknown.

    `readable` are files with secrets that others can open, `writable` what others can change, `strangers` what in the
    home belongs to somebody else than the server's user (when it does not run: than the home itself), `closed` what its
    owner may not use. `home` is the mode of the home.
    """
    found: Dict[str, Any] = {"readable": [], "writable": [], "strangers": [], "closed": [], "home": "", "user": ""}
    if uid is None:
        with contextlib.suppress(OSError):
            uid = Path(seen.home).stat().st_uid if seen.home else None
    found["user"] = "" if uid is None else user_name(uid)
    for path, status in _secrets(root, seen):
        if status.st_mode & 0o004 and _reached(path.parent):
            found["readable"].append(_row(path, status))
    for path, status in _own(root, seen):
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o002 and not mode & stat.S_ISVTX and not stat.S_ISLNK(status.st_mode):
            found["writable"].append(_row(path, status))
        if stat.S_ISDIR(status.st_mode) and mode & 0o700 != 0o700 and _is_top(root, seen, path):
            found["closed"].append(_row(path, status))
        own = path == Path(seen.home) or Path(seen.home) in path.parents
        if seen.backend == "native" and own and uid is not None and status.st_uid != uid:
            found["strangers"].append(_row(path, status))
    with contextlib.suppress(OSError):
        found["home"] = f"{stat.S_IMODE(Path(seen.home).stat().st_mode):04o}" if seen.home else ""
    return {key: value[:TOLD] if isinstance(value, list) else value for key, value in found.items()}


def _secrets(root: Path, seen: Deployed) -> Iterator[Tuple[Path, os.stat_result]]:
    """Files that hold secrets: of every release, accounts and keys of the server, what the site keeps for it."""
    places = [root / "releases" / one / name for one in release.history(root) for name in SECRET_FILES]
    places += [root / SEED, *_below(root / "secrets")]
    if seen.home:
        places += _below(Path(seen.home) / "auth")
    for path in places:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status


def _own(root: Path, seen: Deployed) -> Iterator[Tuple[Path, os.stat_result]]:
    """What the server writes, and the directories around it."""
    tops = [root / name for name in ("", "releases", "state", "run", "logs", "blobs", "models", "venvs")]
    paths = [*tops, *_below(root / "state"), *_below(root / "logs")]
    if seen.home:
        paths += [Path(seen.home), *_below(Path(seen.home), 3)]
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            yield path, path.lstat()


def _is_top(root: Path, seen: Deployed, path: Path) -> bool:
    return path in (root, root / "state", root / "releases", root / "logs") or str(path) == seen.home


def _below(directory: Path, depth: int = 1) -> List[Path]:
    """Files and directories below a directory, `depth` levels of them, without those that cannot be listed."""
    found: List[Path] = []
    level = [directory]
    for _step in range(depth):
        deeper = []
        for place in level:
            with contextlib.suppress(OSError):
                for entry in os.scandir(str(place)):
                    found.append(Path(entry.path))
                    if entry.is_dir(follow_symlinks=False):
                        deeper.append(Path(entry.path))
            if len(found) > WALKED:
                return found[:WALKED]
        level = deeper
    return found


def _reached(directory: Path) -> bool:
    """Whether others may pass every directory on the way."""
    try:
        return all(place.stat().st_mode & 0o001 for place in (directory, *directory.parents))
    except OSError:
        return False


def _row(path: Path, status: os.stat_result) -> Dict[str, Any]:
    mode = f"{stat.S_IMODE(status.st_mode):04o}"
    return {"path": str(path), "mode": mode, "owner": user_name(status.st_uid)}


def labels(root: Path, seen: Deployed) -> Dict[str, Any]:
    """SELinux: `mode`, whether the file system keeps `labels`, and the label of every mount that a container has."""
    told: Dict[str, Any] = {**system_facts.selinux(str(root)), "mounts": {}}
    if told["mode"] != "disabled":
        for one in seen.volumes:
            with contextlib.suppress(OSError):
                value = os.getxattr(one["source"], "security.selinux")
                told["mounts"][one["source"]] = value.rstrip(b"\0").decode("utf-8", "replace")
    return told


def denials(root: Path, pids: List[int], log: Path = AUDIT, now: Optional[float] = None) -> Dict[str, Any]:
    """What SELinux or AppArmor refused to the server within a day, as the audit log has it: `count`, and the `last`."""
    signs = [f'"{root}', f" {root}/", 'comm="xinference', *(f" pid={pid} " for pid in pids)]
    limit = (time.time() if now is None else now) - DENIED_WITHIN
    found = []
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - AUDIT_END))
        for line in file.read().decode("utf-8", "replace").splitlines():
            when = _WHEN.search(line)
            if when and float(when.group(1)) >= limit and _DENIED.search(line) and any(one in line for one in signs):
                found.append(line)
    return {"count": len(found), "last": found[-1][:400] if found else ""}
