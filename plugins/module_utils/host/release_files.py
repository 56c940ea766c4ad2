# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the files of the release in force were like, so that one that somebody changed can be named.

The id of a release tells that it was changed, and not where. So `<root>/state/release.json` has size, mode and a hash
of each file. Only its owner reads it, and the hashes have a key of their own: some of the files have secrets.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Dict, Iterator

PLACE = "state/release.json"


def note(root: Path, directory: Path) -> None:
    """Write down what the files of a release, which is whole, are like."""
    path, key = root / PLACE, secrets.token_hex(16)
    told = {"release": directory.name, "key": key, "files": _look(directory, key)}
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(str(new), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(told, file)
    new.replace(path)


def differences(root: Path, directory: Path) -> Iterator[str]:
    """How the files of a release differ from what was noted of it; nothing where nothing was."""
    try:
        told = json.loads((root / PLACE).read_text(encoding="utf-8"))
        release, key, before = str(told["release"]), str(told["key"]), dict(told["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return
    if release != directory.name:
        return
    now = _look(directory, key)
    for name in sorted({*before, *now}):
        if name not in now:
            yield f"{name} is missing"
        elif name not in before:
            yield f"{name} does not belong to it"
        elif before[name] != now[name]:
            yield f"{name} {_how(before[name], now[name])}"


def _how(before: Dict[str, Any], now: Dict[str, Any]) -> str:
    if before["size"] != now["size"]:
        return f"has {now['size']} bytes instead of {before['size']}"
    if before["hash"] != now["hash"]:
        return "has other content"
    return f"has mode {now['mode']} instead of {before['mode']}"


def _look(directory: Path, key: str) -> Dict[str, Dict[str, Any]]:
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            found[path.relative_to(directory).as_posix()] = {
                "size": len(content),
                "mode": f"{stat.S_IMODE(path.stat().st_mode):04o}",
                "hash": hashlib.blake2b(content, key=key.encode("ascii")).hexdigest(),
            }
    return found
