# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How blobs get from the bundle to the receiving area of a host.

Two transports carry out the same steps: rsync through the connection's own SSH where both sides have it, and the
connection plugin's `put_file` everywhere else. Neither is trusted: the host verifies what arrived.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ansible.errors import AnsibleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import free_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import PACK_PREFIX
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import Step, batches

from .progress import Progress
from .ssh import SshCommand

OLDEST_RSYNC = (3, 1)
_RSYNC_VERSION = re.compile(r"rsync\s+version\s+v?(\d+)\.(\d+)")
_RSYNC_BYTES = re.compile(r"\s*(\d+)\s+\d+%")


class TransportError(Exception):
    """A transfer that broke off; what arrived stays on the host for the next attempt."""


class Transport(Protocol):
    """A way to a host."""

    name: str
    resumes: bool
    """Whether it can go on in the middle of a blob."""

    def send(self, steps: list[Step], progress: Progress) -> None:
        """Carry out steps that travel. Raises TransportError."""


class PutFile:
    """Files through the connection plugin; small ones go in packs, because each call costs a round trip or more."""

    name = "put_file"
    resumes = False

    def __init__(self, connection: Any, bundle: Bundle, target: str, temporary: str) -> None:
        self._connection = connection
        self._bundle = bundle
        self._target = target
        self._temporary = temporary

    def send(self, steps: list[Step], progress: Progress) -> None:
        """Send the whole blob of each step."""
        for number, group in enumerate(batches(steps)):
            if len(group) == 1:
                self._put(self._bundle.blob_path(group[0].digest), _encoded(group[0]))
            else:
                with tempfile.NamedTemporaryFile(dir=self._temporary, prefix=PACK_PREFIX) as pack:
                    try:
                        self._write_pack(group, pack)
                    except OSError as error:
                        raise self._no_pack(group, error) from error
                    self._put(Path(pack.name), f"{PACK_PREFIX}{number:04d}.tar")
            progress.add(sum(step.travels for step in group))

    def _write_pack(self, group: list[Step], pack: Any) -> None:
        with tarfile.open(fileobj=pack, mode="w") as archive:
            for step in group:
                entry = tarfile.TarInfo(_encoded(step))
                entry.size = step.size
                with self._bundle.blob_path(step.digest).open("rb") as blob:
                    archive.addfile(entry, blob)
        pack.flush()

    def _no_pack(self, group: list[Step], error: OSError) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        needed, free = sum(step.size for step in group), free_bytes(Path(self._temporary))
        return TransportError(
            f"{self._temporary} on the controller is full: {size_text(needed)} are needed, {size_text(free)} are free. "
            "Free some there, or set Ansible's local_tmp to a larger disk"
        )

    def _put(self, source: Path, name: str) -> None:
        try:
            self._connection.put_file(str(source), os.path.join(self._target, name))  # noqa: PTH118 - the host's path
        except AnsibleError as error:
            raise TransportError(str(error)) from error


class Rsync:
    """One rsync for all blobs: it appends to what an earlier attempt left, and writes straight into the target."""

    name = "rsync"
    resumes = True

    def __init__(self, executable: str, ssh: SshCommand, bundle: Bundle, target: str, temporary: str) -> None:
        self._executable = executable
        self._ssh = ssh
        self._bundle = bundle
        self._target = target
        self._temporary = temporary

    def send(self, steps: list[Step], progress: Progress) -> None:
        """Send the part of each blob that the host lacks."""
        with tempfile.TemporaryDirectory(dir=self._temporary) as place:
            shell = Path(place, "ssh")
            shell.write_text(self._ssh.script())
            names = Path(place, "names")
            names.write_text("".join(f"{_encoded(step)}\n" for step in steps))
            errors = Path(place, "errors")
            command = [
                self._executable,
                *("--append", "--copy-links", "--perms", "--chmod=F0600", "--secluded-args"),
                *("--info=progress2", "--no-human-readable", "--outbuf=N"),
                *(f"--files-from={names}", f"--rsh=sh {shlex.quote(str(shell))}"),
                f"{self._bundle.root}/blobs/sha256/",
                f"host:{self._target}/",
            ]
            with errors.open("wb") as stderr:
                status = _run_rsync(command, stderr, progress)
            if status:
                detail = errors.read_text(errors="replace").strip().splitlines()[-3:]
                raise TransportError(f"rsync ended with status {status}: {' '.join(detail) or 'no message'}")
        progress.reach(progress.total)


def _run_rsync(command: list[str], stderr: Any, progress: Progress) -> int:
    """Run rsync, feed its byte counts to `progress`, and return its exit status; it never outlives this call."""
    before = progress.done
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            output, rest = cast(BinaryIO, process.stdout).fileno(), ""
            while chunk := os.read(output, 4096):
                *lines, rest = re.split(r"[\r\n]", rest + chunk.decode("ascii", "replace"))
                counts = [match for line in lines if (match := _RSYNC_BYTES.match(line))]
                if counts:
                    progress.reach(min(before + int(counts[-1].group(1)), progress.total))
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()


def choose(connection: Any, bundle: Bundle, receive: dict[str, Any], temporary: str) -> Transport:
    """The quickest transport that both sides offer; `receive` is what the host said about its receiving area."""
    ssh = SshCommand.of(connection)
    rsync = _usable_rsync()
    if ssh is not None and rsync is not None and receive["rsync"]:
        return Rsync(rsync, ssh, bundle, receive["path"], temporary)
    return PutFile(connection, bundle, receive["path"], temporary)


def _usable_rsync() -> str | None:
    """The controller's rsync, if it is one that knows the options used here."""
    executable = shutil.which("rsync")
    if executable is None:
        return None
    answer = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False).stdout
    match = _RSYNC_VERSION.match(answer)
    return executable if match and (int(match[1]), int(match[2])) >= OLDEST_RSYNC else None


def _encoded(step: Step) -> str:
    """The name of a blob's file."""
    return step.digest.partition(":")[2]
