# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What hosts are doing, live on a terminal: a line for each, drawn again twice a second.

Ansible runs an action for every host in a process of its own, which has no terminal: what it displays is handed to the
main process and written there, between the results of other hosts. So every process writes how far it is into a small
file, in a directory that Ansible makes for the run, and whoever holds a lock there draws the lines of all.

Nobody knows what else is written meanwhile, so the drawing depends on nothing that was drawn before: it clears all from
the cursor down, leaves that line empty, writes its lines below, and goes back up. Whatever is written next gets the
empty line, and the next drawing begins below it. Where there is no terminal, or one that should be left alone, there
are plain lines instead.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

from ansible import constants as C
from ansible.utils.display import Display
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text

from .progress import COUNTED, Progress, duration_text, percent, totals

TICK = 0.5
"""Seconds between two drawings."""
PATIENCE = 1.0
"""Seconds before the first drawing: what is quicker shows nothing."""
HOLD = 0.5
"""Seconds without a drawing after a host has ended, so that its result finds the screen as it was left."""
STALE = 5.0
"""Seconds after which a host that wrote nothing any more counts as gone."""
LINE_INTERVAL = 1.5
"""Seconds for each host between two of its plain lines, so that many hosts write no more than a few."""
VERY_VERBOSE = 3
"""Ansible's verbosity (-vvv) from which on lines pass by too quickly for a view."""
ERASE = "\r\x1b[J"
PLAIN = "XINFERENCE_PROGRESS"
"""Environment variable: `lines` chooses plain lines on a terminal, too."""
PLAIN_SURROUNDINGS = ("CI", "AWX_ISOLATED_DATA_DIR")
"""Variables of surroundings that keep what is written to a terminal and show it to somebody else later."""
NOT_SET = ("", "0", "false", "no")


@dataclass(frozen=True)
class Standing:
    """How far one host is; sizes in bytes, `rate` in bytes a second, `at` on the clock of this machine.

    `doing` says what it is about where that is not sending, `ended` that nothing follows.
    """

    host: str
    at: float
    done: int = 0
    total: int = 0
    rate: float = 0.0
    doing: str = ""
    ended: bool = False


class Terminal:
    """The terminal that Ansible's main process writes to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def of(cls, process: int) -> Terminal | None:
        """The terminal of a process that runs in its foreground, None where there is none or it cannot be opened."""
        try:
            # No terminal may become that of this process, and none is waited for.
            flags = os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(f"/proc/{process}/fd/1", flags)
        except OSError:
            return None
        if os.isatty(descriptor) and _in_foreground(process):
            return cls(descriptor)
        os.close(descriptor)
        return None

    def size(self) -> tuple[int, int]:
        """Columns and lines as they are now."""
        try:
            found = os.get_terminal_size(self._descriptor)
        except OSError:
            return 80, 24
        return found.columns or 80, found.lines or 24


def wanted(environment: Mapping[str, str], plain: bool) -> bool:
    """Whether a terminal may be drawn on; `plain` is what Ansible was told (no colours, or very verbose)."""
    return not (
        plain
        or environment.get("TERM", "") in ("", "dumb", "unknown")
        or environment.get(PLAIN, "").lower() == "lines"
        or any(environment.get(name, "").lower() not in NOT_SET for name in PLAIN_SURROUNDINGS)
    )


def _as_far_as_possible(work: Callable[..., None]) -> Callable[..., None]:
    """The same, but a full disk of the controller or the like only costs the view."""

    @wraps(work)
    def done(*arguments: Any, **options: Any) -> None:
        with suppress(OSError):
            work(*arguments, **options)

    return done


class Screen:
    """Where one host's process tells what it does: lines by calling it, and progress that it watches.

    A context: what it has drawn is erased at its end. `write` is the `display` of Ansible's Display, `place` a
    directory that all hosts of the task share, `hosts` their number.
    """

    def __init__(
        self,
        host: str,
        write: Callable[..., None],
        place: Path,
        terminal: Terminal | None = None,
        hosts: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.host = host
        self.hosts = hosts
        self.interval = 0.0 if terminal else LINE_INTERVAL * hosts
        """Seconds between two plain lines of progress, at least."""
        self._write = write
        self._place = place
        self._terminal = terminal
        self._clock = clock
        self._progress: Progress | None = None
        self._doing = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._numbers: dict[str, Any] | None = None
        self._began = clock()

    def __enter__(self) -> Screen:
        self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self

    def __exit__(self, *_error: object) -> None:
        # A thread that is cut off while it hands something over would leave everybody waiting.
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._terminal is not None:
            self._keep(ended=True)
        self._erase()
        line = self._together()
        if line:
            self(line)

    def __call__(self, line: str) -> None:
        """Write a line that stays."""
        self._erase()
        self._write(line if line.startswith(self.host) or line.startswith("together") else f"{self.host}: {line}")

    def watch(self, progress: Progress) -> bool:
        """Show this from now on; False where it has to tell of itself, because there is no terminal."""
        self._progress, self._doing = progress, ""
        self._show()
        return self._terminal is not None

    def doing(self, what: str) -> None:
        """Say what the host is about that has no numbers of its own, until something is watched again."""
        self._doing = what
        self._show()

    def expect(self, hosts: int) -> None:
        """Say that so many of the hosts take part, where not all of them do; 0 for not knowing."""
        self.hosts = hosts or self.hosts

    def count(self, numbers: Mapping[str, Any]) -> None:
        """Give the numbers of this host for the line about all of them."""
        self._numbers = {name: numbers[name] for name in COUNTED if name in numbers}

    def _show(self) -> None:
        if self._terminal is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
            self._thread.start()

    @_as_far_as_possible
    def _run(self) -> None:
        """Keep this host's standing up to date, and draw for all while nobody else does."""
        with (self._place / "draw.lock").open("a") as lock:
            drawing = False
            while not self._stop.wait(TICK):
                self._keep()
                if not drawing:
                    with suppress(OSError):
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        drawing = True
                if drawing:
                    self._draw()

    @_as_far_as_possible
    def _keep(self, ended: bool = False) -> None:
        """Write this host's standing for whoever draws."""
        progress, now = self._progress, self._clock()
        standing = Standing(self.host, now, doing=self._doing, ended=ended)
        if progress is not None:
            name = f"verifying {progress.name}" if progress.name else ""
            label = "" if progress.label == self.host else progress.label.removeprefix(f"{self.host}: ")
            doing = self._doing or ", ".join(filter(None, (label, name)))
            standing = Standing(self.host, now, progress.done, progress.total, progress.rate, doing, ended)
        path = self._place / f"{_file_name(self.host)}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(standing)))
        new.replace(path)

    @_as_far_as_possible
    def _draw(self) -> None:
        now = self._clock()
        standings = read(self._place)
        if now - self._began < PATIENCE or any(one.ended and now - one.at < HOLD for one in standings):
            return
        width, height = self._terminal.size() if self._terminal else (80, 24)
        lines = block([one for one in standings if one.ended or now - one.at < STALE], self.hosts, width, height)
        (self._place / "drawn").touch()
        self._write(drawing(lines), screen_only=True, newline=False)

    def _erase(self) -> None:
        if self._terminal is not None and (self._place / "drawn").exists():
            self._write(ERASE, screen_only=True, newline=False)

    def _together(self) -> str:
        """The line about all hosts, for the one that ends last; empty for the others, and for a single host."""
        if self.hosts < 2:
            return ""
        try:
            with (self._place / "totals").open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                mine = {"host": self.host, "began": self._began, "numbers": self._numbers}
                file.write(json.dumps(mine) + "\n")
                file.flush()
                file.seek(0)
                rows = {row["host"]: row for row in map(json.loads, file)}
        except (OSError, ValueError, KeyError):
            return ""
        return together(list(rows.values()), self._clock()) if len(rows) == self.hosts else ""


def screen(host: str, task: str, variables: Mapping[str, Any]) -> Screen:
    """The screen of a host for a task of this run: `task` is its unique name, `variables` those of the task."""
    display = Display()
    plain = bool(C.ANSIBLE_NOCOLOR) or display.verbosity >= VERY_VERBOSE
    terminal = Terminal.of(os.getppid()) if wanted(os.environ, plain) else None
    hosts = len(variables.get("ansible_play_batch") or [host])
    # Ansible makes this directory for the run alone, and removes it at the end.
    place = Path(C.DEFAULT_LOCAL_TMP, "xinference-progress", task)
    return Screen(host, display.display, place, terminal, hosts)


def read(place: Path) -> list[Standing]:
    """What all hosts wrote, in order of their names; what cannot be read is left out."""
    found = []
    for path in place.glob("*.json"):
        with suppress(OSError, ValueError, TypeError):
            found.append(Standing(**json.loads(path.read_text())))
    return sorted(found, key=lambda one: one.host)


def block(standings: Iterable[Standing], hosts: int, width: int, height: int) -> list[str]:
    """The lines to be drawn: one for each host that is at it, and one for all where there are several.

    No line is wider than the terminal, and there are never more than fit. Who has most left comes first then.
    """
    standings = list(standings)
    rows = [one for one in standings if not one.ended]
    room = max(1, height - 4)
    shown = rows
    if len(rows) > room:
        most = sorted(rows, key=lambda one: one.done - one.total)[:room]
        shown = [one for one in rows if one in most]
    cells = [_cells(one.host, one) for one in shown]
    if hosts > 1 and rows:
        done, hidden = sum(one.ended for one in standings), len(rows) - len(shown)
        words = [f"{done} of {hosts} done"] + ([f"{hidden} more at it"] if hidden else [])
        every = Standing(
            host="together",
            at=0.0,
            done=sum(one.done for one in standings),
            total=sum(one.total for one in standings),
            rate=sum(one.rate for one in rows),
            doing=", ".join(words),
        )
        cells.append(_cells("together", every))
    return [_cut(line, width - 1) for line in _aligned(cells)]


def drawing(lines: list[str]) -> str:
    """What to write so that these lines stand below an empty one, with the cursor on that."""
    below = "".join(f"\n{line}" for line in lines)
    return f"{ERASE}{below}\r\x1b[{len(lines)}A" if lines else ERASE


def together(rows: list[dict[str, Any]], now: float) -> str:
    """One line about all hosts of a task, from what each left at its end; empty when nothing was sent to any."""
    known = [row["numbers"] for row in rows if row["numbers"]]
    summed = {name: sum(int(numbers.get(name, 0)) for numbers in known) for name in COUNTED}
    if not summed.get("sent_bytes") and not summed.get("from_peers_bytes"):
        return ""
    failed = f"; {len(rows) - len(known)} failed" if len(known) < len(rows) else ""
    seconds = max(0.0, now - min(float(row["began"]) for row in rows))
    return f"together, {len(known)} hosts: {totals(summed, seconds)}{failed}"


def _cells(name: str, one: Standing) -> list[str]:
    """The parts of a line: name, percent, bytes, rate, time left, what it is about."""
    if not one.total:
        return [name, "", "", "", one.doing or "waiting"]
    left = one.total - one.done
    if one.rate >= 1 and left > 0:
        time_left = f"{duration_text(left / one.rate)} left"
    else:
        time_left = "" if left > 0 else "all there, waiting for the host"
    words = "  ".join(filter(None, (time_left, one.doing)))
    sizes = f"{size_text(one.done)} of {size_text(one.total)}"
    rate = f"{size_text(one.rate)}/s" if left > 0 else ""
    return [name, f"{percent(one.done, one.total)} %", sizes, rate, words]


def _aligned(cells: list[list[str]]) -> list[str]:
    """Lines with their parts below each other, names to the left and numbers to the right; empty columns go."""
    widths = [max((len(row[place]) for row in cells), default=0) for place in range(4)]
    lines = []
    for row in cells:
        numbers = [row[place].rjust(widths[place]) for place in range(1, 4) if widths[place]]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[4]]).rstrip())
    return lines


def _cut(line: str, width: int) -> str:
    """A line that does not wrap, with nothing in it that moves a cursor."""
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"


def _file_name(host: str) -> str:
    """A host's name as that of a file."""
    return host.encode().hex()[:200]


def _in_foreground(process: int) -> bool:
    """Whether a process is the one its terminal listens to; one in the background would write into another's lines."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        group, foreground = int(fields[2]), int(fields[5])
    except (OSError, ValueError, IndexError):
        return False
    return group == foreground
