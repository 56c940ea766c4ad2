# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Put a gateway in force on this host: write, have nginx judge, switch, start or reload, wait until it answers."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..host import release as releases
from ..host.release import Entry
from .definition import Gateway
from .nginx import CERTIFICATE, CONFIGURATION, KEYS, PRIVATE_KEY, configuration, keys_file

PLACE = "gateway"
"""The directory below the root of the collection that holds the releases of the gateway."""
LOADED = "loaded"
"""Names the release that nginx read last, so that a run which was interrupted is made up for."""
PRIVATE = 0o400
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
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
    text = configuration(gateway, runner.scratch, runner.log, runner.user)
    found = {
        CONFIGURATION: Entry(text),
        CERTIFICATE: Entry(certificate),
        PRIVATE_KEY: Entry(key, PRIVATE),
    }
    return {**found, KEYS: Entry(keys_file(gateway), PRIVATE)} if gateway.keys else found


def converge(place: Path, runner: Any, gateway: Gateway, wanted: Mapping[str, Entry], wait: float, dry: bool) -> Done:
    """Make it so; with `dry` only tell. Raises GatewayError, with what nginx said.

    Nothing that runs is touched before nginx has judged the new configuration good.
    """
    name = releases.identity(wanted)
    before = releases.current(place)
    diff = releases.difference(_shown(place / releases.RELEASES / str(before)), shown(wanted))
    runs = runner.running()
    stands = before == name and releases.whole(place, wanted)
    if stands and runs and _loaded(place) == name:
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
    await_answer(runner, gateway, wanted[CERTIFICATE].text, wait)
    (place / LOADED).write_text(f"{name}\n", encoding="ascii")
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


def await_answer(runner: Any, gateway: Gateway, certificate: str, wait: float) -> None:
    """Wait until this gateway answers on its port. Raises GatewayError with its log when it does not."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(gateway.host, gateway.host)
    wanted = ssl.PEM_cert_to_DER_cert(_PEM.findall(certificate)[0])
    limit = time.monotonic() + wait
    while True:
        found, problem = _certificate((host, gateway.port))
        if found == wanted:
            return
        if time.monotonic() > limit:
            problem = problem or "what answers there has another certificate, so it is another program"
            raise GatewayError(
                f"The gateway does not answer on {host}:{gateway.port} within {wait:g} s: {problem}\n{runner.said()}"
            )
        time.sleep(0.2)


def _certificate(address: Tuple[str, int]) -> Tuple[bytes, str]:
    """What the listener at an address shows, or why there is nothing. It is compared, so it need not be verified."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection(address, timeout=5) as plain, context.wrap_socket(plain) as secured:
            return secured.getpeercert(binary_form=True) or b"", ""
    except OSError as error:
        return b"", str(error)


def shown(wanted: Mapping[str, Entry]) -> Dict[str, str]:
    """The texts of a release as they may be shown: the names of keys and never a key."""
    return {path: _without_secrets(path, entry.text) for path, entry in wanted.items()}


def _shown(directory: Path) -> Dict[str, str]:
    return {path: _without_secrets(path, text) for path, text in releases.read(directory).items()}


def _without_secrets(path: str, text: str) -> str:
    if path == PRIVATE_KEY:
        return "(hidden)\n"
    return _KEY.sub(r"(hidden)\1", text) if path == KEYS else text


def _loaded(place: Path) -> str:
    with contextlib.suppress(OSError):
        return (place / LOADED).read_text(encoding="ascii").strip()
    return ""


def _forget(place: Path, name: str) -> None:
    """Remove what was in force before: it holds keys that may have been revoked."""
    for one in releases.history(place):
        if one != name:
            shutil.rmtree(str(place / releases.RELEASES / one))
