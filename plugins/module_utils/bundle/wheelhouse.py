# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A directory of wheels that pip collected for one Python, collected again only when what was asked for changed."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterable

from .digest import hash_bytes, write_atomically
from .layout import BundleError
from .manifest import WHEELS_GLIBC, WHEELS_PLATFORM, WHEELS_PYTHON, WHEELS_REQUIRES, WHEELS_XINFERENCE

PROBE = (
    "import json, sys, sysconfig; print(json.dumps({"
    "'tag': 'cp%d%d' % sys.version_info[:2], 'version': '%d.%d.%d' % sys.version_info[:3], "
    "'platform': sysconfig.get_platform().replace('-', '_').replace('.', '_'), "
    "'implementation': sys.implementation.name}))"
)
"""Python code that tells what an interpreter is."""

OLDEST = "3.8"
"""The oldest Python that a wheelhouse for any Python is good for."""

Run = Callable[[list], "tuple[int, str, str]"]
_MANYLINUX = re.compile(r"manylinux_2_(\d+)_")
_LEGACY_MANYLINUX = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}
_NORMAL = re.compile(r"[-_.]+")


@dataclass(frozen=True)
class Order:
    """What is asked of pip: requirement lines, constraint lines, names to leave out of the result.

    With `portable` only pure-Python wheels are taken, good for every Python from OLDEST on; all of them must then be
    listed, because nothing is resolved. With `version` (such as 3.12) and `platform` (such as manylinux_2_28_x86_64)
    wheels are taken for another Python than the one that runs pip; nothing is built then.
    """

    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    portable: bool = False
    version: str = ""
    platform: str = ""

    @property
    def foreign(self) -> bool:
        """Whether the wheels are for another Python than the one that runs pip."""
        return bool(self.version or self.platform)

    def target(self, interpreter: dict[str, str]) -> dict[str, str]:
        """Tag and platform of the Python that the wheels are for."""
        tag = "cp" + self.version.replace(".", "") if self.version else interpreter["tag"]
        return {"tag": tag, "platform": self.platform or interpreter["platform"]}

    def key(self, interpreter: dict[str, str]) -> str:
        """Changes when other wheels would have to be collected."""
        content = {**asdict(self), **self.target(interpreter)}
        del content["version"]
        if self.portable:
            content["tag"] = content["platform"] = "any"
        return hash_bytes(json.dumps(content, sort_keys=True).encode())


@dataclass(frozen=True)
class Wheel:
    """A wheel by its file name: normalised distribution name, version, and its tags."""

    file: str
    name: str
    version: str
    pythons: tuple[str, ...]
    platforms: tuple[str, ...]

    @classmethod
    def parse(cls, file: str) -> Wheel | None:
        """The facts in a wheel's file name, or None when it is not one."""
        parts = file[: -len(".whl")].split("-") if file.endswith(".whl") else []
        if len(parts) not in (5, 6):
            return None
        return cls(file, normal(parts[0]), parts[1], tuple(parts[-3].split(".")), tuple(parts[-1].split(".")))


def normal(name: str) -> str:
    """A distribution name in the one form in which names are compared."""
    return _NORMAL.sub("-", name).lower()


def interpreter_facts(python: str, run: Run) -> dict[str, str]:
    """Tag, version and platform of an interpreter. Raises BundleError when it cannot be run or is no CPython."""
    code, out, err = run([python, "-c", PROBE])
    try:
        facts: dict[str, str] = json.loads(out)
    except ValueError:
        facts = {}
    if code != 0 or "tag" not in facts:
        raise BundleError(f"{python} cannot be run as the Python that collects wheels: {err.strip() or out.strip()}")
    if facts["implementation"] != "cpython":
        raise BundleError(f"{python} is {facts['implementation']}; wheels are collected for CPython only.")
    return facts


def pip_of(python: str, own: str, run: Run) -> list[str]:
    """The command that is pip for an interpreter: its own, or where it has none (as Debian's) that of `own`.

    Raises BundleError when neither has one.
    """
    for command in ([python, "-m", "pip"], [own, "-m", "pip", "--python", python]):
        if run([*command, "--version"])[0] == 0:
            return [*command, "--disable-pip-version-check"]
    raise BundleError(
        f"Neither {python} nor {own} has pip. Install it (python3-pip or python3-venv) or name another Python."
    )


def up_to_date(directory: Path, key: str) -> bool:
    """Whether the wheels of this order are there, as the note beside the directory says."""
    try:
        note = json.loads(_note(directory).read_text())
        return note["key"] == key and note["files"] == _sizes(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def collect(
    directory: Path, order: Order, pip: list[str], key: str, run: Run, interpreter: dict[str, str] | None = None
) -> None:
    """Have `pip` (a command) collect the wheels beside `directory`, check them, and put them in its place in one step.

    Two that collect into one directory wait for each other, and the second finds the work done. Raises BundleError with
    the end of what pip said, or with every file that is not a wheel that was asked for.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(directory.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not up_to_date(directory, key):
            _collect(directory, order, pip, key, run, interpreter)


def _collect(
    directory: Path, order: Order, pip: list[str], key: str, run: Run, interpreter: dict[str, str] | None
) -> None:
    fresh = directory.with_name(directory.name + ".new")
    shutil.rmtree(str(fresh), ignore_errors=True)
    fresh.mkdir(parents=True)
    listed = _write_lines(fresh.with_suffix(".requirements"), order.requirements)
    constrained = _write_lines(fresh.with_suffix(".constraints"), order.constraints)
    code, out, err = run(pip_command(pip, order, listed, constrained, fresh, interpreter or {}))
    if code != 0:
        lines = [line.strip() for line in (out + "\n" + err).splitlines() if line.strip()]
        raise BundleError(
            f"pip could not collect {', '.join(order.requirements)} (exit status {code} of {' '.join(pip)}). "
            "Check the network, the index in pip's configuration and the requirements. It said:",
            [line for line in lines if "error" in line.lower()][-8:] or lines[-8:],
        )
    excluded = {normal(name) for name in order.exclude}
    for wheel in wheels_in(fresh):
        if wheel.name in excluded:
            (fresh / wheel.file).unlink()
    problems = check(sorted(entry.name for entry in fresh.iterdir()), order)
    if problems:
        raise BundleError(f"pip collected what cannot be used in {fresh}:", problems)
    shutil.rmtree(str(directory), ignore_errors=True)
    fresh.rename(directory)
    for scratch in (listed, constrained):
        scratch.unlink()
    content = {"key": key, "files": _sizes(directory)}
    write_atomically(_note(directory), json.dumps(content, indent=1).encode() + b"\n")


def platform_tags(platform: str) -> list[str]:
    """The platform and all older ones whose wheels run on it too, newest first. pip wants every one of them named."""
    match = _MANYLINUX.match(platform)
    if not match:
        return [platform]
    machine = platform[match.end() :]
    tags = []
    for minor in range(int(match.group(1)), 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        tags += [f"{name}_{machine}" for name, old in _LEGACY_MANYLINUX.items() if old == minor]
    return [*tags, f"linux_{machine}"]


def pip_command(
    pip: list[str], order: Order, requirements: Path, constraints: Path, target: Path, interpreter: dict[str, str]
) -> list[str]:
    """The command line: which index to use is left to pip's own configuration.

    What has no wheel is built in isolation, because an old pip would otherwise want the package `wheel` installed.
    """
    common = ["--no-input", "--progress-bar", "off", "--requirement", str(requirements)]
    if order.portable:
        tags = ["--platform", "any", "--implementation", "py", "--abi", "none", "--python-version", OLDEST]
        return [*pip, "download", *common, "--no-deps", "--only-binary=:all:", *tags, "--dest", str(target)]
    if order.foreign:
        where = order.target(interpreter)
        tags = ["--implementation", "cp", "--python-version", where["tag"][2:], "--abi", where["tag"]]
        tags += ["--abi", "abi3", "--abi", "none"]
        for platform in platform_tags(where["platform"]):
            tags += ["--platform", platform]
        constrained = ["--constraint", str(constraints)]
        return [*pip, "download", *common, "--only-binary=:all:", *tags, *constrained, "--dest", str(target)]
    return [*pip, "wheel", *common, "--use-pep517", "--constraint", str(constraints), "--wheel-dir", str(target)]


def check(files: Iterable[str], order: Order) -> list[str]:
    """What is wrong with the files that pip left."""
    problems = []
    versions: dict[str, str] = {}
    for file in files:
        wheel = Wheel.parse(file)
        if wheel is None:
            problems.append(f"{file}: not a wheel")
            continue
        if order.portable and wheel.platforms != ("any",):
            problems.append(f"{file}: only good for {', '.join(wheel.platforms)}, but any machine is wanted")
        if wheel.name in versions:
            problems.append(f"{file}: a second version of {wheel.name} beside {versions[wheel.name]}")
        versions[wheel.name] = wheel.version
    return problems or ([] if versions else ["no file at all"])


def wheels_in(directory: Path) -> list[Wheel]:
    """The wheels of a directory, in order of name."""
    parsed = (Wheel.parse(entry.name) for entry in directory.iterdir())
    return sorted((wheel for wheel in parsed if wheel), key=lambda wheel: wheel.file)


def facts_of(wheels: Iterable[Wheel], order: Order, interpreter: dict[str, str]) -> dict[str, str]:
    """What the bundle says about a wheelhouse, so that a host can be checked before anything is shipped to it."""
    wheels = list(wheels)
    if order.portable:
        return {WHEELS_PYTHON: "py3", WHEELS_REQUIRES: OLDEST, WHEELS_PLATFORM: "any"}
    where = order.target(interpreter)
    facts = {WHEELS_PYTHON: where["tag"], WHEELS_PLATFORM: where["platform"]}
    needed = [minor for minor in (_glibc_minor(wheel) for wheel in wheels) if minor is not None]
    if needed:
        facts[WHEELS_GLIBC] = f"2.{max(needed)}"
    version = next((wheel.version for wheel in wheels if wheel.name == "xinference"), None)
    return {**facts, WHEELS_XINFERENCE: version} if version else facts


def _glibc_minor(wheel: Wheel) -> int | None:
    """n of the oldest glibc 2.n a wheel runs with, or None when it needs none."""
    found = [int(match.group(1)) for match in map(_MANYLINUX.match, wheel.platforms) if match]
    found += [
        minor for tag, minor in _LEGACY_MANYLINUX.items() for each in wheel.platforms if each.startswith(f"{tag}_")
    ]
    return min(found) if found else None


def _note(directory: Path) -> Path:
    return directory.with_name(directory.name + ".json")


def _sizes(directory: Path) -> dict[str, Any]:
    return {entry.name: entry.stat().st_size for entry in sorted(directory.iterdir())}


def _write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
