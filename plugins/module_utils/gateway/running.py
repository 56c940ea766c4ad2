# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Put a gateway in force on this host: write, have nginx judge, switch, start or reload, wait until it answers."""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..host import release as releases
from ..host.release import Entry
from .definition import Gateway
from .nginx import CERTIFICATE, CONFIGURATION, KEYS, MARK, PRIVATE_KEY, configuration, keys_file

PLACE = "gateway"
"""The directory below the root of the collection that holds the releases of the gateway."""
IN_A_ROW = 5
"""Answers of the new configuration after which the workers of the old one have let go of the port."""
PRIVATE = 0o400
_KEY = re.compile(r'"[^"]*"( [A-Za-z0-9])')


class GatewayError(Exception):
    """A gateway that cannot be put in force; the text says why and what to do."""


@dataclass(frozen=True)
class Done:
    """What was done: `none`, `start` or `reload`; the release in force, and what changed in it as Ansible's diff."""

    action: str
    release: str
    diff: List[Dict[str, str]]

    @property
    def changed(self) -> bool:
        """Whether anything was."""
        return self.action != "none"


def files(gateway: Gateway, runner: Any, certificate: str, key: str) -> Dict[str, Entry]:
    """The files of a release, private ones for their owner only."""
    found = {CERTIFICATE: Entry(certificate), PRIVATE_KEY: Entry(key, PRIVATE)}
    if gateway.keys:
        found[KEYS] = Entry(keys_file(gateway), PRIVATE)
    told = (gateway, runner.scratch, runner.log, runner.user)
    mark = releases.identity({**found, CONFIGURATION: Entry(configuration(*told))})
    return {**found, CONFIGURATION: Entry(configuration(*told, mark))}


def converge(place: Path, runner: Any, gateway: Gateway, wanted: Mapping[str, Entry], wait: float, dry: bool) -> Done:
    """Make it so; with `dry` only tell. Raises GatewayError, with what nginx said.

    What counts is what runs, so an interrupted run is made up for. Nothing that runs is touched before nginx has judged
    the new configuration good.
    """
    name = releases.identity(wanted)
    before = releases.current(place)
    diff = releases.difference(_shown(place / releases.RELEASES / str(before)), shown(wanted))
    runs = runner.running()
    stands = before == name and releases.whole(place, wanted)
    if stands and runs and answers(gateway, wanted):
        return Done("none", name, [])
    action = "reload" if runs else "start"
    if dry:
        return Done(action, name, diff)
    releases.make(place, wanted)
    fault = runner.check(name)
    if fault:
        if before != name:
            shutil.rmtree(str(place / releases.RELEASES / name))
        raise GatewayError(f"nginx refuses the configuration, so that nothing was changed:\n{fault}")
    releases.switch(place, name)
    if runs:
        runner.reload()
    else:
        runner.start()
    _await_answer(runner, gateway, wanted, wait)
    _forget(place, name)
    return Done(action, name, diff)


def remove(place: Path, runner: Optional[Any], dry: bool) -> bool:
    """Take the gateway off this host; whether there was one. Without a runner only its files go."""
    there = place.exists() or (runner is not None and runner.there())
    if there and not dry:
        if runner is not None:
            runner.stop()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(str(place))
    return there


def answers(gateway: Gateway, wanted: Mapping[str, Entry]) -> bool:
    """Whether what listens on the gateway's port runs exactly these files."""
    return _asked(gateway)[0] == _mark(wanted)


def _await_answer(runner: Any, gateway: Gateway, wanted: Mapping[str, Entry], wait: float) -> None:
    """Wait until these files are in force. Raises GatewayError with the log when they do not come to be."""
    limit = time.monotonic() + wait
    row = 0
    while row < IN_A_ROW:
        found, problem = _asked(gateway)
        row = row + 1 if found == _mark(wanted) else 0
        if time.monotonic() > limit:
            problem = problem or "what answers there is another program, or another configuration of this one"
            raise GatewayError(
                f"The gateway does not answer on port {gateway.port} within {wait:g} s: {problem}\n{runner.said()}"
            )
        if not row:
            time.sleep(0.2)


def _mark(wanted: Mapping[str, Entry]) -> str:
    found = re.search(f"add_header {MARK} (\\w+)", wanted[CONFIGURATION].text)
    return found.group(1) if found else ""


def _asked(gateway: Gateway) -> Tuple[str, str]:
    """The mark of the configuration that runs, or why there is none. Nothing secret is sent, so nothing is verified."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(gateway.host, gateway.host)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, gateway.port, timeout=5, context=context)
    try:
        connection.request("GET", "/", headers={"Host": "configuration.invalid"})
        return connection.getresponse().getheader(MARK) or "", ""
    except (OSError, http.client.HTTPException) as error:
        return "", str(error)
    finally:
        connection.close()


def shown(wanted: Mapping[str, Entry]) -> Dict[str, str]:
    """The texts of a release as they may be shown: the names of keys and never a key."""
    return {path: _without_secrets(path, entry.text) for path, entry in wanted.items()}


def _shown(directory: Path) -> Dict[str, str]:
    return {path: _without_secrets(path, text) for path, text in releases.read(directory).items()}


def _without_secrets(path: str, text: str) -> str:
    if path == PRIVATE_KEY:
        return "(hidden)\n"
    return _KEY.sub(r"(hidden)\1", text) if path == KEYS else text


def _forget(place: Path, name: str) -> None:
    """Remove what was in force before: it holds keys that may have been revoked."""
    for one in releases.history(place):
        if one != name:
            shutil.rmtree(str(place / releases.RELEASES / one))
