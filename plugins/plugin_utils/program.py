# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Programs made of host-side modules, handed to a host's Python on its standard input: nothing is installed there.

What the interpreter is started with is short and always the same, whatever the program (`command`). The program comes
first on standard input: one line that loads, then a zip of modules (`program`). What follows is the program's own.
"""

from __future__ import annotations

import ast
import io
import shlex
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Iterable

MODULES = Path(__file__).resolve().parents[1] / "module_utils"
PACKAGE = "airgap_xinference"
"""The name of the package the modules are in, over there."""

# Read byte by byte, so that nothing behind the line is taken away from the program.
_BOOTSTRAP = 'import sys;exec(eval(open(0,"rb",0,closefd=False).readline()))'

# The zip needs a path to be imported from; a file without a name has one in /proc.
_LOADER = """
import os, sys, tempfile
if sys.version_info < (3, 8):
    sys.exit("Python 3.8 or newer is needed, %s is %s" % (sys.executable, sys.version.split()[0]))
try:
    handle = os.memfd_create("airgap.xinference")
except (AttributeError, OSError):
    keep = tempfile.TemporaryFile()
    handle = keep.fileno()
left = {size}
while left:
    data = os.read(0, min(left, 65536))
    if not data:
        sys.exit("the program did not arrive")
    left -= len(data)
    while data:
        data = data[os.write(handle, data):]
sys.path.insert(0, "/proc/%d/fd/%d" % (os.getpid(), handle))
from {module} import main
main()
"""


def pack(modules: Iterable[str]) -> bytes:
    """A zip of modules below module_utils, named like ``bundle.receive``, and of all those they import from there.

    The same modules give the same bytes. Raises OSError for a module that is not there.
    """
    found: dict[str, bytes] = {}
    left = list(modules)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = MODULES.joinpath(*name.split(".")).with_suffix(".py").read_bytes()
            left += _imports(name, found[name])
    packages = {name.rpartition(".")[0] for name in found}
    packages |= {package.rpartition(".")[0] for package in packages}
    paths = {f"{PACKAGE}/{name.replace('.', '/')}.py": content for name, content in found.items()}
    paths |= {"/".join([PACKAGE, *filter(None, package.split(".")), "__init__.py"]): b"" for package in packages}
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in sorted(paths.items()):
            archive.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)
    return target.getvalue()


@lru_cache
def program(module: str) -> bytes:
    """What has to come first on standard input for the function `main` of a module to run, such as bundle.receive."""
    content = pack([module])
    loader = _LOADER.format(size=len(content), module=f"{PACKAGE}.{module}")
    return repr(loader).encode("ascii") + b"\n" + content


def command(interpreter: str) -> str:
    """The shell command that runs whatever program comes on its standard input.

    `interpreter` may have arguments, as Ansible allows. Nothing in the working directory or in the environment can
    put itself in the place of a module (`-I`).
    """
    return f"{interpreter} -I -c {shlex.quote(_BOOTSTRAP)}"


def _imports(name: str, source: bytes) -> list[str]:
    """The modules of ours that a module imports, wherever in its code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = name.split(".")[: -node.level]
            if node.module:
                found.append(".".join([*place, node.module]))
            else:
                found += [".".join([*place, alias.name]) for alias in node.names]
    return found
