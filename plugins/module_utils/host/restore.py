# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a restore does, and what is in its way. Pure: `plan` compares a backup's index with how the host stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Set, Tuple

from .backup import AUTH, CONFIGURATION, LAUNCHED, File, Index, is_database, numbers


@dataclass(frozen=True)
class Mark:
    """What a home says of the backup that was put into it, in `<home>/.restored.json`.

    `identity` is the backup's. `done` is false while its files are being exchanged. `aside` is the directory, below
    `<root>/state`, that has what was there before; empty when nothing was.
    """

    identity: str
    host: str
    time: str
    done: bool
    aside: str = ""


@dataclass(frozen=True)
class Standing:
    """A host as a restore finds it.

    `backend` is empty when nothing is served. `digests` are the SHA-256 of files that are there, by their name in a
    backup (of databases, which change by being read, the text is empty). `users` and `keys` are those of the server,
    None where its database cannot be read. `links` are places in which a link leads elsewhere.
    """

    root: str
    home: str
    backend: str = ""
    version: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    users: Optional[Tuple[str, ...]] = ()
    keys: int = 0
    links: Tuple[str, ...] = ()
    mark: Optional[Mark] = None


@dataclass(frozen=True)
class Row:
    """One file of a backup and what is done with it: `new`, `replace` or `keep`."""

    file: File
    action: str


@dataclass
class Plan:
    """What a restore does. `problems` are reasons not to begin, `notes` what is not restored and why."""

    rows: List[Row] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    resumed: bool = False

    @property
    def changed(self) -> bool:
        """Whether anything is to be done."""
        return self.resumed or any(row.action != "keep" for row in self.rows)


def plan(index: Index, there: Standing, replace: bool = False, administrator: str = "") -> Plan:
    """Compare a backup with a host.

    `replace` allows to put the accounts of the backup in the place of those of the host. `administrator` is the account
    that serving itself makes, which is nobody's loss.
    """
    found = Plan()
    if not there.backend:
        found.problems.append(
            f"Nothing is served below {there.root}. Ship and serve the host first (playbooks/ship.yml, serve.yml), "
            "then restore."
        )
        return found
    rows = [file for file in index.files if file.kind != CONFIGURATION]
    if index.backend != there.backend and any(file.name == LAUNCHED for file in rows):
        rows = [file for file in rows if file.name != LAUNCHED]
        found.notes.append(
            f"The record of what was launched is not restored: it is of a {index.backend} server, and this host serves "
            f"with {there.backend}."
        )
    found.notes += _configuration(index, there)
    mark = there.mark if there.mark and there.mark.identity == index.identity else None
    missing: Set[str] = {file.name for file in rows} - set(there.digests)
    if mark and mark.done and not missing:
        found.rows = [Row(file, "keep") for file in rows]
        return found
    found.resumed = mark is not None and not mark.done
    found.rows = [Row(file, _action(file, index, there)) for file in rows]
    found.problems += _problems(index, there, rows, replace or found.resumed, administrator)
    return found


def _action(file: File, index: Index, there: Standing) -> str:
    if file.name not in there.digests:
        return "new"
    same = (index.root, index.home) == (there.root, there.home)
    return "keep" if same and there.digests[file.name] == file.sha256 else "replace"


def _problems(index: Index, there: Standing, files: List[File], replace: bool, administrator: str) -> List[str]:
    problems = []
    if there.links:
        problems.append(
            f"{', '.join(there.links)} is a link, and what it leads to may be somebody else's. Put a directory there."
        )
    if any(is_database(file.name) for file in files) and numbers(index.server_version) > numbers(there.version) != ():
        problems.append(
            f"The backup is of Xinference {index.server_version}, and this host serves {there.version}, which does not "
            "know databases of later versions. Serve that version, or a later one, then restore."
        )
    if not replace and any(file.name == AUTH for file in files):
        own = _own(there, administrator)
        if own:
            problems.append(
                f"The server of this host has {own} of its own, which the accounts of the backup would replace. If "
                "that is meant, say xinference_restore_replace: true; what is there is then kept aside, and --check "
                "--diff tell what would change."
            )
    return problems


def _own(there: Standing, administrator: str) -> str:
    """The accounts and keys that were not made by serving, in words; empty when there are none."""
    if there.users is None:
        return "accounts that cannot be read"
    strangers = [name for name in there.users if name != administrator]
    words = []
    if strangers:
        words.append(f"the account{'s' if len(strangers) > 1 else ''} {', '.join(strangers)}")
    if there.keys:
        words.append(f"{there.keys} API key{'s' if there.keys > 1 else ''}")
    return " and ".join(words)


def _configuration(index: Index, there: Standing) -> List[str]:
    """What is in force is what the inventory says; where the backup had something else, that is told."""
    if (index.root, index.home, index.backend) != (there.root, there.home, there.backend):
        return []
    was: Dict[str, str] = {file.name: file.sha256 for file in index.files if file.kind == CONFIGURATION}
    now = {name: digest for name, digest in there.digests.items() if name.startswith("release/")}
    other = sorted(name[len("release/") :] for name in {*was, *now} if was.get(name) != now.get(name))
    if not was or not other:
        return []
    return [f"The configuration stays as the inventory says; the backup has other content in {', '.join(other)}."]
