# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ssh command line that reaches the same host, the same way, as Ansible's own connection."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SshCommand:
    """An ssh command up to and including the host."""

    arguments: tuple[str, ...]
    host: str

    @classmethod
    def of(cls, connection: Any) -> SshCommand | None:
        """The command for a connection, or None when it is not one of Ansible's ssh plugin.

        A connection that already stands (ControlPersist) is shared, so no password is asked for again. One that
        compresses is not: blobs do not compress, so a new one is made, unless it would need a password.
        """
        if getattr(connection, "transport", "") != "ssh":
            return None
        try:
            return _command(connection)
        except (KeyError, AttributeError):
            # Some other plugin that calls itself ssh and does not have the options of the real one.
            return None

    def script(self) -> str:
        """A shell script for rsync's --rsh: the host rsync names is replaced by the real one."""
        return f'#!/bin/sh\nshift\nexec {shlex.join(self.arguments)} {shlex.quote(self.host)} "$@"\n'


def _command(connection: Any) -> SshCommand:
    option = connection.get_option
    words: list[str] = []
    for name in ("ssh_args", "ssh_common_args", "ssh_extra_args"):
        words += shlex.split(option(name) or "")
    password = bool(option("password"))
    compressed = "-C" in words
    words = [word for word in words if word != "-C"]
    if compressed and not password:
        control = ["-o", "ControlPath=none", "-o", "ControlMaster=no"]
    else:
        control = _control_path(connection, words)
    command = [option("ssh_executable") or "ssh", *control, "-o", "BatchMode=yes"]
    if option("host_key_checking") is False:
        command += ["-o", "StrictHostKeyChecking=no"]
    if option("port") is not None:
        command += ["-o", f"Port={option('port')}"]
    if option("private_key_file"):
        command += ["-o", f'IdentityFile="{Path(option("private_key_file")).expanduser()}"']
    if option("remote_user"):
        command += ["-o", f'User="{option("remote_user")}"']
    if option("timeout"):
        command += ["-o", f"ConnectTimeout={option('timeout')}"]
    return SshCommand((*command, *words), str(option("host")))


def _control_path(connection: Any, words: list[str]) -> list[str]:
    """The socket that the connection keeps open, where Ansible chose its place itself."""
    text = " ".join(words).lower()
    if "controlpersist" not in text or "controlpath" in text:
        return []
    directory = Path(connection.get_option("control_path_dir")).expanduser()
    pattern = connection.get_option("control_path") or getattr(connection, "control_path", None)
    return ["-o", f'ControlPath="{pattern % {"directory": directory}}"'] if pattern else []
