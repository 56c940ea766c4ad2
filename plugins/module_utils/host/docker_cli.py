# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine of this host through its own client, which Compose needs anyway: images, containers, what they print."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where the client is looked for when a shell without login has a short PATH."""
TIMEOUT = 120.0


class DockerError(Exception):
    """The engine did not do what was asked; the text has its own words."""


class Answer(NamedTuple):
    """What a command said, and with which status it ended."""

    code: int
    out: str
    err: str


class Docker:
    """The client; `address` is that of the engine, by default what the client is set up for."""

    def __init__(self, address: Optional[str] = None) -> None:
        found = shutil.which("docker") or shutil.which("docker", path=PLACES)
        if not found:
            raise DockerError("There is no docker on this host. Install Docker Engine and Compose v2, then run again.")
        self._client = [found, *(["--host", address] if address else [])]

    def ask(self, *arguments: str, timeout: float = TIMEOUT) -> Answer:
        """Call the client. Raises DockerError only when it cannot be run at all or does not come back."""
        return self.run([*self._client, *arguments], f"docker {arguments[0]}", timeout)

    def run(self, command: Sequence[str], what: str = "", timeout: float = TIMEOUT) -> Answer:
        """Call a program that belongs to the client. Raises DockerError as ask() does; `what` is what it then names."""
        try:
            done = subprocess.run(
                list(command),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DockerError(f"{what or command[0]} did not come back: {error}") from error
        return Answer(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

    def image_id(self, names: Sequence[str]) -> Optional[str]:
        """What the engine calls the first image of `names` that it has. Raises DockerError when it cannot be asked."""
        for name in names:
            answer = self.ask("image", "inspect", "--format", "{{.Id}}", name)
            if answer.code == 0:
                return answer.out.strip()
            if "no such image" not in answer.err.lower():
                raise DockerError(f"The Docker Engine cannot be asked for its images: {answer.err.strip()}")
        return None

    def info(self) -> Dict[str, Any]:
        """What the engine says of itself. Raises DockerError when it does not."""
        answer = self.ask("info", "--format", "{{json .}}")
        if answer.code != 0:
            raise DockerError(f"The Docker Engine does not answer: {answer.err.strip()}")
        return dict(json.loads(answer.out))

    def container(self, labels: Mapping[str, str]) -> Optional[Dict[str, Any]]:
        """The one container with these labels, running or not, as `docker inspect` shows it; the newest of several."""
        filters = [part for name, value in labels.items() for part in ("--filter", f"label={name}={value}")]
        answer = self.ask("ps", "--all", "--quiet", "--no-trunc", *filters)
        if answer.code != 0:
            raise DockerError(f"The Docker Engine cannot be asked for its containers: {answer.err.strip()}")
        for identity in answer.out.split():
            seen = self.ask("inspect", "--type", "container", identity)
            if seen.code == 0:  # Otherwise it went away in between.
                found: List[Dict[str, Any]] = json.loads(seen.out)
                return found[0]
        return None

    def logs(self, container: str, lines: int) -> str:
        """The last lines that a container printed, on both of its streams."""
        answer = self.ask("logs", "--tail", str(lines), container)
        return answer.out + answer.err

    def inside(self, container: str, *command: str) -> Answer:
        """Run a command in a container."""
        return self.ask("exec", container, *command)
