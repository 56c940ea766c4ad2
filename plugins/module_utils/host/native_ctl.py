# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start, stop and look at the native server of a host, under systemd or supervisord.

The modules use this file as a library, and people as a program: every release has it as ``bin/xinferencectl``. It
needs nothing but Python's own library, and `native_run.py` and `native_unit.py` beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

if TYPE_CHECKING or __name__ != "__main__":
    from . import native_run, native_unit
    from .native_run import say
else:
    import native_run
    import native_unit
    from native_run import say

SOCKET_LIMIT = 100
"""Bytes a path of a unix socket may have; the kernel ends at 107."""
UNITS = Path("/etc/systemd/system")
GRACE = 15.0
"""Seconds a manager gets beyond the server's own time to stop."""
LOCK = "state/service.lock"
ASKED = "state/asked.json"
"""When somebody last asked for the end of the server, for the keeper, which takes any other end for a fault."""
KEEPER = "bin/keeper"
KEEPER_PROGRAM = "keeper.pyz"
_held: Set[Path] = set()


class ServiceError(Exception):
    """A service that cannot be started, stopped or read."""


@dataclass(frozen=True)
class State:
    """The server of a host as it runs now; `digest` says from which definition it was started."""

    active: bool
    pid: Optional[int] = None
    release: Optional[str] = None
    digest: Optional[str] = None
    started: Optional[float] = None


class Native:
    """The native server under a root directory that has a release in force."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            text = (root / native_run.SERVICE).read_text(encoding="utf-8")
        except OSError as error:
            raise ServiceError(
                f"There is no release in force under {root}: {error}; run playbooks/serve.yml"
            ) from error
        self.service: Dict[str, Any] = json.loads(text)
        self.name = str(self.service["name"])
        self.systemd = use_systemd(str(self.service["manager"]))
        self.patience = float(self.service["stop_timeout"]) + GRACE
        self.config = root / "run" / "supervisord.conf"
        self.keeper_name = f"{self.name}-keeper"

    @property
    def manager(self) -> str:
        return "systemd" if self.systemd else "supervisord"

    @property
    def digest(self) -> str:
        """What a server started now would be; it differs from the digest of a running one that has to be restarted."""
        return native_run.digest(self.root)

    def state(self) -> State:
        """The running server; one whose starting program is gone does not count."""
        known = self._read(native_run.STATE)
        family = set(native_run.family(self.root))
        if known.get("pid") not in family or not self._supervised():
            return State(active=False)
        return State(True, known["pid"], known["release"], known["digest"], known["started"])

    def last_exit(self) -> Dict[str, Any]:
        """How the last server ended: `code`, `lived` (seconds), `ended` (time), `asked`; empty when none did."""
        return self._read(native_run.LAST_EXIT)

    def start(self) -> None:
        """Start the server under its manager and return at once; raises ServiceError."""
        with locked(self.root):
            self._start()

    def _start(self) -> None:
        for name in ("run", "logs", "home", "state"):
            (self.root / name).mkdir(mode=0o700 if name == "run" else 0o750, parents=True, exist_ok=True)
        if self.systemd:
            self._start_unit(self.name, self.unit())
            if self.keeps:
                self._start_unit(self.keeper_name, self.keeper_unit())
            return
        if self.supervisors():
            raise ServiceError(f"{self.name} is under supervisord already; stop it first")
        self.config.write_text(self.supervisor_config(), encoding="utf-8")
        self._call([self.python, "-m", "supervisor.supervisord", "-c", str(self.config)])

    def _start_unit(self, name: str, text: str) -> None:
        unit = UNITS / f"{name}.service"
        if not unit.exists() or unit.read_text(encoding="utf-8") != text:
            # Reload only for a changed unit: a reload can take the GPUs away from running containers.
            unit.write_text(text, encoding="utf-8")
            self._call(["systemctl", "daemon-reload"])
        self._call(["systemctl", "enable", "--quiet", name])
        self._call(["systemctl", "restart", name])

    def start_keeper(self) -> None:
        """Start the keeper beside a server that runs under its manager; raises ServiceError."""
        with locked(self.root):
            if self.systemd:
                self._start_unit(self.keeper_name, self.keeper_unit())
                return
            self.config.write_text(self.supervisor_config(), encoding="utf-8")
            self._control("reread")
            self._control("add", self.keeper_name, unless="already active")
            self._control("start", self.keeper_name, unless="already started")

    def stop_keeper(self) -> None:
        """End the keeper and leave the server alone; raises ServiceError."""
        with locked(self.root):
            if self._unit_active(self.keeper_name):
                self._call(["systemctl", "disable", "--quiet", "--now", self.keeper_name])
            elif not self.systemd and self.supervisors():
                self._control("stop", self.keeper_name, unless="no such")
                self._control("remove", self.keeper_name, unless="no such process")
                self.config.write_text(self.supervisor_config(), encoding="utf-8")
            self._end(self.keepers)

    def _control(self, *words: str, unless: str = "") -> None:
        """Tell supervisord to do something; what has been done already (it says `unless`) is no failure."""
        try:
            self._call([self.python, "-m", "supervisor.supervisorctl", "-c", str(self.config), *words])
        except ServiceError as error:
            if not unless or unless not in str(error):
                raise

    def stop(self) -> bool:
        """Stop the server and everything that belongs to it; returns whether anything was running."""
        with locked(self.root):
            managed = self.managed
            found = managed or bool(self.keepers())
            if managed:
                self._note_asked()
            # Before the server, so that it takes nothing for a fault.
            if self._unit_active(self.keeper_name):
                self._call(["systemctl", "disable", "--quiet", "--now", self.keeper_name])
            if self._unit_active():
                self._call(["systemctl", "disable", "--quiet", "--now", self.name])
            found = self._end(self.supervisors) or found
            # A supervisord that was killed leaves the program that started the server.
            found = self._end(self.runners) or found
            found = self._end(self.keepers) or found
            return bool(native_run.sweep(self.root)) or found

    def _note_asked(self) -> None:
        path = self.root / ASKED
        new = path.with_name(f".{path.name}.new")
        with contextlib.suppress(OSError):
            with os.fdopen(os.open(str(new), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "w") as file:
                json.dump({"at": round(time.time(), 1)}, file)
            new.replace(path)

    @property
    def managers(self) -> int:
        """How many managers look after the server, even one that waits to start it again; one is right."""
        return len(self.supervisors()) + self._unit_active()

    @property
    def managed(self) -> bool:
        """Whether a manager looks after the server."""
        return self.managers > 0

    def supervisors(self) -> List[int]:
        """Every supervisord that runs with our configuration, whatever became of its pid file and its socket."""
        config = os.fsencode(str(self.config))
        return _processes(lambda words: config in words and any(word.endswith(b"supervisord") for word in words))

    def runners(self) -> List[int]:
        """Every program that starts our server and waits for its end."""
        tail_of = [os.fsencode(str(self.root / native_run.RUNNER)), os.fsencode(str(self.root))]
        return _processes(lambda words: words[-2:] == tail_of)

    @property
    def keeps(self) -> bool:
        """Whether the release in force has a keeper."""
        return (self.root / "current" / KEEPER).is_file()

    @property
    def controllable(self) -> bool:
        """Whether the manager can start programs one by one; a long path leaves supervisord without a socket."""
        return self.systemd or len(os.fsencode(str(self.root / "run" / "supervisor.sock"))) <= SOCKET_LIMIT

    def keepers(self) -> List[int]:
        """Every process of the keeper, and of those that it started."""
        root = os.fsencode(str(self.root))

        def ours(words: List[bytes]) -> bool:
            program = any(word.startswith(root + b"/") and word.endswith(KEEPER_PROGRAM.encode()) for word in words)
            return program and words[-1] in (b"run", b"work")

        return _processes(ours)

    def logs(self, lines: int) -> str:
        """The end of what the server printed."""
        if self.systemd:
            command = ["journalctl", "--unit", self.name, "--lines", str(lines), "--no-pager", "--output", "cat"]
            return subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout.decode(errors="replace")
        return tail(self.root / "logs" / "server.log", lines)

    @property
    def python(self) -> str:
        return str(self.service["command"][0])

    @property
    def command(self) -> List[str]:
        """What the manager runs; the same for every release."""
        return [str(self.root / "current" / "bin" / "run"), str(self.root)]

    @property
    def keeper_command(self) -> List[str]:
        """What the manager runs for the keeper; the same for every release."""
        return [str(self.root / "current" / KEEPER), "run"]

    def unit(self) -> str:
        """The systemd unit of the server."""
        service, written = self.service, self.written
        more = native_unit.devices(shutil.which("nvidia-modprobe") or "") + self._home([*written, self.python])
        user, port = str(service.get("user") or "root"), int(service["port"])
        return native_unit.server(str(self.root), self.command, int(self.patience), user, port, written, more)

    def keeper_unit(self) -> str:
        """The systemd unit of the keeper."""
        state = [str(self.root / "state")]
        return native_unit.keeper(str(self.root), self.keeper_command, state, self._home([*state, self.python]))

    @property
    def written(self) -> List[str]:
        """What the server writes: what it keeps, where its processes meet, and what the inventory names."""
        return [str(self.service["directory"]), str(self.root / "run"), *self.service.get("writable", [])]

    @staticmethod
    def _home(needed: Sequence[str]) -> str:
        return native_unit.home([os.path.realpath(path) for path in needed] + list(needed))

    def supervisor_config(self) -> str:
        """The configuration of supervisord, which knows the server and, where the release has one, the keeper."""
        root = str(self.root).replace("%", "%%")
        command, keeper = (
            " ".join('"' + part.replace("%", "%%") + '"' for part in words)
            for words in (self.command, self.keeper_command)
        )
        second = f"""
[program:{self.keeper_name}]
command={keeper}
autorestart=true
startsecs=1
startretries=1000000
stopwaitsecs=15
killasgroup=true
redirect_stderr=true
stdout_logfile={root}/logs/keeper.log
stdout_logfile_maxbytes=5MB
stdout_logfile_backups=2
"""
        socket = f"{root}/run/supervisor.sock"
        remote = f"""
[unix_http_server]
file={socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://{socket}
"""
        user = "user=root\n" if os.geteuid() == 0 else ""
        return f"""; Written by airgap.xinference at every start; changes are lost.
[supervisord]
pidfile={root}/run/supervisord.pid
logfile={root}/logs/supervisord.log
logfile_maxbytes=5MB
logfile_backups=2
childlogdir={root}/run
directory={root}
umask=027
{user}{remote if self.controllable else ""}
[program:{self.name}]
command={command}
autorestart=true
startsecs=5
startretries=1000000
stopwaitsecs={int(self.patience)}
redirect_stderr=true
stdout_logfile={root}/logs/server.log
stdout_logfile_maxbytes=50MB
stdout_logfile_backups=5
{second if self.keeps else ""}"""

    def _supervised(self) -> bool:
        """Whether the program that started the server lives, so that a server that dies is started again."""
        try:
            return b"native_run" in Path(f"/proc/{self._read(native_run.STATE)['runner']}/cmdline").read_bytes()
        except (OSError, KeyError):
            return False

    def _unit_active(self, name: str = "") -> bool:
        """Whether a systemd unit of ours runs or waits to run again; that of the server unless named."""
        name = name or self.name
        if not (UNITS / f"{name}.service").exists() or not use_systemd("auto"):
            return False
        shown = ["systemctl", "show", "--property=ActiveState", "--value", name]
        state = subprocess.run(shown, stdout=subprocess.PIPE, check=False).stdout.decode().strip()
        return state in ("active", "activating", "deactivating", "reloading")

    def _end(self, find: Callable[[], List[int]]) -> bool:
        """Ask processes to end, kill those that do not in time; returns whether there were any."""
        asked: Set[int] = set()
        deadline = time.monotonic() + self.patience
        while True:
            there = find()
            if not there:
                return bool(asked)
            late = time.monotonic() - deadline
            if late > native_run.KILL_WAIT:
                raise ServiceError(f"{self.name} cannot be stopped: processes {there} do not end")
            for pid in there if late > 0 else set(there) - asked:
                try:
                    os.kill(pid, signal.SIGKILL if late > 0 else signal.SIGTERM)
                except ProcessLookupError:
                    pass
                except PermissionError as error:
                    raise ServiceError(f"{self.name} runs as another user (process {pid}); stop it as root") from error
            asked.update(there)
            time.sleep(0.1)

    def _read(self, name: str) -> Dict[str, Any]:
        try:
            content = json.loads((self.root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _call(self, command: Sequence[str]) -> None:
        """Run a program of the manager with a clean environment."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.root / "home"), "LANG": "C.UTF-8"}
        environment["PYTHONPATH"] = str(self.root / "lib" / "python")
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            output = done.stdout.decode(errors="replace").strip()
            raise ServiceError(f"`{' '.join(command)}` ended with code {done.returncode}: {output}")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the server of `root`; another process waits, and whoever holds it already goes on. Raises ServiceError."""
    path = root / LOCK
    if path in _held:
        yield
        return
    try:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o755, exist_ok=True)
        # Read-only will do, so that root and the owner can both use the file whoever made it.
        lock = os.open(str(path), os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError as error:
        raise ServiceError(f"Cannot lock the server: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        os.close(lock)


def _processes(ours: Callable[[List[bytes]], bool]) -> List[int]:
    """The processes whose command line is ours; one that has ended and is only not yet reaped has none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                if ours(words):
                    found.append(int(entry.name))
    return found


def use_systemd(manager: str) -> bool:
    """Whether systemd looks after the server: as told, or (`auto`) where we are root and it runs the host."""
    return manager == "systemd" or (manager == "auto" and os.geteuid() == 0 and Path("/run/systemd/system").is_dir())


def tail(path: Path, lines: int, limit: int = 65536) -> str:
    """The last lines of a file, of its last `limit` bytes at most; nothing when it is not there."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - limit))
            return "\n".join(handle.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _carry_out(native: Native, verb: str) -> None:
    """Start, stop or restart, as one step."""
    with locked(native.root):
        if verb == "start" and native.managers == 1:
            if native.keeps and native.controllable and not native.keepers():
                native.start_keeper()
            return
        # What lives on without its manager would end the server that is started now.
        native.stop()
        if verb != "stop":
            native.start()


def _change_keeper(native: Native, verb: str) -> None:
    """Start, stop or restart the keeper alone."""
    with locked(native.root):
        if verb != "start":
            native.stop_keeper()
        if verb != "stop":
            if not native.managed:
                raise ServiceError("the server does not run; `xinferencectl start` starts both")
            native.start_keeper()


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The program; returns its exit code (status: 0 running, 3 not)."""
    parser = argparse.ArgumentParser(prog="xinferencectl", description="The Xinference server of this directory.")
    parser.add_argument("--root", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("verb", choices=["start", "stop", "restart", "status", "logs", "keeper"])
    parser.add_argument(
        "what", nargs="?", choices=["status", "start", "stop", "restart"], default="status", help="for the keeper alone"
    )
    parser.add_argument("-n", "--lines", type=int, default=100, help="how many lines of the log")
    options = parser.parse_args(arguments)
    try:
        native = Native(options.root)
        if options.verb == "logs":
            say(native.logs(options.lines))
            return 0
        if options.verb == "keeper":
            if not native.keeps:
                raise ServiceError("the release in force has no keeper (xinference_keeper)")
            if options.what != "status":
                _change_keeper(native, options.what)
                return 0
            return subprocess.run([str(native.root / "current" / KEEPER), "status"], check=False).returncode
        if options.verb != "status":
            _carry_out(native, options.verb)
    except ServiceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    state = native.state()
    if options.verb == "status":
        alone = "" if native.managed else "; nothing would start it again, so use restart"
        say(f"running, process {state.pid}, release {state.release}{alone}" if state.active else "not running")
        if native.keeps:
            pids = native.keepers()
            say(f"keeper running, process {min(pids)}" if pids else "keeper not running; use start")
    return 0 if state.active or options.verb != "status" else 3


if __name__ == "__main__":
    # Whoever reads only the beginning (`| head`) ends this like any other tool.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(main())
