# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The live view: what is drawn, where it is drawn, and what it leaves of everything else on the screen."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils import screen as screen_module
from ansible_collections.airgap.xinference.plugins.plugin_utils.progress import Progress
from ansible_collections.airgap.xinference.plugins.plugin_utils.screen import (
    ERASE,
    Screen,
    Standing,
    Terminal,
    block,
    drawing,
    read,
    together,
    wanted,
)

MIB = 1024 * 1024
_PIECES = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Glass:
    """What is seen after everything that was written; `gone` are the lines that moved out at the top."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.gone: list[str] = []
        self._rows: list[str] = [""] * height
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Write text and the sequences that the view uses. Raises ValueError for any other."""
        place = 0
        while place < len(text):
            match = _PIECES.match(text, place)
            if match is None:
                raise ValueError(f"unknown: {text[place : place + 10]!r}")
            place = match.end()
            count, letter, control, plain = match.groups()
            if control == "\r":
                self._column = 0
            elif control == "\n":
                self._down()
            elif letter == "A":
                self._row = max(0, self._row - int(count or 1))
            elif letter == "J":
                self._rows[self._row] = self._rows[self._row][: self._column]
                self._rows[self._row + 1 :] = [""] * (self.height - self._row - 1)
            elif letter == "m" or letter == "K":
                pass
            elif letter:
                raise ValueError(f"unknown: {match.group()!r}")
            else:
                self._put(plain)

    def lines(self) -> list[str]:
        """The lines down to the last one that is not empty."""
        rows = [row.rstrip() for row in self._rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def _put(self, plain: str) -> None:
        for character in plain:
            if self._column == self.width:
                self._down()
            row = self._rows[self._row].ljust(self._column)
            self._rows[self._row] = row[: self._column] + character + row[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        """To the beginning of the next line, as a terminal does that a program's new lines go through."""
        self._column = 0
        self._row += 1
        if self._row == self.height:
            self.gone.append(self._rows.pop(0).rstrip())
            self._rows.append("")
            self._row -= 1


def standing(host: str, done: int = 0, total: int = 0, **more: Any) -> Standing:
    return Standing(host, more.pop("at", 0.0), done, total, **more)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_line_for_each_host_and_one_for_all():
    rows = [
        standing("gpu-1", 45 * MIB, 100 * MIB, rate=10.0 * MIB, doing="verifying models/bge-m3: weights.bin"),
        standing("gpu-22", 5 * MIB, 1000 * MIB, rate=1.0 * MIB),
        standing("gpu-3", ended=True, done=7, total=7),
    ]
    assert block(rows, 3, 120, 40) == [
        "gpu-1     45 %  45.0 MiB of 100 MiB  10.0 MiB/s  5.5 s left  verifying models/bge-m3: weights.bin",
        "gpu-22     0 %   5.0 MiB of 1.0 GiB   1.0 MiB/s  16 min 35 s left",
        "together   4 %  50.0 MiB of 1.1 GiB  11.0 MiB/s  1 min 35 s left  1 of 3 done",
    ]


def test_a_single_host_has_no_line_about_all():
    assert len(block([standing("gpu-1", 1, 2)], 1, 80, 24)) == 1


def test_a_host_without_numbers_says_what_it_does():
    assert block([standing("gpu-1", doing="loading images")], 1, 80, 24) == ["gpu-1  loading images"]
    assert block([standing("gpu-1")], 1, 80, 24) == ["gpu-1  waiting"]


def test_what_has_arrived_is_said_to_have():
    assert block([standing("gpu-1", 9, 9, rate=3.0)], 1, 80, 24) == [
        "gpu-1  100 %  9 B of 9 B  all there, waiting for the host"
    ]


def test_no_line_is_wider_than_the_terminal_and_nothing_moves_the_cursor():
    rows = [standing("gpu-1\x1b[2J", 1, 2, doing="verifying " + "x" * 200)]
    (line,) = block(rows, 1, 60, 24)
    assert len(line) == 59 and line.endswith("…") and "\x1b" not in line


def test_of_many_hosts_those_are_shown_that_have_most_left():
    rows = [standing(f"gpu-{number:03}", number, 1000) for number in range(200)]
    lines = block(rows, 200, 100, 24)
    assert len(lines) == 21 and lines[0].startswith("gpu-000") and lines[19].startswith("gpu-019")
    assert lines[-1].endswith("0 of 200 done, 180 more at it")


def test_a_terminal_of_no_height_at_all_is_survived():
    assert len(block([standing("a", 1, 2), standing("b", 1, 2)], 2, 1, 1)) == 2


# --- where it is drawn ------------------------------------------------------------------------------------------------


def test_drawings_follow_each_other_in_place():
    glass = Glass(40, 10)
    glass.write("TASK [Ship]\n")
    glass.write(drawing(["gpu-1  10 %", "gpu-2  20 %"]))
    glass.write(drawing(["gpu-1  30 %"]))
    assert glass.lines() == ["TASK [Ship]", "", "gpu-1  30 %"]
    glass.write(ERASE)
    assert glass.lines() == ["TASK [Ship]"]


def test_a_result_between_two_drawings_stays_and_is_whole():
    glass = Glass(40, 10)
    glass.write("TASK [Ship]\n")
    glass.write(drawing(["gpu-1  10 %", "gpu-2  20 %"]))
    glass.write("changed: [gpu-1]\n")
    glass.write(drawing(["gpu-2  30 %"]))
    assert glass.lines() == ["TASK [Ship]", "changed: [gpu-1]", "", "gpu-2  30 %"]


def test_several_lines_at_once_lose_nothing_and_cost_one_stale_tail_at_most():
    glass = Glass(40, 10)
    glass.write(drawing(["gpu-1  10 % and a long line", "gpu-2  20 % and a long line"]))
    glass.write("fatal: [gpu-1]: FAILED!\n    msg: no\n")
    glass.write(drawing(["gpu-2  30 %"]))
    assert glass.lines()[0] == "fatal: [gpu-1]: FAILED!" and glass.lines()[1].startswith("    msg: no")
    assert glass.lines()[-1] == "gpu-2  30 %" and len(glass.lines()) == 4


def test_at_the_lower_end_of_the_terminal_everything_moves_up():
    glass = Glass(40, 5)
    for number in range(5):
        glass.write(f"line {number}\n")
    for _again in range(3):
        glass.write(drawing(["gpu-1  10 %", "gpu-2  20 %"]))
    glass.write("changed: [gpu-1]\n")
    glass.write(drawing(["gpu-1  10 %", "gpu-2  20 %"]))
    glass.write(ERASE)
    assert [*glass.gone, *glass.lines()] == [*(f"line {number}" for number in range(5)), "changed: [gpu-1]"]


# --- who may draw -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "plain", "expected"),
    [
        ({"TERM": "xterm"}, False, True),
        ({"TERM": "xterm", "CI": "false"}, False, True),
        ({"TERM": "xterm", "CI": "true"}, False, False),
        ({"TERM": "xterm", "AWX_ISOLATED_DATA_DIR": "/runner"}, False, False),
        ({"TERM": "xterm", "XINFERENCE_PROGRESS": "lines"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
        ({"TERM": "xterm"}, True, False),
    ],
)
def test_a_terminal_is_drawn_on_where_a_person_sees_it(environment, plain, expected):
    assert wanted(environment, plain) is expected


def test_a_process_without_a_terminal_has_none():
    with subprocess.Popen(["sleep", "30"], stdout=subprocess.DEVNULL) as process:
        assert Terminal.of(process.pid) is None
        process.kill()
    assert Terminal.of(2**22) is None


@pytest.mark.parametrize("foreground", [True, False])
def test_the_terminal_of_another_process_is_found_when_that_is_in_its_foreground(foreground):
    above, below = pty.openpty()
    code = (
        "import os, sys, time\n"
        + ("os.setpgid(0, 0)\n" if not foreground else "")
        + "sys.stdout.write('x'); sys.stdout.flush(); time.sleep(30)"
    )
    # A session of its own, with this terminal; a group of its own in there is in the background.
    start = (
        "import fcntl, os, sys, termios\n"
        "os.setsid(); fcntl.ioctl(1, termios.TIOCSCTTY, 0)\n"
        "child = os.fork()\n"
        f"exec({code!r}) if not child else os.waitpid(child, 0)\n"
    )
    os.set_blocking(above, True)
    with subprocess.Popen([sys.executable, "-c", start], stdout=below) as process:
        os.read(above, 1)
        child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        found = Terminal.of(child)
        os.kill(child, 9)
    assert (found is not None) is foreground
    if found:
        assert found.size() == (80, 24)
    for descriptor in (above, below):
        os.close(descriptor)


# --- several processes ------------------------------------------------------------------------------------------------


class FakeTerminal:
    def size(self) -> tuple[int, int]:
        return 80, 24


class Recorder:
    """Everything that was written, as it would be on the glass."""

    def __init__(self) -> None:
        self.written: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.glass = Glass(80, 24)

    def __call__(self, text: str, **options: Any) -> None:
        with self.lock:
            self.written.append((text, options))
            self.glass.write(text + ("" if options.get("newline") is False else "\n"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TICK": 0.01, "PATIENCE": 0.0, "HOLD": 0.05}.items():
        monkeypatch.setattr(screen_module, name, value)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_of_several_draws_for_all_and_another_takes_over(tmp_path: Path, quick: None) -> None:
    first, second = Recorder(), Recorder()
    terminal: Any = FakeTerminal()
    with Screen("gpu-2", second, tmp_path, terminal, 2) as other:
        with Screen("gpu-1", first, tmp_path, terminal, 2) as one:
            Progress("gpu-1", 100, one).add(50)
            wait_for(lambda: any("gpu-1" in text for text, _options in first.written))
            Progress("gpu-2", 100, other).add(10)
            wait_for(lambda: any("gpu-2" in text for text, _options in first.written))
            assert second.written == []
        wait_for(lambda: any("1 of 2 done" in text for text, _options in second.written))
    assert first.glass.lines() == [] and second.glass.lines() == []
    drawn = [options for text, options in first.written + second.written if text]
    assert all(options == {"screen_only": True, "newline": False} for options in drawn)


def test_a_line_that_is_said_stays_above_the_drawing(tmp_path: Path, quick: None) -> None:
    recorder = Recorder()
    terminal: Any = FakeTerminal()
    with Screen("gpu-1", recorder, tmp_path, terminal) as one:
        progress = Progress("gpu-1", 100, one)
        progress.add(50)
        wait_for(lambda: len(recorder.written) > 2)
        one("the line was cut; going on with put_file")
        count = len(recorder.written)
        wait_for(lambda: len(recorder.written) > count + 2)
        lines = recorder.glass.lines()
    assert lines[0] == "gpu-1: the line was cut; going on with put_file" and lines[-1].startswith("gpu-1  50 %")
    assert recorder.glass.lines() == ["gpu-1: the line was cut; going on with put_file"]


def test_nobody_draws_while_the_result_of_a_host_is_on_its_way(tmp_path: Path, quick: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(screen_module, "HOLD", 1e9)
    recorder = Recorder()
    terminal: Any = FakeTerminal()
    with Screen("gpu-1", recorder, tmp_path, terminal, 2) as one:
        with Screen("gpu-2", recorder, tmp_path, terminal, 2):
            pass
        recorder.written.clear()
        Progress("gpu-1", 100, one).add(1)
        time.sleep(0.1)
        assert recorder.written == []


def test_what_is_quick_draws_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    terminal: Any = FakeTerminal()
    with Screen("gpu-1", recorder, tmp_path, terminal) as one:
        Progress("gpu-1", 100, one).add(100)
        one("all is there")
    assert recorder.written == [("gpu-1: all is there", {})]


def test_without_a_terminal_there_are_plain_lines_and_no_thread(tmp_path: Path) -> None:
    recorder = Recorder()
    with Screen("gpu-1", recorder, tmp_path, None, 8) as one:
        before = threading.active_count()
        now = [0.0]
        progress = Progress("gpu-1", 1000, one, clock=lambda: now[0])
        assert threading.active_count() == before
        for _second in range(40):
            now[0] += 1
            progress.add(25)
    assert [text for text, _options in recorder.written] == [
        "gpu-1: 300 B of 1000 B (30 %), 25 B/s, 28 s left".replace("1000 B", "1.0 KiB"),
        "gpu-1: 600 B of 1.0 KiB (60 %), 25 B/s, 16 s left",
        "gpu-1: 900 B of 1.0 KiB (90 %), 25 B/s, 4.0 s left",
    ]


def test_a_view_that_cannot_be_kept_costs_only_the_view(tmp_path: Path, quick: None) -> None:
    recorder = Recorder()
    terminal: Any = FakeTerminal()
    with Screen("gpu-1", recorder, tmp_path / "gone", terminal) as one:
        progress = Progress("gpu-1", 100, one)
        for path in (tmp_path / "gone").iterdir():
            path.unlink()
        (tmp_path / "gone").rmdir()
        progress.add(10)
        time.sleep(0.05)
        one("still here")
    assert ("gpu-1: still here", {}) in recorder.written


def test_files_of_others_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "aa.json").write_text("{ not json")
    (tmp_path / "bb.json").write_text('{"later": "version"}')
    (tmp_path / "cc.json").write_text('{"host": "gpu-1", "at": 1.0}')
    assert read(tmp_path) == [Standing("gpu-1", 1.0)]


# --- the end ----------------------------------------------------------------------------------------------------------


def test_the_last_host_tells_about_all_of_them(tmp_path: Path) -> None:
    recorder = Recorder()
    for host, sent in (("gpu-1", 5), ("gpu-2", 7)):
        with Screen(host, recorder, tmp_path, None, 2) as one:
            one.count({"sent_bytes": sent * MIB, "skipped_bytes": MIB, "msg": "words", "images": []})
    assert len(recorder.written) == 1
    assert recorder.written[0][0].startswith("together, 2 hosts: 12.0 MiB sent in ")
    assert recorder.written[0][0].endswith(", 2.0 MiB were there already")


def test_only_those_that_take_part_are_waited_for(tmp_path: Path) -> None:
    recorder = Recorder()
    for host in ("gpu-1", "gpu-2"):
        with Screen(host, recorder, tmp_path, None, 8) as one:
            one.expect(2)
            one.count({"sent_bytes": 0, "from_peers_bytes": MIB})
    assert recorder.written[0][0].startswith("together, 2 hosts: 0 B sent in ")
    assert "1.0 MiB of other hosts" not in recorder.written[0][0] and "2.0 MiB of other hosts" in recorder.written[0][0]


def test_hosts_that_failed_are_counted(tmp_path: Path) -> None:
    recorder = Recorder()
    with Screen("gpu-1", recorder, tmp_path, None, 2) as one:
        one.count({"sent_bytes": 5})
    with pytest.raises(RuntimeError), Screen("gpu-2", recorder, tmp_path, None, 2):
        raise RuntimeError
    assert recorder.written[0][0].endswith("; 1 failed")


def test_where_nothing_was_sent_nothing_is_told():
    assert together([{"began": 0.0, "numbers": {"sent_bytes": 0}}] * 2, 9.0) == ""


# --- Ansible itself ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
COLLECTIONS = ROOT.parents[2] if ROOT.parents[1].name == "ansible_collections" else ROOT / "build/collections"
ACTION = """
import time
from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.plugin_utils.progress import Progress
from ansible_collections.airgap.xinference.plugins.plugin_utils.screen import screen

class ActionModule(ActionBase):
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        host = task_vars["inventory_hostname"]
        size, rate = int(self._task.args["size"]), int(self._task.args["rate"])
        with screen(host, self._task._uuid, task_vars) as say:
            progress = Progress(host, size, say)
            while progress.done < size:
                progress.hashing("part %d" % (progress.done * 3 // size))
                time.sleep(0.1)
                progress.add(rate // 10)
            say(f"{host}: all of it is there")
            say.count({"sent_bytes": size})
        return {"changed": True}
"""


def play(directory: Path, terminal: bool, rate: int, **environment: str) -> str:
    """What a slow task (`rate` bytes a second) on two hosts writes to its terminal, or into a pipe."""
    (directory / "action_plugins").mkdir()
    (directory / "action_plugins/slow.py").write_text(ACTION)
    tasks = [{"name": "Send", "slow": {"size": "{{ size }}", "rate": rate}}]
    (directory / "play.yml").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    hosts = {"gpu-1": {"size": 1500000}, "gpu-2": {"size": 4000000}}
    (directory / "hosts.json").write_text(
        json.dumps({"all": {"hosts": hosts, "vars": {"ansible_connection": "local"}}})
    )
    (directory / "ansible.cfg").touch()
    settings = {
        "ANSIBLE_CONFIG": str(directory / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
        "ANSIBLE_LOCAL_TEMP": str(directory / "tmp"),
        "TERM": "xterm",
        "CI": "",
        **environment,
    }
    for name in ("ANSIBLE_NOCOLOR", "NO_COLOR", "ANSIBLE_FORCE_COLOR"):
        settings.setdefault(name, "")
    command = ["ansible-playbook", "-i", "hosts.json", "play.yml"]
    surroundings = {**{name: value for name, value in os.environ.items() if name not in settings}}
    surroundings.update({name: value for name, value in settings.items() if value})
    if not terminal:
        return subprocess.run(
            command, cwd=directory, env=surroundings, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    pid, above = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execvpe(command[0], command, surroundings)
    output = b""
    try:
        while chunk := os.read(above, 65536):
            output += chunk
    except OSError:  # This is how a terminal says that nobody writes to it any more.
        pass
    os.close(above)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return output.decode()


needs_ansible = pytest.mark.skipif(not shutil.which("ansible-playbook"), reason="ansible-playbook is not installed")


@needs_ansible
def test_two_hosts_on_a_real_terminal(tmp_path: Path) -> None:
    output = play(tmp_path, terminal=True, rate=1200000)
    glass, seen = Glass(80, 24), []
    for piece in re.split(r"(?=\r\x1b\[J)", output.replace("\r\n", "\n")):
        glass.write(piece)
        seen.append(glass.lines())
    both = [lines for lines in seen if sum(line.startswith(("gpu-1  ", "gpu-2  ")) for line in lines) == 2]
    later = [lines for lines in seen if any("1 of 2 done" in line for line in lines)]
    assert both and later, output
    assert re.search(r"gpu-1 +\d+ %  .*iB of 1\.4 MiB .*/s .*left  verifying part \d", "\n".join(both[0]))
    assert any(line.startswith("together") and "0 of 2 done" in line for line in both[0])
    # While one host went on, the result of the other stood above it, as Ansible wrote it.
    assert "changed: [gpu-1]" in later[-1]
    final = [line for line in glass.lines() if line]
    assert not any("%" in line for line in final), final
    assert [line for line in final if line.startswith(("gpu", "changed", "together"))][:4] == [
        "gpu-1: all of it is there",
        "changed: [gpu-1]",
        "gpu-2: all of it is there",
        next(line for line in final if line.startswith("together, 2 hosts: 5.2 MiB sent in ")),
    ]
    assert "changed: [gpu-2]" in final


@needs_ansible
@pytest.mark.parametrize(
    ("terminal", "environment"),
    [(False, {}), (True, {"TERM": "dumb"}), (True, {"ANSIBLE_NOCOLOR": "1"}), (True, {"CI": "true"})],
    ids=["pipe", "dumb", "no colour", "CI"],
)
def test_plain_lines_elsewhere(tmp_path: Path, terminal: bool, environment: dict[str, str]) -> None:
    output = play(tmp_path, terminal, 10**8, **environment)
    assert "\x1b[J" not in output and "\x1b[1A" not in output
    assert "gpu-2: all of it is there" in output and "together, 2 hosts: 5.2 MiB sent" in output
