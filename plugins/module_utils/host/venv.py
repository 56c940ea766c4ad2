# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A virtual environment from a directory of wheels, without any index.

An environment cannot be moved (its scripts name their interpreter), so it is built in its final place; a marker
written last says that it is whole, and one without the marker is built again from nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

MARKER = ".complete"
SHOWN_OUTPUT = 2000
"""Characters of an installer's output that a message quotes, from the end."""


class VenvError(Exception):
    """An environment that cannot be built; the text says what was wanted, what is there, and what to do."""


@dataclass(frozen=True)
class Venv:
    """A complete environment: where it is, with which Python and which tool it was made, and how long that took."""

    path: str
    python: str
    tool: str
    seconds: float

    @property
    def bin(self) -> str:
        return str(Path(self.path, "bin"))


def complete(path: Path) -> Optional[Venv]:
    """What the marker of an environment says, None when the environment is not there or not whole.

    Of its tens of thousands of files only one for each package is looked at, and whether its Python is still there.
    """
    try:
        content = json.loads((path / MARKER).read_text(encoding="utf-8"))
        records = content.pop("records", {})
        there = {name: facts for name, facts in _records(path).items() if name in records}
        if there != records or not (path / "bin" / "python").exists():
            return None
        return Venv(**content)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _records(path: Path) -> Dict[str, List[int]]:
    """Size and time of the list of files that every installed package has, by path."""
    found = {}
    for record in path.glob("lib/python*/site-packages/*.dist-info/RECORD"):
        status = record.stat()
        found[record.relative_to(path).as_posix()] = [status.st_size, status.st_mtime_ns]
    return found


def places(root: Path, name: str) -> Tuple[Path, Path]:
    """Where shipping put the wheels called `name`, and where their environment belongs; raises VenvError."""
    listing = root / "state" / "artifacts.json"
    try:
        entry = json.loads(listing.read_text(encoding="utf-8"))["wheels"][name]
        return Path(entry["path"]), root / "venvs" / str(entry["digest"]).rpartition(":")[2][:12]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VenvError(
            f"No wheels/{name} was shipped to this host ({listing}: {type(error).__name__}: {error}). "
            "Build the bundle with a native wheelhouse and run ship.yml"
        ) from error


def required_tags(names: Sequence[str]) -> Set[str]:
    """The CPython versions (as ``cp311``) that wheels were compiled for; those good for any version do not count."""
    return {match.group(1) for match in (re.search(r"-(cp3\d+)-\1-[^-]+\.whl$", name) for name in names) if match}


def tag_of(python: str) -> Optional[str]:
    """The tag of an interpreter, as ``cp311``; None when it cannot be run."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def choose_python(tags: Set[str], wanted: Optional[str] = None) -> str:
    """The interpreter to build with: `wanted`, else the one running this, else one named after the version.

    Raises VenvError when none of them fits the wheels.
    """
    if len(tags) > 1:
        raise VenvError(f"The wheels are for several Pythons ({', '.join(sorted(tags))}); build the bundle again")
    tag = next(iter(tags), None)
    own = getattr(sys, "_base_executable", None) or sys.executable
    names = [own] if tag is None else [own, f"python3.{tag[3:]}"]
    found = []
    for name in [wanted] if wanted else names:
        path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/bin:/usr/bin")
        if path is None:
            continue
        has = tag_of(path)
        if has and tag in (None, has):
            return path
        found.append(f"{path} is {has or 'unusable'}")
    raise VenvError(
        f"The wheels of the bundle need Python {_version(tag)}; {'; '.join(found) or f'there is no {wanted}'}. "
        f"Install Python {_version(tag)} on this host (its venv or ensurepip package is not needed), name another "
        "interpreter in xinference_server_python, or build the bundle for the Python that is here"
    )


def build(wheels: Path, path: Path, wanted_python: Optional[str] = None) -> Venv:
    """Install every wheel of the directory `wheels` into a new environment at `path`, and return it.

    Two builds of the same environment wait for each other, and the second finds the work done. Raises VenvError.
    """
    with _for_everybody(), _lock(path.with_name(path.name + ".lock")):
        existing = complete(path)
        if existing:
            return existing
        names = sorted(entry.name for entry in wheels.glob("*.whl")) if wheels.is_dir() else []
        if not names:
            raise VenvError(f"There are no wheels in {wheels}; ship a bundle that has a native wheelhouse")
        python = choose_python(required_tags(names), wanted_python)
        started = time.monotonic()
        for leftover in [path, *path.parent.glob(f"{path.name}.*/")]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
        tool = _install(wheels, names, path, python)
        venv = Venv(str(path), python, tool, round(time.monotonic() - started, 1))
        marker = path / (MARKER + ".new")
        marker.write_text(json.dumps({**asdict(venv), "records": _records(path)}) + "\n", encoding="utf-8")
        # The marker must not outlive the files it vouches for when the power goes.
        os.sync()
        marker.replace(path / MARKER)
        return venv


def _install(wheels: Path, names: Sequence[str], path: Path, python: str) -> str:
    """Make the environment and fill it with the best installer the wheelhouse carries; returns its name."""
    files = [str(wheels / name) for name in names]
    uv = next((name for name in names if name.startswith("uv-")), None)
    pip = next((name for name in names if name.startswith("pip-")), None)
    target, purpose = str(path / "bin" / "python"), f"install {len(files)} wheels"
    with tempfile.TemporaryDirectory(prefix=path.name + ".", dir=str(path.parent)) as scratch:
        if not uv and not pip:
            _run(
                [python, "-m", "venv", str(path)],
                scratch,
                "make an environment with pip (the wheels have no uv or pip)",
            )
            _run([target, "-m", "pip", *_PIP, *files], scratch, purpose)
            return "pip of the host"
        _run([python, "-m", "venv", "--without-pip", str(path)], scratch, "make an environment")
        if uv:
            # The cache is on the same file system, so that files are linked out of it and written once.
            command = [_unpack_uv(wheels / uv, Path(scratch)), "pip", "install", "--python", target, *_UV]
            _run([*command, "--cache-dir", str(Path(scratch, "cache")), *files], scratch, purpose)
            return "uv"
        _run([target, str(wheels / str(pip) / "pip"), *_PIP, *files], scratch, purpose)
        return "pip"


_UV: List[str] = ["--offline", "--no-index", "--no-deps", "--no-config", "--compile-bytecode", "--link-mode=hardlink"]
_PIP: List[str] = ["--isolated", "install", "--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]


def _unpack_uv(wheel: Path, directory: Path) -> str:
    """Put the program of a uv wheel into `directory`."""
    with zipfile.ZipFile(str(wheel)) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".data/scripts/uv")), None)
        if member is None:
            raise VenvError(f"There is no program in {wheel}; build the bundle again")
        program = directory / "uv"
        program.write_bytes(archive.read(member))
    program.chmod(stat.S_IRWXU)
    return str(program)


def _run(command: Sequence[str], scratch: str, purpose: str) -> None:
    """Run an installer with nothing of the caller's environment but PATH; its output goes into the error."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"}
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise VenvError(f"Cannot {purpose}: {command[0]}: {error.strerror}") from error
    if done.returncode:
        output = done.stdout.decode(errors="replace").strip()[-SHOWN_OUTPUT:]
        raise VenvError(f"Cannot {purpose}: {Path(command[0]).name} ended with code {done.returncode}:\n{output}")


def _version(tag: Optional[str]) -> str:
    return f"{tag[2]}.{tag[3:]}" if tag else "3"


@contextmanager
def _for_everybody() -> Iterator[None]:
    """Make files that everybody may read: a server may run as another user than whoever builds."""
    before = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:  # noqa: PTH123
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
