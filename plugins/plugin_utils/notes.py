# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the hosts of a play told about themselves, kept on the controller until they have been shipped to.

Facts would do for a few hosts. A bundle with 40,000 files on 200 hosts is another matter: every process would carry
every list. Here each list is written once, however many hosts have the same, and read by who needs it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Iterable, Mapping

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import write_atomically

from .credential import Run
from .fanout import Member

_NOTHING: dict[str, int] = {}


class Notes:
    """Notes of one run about the hosts that are shipped to; hosts are called by their inventory names."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._read: dict[str, dict[str, int]] = {}

    def missing(
        self,
        host: str,
        missing: Mapping[str, int],
        passing: Iterable[str] = (),
        counted: Mapping[str, int] | None = None,
    ) -> None:
        """A host lacks these blobs, sizes in bytes by digest; those that are `passing` leave its store soon after.

        `counted` are numbers about it to be added up later. What was noted about it before is void.
        """
        if missing:
            self._run.open()
            passing = sorted(set(missing).intersection(passing))
            self._write(host, {"missing": self._list(missing), "passing": passing, "counted": dict(counted or {})})
        else:
            self._place(host).unlink(missing_ok=True)

    def peer(self, host: str, address: str, port: int, has: Iterable[str]) -> None:
        """A host passes blobs on, and has these."""
        self._write(host, {**self._of(host), "peer": [address, port], "has": self._list(dict.fromkeys(has, 0))})

    def waiting(self, hosts: Iterable[str]) -> list[str]:
        """Those of some hosts that lack something."""
        return [host for host in hosts if self._of(host).get("missing")]

    def wanted(self, hosts: Iterable[str]) -> dict[str, int]:
        """All that some hosts lack."""
        lists = dict.fromkeys(self._of(host).get("missing", "") for host in hosts)
        return {digest: size for name in lists for digest, size in self._blobs(name).items()}

    def counted(self, host: str) -> dict[str, int]:
        """The numbers about a host."""
        return dict(self._of(host).get("counted", {}))

    def passing(self, hosts: Iterable[str]) -> set[str]:
        """Blobs that some of the hosts will have for a while only."""
        return {digest for host in hosts for digest in self._of(host).get("passing", [])}

    def members(self, hosts: Iterable[str]) -> dict[str, Member]:
        """What is known of those of some hosts about which there is a note, in the same order."""
        notes = {host: self._of(host) for host in hosts}
        return {
            host: Member(
                self._blobs(note.get("missing", "")),
                self._blobs(note.get("has", "")),
                (note["peer"][0], note["peer"][1]) if note.get("peer") else None,
            )
            for host, note in notes.items()
            if note
        }

    def _of(self, host: str) -> dict[str, Any]:
        try:
            found = json.loads(self._place(host).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, host: str, note: Mapping[str, Any]) -> None:
        write_atomically(self._place(host), json.dumps(note).encode())

    def _list(self, blobs: Mapping[str, int]) -> str:
        """Write a list of blobs, unless it is there; returns its name, empty for an empty list."""
        if not blobs:
            return ""
        content = json.dumps(dict(sorted(blobs.items())), separators=(",", ":")).encode()
        name = hashlib.sha256(content).hexdigest()[:32]
        path = self._run.place / f"blobs-{name}.json"
        if not path.exists():
            write_atomically(path, content)
        return name

    def _blobs(self, name: str) -> dict[str, int]:
        """A list of blobs by its name; the same object for the same name."""
        if not name:
            return _NOTHING
        if name not in self._read:
            try:
                self._read[name] = json.loads((self._run.place / f"blobs-{name}.json").read_text())
            except (OSError, ValueError):
                # Where hosts do not go from task to task together, one may be done before another has begun.
                return _NOTHING
        return self._read[name]

    def _place(self, host: str) -> Path:
        return self._run.place / f"host-{hashlib.sha256(host.encode()).hexdigest()[:32]}.json"
