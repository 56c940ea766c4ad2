# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Our table of nftables on a host: what is in force, what the next boot loads, and how both become another.

::

    /etc/airgap-xinference/firewall.nft     the rules
    /etc/airgap-xinference/firewall.loaded  how the kernel shows them, to see when somebody changed them
    /etc/systemd/system/airgap-xinference-firewall.service, and a link to it: loads them at boot, before Docker

systemd is not told to read its units again, because that can take the GPUs away from containers that run; the next boot
reads them anyway.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Optional

from . import firewall

PLACES = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
DIRECTORY = "etc/airgap-xinference"
RULES = f"{DIRECTORY}/firewall.nft"
LOADED = f"{DIRECTORY}/firewall.loaded"
UNIT_NAME = "airgap-xinference-firewall.service"
UNIT = f"etc/systemd/system/{UNIT_NAME}"
LINK = f"etc/systemd/system/multi-user.target.wants/{UNIT_NAME}"


class FirewallError(Exception):
    """Rules that cannot be read, checked or loaded; the text has nft's own words."""


class Table:
    """Our table below the root of a host's file system."""

    def __init__(self, top: Path = Path("/")) -> None:
        found = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:{PLACES}")
        if not found:
            raise FirewallError(
                "There is no nft on this host. Install nftables, or leave the firewall to somebody else "
                "(xinference_firewall: none)."
            )
        self.nft, self.top = found, top

    def before(self) -> str:
        """The rules that the next boot loads; empty without any."""
        return self._text(RULES) or ""

    def check(self, rules: str) -> None:
        """Have nft read rules without loading them. Raises FirewallError."""
        self._call(["-c", "-f", "-"], rules)

    def differs(self, rules: str) -> bool:
        """Whether anything has to be done for `rules` to be in force, now and after the next boot; empty for none."""
        shown = self._shown()
        if not rules:
            return shown is not None or any((self.top / name).exists() for name in (*self._files(rules), LOADED))
        files = {name: self._text(name) for name in self._files(rules)}
        unlinked = UNIT in files and not (self.top / LINK).is_symlink()
        return files != self._files(rules) or unlinked or shown is None or shown != self._text(LOADED)

    def load(self, rules: str) -> None:
        """Put rules in force, now and at every boot."""
        self._call(["-f", "-"], rules)
        (self.top / DIRECTORY).mkdir(mode=0o750, parents=True, exist_ok=True)
        for name, text in {**self._files(rules), LOADED: self._shown() or ""}.items():
            self._write(self.top / name, text)
        link = self.top / LINK
        if link.parent.parent.is_dir() and not link.is_symlink():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(f"../{UNIT_NAME}")

    def remove(self) -> None:
        """Take the table away, and what would load it at a boot."""
        self._call(["-f", "-"], firewall.removal())
        for name in (LINK, *self._files(""), LOADED):
            if (self.top / name).exists() or (self.top / name).is_symlink():
                (self.top / name).unlink()
        if (self.top / DIRECTORY).is_dir() and not any((self.top / DIRECTORY).iterdir()):
            (self.top / DIRECTORY).rmdir()

    def _files(self, rules: str) -> Dict[str, str]:
        """The files of the rules and their content; those of systemd only where it could run the host."""
        units = {UNIT: unit(self.nft)} if (self.top / UNIT).parent.is_dir() else {}
        return {RULES: rules, **units}

    def _shown(self) -> Optional[str]:
        """The table as the kernel has it, without counters; None without one."""
        shown = self._run(["-s", "list", "table", "inet", firewall.TABLE], "")
        if shown.returncode and "No such file" not in shown.stderr:
            raise FirewallError(f"nft cannot show the rules in force: {shown.stderr.strip()}. It needs root.")
        return None if shown.returncode else shown.stdout

    def _text(self, name: str) -> Optional[str]:
        try:
            return (self.top / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    @staticmethod
    def _write(path: Path, text: str) -> None:
        new = path.with_name(f".{path.name}.new")
        new.touch(mode=0o640)
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644 if path.suffix == ".service" else 0o640)
        new.replace(path)

    def _call(self, arguments: List[str], rules: str) -> None:
        done = self._run(arguments, rules)
        if done.returncode:
            raise FirewallError(f"nft does not take the rules: {done.stderr.strip() or done.stdout.strip()}")

    def _run(self, arguments: List[str], rules: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LC_ALL": "C"}
        command = [self.nft, *arguments]
        return subprocess.run(command, input=rules, capture_output=True, text=True, check=False, env=environment)


def never_loaded(top: Path = Path("/")) -> bool:
    """Whether nothing here tells of our rules, so that there is nothing to take away, and no nft is needed for it."""
    return not any((top / name).exists() for name in (RULES, LOADED, UNIT))


def unit(nft: str) -> str:
    """The unit that loads the rules at boot: after whoever begins with an empty set of rules, and before any server.

    nftables.service empties it at a restart and at a reload as well, so ours does both with it.
    """
    return f"""# Written by airgap.xinference; change the inventory and run playbooks/firewall.yml instead.
[Unit]
Description=Who may reach the ports of Xinference
DefaultDependencies=no
Wants=network-pre.target
After=local-fs.target nftables.service firewalld.service
Before=network-pre.target docker.service shutdown.target
PartOf=nftables.service
ReloadPropagatedFrom=nftables.service
Conflicts=shutdown.target
ConditionPathExists=/{RULES}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={nft} -f /{RULES}
ExecReload={nft} -f /{RULES}

[Install]
WantedBy=multi-user.target
"""
