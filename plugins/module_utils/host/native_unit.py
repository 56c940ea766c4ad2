# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd units of a native server and of its keeper. Pure: data in, text out.

What is missing is left out for GPUs and for code that is compiled while the server runs: PrivateDevices, DevicePolicy
and ProtectClock (which implies it) hide devices, MemoryDenyWriteExecute forbids compiled code, see systemd.exec(5).

Part of every release and needs nothing but Python's own library.
"""

from __future__ import annotations

from typing import Sequence

CONFINED = """\
NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectHostname=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0027
"""
HOMES = ("/home/", "/root/", "/run/user/")
PRIVILEGED = 1024
"""The first port that an ordinary user may open."""
# What libraries of the server lock into memory has no limit for root, and would have one for another user.
LIMITS = "LimitNOFILE=1048576\nLimitMEMLOCK=infinity\n"
# The keeper is root, because Ansible and it write the same files. It ends a server that is half dead.
KEEPER_CAPABILITIES = "CAP_DAC_OVERRIDE CAP_KILL CAP_SYS_PTRACE"


def server(
    root: str, command: Sequence[str], patience: int, user: str, port: int, paths: Sequence[str], more: str
) -> str:
    """The unit of the server; `paths` are what it writes, all of which is given to `user` at every start.

    `more` are lines that the host asks for, see `devices` and `home`.
    """
    bind = "CAP_NET_BIND_SERVICE" if port < PRIVILEGED else ""
    lines = [
        f"User={user}",
        f"CapabilityBoundingSet={bind}",
        *([f"AmbientCapabilities={bind}"] if bind else []),
        f"ExecStartPre=+/bin/chown --recursive --no-dereference {user}: {_words(paths)}",
        f"ReadWritePaths={_words(paths)}",
    ]
    return _unit(f"Xinference server under {root}", command, patience, "\n".join(lines) + f"\n{LIMITS}{CONFINED}{more}")


def keeper(root: str, command: Sequence[str], paths: Sequence[str], more: str) -> str:
    """The unit of the keeper: its own, so that neither ends with the other."""
    lines = f"CapabilityBoundingSet={KEEPER_CAPABILITIES}\nReadWritePaths={_words(paths)}\n{CONFINED}{more}"
    return _unit(f"Keeper of the Xinference models under {root}", command, 15, lines)


def home(needed: Sequence[str]) -> str:
    """Whether people's home directories are hidden, or only cannot be written because something needed lies there."""
    inside = any(f"{path}/".startswith(HOMES) for path in needed)
    return f"ProtectHome={'read-only' if inside else 'yes'}\n"


def devices(modprobe: str) -> str:
    """A line for NVIDIA's GPUs: a program (`modprobe`) that a server may not run makes their devices on demand."""
    return f"ExecStartPre=+-{modprobe} -u -c=0\n" if modprobe else ""


def _unit(what: str, command: Sequence[str], patience: int, more: str) -> str:
    return f"""# Written by airgap.xinference; changes are lost.
[Unit]
Description={what}
After=network.target
StartLimitIntervalSec=0

[Service]
ExecStart={_words(command)}
Restart=always
RestartSec=5
KillMode=mixed
TimeoutStopSec={patience}
{more}
[Install]
WantedBy=multi-user.target
"""


def _words(words: Sequence[str]) -> str:
    return " ".join('"' + word.replace("%", "%%").replace("$", "$$") + '"' for word in words)
