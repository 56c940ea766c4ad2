# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The keeper's program, `bin/keeper.pyz` of every release: `run` (until told to end), `work` (for the keeper itself),
`status` (for people).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import List, Optional, Sequence

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Optional[Sequence[str]] = None, own: Optional[Path] = None) -> int:
    """The program; `own` is the file it runs from. Returns the code to exit with."""
    parser = argparse.ArgumentParser(prog="keeper", description="Keeps the models of a release served.")
    parser.add_argument("--root", type=Path, required=True, help="root directory of the installation")
    parser.add_argument("verb", choices=["run", "work", "status"], nargs="?", default="status")
    options = parser.parse_args(arguments)
    if options.verb == "work":
        from . import keeper_work

        return keeper_work.main(options.root)
    if options.verb == "status":
        from . import keeper_told

        try:
            sys.stdout.write("".join(f"{line}\n" for line in keeper_told.lines(options.root)))
            sys.stdout.flush()
        except BrokenPipeError:  # Whoever reads has seen enough (`| head`); nothing is written at the end either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return 0
    return run(options.root, own)


def run(root: Path, own: Optional[Path]) -> int:
    """Keep until a signal says to end."""
    from .keeper import Keeper

    stopping = threading.Event()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_told: stopping.set())
    (root / "state").mkdir(parents=True, exist_ok=True)
    content = own.read_bytes() if own and own.is_file() else None

    def renew(program: Path) -> None:
        """Go on as the program of another release, where that is another one."""
        if content is not None and program.read_bytes() != content:
            say("goes on with the program of the new release")
            command: List[str] = [sys.executable, "-E", "-s", str(program), "--root", str(root), "run"]
            os.execv(sys.executable, command)

    keeper = Keeper(root, say, renew=renew)
    while not stopping.is_set():
        stopping.wait(keeper.tick())
    keeper.end()
    return 0


def say(line: str) -> None:
    """One line for the log. A log that cannot be written is no reason to end."""
    try:
        sys.stdout.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} keeper: {line}\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        pass
