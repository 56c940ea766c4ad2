# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names of hosts as names of what the controller keeps for them: keys, certificates, backups, support archives."""

from __future__ import annotations

import hashlib
import re

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def file_name(host: str) -> str:
    """A name for files of a host. It leads out of no directory, and no two hosts share one."""
    plain = _UNSAFE.sub("_", host).lstrip(".")
    return plain if plain and plain == host else f"{plain or 'host'}-{hashlib.sha256(host.encode()).hexdigest()[:8]}"
