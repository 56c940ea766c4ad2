# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A process on a host that is talked to through its standard input and output, as the user Ansible becomes."""

from __future__ import annotations

import fcntl
import os
import selectors
import shlex
import subprocess
import time
from dataclasses import dataclass
from typing import IO, Any, Iterable, cast

PIPE_SIZE = 1024 * 1024
"""Bytes that may wait to be read by ssh: enough for it never to wait for us."""
KEPT_ERRORS = 8192
START_SECONDS = 60.0
"""Seconds in which the host has to begin, asking for a password included."""


class NotStarted(Exception):
    """The process does not run; `status` is what ssh or the shell ended with, None when it did not end."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class HostProcess:
    """A running command; ssh, or a shell for this machine.

    Standard input is a pipe written by whoever feeds it; `read` gives the output as it comes. What is said on standard
    error is kept for the message that may be needed.
    """

    def __init__(self, arguments: list[str]) -> None:
        try:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise NotStarted(f"{arguments[0]} cannot be run: {error.strerror}") from error
        self.stdin, self.stdout, self.stderr = (
            cast(IO[bytes], stream).fileno()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        try:
            fcntl.fcntl(self.stdin, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except (AttributeError, OSError):
            pass  # A smaller pipe is slower, no more.
        self._errors = b""
        self._output = b""
        self._open = {self.stdout, self.stderr}

    @property
    def ended(self) -> bool:
        """Whether nothing more can be read."""
        return not self._open

    def read(self, handle: int) -> bytes:
        """What is there of the output, after `wait_for_output` named this descriptor; errors are kept aside."""
        if handle == self.stdout and self._output:
            data, self._output = self._output, b""
            return data
        data = os.read(handle, 65536)
        if not data:
            self._open.discard(handle)
        if handle == self.stderr:
            self._errors = (self._errors + data)[-KEPT_ERRORS:]
            return b""
        return data

    def readable(self) -> set[int]:
        """The descriptors that may still say something."""
        return set(self._open)

    def errors(self) -> str:
        """The last lines of standard error."""
        lines = self._errors.decode("utf-8", "replace").strip().splitlines()
        return " ".join(line.strip() for line in lines[-4:])[-1000:]

    def close_input(self) -> None:
        """Let the process see the end of its input."""
        cast(IO[bytes], self._process.stdin).close()

    def terminate(self) -> None:
        """Have the process end now."""
        if self._process.poll() is None:
            try:
                self._process.terminate()
            except PermissionError:
                pass  # It became another user. It ends with its input.

    def close(self) -> None:
        """End the process and forget its pipes; it gets a moment to end by itself."""
        self.close_input()
        if self.wait(0.5) is None:
            self.terminate()
            self.wait(5)
        for stream in (self._process.stdout, self._process.stderr):
            cast(IO[bytes], stream).close()

    def wait(self, seconds: float) -> int | None:
        """The status the process ends with in this time, or None."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def become(self, become: Any) -> None:
        """Wait until another user was become, telling the password when it is asked for. Raises NotStarted."""
        deadline = time.monotonic() + START_SECONDS
        seen, told = b"", False
        marker = become.success.encode() + b"\n"
        while marker not in seen:
            if self.ended:
                raise NotStarted(f"{become.name}: {self.errors() or 'it ended without a word'}", self.wait(5))
            if not told and become.expect_prompt() and any(map(become.check_password_prompt, (self._errors, seen))):
                os.write(self.stdin, (become.get_option("become_pass") or "").encode() + b"\n")
                told = True
            if become.check_incorrect_password(self._errors + seen):
                raise NotStarted(f"{become.name}: the password is wrong")
            if become.check_missing_password(self._errors + seen):
                raise NotStarted(f"{become.name}: a password is needed")
            speaking = self.wait_for_output(deadline - time.monotonic())
            if not speaking:
                raise NotStarted(f"{become.name}: it did not begin within {START_SECONDS:.0f} s")
            for handle in speaking:
                seen += self.read(handle)
        self._output = seen.partition(marker)[2]

    def wait_for_output(self, seconds: float) -> list[int]:
        """Those descriptors that can be read, waiting for one of them for so many seconds at most."""
        return [self.stdout] if self._output else ready(self._open, seconds)


def ready(handles: Iterable[int], seconds: float) -> list[int]:
    """Those of some descriptors that can be read, waiting for one of them for so many seconds at most."""
    with selectors.DefaultSelector() as selector:
        for handle in handles:
            selector.register(handle, selectors.EVENT_READ)
        return [key.fd for key, _events in selector.select(max(0.0, seconds))]


@dataclass(frozen=True)
class Launcher:
    """How commands get to run on a host: `prefix` is what the command is appended to, `become` Ansible's plugin."""

    prefix: tuple[str, ...]
    become: Any = None
    shell: Any = None
    own: bool = True
    """Whether each process has a connection of its own, so that several of them are faster than one."""

    def start(self, command: str) -> HostProcess:
        """Run a shell command as the user who is to run it. Raises NotStarted."""
        if self.become is not None:
            command = self.become.build_become_command(command, self.shell)
        process = HostProcess([*self.prefix, f"/bin/sh -c {shlex.quote(command)}"])
        try:
            if self.become is not None:
                process.become(self.become)
        except BaseException:
            process.close()
            raise
        return process
