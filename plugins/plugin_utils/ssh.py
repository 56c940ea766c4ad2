# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ssh command lines that reach the same host, the same way, as Ansible's own connection."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALIVE = {"ServerAliveInterval": "15", "ServerAliveCountMax": "4"}
"""After a minute without an answer a connection is dead; the receiver gives its controller as long."""

ALONE = ("-o", "ControlPath=none", "-o", "ControlMaster=no", "-o", "ClearAllForwardings=yes", "-o", "Compression=no")


@dataclass(frozen=True)
class SshCommand:
    """An ssh command up to and including the host; `own` when it makes a connection of its own."""

    arguments: tuple[str, ...]
    own: bool

    @classmethod
    def of(cls, connection: Any, aes: bool = False) -> list[SshCommand]:
        """The commands for a connection, best first; none when it is not one of Ansible's ssh plugin.

        The best is a connection of its own: it does not compress, because blobs do not, and where `aes` says that both
        processors compute AES it prefers the ciphers made of it. The other shares the connection that stands
        (ControlPersist). It is the only one where a password is needed, which would have to be asked for again.
        """
        if getattr(connection, "transport", "") != "ssh":
            return []
        try:
            return _commands(connection, aes)
        except (KeyError, AttributeError):
            # Some other plugin that calls itself ssh and does not have the options of the real one.
            return []


def _commands(connection: Any, aes: bool) -> list[SshCommand]:
    option = connection.get_option
    words: list[str] = []
    for name in ("ssh_args", "ssh_common_args", "ssh_extra_args"):
        words += shlex.split(option(name) or "")
    executable = option("ssh_executable") or "ssh"
    said = ["-o", "BatchMode=yes"]
    if option("host_key_checking") is False:
        said += ["-o", "StrictHostKeyChecking=no"]
    if option("port") is not None:
        said += ["-o", f"Port={option('port')}"]
    if option("private_key_file"):
        said += ["-o", f'IdentityFile="{Path(option("private_key_file")).expanduser()}"']
    if option("remote_user"):
        said += ["-o", f'User="{option("remote_user")}"']
    if option("timeout"):
        said += ["-o", f"ConnectTimeout={option('timeout')}"]
    host = str(option("host"))
    plain = [word for word in words if word != "-C"]
    shared = SshCommand((executable, *_control_path(connection, words), *said, *plain, "-T", host), False)
    if option("password"):
        return [shared]
    tuned = _tuning(_settings([executable, *said, *plain, "-G", host]), aes)
    return [SshCommand((executable, *ALONE, *tuned, *said, *plain, "-T", host), True), shared]


def _control_path(connection: Any, words: list[str]) -> list[str]:
    """The socket that the connection keeps open, where Ansible chose its place itself."""
    text = " ".join(words).lower()
    if "controlpersist" not in text or "controlpath" in text:
        return []
    directory = Path(connection.get_option("control_path_dir")).expanduser()
    pattern = connection.get_option("control_path") or getattr(connection, "control_path", None)
    return ["-o", f'ControlPath="{pattern % {"directory": directory}}"'] if pattern else []


def _settings(command: list[str]) -> dict[str, str]:
    """What ssh would do with these options and its configuration, by lower-case name; nothing when it does not say."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError:
        return {}
    rows = (line.partition(" ") for line in done.stdout.splitlines())
    return {name.lower(): rest for name, _space, rest in rows} if done.returncode == 0 else {}


def _tuning(settings: dict[str, str], aes: bool) -> list[str]:
    """Options that change the order of what is allowed, and what the user left open; never what is allowed."""
    found: list[str] = []
    allowed = [cipher for cipher in settings.get("ciphers", "").split(",") if cipher]
    quick = [cipher for cipher in allowed if cipher.startswith("aes") and "-gcm@" in cipher]
    if aes and quick:
        found += ["-o", f"Ciphers={','.join([*quick, *(cipher for cipher in allowed if cipher not in quick)])}"]
    if settings.get("serveraliveinterval") == "0":
        for name, value in ALIVE.items():
            found += ["-o", f"{name}={value}"]
    return found
