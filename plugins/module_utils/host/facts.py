# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a host offers: interpreters, disk, GPUs, and what its store has already. Reads only, judges nothing."""

from __future__ import annotations

import os
import platform
import pwd
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .venv import VenvError, choose_python, complete

_HEX = re.compile(r"[0-9a-f]{64}\Z")
MARKS = ("blobs/sha256", "partial", "state/store.lock", "gateway/current/nginx.conf")
"""What shipping makes first below a root directory, and a gateway to which nothing was shipped.

One of it stays as long as anything of ours does.
"""
OURS = (
    *("blobs", "cache", "current", "home", "lib", "logs", "models", "partial", "releases", "run", "state", "tools"),
    *("venvs", "wheels"),
)
"""What serving makes, and a teardown removes, below a root directory."""


def machine() -> dict[str, Any]:
    """Architecture, kernel, C library and the user this runs as."""
    library, version = platform.libc_ver()
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "libc": library,
        "libc_version": version,
        "user": user_name(),
        "processors": os.cpu_count() or 1,
    }


def interpreter(tag: str | None, wanted: str | None) -> dict[str, Any]:
    """The Python the server's environment would be built with: `path`, or `problem` when none fits `tag`."""
    try:
        return {"path": choose_python({tag} if tag else set(), wanted), "problem": ""}
    except VenvError as error:
        return {"path": "", "problem": str(error)}


def place(root: str) -> dict[str, Any]:
    """Whether `root` can be made or written by this user, and the bytes that are free there.

    `existing` is the nearest directory that is there, `owner` and `mode` are its. `obstacle` names a file in the way,
    `foreign` what has one of our names below `root` although nothing of ours ever came there.
    """
    path = Path(root)
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    obstacle = "" if path.is_dir() else str(path)
    directory = path.parent if obstacle else path
    status, volume = directory.stat(), os.statvfs(str(directory))
    return {
        "existing": str(directory),
        "obstacle": obstacle,
        "owner": user_name(status.st_uid),
        "mode": f"{status.st_mode & 0o7777:04o}",
        "writable": os.access(str(directory), os.W_OK | os.X_OK),
        "read_only": bool(volume.f_flag & os.ST_RDONLY),
        "noexec": bool(volume.f_flag & os.ST_NOEXEC),
        "device": status.st_dev,
        "free_bytes": volume.f_bavail * volume.f_frsize,
        "foreign": _foreign(Path(root)),
    }


def _foreign(root: Path) -> list[str]:
    if any(os.path.lexists(root / mark) for mark in MARKS):
        return []
    return [name for name in OURS if os.path.lexists(root / name)]


def contents(root: str) -> dict[str, Any]:
    """What is below the root already: sizes of blobs and received parts by digest, names of finished directories."""
    top = Path(root)
    return {
        "blobs": _sizes(top / "blobs" / "sha256"),
        "partial": _sizes(top / "partial"),
        "venvs": [name for name in _names(top / "venvs") if complete(top / "venvs" / name)],
        "lib": _names(top / "lib"),
    }


def gpus() -> dict[str, Any]:
    """The GPUs `nvidia-smi` lists: index, name, uuid, driver; `problem` says why there is no list."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {"list": [], "problem": "there is no nvidia-smi on the PATH"}
    question = [command, "--query-gpu=index,uuid,driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(question, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return {"list": [], "problem": f"nvidia-smi cannot be run: {error}"}
    text = answer.stdout.decode("utf-8", "replace")
    rows = [[part.strip() for part in line.split(",", 3)] for line in text.splitlines()]
    found = [
        {"index": int(row[0]), "name": row[3], "uuid": row[1], "driver": row[2]}
        for row in rows
        if len(row) == 4 and row[0].isdigit()
    ]
    problem = f"nvidia-smi ended with status {answer.returncode}: {text.strip()}" if answer.returncode else ""
    return {"list": found, "problem": problem}


def _sizes(directory: Path) -> dict[str, int]:
    """Sizes of the regular files that are named as digests."""
    try:
        entries = [entry for entry in os.scandir(str(directory)) if _HEX.match(entry.name)]
    except OSError:
        return {}
    return {
        f"sha256:{entry.name}": entry.stat(follow_symlinks=False).st_size
        for entry in entries
        if entry.is_file(follow_symlinks=False)
    }


def _names(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(str(directory)) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def user_name(uid: int | None = None) -> str:
    """The name of a user by number, by default of the one this runs as; the number where it has no name."""
    number = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
