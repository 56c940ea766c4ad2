# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A keeper for tests: its release, its process (the real program, run by the server's own Python), what it tells."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from ansible_collections.airgap.xinference.plugins.module_utils.host import keeper_app, release
from ansible_collections.airgap.xinference.plugins.module_utils.host.definition import json_text
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import Applied, apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client
from ansible_collections.airgap.xinference.plugins.module_utils.server.keeper_release import PROGRAM
from servers import Server, environment


class Kept:
    """A root directory with a release for `server`, and the keeper that looks after it."""

    def __init__(self, server: Server, root: Path, **settings: Any) -> None:
        self.server, self.root, self.endpoint = server, root, server.endpoint
        self.settings: Dict[str, Any] = {"interval": 1, "grace": 0, **settings}
        self.login: Dict[str, str] = {}
        self.registrations: List[Any] = []
        self.process: Optional[subprocess.Popen[bytes]] = None

    def release(self, entries: List[Dict[str, Any]], **settings: Any) -> str:
        """Put a release with these models in force; returns its id."""
        self.settings.update(settings)
        files = {
            "models.json": release.Entry(json_text(entries), 0o400),
            "server.json": release.Entry(json_text({"backend": "native", "gpus": []})),
            **keeper_app.files(self.settings, self.endpoint, self.registrations, self.login, json_text),
        }
        release.make(self.root, files)
        release.switch(self.root, release.identity(files))
        return release.identity(files)

    def start(self) -> None:
        """Start the program, as systemd and supervisord would."""
        python = environment(self.server.version) / "bin" / "python"
        program = self.root / "current" / PROGRAM
        command = [str(python), "-E", "-s", str(program), "--root", str(self.root), "run"]
        with (self.root / "keeper.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, sign: int = signal.SIGTERM) -> None:
        """End it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(sign)
            self.process.wait(60)

    @property
    def tells(self) -> bool:
        """Whether what its file says is of the process that was started last."""
        return self.process is not None and bool(self.told.get("pid") == self.process.pid)

    @property
    def log(self) -> str:
        """All that it said."""
        return (self.root / "keeper.log").read_text(errors="replace")

    @property
    def told(self) -> Dict[str, Any]:
        """What its file says; empty before it is there."""
        try:
            found: Dict[str, Any] = json.loads((self.root / "state/keeper.json").read_text())
        except OSError:
            return {}
        found["models"] = {one["uid"]: one for one in found["models"]}
        return found

    def model(self, uid: str) -> Dict[str, Any]:
        """What its file says of a model."""
        return self.told.get("models", {}).get(uid, {})

    def until(self, condition: Callable[[], Any], limit: float = 300.0) -> float:
        """Wait for something; returns how many seconds that took."""
        began = time.monotonic()
        while True:
            with contextlib.suppress(LookupError, TypeError, AttributeError):
                if condition():
                    return time.monotonic() - began
            if time.monotonic() - began > limit:
                raise AssertionError(
                    f"it did not happen in {limit:.0f} s\n{self.log}\n{json.dumps(self.told, indent=1)}"
                )
            assert self.process is None or self.process.poll() is None, self.log
            time.sleep(0.1)

    def ready(self, *uids: str) -> bool:
        """Whether the keeper tells that these models serve."""
        return all(self.model(uid).get("state") == "ready" == self.model(uid)["state"] for uid in uids)

    def converge(self, entries: List[Dict[str, Any]], client: Optional[Client] = None, **options: Any) -> Applied:
        """What Ansible does."""
        client = client or self.server.client()
        return apply(client, specs_from(client, entries, [], self.root), self.root, who="Ansible", **options)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / float(os.sysconf("SC_CLK_TCK"))


def memory_mib(pid: int) -> float:
    """Memory of a process that is its own or shared, whichever is in use now."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024
