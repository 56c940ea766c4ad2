# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway as the nginx of the host, with a configuration and a process of its own beside any other nginx.

Under systemd where root asks for it there; otherwise nginx goes into the background by itself.
"""

from __future__ import annotations

import contextlib
import grp
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence

from ..host.native_ctl import UNITS, use_systemd
from ..host.release import CURRENT, RELEASES
from .nginx import CONFIGURATION
from .running import GatewayError

OLDEST = (1, 19, 5)
"""The first nginx that takes the file of its first messages as an argument."""
PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOP_SECONDS = 30.0
_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9/._+@-]*\Z")
UNIT = """\
[Unit]
Description=Gateway before Xinference
After=network-online.target
Wants=network-online.target

[Service]
Type=forking
PIDFile={pid}
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
KillSignal=SIGQUIT
KillMode=mixed
TimeoutStopSec=30
Restart=on-failure
NoNewPrivileges=true
ProtectSystem=strict
ProtectHome=true
PrivateTmp=true
PrivateDevices=true
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectControlGroups=true
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_SETUID CAP_SETGID CAP_CHOWN
ReadWritePaths={place}/run {logs}

[Install]
WantedBy=multi-user.target
"""


@dataclass
class Native:
    """nginx `program` (empty: the one on PATH) that runs the releases below `place`; `name` is that of its unit.

    Only one that is to be taken away can do without a program (`needed`).
    """

    place: Path
    name: str
    program: str = ""
    manager: str = "auto"
    needed: bool = True

    def __post_init__(self) -> None:
        """Look for nginx. Raises GatewayError when there is none that fits."""
        if not self.needed:
            return
        if not _PLAIN.match(str(self.place)) or not _PLAIN.match(self.name) or "/" in self.name:
            raise GatewayError(
                f"nginx cannot be configured below {str(self.place)!r} as {self.name!r}. Use letters, digits and ._+@- "
                "in xinference_root and xinference_gateway_service, or set xinference_gateway_backend: docker."
            )
        found = shutil.which(self.program or "nginx") or shutil.which(self.program or "nginx", path=PLACES)
        if not found:
            raise GatewayError(
                f"There is no {self.program or 'nginx'} on this host, and the bundle carries no package of it. Install "
                "nginx from the distribution's own media, or set xinference_gateway_backend: docker with an image of "
                "nginx in the bundle."
            )
        self.program = found
        told = self._call([found, "-v"])
        version = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", told)
        if not version or tuple(int(part) for part in version.groups()) < OLDEST:
            raise GatewayError(f"{found} is {told or 'no nginx'}; 1.19.5 or newer is needed.")

    @property
    def scratch(self) -> str:
        """Directory for the pid and for what nginx insists on."""
        return str(self.place / "run")

    @property
    def log(self) -> str:
        """The file of the access log."""
        return str(self._logs / "gateway.log")

    @property
    def user(self) -> str:
        """User and group of the workers where nginx starts as root."""
        if os.geteuid() != 0:
            return ""
        names = [entry.gr_name for entry in grp.getgrall()]
        return "nobody nogroup" if "nogroup" in names else "nobody nobody"

    def check(self, release: str) -> str:
        """What nginx says against a release, empty when it would run it."""
        self._directories()
        command = [*self._command(self.place / RELEASES / release, "stderr"), "-t", "-q"]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        return "" if done.returncode == 0 else done.stderr.decode("utf-8", "replace").strip()

    def running(self) -> bool:
        """Whether it runs, looked after by whom it shall be."""
        return bool(self._pid()) and (not self._systemd or self._unit_there())

    def there(self) -> bool:
        """Whether anything of it is there."""
        return bool(self._pid()) or (UNITS / f"{self.name}.service").exists()

    def start(self) -> None:
        """Start it, in place of one that runs."""
        self._end()
        self._directories()
        if not self._systemd:
            self._call(self._command(self.place / CURRENT, str(self._errors)), silent=True)
            return
        if not self._unit_there():
            # Only for a changed unit: a reload of systemd can take the GPUs away from containers.
            (UNITS / f"{self.name}.service").write_text(self._unit(), encoding="utf-8")
            self._call(["systemctl", "daemon-reload"])
        self._call(["systemctl", "enable", "--quiet", self.name])
        self._call(["systemctl", "restart", self.name])

    def reload(self) -> None:
        """Have nginx read its configuration again; requests that are on their way are finished."""
        os.kill(self._pid(), signal.SIGHUP)

    def stop(self) -> None:
        """End it and forget its unit."""
        self._end()
        unit = UNITS / f"{self.name}.service"
        if unit.exists():
            self._call(["systemctl", "disable", "--quiet", self.name])
            unit.unlink()

    def said(self) -> str:
        """The end of its own log."""
        with contextlib.suppress(OSError):
            return "\n".join(self._errors.read_text(errors="replace").splitlines()[-20:])
        return ""

    @property
    def _logs(self) -> Path:
        return self.place.parent / "logs"

    @property
    def _errors(self) -> Path:
        return self._logs / "gateway-error.log"

    @property
    def _systemd(self) -> bool:
        return use_systemd(self.manager)

    def _unit(self) -> str:
        command = " ".join(self._command(self.place / CURRENT, str(self._errors)))
        return UNIT.format(pid=f"{self.scratch}/nginx.pid", command=command, place=self.place, logs=self._logs)

    def _unit_there(self) -> bool:
        unit = UNITS / f"{self.name}.service"
        return unit.exists() and unit.read_text(encoding="utf-8") == self._unit()

    def _command(self, directory: Path, errors: str) -> List[str]:
        return [self.program, "-e", errors, "-c", str(directory / CONFIGURATION)]

    def _directories(self) -> None:
        self._logs.mkdir(mode=0o755, parents=True, exist_ok=True)
        Path(self.scratch).mkdir(mode=0o755, parents=True, exist_ok=True)
        for log in (Path(self.log), self._errors):
            log.touch(mode=0o640)

    def _pid(self) -> int:
        """The process of ours that runs, 0 when none does; a number that was given to another program is not ours."""
        with contextlib.suppress(OSError, ValueError):
            pid = int(Path(self.scratch, "nginx.pid").read_text())
            command = Path("/proc", str(pid), "cmdline").read_bytes().decode("utf-8", "replace")
            if str(self.place / CURRENT) in command:
                return pid
        return 0

    def _end(self) -> None:
        """End what runs: gracefully, and after half a minute at once."""
        for sign in (signal.SIGQUIT, signal.SIGTERM):
            pid = self._pid()
            if not pid:
                return
            os.kill(pid, sign)
            limit = time.monotonic() + STOP_SECONDS
            while self._pid() and time.monotonic() < limit:
                time.sleep(0.1)

    def _call(self, command: Sequence[str], silent: bool = False) -> str:
        """Run a program; a daemon must not keep this module's pipes open, so `silent` gives it none."""
        pipe = subprocess.DEVNULL if silent else subprocess.PIPE
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, check=False)
        text = b"".join(part for part in (done.stdout, done.stderr) if part).decode("utf-8", "replace").strip()
        if done.returncode != 0:
            raise GatewayError(f"{' '.join(command)} failed: {text or self.said()}")
        return text
