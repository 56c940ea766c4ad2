# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper's program and settings, as a release has them.

The program is a zipapp of our own modules, the same ones that Ansible uses. It needs a Python and the library requests,
which every server brings along. Its bytes depend on nothing but the modules, so that the same collection makes the same
release on every host.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import sys
import zipfile
from typing import Any, Dict, Iterator, List, Mapping, Sequence

# All that the program begins with; named here, so that Ansible sends them to the host with this module.
from ..server import keeper, keeper_main, keeper_told, keeper_work
from ..server.keeper_release import CREDENTIALS, LONGEST_INTERVAL, PROGRAM, REGISTRATIONS, SETTINGS
from .release import Entry

PRIVATE = 0o400
PACKAGE = "keeper"
BASE = __name__[: -len(".host.keeper_app")]
BEGINNING = (keeper, keeper_main, keeper_told, keeper_work)
MOMENT = (1980, 1, 1, 0, 0, 0)
MAIN = f"""import os
import sys
from pathlib import Path

# A release may be replaced by another while this runs; its own program must stay the same.
sys.path[0] = os.path.realpath(sys.path[0])

from {PACKAGE}.server.keeper_main import main

sys.exit(main(own=Path(sys.path[0])))
"""


# By setting: the variable of the inventory, and the least and the most it may be.
RANGES = {
    "interval": ("xinference_keeper_interval", 1.0, LONGEST_INTERVAL),
    "grace": ("xinference_server_keeper_grace", 0.0, sys.float_info.max),
    "wait_timeout": ("xinference_server_keeper_wait_timeout", 1.0, sys.float_info.max),
    "parallel": ("xinference_server_keeper_parallel", 1, sys.float_info.max),
    "verify": ("xinference_server_keeper_verify", 0.0, sys.float_info.max),
}


def refuse_faults(told: Mapping[str, Any]) -> None:
    """Raise ValueError with every number in the settings that the keeper cannot go by; times are in seconds."""
    faults = []
    for setting, (variable, least, most) in RANGES.items():
        # So that no number at all (NaN) is refused, too.
        if setting in told and not least <= told[setting] <= most:
            wanted = f"from {least:g} to {most:g}" if most <= LONGEST_INTERVAL else f"{least:g} or more, and finite"
            faults.append(f"{variable} is {told[setting]:g}, and has to be {wanted}")
    if faults:
        raise ValueError(f"The keeper cannot go by what the inventory says: {'; '.join(faults)}.")


def files(
    told: Mapping[str, Any], endpoint: str, registrations: Sequence[Any], login: Mapping[str, Any], text: Any
) -> Dict[str, Entry]:
    """The files of the keeper in a release; `told` are its settings, `text` turns content into a file's text."""
    found = {
        SETTINGS: Entry(text({"endpoint": endpoint, **told})),
        PROGRAM: Entry(data=program()),
    }
    if registrations:
        found[REGISTRATIONS] = Entry(text(list(registrations)), PRIVATE)
    credentials = {name: value for name, value in login.items() if value}
    if credentials:
        found[CREDENTIALS] = Entry(text(credentials), PRIVATE)
    return found


def program() -> bytes:
    """The zipapp."""
    sources = {"__main__.py": MAIN}
    for name, source in modules().items():
        place = name[len(BASE) + 1 :].replace(".", "/")
        sources[f"{PACKAGE}/{place}.py"] = source
        for part in range(place.count("/") + 1):
            sources.setdefault("/".join([PACKAGE, *place.split("/")[:part], "__init__.py"]), "")
    memory = io.BytesIO()
    # Stored, because compression differs from one library to another.
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_STORED) as archive:
        for path, source in sorted(sources.items()):
            member = zipfile.ZipInfo(path, MOMENT)
            member.external_attr = 0o644 << 16
            archive.writestr(member, source)
    return memory.getvalue()


def modules() -> Dict[str, str]:
    """The text of every module that the program needs, by its name."""
    found: Dict[str, str] = {}
    waiting: List[str] = [module.__name__ for module in BEGINNING]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _source(name)
            waiting += _imported(name, found[name])
    return found


def _imported(name: str, source: str) -> Iterator[str]:
    """The modules of our own that a module imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*name.split(".")[: -node.level], *([node.module] if node.module else [])])
            if node.module:
                yield base
            else:
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _source(name: str) -> str:
    """The text of a module, wherever it was loaded from: a directory, or the archive that Ansible sends."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ValueError(f"the keeper's module {name} is missing")
    return str(spec.loader.get_source(name))  # type: ignore[attr-defined]
