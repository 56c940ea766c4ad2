# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What support needs of a host, as one archive: logs and configuration, every secret taken out.

Only what is named here goes in, so that a file nobody thought of never does: no database, no key, no program. Documents
lose their secrets by the names in them (`masking`), and then every text loses those that are known and what looks like
one (`scrubbing`). At the end the archive is searched for what is known, and not given away where any of it is left.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from ..gateway import support as gateway
from ..gateway.running import PLACE as GATEWAY
from ..masking import HIDDEN, masked, masked_json, masked_yaml
from ..scrubbing import Scrubber
from . import container, release
from .compose import KEEPER
from .deployed import Deployed, deployed
from .docker_cli import Docker, DockerError
from .known_secrets import known_secrets
from .native_ctl import Native, ServiceError

CONFIGURATION = ("server.json", "service.json", "models.json", "registrations.json", "artifacts.json", "keeper.json")
STATE = ("artifacts.json", "launched.json", "keeper.json")
RUN = ("server.json", "exit.json")
LOGS = ("logs/*.log*",)
HOME_LOGS = ("logs/*.log*", "logs/*/*.log*")
MOST_FILES = 60
"""Logs that are packed, the newest first."""
COMMANDS = {
    "uname.txt": ["uname", "-a"],
    "df.txt": ["df", "-hT"],
    "inodes.txt": ["df", "-i"],
    "mounts.txt": ["cat", "/proc/self/mounts"],
    "memory.txt": ["cat", "/proc/meminfo"],
    "os-release.txt": ["cat", "/etc/os-release"],
    "nvidia-smi.txt": ["nvidia-smi"],
}
PATIENCE = 30.0
LONG_LINES = 64 * 1024
"""Characters after which a line of JSON is cut: a request that was logged with a picture in it."""
_VALUE = re.compile(r"(?m)^([^=#\n]+)=.*$")
FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, DockerError, ServiceError)


Packed = Tuple[bytes, List[str]]


class Leak(Exception):
    """A secret that would have been in the archive; the text names the file, never the secret."""


def pack(root: Path, top: str, limit: int, docker_host: Optional[str], hide: Iterable[str], more: Any) -> Packed:
    """The archive (tar, gzip) with all below the directory `top`, and the names in it.

    `limit` is how many bytes of each log, from its end. `hide` are further texts to take out, `more` what was
    diagnosed. Raises Leak.
    """
    seen, problems = Deployed(), {}
    try:
        seen = deployed(root)
    except FAILURES as error:
        problems["release"] = f"{type(error).__name__}: {error}"
    docker, inside = _engine(seen, docker_host, problems)
    scrubber = Scrubber({*known_secrets(root, seen, inside), *gateway.secrets(root / GATEWAY), *hide})
    texts: Dict[str, str] = {}
    sources = (
        *(_files(root), _logs(root, seen, limit), _native(root, seen, limit), _system()),
        _gateway(root / GATEWAY, docker_host, limit),
    )
    for source in (*sources, _containers(docker, seen, inside, limit) if docker else iter(())):
        try:
            for name, text in source:
                texts[scrubber.known_out(name)] = scrubber.clean(text)
        except FAILURES as error:
            problems[f"after {len(texts)} files"] = f"{type(error).__name__}: {error}"
    texts["diagnosis.json"] = json.dumps(scrubber.clean_data(masked(more)), indent=2, ensure_ascii=False) + "\n"
    if problems:
        texts["problems.json"] = json.dumps(scrubber.clean_data(problems), indent=2) + "\n"
    texts["README.txt"] = scrubber.clean(_readme(texts, limit))
    for name, text in texts.items():
        if scrubber.left_in(text) or scrubber.left_in(name):
            where = "the name of a file" if scrubber.left_in(name) else name
            raise Leak(f"A secret is left in {where}, so nothing was packed; report this as a bug.")
    return _archive(top, texts), sorted(texts)


def _engine(seen: Deployed, docker_host: Optional[str], problems: Dict[str, str]) -> Tuple[Optional[Docker], Any]:
    """The engine's client and the server's container, as far as there are any."""
    if seen.backend != "docker":
        return None, None
    try:
        docker = Docker(docker_host)
        return docker, container.find(docker, seen.view)
    except FAILURES as error:
        problems["engine"] = f"{type(error).__name__}: {error}"
        return None, None


def _files(root: Path) -> Iterator[Tuple[str, str]]:
    """Configuration of the release in force, and what was written down about the server, without secrets by name."""
    place = root / release.CURRENT
    for name in CONFIGURATION:
        yield from _masked_file(place / name, f"release/{name}")
    for name in STATE:
        yield from _masked_file(root / "state" / name, f"state/{name}")
    for name in RUN:
        yield from _masked_file(root / "run" / name, f"run/{name}")
    for name, mask in (("compose.yaml", masked_yaml), ("pip.conf", str), ("server.env", _names_only)):
        text = _text(place / name)
        if text is not None:
            yield f"release/{name}", mask(text)
    yield "release/in-force.txt", f"{release.current(root)}\n" + "".join(f"{one}\n" for one in release.history(root))


def _names_only(text: str) -> str:
    """The names in a file of variables; a value may go over several lines, of which none is told."""
    return "".join(f"{match.group(1)}={HIDDEN}\n" for match in _VALUE.finditer(text) if match.group(1).isidentifier())


def _masked_file(path: Path, name: str) -> Iterator[Tuple[str, str]]:
    text = _text(path)
    if text is not None:
        yield name, masked_json(text)


def _logs(root: Path, seen: Deployed, limit: int) -> Iterator[Tuple[str, str]]:
    """What was printed into files, the newest of them first."""
    found: Dict[Path, str] = {}
    for top, patterns, where in ((root, LOGS, ""), (Path(seen.home or root / "home"), HOME_LOGS, "home/")):
        for pattern in patterns:
            for path in top.glob(pattern):
                if path.is_file() and not path.is_symlink() and path.suffix not in (".gz", ".db", ".zst", ".xz"):
                    found[path] = f"{where}{path.relative_to(top)}"
    newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:MOST_FILES]
    for path in newest:
        yield found[path], end_of(path, limit)


def end_of(path: Path, limit: int) -> str:
    """The end of a text file, from the beginning of a line; nothing of what is no text."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - limit))
        content = file.read(limit)
        if size > limit:
            content = content.partition(b"\n")[2]
        if b"\0" in content[:4096]:
            return "(not a text)\n"
        return _cut(content.decode("utf-8", "replace"))
    return ""


def _cut(text: str) -> str:
    return "".join(
        line if len(line) <= LONG_LINES else f"{line[:LONG_LINES]} ... ({len(line)} characters)\n"
        for line in text.splitlines(keepends=True)
    )


def _native(root: Path, seen: Deployed, limit: int) -> Iterator[Tuple[str, str]]:
    """What the journal has of the server and its keeper."""
    if seen.backend == "native":
        native = Native(root)
        for unit in (native.name, native.keeper_name) if native.systemd else ():
            command = ["journalctl", "--unit", unit, "--lines", "20000", "--no-pager", "--output", "short-iso"]
            yield f"journal/{unit}.log", _cut(_run(command)[-limit:].partition("\n")[2])


def _containers(docker: Docker, seen: Deployed, inside: Any, limit: int) -> Iterator[Tuple[str, str]]:
    """What the engine says of the containers of the project, and what they printed."""
    yield "docker/version.txt", docker.ask("version").out
    for service in (str(seen.view["service"]), KEEPER):
        one = inside if service == seen.view["service"] else container.find(docker, {**seen.view, "service": service})
        if one is None:
            continue
        yield f"docker/{service}.json", json.dumps(masked(_shown(one)), indent=2, ensure_ascii=False) + "\n"
        answer = docker.ask("logs", "--timestamps", "--tail", "20000", str(one["Id"]))
        yield f"docker/{service}.log", _cut((answer.out + answer.err)[-limit:].partition("\n")[2])


def _gateway(place: Path, docker_host: Optional[str], limit: int) -> Iterator[Tuple[str, str]]:
    """A gateway on this host: its configuration, and what it printed where it runs in a container."""
    for name, text in gateway.files(place):
        yield f"gateway/{name}", text
    if gateway.contained(place):
        for seen, printed in gateway.printed(Docker(docker_host)):
            name = str(seen.get("Name") or "container").strip("/")
            yield f"gateway/{name}.json", json.dumps(masked(_shown(seen)), indent=2, ensure_ascii=False) + "\n"
            yield f"gateway/{name}.log", _cut(printed[-limit:].partition("\n")[2] if len(printed) > limit else printed)


def _shown(inspected: Mapping[str, Any]) -> Dict[str, Any]:
    """A container as the engine shows it, its environment as a mapping, so that the names in it are known."""
    found = dict(inspected)
    config = dict(found.get("Config") or {})
    words = (word.partition("=") for word in config.pop("Env", None) or [])
    config["environment"] = {name: value for name, _mark, value in words}
    found["Config"] = config
    return found


def _system() -> Iterator[Tuple[str, str]]:
    """What the host is like."""
    for name, command in COMMANDS.items():
        yield f"system/{name}", _run(command)


def _run(command: List[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]} cannot be run: {error}\n"
    return (done.stdout + done.stderr).decode("utf-8", "replace")


def _text(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _readme(texts: Mapping[str, str], limit: int) -> str:
    listed = "".join(f"  {name}\n" for name in sorted(texts))
    return (
        f"Logs and configuration of an Xinference host, packed by airgap.xinference.\n\nSecrets are {HIDDEN}. "
        f"Databases and keys are never packed. Of each log the last {limit} bytes.\n\n{listed}"
    )


def _archive(top: str, texts: Mapping[str, str]) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=6) as archive:
        for name, text in sorted(texts.items()):
            content = text.encode("utf-8", "surrogateescape")
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size, member.mode, member.mtime = len(content), 0o600, int(time.time())
            archive.addfile(member, io.BytesIO(content))
    return memory.getvalue()
