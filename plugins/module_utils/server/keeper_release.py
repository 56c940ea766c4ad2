# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the release in force tells the keeper: the models, and how to look after them.

A release that cannot be read in full is not acted upon: a list of which a part is missing would end models.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from .keeper_drift import POLICIES, RESTORE

SETTINGS = "keeper.json"
MODELS = "models.json"
REGISTRATIONS = "registrations.json"
CREDENTIALS = "credentials.json"
VIEW = "server.json"
PROGRAM = "bin/keeper.pyz"
# A keeper that says nothing for two minutes counts as silent.
LONGEST_INTERVAL = 60.0


class Unreadable(Exception):
    """No release, or one that cannot be understood; the text says what is wrong."""


@dataclass(frozen=True)
class Settings:
    """How to look after the models; times in seconds.

    interval: between two questions to the server. grace: what a new release brings is left to Ansible for this long.
    wait_timeout: how long one launch may take. parallel: launches at once. verify: between two probes of one model, 0
    for none. pid_file: where the process id of a server stands that may be ended when it is only half alive, and mark:
    what stands in its environment; empty where the keeper has no say in that.
    """

    endpoint: str
    policy: str = RESTORE
    interval: float = 5.0
    grace: float = 60.0
    wait_timeout: float = 1800.0
    parallel: int = 4
    verify: float = 600.0
    pid_file: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Release:
    """A release: `entries` as in the inventory, `registrations` with `model_type` and `definition` each.

    `login` is empty, or has an `api_key`, or `username` and `password`.
    """

    id: str
    directory: Path
    settings: Settings
    entries: Tuple[Mapping[str, Any], ...] = ()
    registrations: Tuple[Mapping[str, Any], ...] = ()
    login: Mapping[str, str] = field(default_factory=dict)

    def key(self, uid: str) -> str:
        """What a model is tried as: its entry, in this release. No secret can be read off it."""
        entry = next((one for one in self.entries if str(one.get("model_uid")) == uid), {})
        text = json.dumps(entry, sort_keys=True, default=str)
        return f"{self.id}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def entry(self, uid: str) -> Mapping[str, Any]:
        """The entry of a model, empty when the release has none."""
        return next((one for one in self.entries if str(one.get("model_uid")) == uid), {})


def current(root: Path) -> str:
    """The id of the release in force, empty when there is none."""
    try:
        return Path(os.readlink(str(root / "current"))).name
    except OSError:
        return ""


def load(root: Union[str, Path]) -> Release:
    """The release in force. Raises Unreadable."""
    root = Path(root)
    name = current(root)
    if not name:
        raise Unreadable(f"no release is in force under {root}")
    # By its own name, so that a switch meanwhile mixes no two of them.
    directory = root / "releases" / name
    settings = _settings(directory / SETTINGS)
    _read(directory / VIEW, dict)
    return Release(
        name,
        directory,
        settings,
        tuple(_rows(directory / MODELS)),
        tuple(_rows(directory / REGISTRATIONS, optional=True)),
        {str(key): str(value) for key, value in (_read(directory / CREDENTIALS, dict, True) or {}).items() if value},
    )


def _settings(path: Path) -> Settings:
    told: Dict[str, Any] = _read(path, dict)
    try:
        found = Settings(str(told["endpoint"]))
        wanted = {name: value for name, value in told.items() if name in Settings.__dataclass_fields__}
        found = replace(found, **wanted)
        return replace(
            found,
            policy=found.policy if found.policy in POLICIES else RESTORE,
            interval=min(max(1.0, float(found.interval)), LONGEST_INTERVAL),
            grace=max(0.0, float(found.grace)),
            wait_timeout=max(1.0, float(found.wait_timeout)),
            parallel=max(1, int(found.parallel)),
            verify=max(0.0, float(found.verify)),
            pid_file=str(found.pid_file),
            mark=str(found.mark),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"{path} is not as this collection writes it: {type(error).__name__}: {error}") from error


def _rows(path: Path, optional: bool = False) -> List[Mapping[str, Any]]:
    rows = _read(path, list, optional) or []
    if not all(isinstance(row, Mapping) for row in rows):
        raise Unreadable(f"{path} is not a list of dictionaries")
    return rows


def _read(path: Path, kind: type, optional: bool = False) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if optional and path.parent.is_dir():
            return None
        raise Unreadable(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    if not isinstance(found, kind):
        raise Unreadable(f"{path} is not a {'list' if kind is list else 'dictionary'}")
    return found


def program(directory: Path) -> Optional[Path]:
    """The keeper's own program in a release, None when it has none."""
    path = directory / PROGRAM
    return path if path.is_file() else None
