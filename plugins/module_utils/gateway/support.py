# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What support needs of a gateway: its configuration and logs. Keys of clients are told by name only.

The logs of a native one lie among those of the host.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from ..host import release as releases
from ..host.docker_cli import Docker
from .container import DEFINITION, Container
from .nginx import CERTIFICATE, CONFIGURATION, KEYS
from .running import shown

LINES = "20000"
_KEY = re.compile(r'"~\^\(\?i:bearer\) (.*)\$" \S+;\Z')
_ESCAPED = re.compile(r"\\(.)")


def files(place: Path) -> Iterator[Tuple[str, str]]:
    """The configuration in force, by name; nothing where there is no gateway."""
    for name in (CONFIGURATION, KEYS, CERTIFICATE):
        try:
            text = (place / releases.CURRENT / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield name, shown({name: releases.Entry(text)})[name]


def contained(place: Path) -> bool:
    """Whether the gateway runs in a container, which prints its log."""
    try:
        text = (place / releases.CURRENT / CONFIGURATION).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return f"access_log {Container.log} " in text


def printed(docker: Docker) -> Iterator[Tuple[Dict[str, Any], str]]:
    """Each container of a gateway, as the engine shows it, and what it printed."""
    for identity in docker.ask("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={DEFINITION}").out.split():
        seen = docker.ask("inspect", "--type", "container", identity)
        if seen.code == 0:  # Otherwise it went away in between.
            answer = docker.ask("logs", "--timestamps", "--tail", LINES, identity)
            yield json.loads(seen.out)[0], answer.out + answer.err


def secrets(place: Path) -> Iterator[str]:
    """The keys of clients in all releases that are kept, and the lines of private keys."""
    for name in releases.history(place):
        for path, text in releases.read(place / releases.RELEASES / name).items():
            if path == KEYS:
                matches = (_KEY.search(line.strip()) for line in text.splitlines())
                yield from (_ESCAPED.sub(r"\1", match.group(1)) for match in matches if match)
            elif path.endswith(".key"):
                yield from (line for line in text.splitlines() if len(line) >= 16 and not line.startswith("-----"))
