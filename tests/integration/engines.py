# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Docker Engine of a test's own: its images, its socket, no network, and gone afterwards."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

START_LIMIT = 60.0


class PrivateEngine:
    """dockerd with everything below one directory; with `size` that directory is a file system of so many bytes.

    The directory is not one of pytest's: their names are too long for the sockets in it.
    """

    def __init__(self, size: Optional[int] = None) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="engine-"))
        self.size = size
        self.process: Any = None

    @property
    def address(self) -> str:
        """What DOCKER_HOST has to be."""
        return f"unix://{self.place}/docker.sock"

    def start(self) -> PrivateEngine:
        """Start the engine and wait until it answers."""
        if self.size:
            options = f"size={self.size}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.place)], check=True)
        log = (self.place / "log").open("wb")
        # In a network of its own: without a bridge, dockerd removes the one of an engine that runs on this machine.
        command = ["unshare", "--net", "dockerd", "--host", self.address, "--pidfile", f"{self.place}/pid"]
        command += ["--data-root", f"{self.place}/data", "--exec-root", f"{self.place}/exec"]
        command += ["--bridge", "none", "--iptables=false", "--ip-masq=false"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if self._docker(["info"]).returncode == 0:
                return self
            time.sleep(0.1)
        said = (self.place / "log").read_text()[-2000:]
        self.stop()
        raise RuntimeError(f"dockerd did not start: {said}")

    def stop(self) -> None:
        """End the engine and remove all it had."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        if self.size:
            subprocess.run(["umount", "--lazy", str(self.place)], check=True)
        shutil.rmtree(self.place, ignore_errors=True)

    def docker(self, *arguments: str, content: Optional[bytes] = None) -> str:
        """What a docker command says; it must succeed."""
        ended = self._docker(list(arguments), content)
        assert ended.returncode == 0, ended.stderr.decode()
        return ended.stdout.decode().strip()

    def image(self, reference: str) -> str:
        """The id of an image; empty when there is none."""
        ended = self._docker(["image", "inspect", "--format", "{{.Id}}", reference])
        return ended.stdout.decode().strip() if ended.returncode == 0 else ""

    def make_image(self, reference: str, *layers: Dict[str, bytes]) -> str:
        """Make an image of layers, each given by the files it adds; returns its id."""
        self.docker("import", "--change", 'CMD ["/program"]', "-", reference, content=tar_of(layers[0]))
        for number, files in enumerate(layers[1:]):
            container = self.docker("create", "--name", f"maker-{number}-{time.monotonic_ns()}", reference)
            self.docker("cp", "-", f"{container}:/", content=tar_of(files))
            self.docker("commit", container, reference)
            self.docker("rm", container)
        return self.image(reference)

    def remove_all(self) -> None:
        """Remove every image."""
        images = self.docker("image", "ls", "--all", "--quiet").split()
        if images:
            self.docker("image", "rm", "--force", *dict.fromkeys(images))

    def _docker(self, arguments: List[str], content: Optional[bytes] = None) -> Any:
        command = ["docker", "--host", self.address, *arguments]
        return subprocess.run(command, input=content, capture_output=True, check=False)


def tar_of(files: Dict[str, bytes]) -> bytes:
    """A tar archive with these files."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return memory.getvalue()
