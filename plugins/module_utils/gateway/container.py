# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gateway in a container of its own, through the client of the host's engine.

It uses the host's network, because servers listen on the host's loopback. All else is taken from it: its file system is
read-only, it can gain no privileges, and it has no capability but, where it starts as root, those that let nginx open a
port below 1024 and give its workers away to another user.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from ..host.docker_cli import Docker
from ..host.release import CURRENT, RELEASES
from .nginx import CONFIGURATION
from .running import GatewayError

INSIDE = "/etc/xinference-gateway"
SCRATCH = "/run/xinference-gateway"
DEFINITION = "airgap.xinference.gateway"
"""The label with the hash of what the container was made from, and the mark that it is ours."""
AS_ROOT = ("CHOWN", "NET_BIND_SERVICE", "SETGID", "SETUID")
WORKERS = "nobody nogroup"
"""User and group that images of Debian and of Alpine both have."""
SELINUX = Path("/sys/fs/selinux/enforce")
STOP_SECONDS = 30


@dataclass
class Container:
    """The container `name` that runs the releases below `place`, from an image the engine has."""

    place: Path
    name: str
    image: str
    docker: Docker
    log_max_size: str = "100m"
    log_max_files: int = 10

    scratch = SCRATCH
    log = "/dev/stdout"

    @property
    def user(self) -> str:
        """User and group for the workers; nobody's where the container does not start as root."""
        return WORKERS if os.geteuid() == 0 else ""

    def check(self, release: str) -> str:
        """What the engine, or nginx of the image, says against a release; empty when it would run."""
        arguments = [*self._confined(), *self._logs(), *self._command(f"{INSIDE}/{RELEASES}/{release}", "-t", "-q")]
        answer = self.docker.ask("run", "--rm", *arguments)
        return "" if answer.code == 0 else (answer.err or answer.out).strip()

    def running(self) -> bool:
        """Whether it runs as it would be made now."""
        seen = self._seen()
        return bool(
            seen and seen["State"]["Running"] and seen["Config"]["Labels"].get(DEFINITION) == self._definition()
        )

    def there(self) -> bool:
        """Whether there is one at all."""
        return self._seen() is not None

    def start(self) -> None:
        """Make it, in place of one that was made otherwise."""
        self.stop()
        keep = ["--restart", "unless-stopped", "--label", f"{DEFINITION}={self._definition()}"]
        self._do("run", "--detach", "--name", self.name, *keep, *self._arguments())

    def reload(self) -> None:
        """Have nginx read its configuration again; requests that are on their way are finished.

        By nginx itself: the engine takes a container that it sent a signal for stopped by hand, and would leave it so
        after a reboot (seen with 20.10).
        """
        self._do("exec", self.name, "nginx", *self._command(f"{INSIDE}/{CURRENT}", "-s", "reload")[1:])

    def stop(self) -> None:
        """Take it away, its requests finished where that takes no longer than half a minute."""
        if self._seen():
            self._do("stop", self.name)
            self._do("rm", "--force", "--volumes", self.name)

    def said(self) -> str:
        """The end of what it printed."""
        return self.docker.logs(self.name, 20).strip()

    def _confined(self) -> List[str]:
        label = ",z" if SELINUX.exists() else ""
        caps = AS_ROOT if os.geteuid() == 0 else ()
        return [
            "--pull=never",
            "--network=host",
            "--read-only",
            "--cap-drop=ALL",
            *(f"--cap-add={name}" for name in caps),
            "--security-opt=no-new-privileges:true",
            f"--user={os.geteuid()}:{os.getegid()}",
            f"--tmpfs={SCRATCH}:rw,noexec,nosuid,nodev,size=16m,mode=1777",
            f"--volume={self.place}:{INSIDE}:ro{label}",
            "--entrypoint=nginx",
        ]

    def _command(self, directory: str, *more: str) -> List[str]:
        return [self.image, "-e", "stderr", "-c", f"{directory}/{CONFIGURATION}", *more]

    def _logs(self) -> List[str]:
        return [
            "--log-driver=json-file",
            f"--log-opt=max-size={self.log_max_size}",
            f"--log-opt=max-file={self.log_max_files}",
        ]

    def _arguments(self) -> List[str]:
        stop = ["--stop-signal=SIGQUIT", f"--stop-timeout={STOP_SECONDS}", "--no-healthcheck"]
        return [*self._confined(), *self._logs(), *stop, *self._command(f"{INSIDE}/{CURRENT}", "-g", "daemon off;")]

    def _definition(self) -> str:
        return hashlib.sha256(json.dumps(self._arguments()).encode()).hexdigest()[:12]

    def _seen(self) -> Optional[Dict[str, Any]]:
        """The container as the engine shows it. Raises GatewayError when the name is somebody else's."""
        answer = self.docker.ask("inspect", "--type", "container", self.name)
        if answer.code != 0:
            if "no such container" in answer.err.lower():
                return None
            raise GatewayError(f"The Docker Engine does not answer: {answer.err.strip()}")
        seen: Dict[str, Any] = json.loads(answer.out)[0]
        if DEFINITION not in (seen["Config"]["Labels"] or {}):
            raise GatewayError(
                f"The container {self.name} is not of this collection. Rename it, or set xinference_gateway_service to "
                "another name, then run again."
            )
        return seen

    def _do(self, *arguments: str) -> None:
        answer = self.docker.ask(*arguments)
        if answer.code != 0:
            raise GatewayError(f"docker {arguments[0]} of {self.name} failed: {answer.err.strip()}")
