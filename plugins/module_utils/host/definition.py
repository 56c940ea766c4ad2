# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a release."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence

from . import guarding, native_ctl, native_run, native_unit
from .gpus import Given
from .release import Entry

PRIVATE = 0o400
SHARED = 0o440
PROGRAM = 0o550


def files(
    root: Path,
    service: Mapping[str, Any],
    models: Sequence[Any],
    artifacts: Mapping[str, Any],
    gpus: Sequence[Given] = (),
    keeper: Optional[Mapping[str, Entry]] = None,
    guard: Optional[Mapping[str, Entry]] = None,
) -> Dict[str, Entry]:
    """Everything a release of the native backend holds; `keeper` are the files of the keeper, `guard` of guarding.

    `service` is the definition of the server (`name`, `manager`, `command`, `environment`, `directory`, `host`, `port`,
    `stop_timeout`, `user`, `writable`), `models` the desired set, `artifacts` what shipping put on the host, `gpus`
    what it may use.
    """
    guard = guarding.files({}, {}, "") if guard is None else guard
    if guarding.needed(guard):
        python, *program = service["command"]
        service = {**service, "command": [python, *guarding.command(str(root / "current"), guard, program)]}
    python = shlex.quote(str(service["command"][0]))
    here = shlex.quote(str(root / "current" / "bin"))
    keep = f"exec {python} -E -s -B {here}/keeper.pyz --root {shlex.quote(str(root))}"
    control = f'exec {python} -E -s -B {here}/native_ctl.py --root {shlex.quote(str(root))} "$@"'
    return {
        # Its group is that of the server's user, where it has one.
        "service.json": Entry(json_text(service), SHARED if service.get("user") else PRIVATE),
        # A server that is told by CUDA_VISIBLE_DEVICES what to use keeps the numbers of the host.
        "server.json": Entry(
            json_text({"backend": "native", "gpus": [{"index": gpu.index, "names": gpu.names} for gpu in gpus]})
        ),
        "models.json": Entry(json_text(list(models)), PRIVATE),
        "artifacts.json": Entry(json_text(artifacts)),
        "bin/native_run.py": Entry(_source(native_run)),
        "bin/native_ctl.py": Entry(_source(native_ctl)),
        "bin/native_unit.py": Entry(_source(native_unit)),
        "bin/run": Entry(f'#!/bin/sh\nexec {python} -E -s -B {here}/native_run.py "$@"\n', PROGRAM),
        "bin/xinferencectl": Entry(f"#!/bin/sh\n{control}\n", PROGRAM),
        **guard,
        **({**keeper, native_ctl.KEEPER: Entry(f'#!/bin/sh\n{keep} "$@"\n', PROGRAM)} if keeper else {}),
    }


def digest(release: Mapping[str, Entry]) -> str:
    """The digest of the definition that a server of this release is started from."""
    names = [Path(name).relative_to("current").as_posix() for name in native_run.DEFINING]
    return native_run.digest_of(*(release[name].text.encode() for name in names if name in release))


def json_text(content: Any) -> str:
    """Content as a file of a release has it."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def shipped(root: Path) -> Any:
    """What shipping recorded on this host; nothing when it has not run."""
    path = root / "state" / "artifacts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _source(module: Any) -> str:
    """The text of one of our own modules, wherever it was loaded from (a directory, or the archive Ansible sends)."""
    return str(module.__loader__.get_source(module.__name__))
