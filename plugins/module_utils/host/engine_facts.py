# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Docker Engine of a host is like, asked through its command line: no library has been shipped yet.

Reads only, judges nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .system_facts import volume

LIMIT = 60.0
"""Seconds that one question may take."""
SNAPSHOTTER = "io.containerd.snapshotter.v1"
CONTAINERD_ROOT = "/var/lib/containerd"
NVIDIA_HOOK = "nvidia-container-runtime-hook"
_VERSION = re.compile(r"\d+\.\d+(?:\.\d+)?")
_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def look(root: str, port: Optional[int], address: Optional[str] = None) -> Dict[str, Any]:
    """Everything about the engine: `client`, `version`, `problem`, `data`, `compose`, `nvidia`, `images`, ...

    `address` is that of the engine, by default what the client is set up for.

    `problem` says why there is no answer, in the client's own words; what only an engine tells is empty then.
    """
    program = _which("docker")
    client = [program, *(["--host", address] if address else [])] if program else []
    answer = _info(client) if client else {}
    problem = _trouble(client, answer)
    up = not problem
    containerd = any(len(row) > 1 and row[1] == SNAPSHOTTER for row in answer.get("DriverStatus") or [])
    data = CONTAINERD_ROOT if containerd else answer.get("DockerRootDir") or ""
    return {
        "client": program,
        "version": answer.get("ServerVersion") or "",
        "problem": problem,
        "containerd": containerd,
        "security": answer.get("SecurityOptions") or [],
        "data": volume(data) if up and data else None,
        "compose": compose(program),
        "nvidia": nvidia(answer),
        "images": _images(client) if up else [],
        "publishers": _publishers(client, port, root) if up and port else [],
    }


def compose(program: str) -> Dict[str, str]:
    """Versions of the plugin (`v2`) and of the program of its own (`v1`); empty where there is none.

    A program of its own that is a Compose v2 does not count: the engine's client does not find it.
    """
    plugin = _version(_run(program, "compose", "version", "--short")[1]) if program else ""
    other = _which("docker-compose")
    alone = _version(_run(other, "version")[1]) if other else ""
    return {"v2": plugin, "v1": alone if alone.startswith("1.") else ""}


def nvidia(info: Dict[str, Any]) -> Dict[str, Any]:
    """What lets containers have GPUs: a runtime, the hook that takes device requests, device descriptions (CDI).

    Descriptions count only where the engine reads them: it tells its directories when it does (API 1.44).
    """
    described = []
    for directory in info.get("CDISpecDirs") or ():
        for path in sorted(Path(directory).glob("*")):
            if path.suffix in (".json", ".yaml", ".yml") and "nvidia.com/gpu" in _text(path):
                described.append(str(path))
    return {"runtime": "nvidia" in (info.get("Runtimes") or {}), "hook": _which(NVIDIA_HOOK), "cdi": described}


def gpu_driver(info: Dict[str, Any]) -> str:
    """The Compose driver of GPU reservations: nvidia, or cdi where only descriptions lead to devices."""
    ways = nvidia(info)
    return "cdi" if ways["cdi"] and not ways["hook"] else "nvidia"


def _trouble(client: Sequence[str], info: Dict[str, Any]) -> str:
    """Why the engine cannot be used, empty when it can."""
    if not client:
        return "there is no docker on the PATH"
    errors = info.get("ServerErrors") or []
    if errors or not info.get("ServerVersion"):
        return " ".join(errors) or str(info.get("said") or "it gives no version of the engine")
    return ""


def _info(client: Sequence[str]) -> Dict[str, Any]:
    """What `docker info` tells; with `said` when that is no JSON."""
    _code, out, err = _run(*client, "info", "--format", "{{json .}}")
    try:
        found = json.loads(out)
    except ValueError:
        return {"said": " ".join((err or out).split())[:400]}
    if isinstance(found, dict):
        return {"said": " ".join(err.split())[:400], **found}
    return {}


def _images(client: Sequence[str]) -> List[Dict[str, Any]]:
    """Id, names and layers of every image, intermediate ones too."""
    _code, out, _err = _run(*client, "image", "ls", "--all", "--quiet", "--no-trunc")
    ids = list(dict.fromkeys(out.split()))
    found: List[Dict[str, Any]] = []
    for start in range(0, len(ids), 200):
        _code, out, _err = _run(*client, "image", "inspect", *ids[start : start + 200])
        try:
            rows = json.loads(out)
        except ValueError:
            continue
        for row in rows:
            layers = (row.get("RootFS") or {}).get("Layers") or []
            found.append({"id": row.get("Id"), "tags": row.get("RepoTags") or [], "layers": layers})
    return found


def _publishers(client: Sequence[str], port: int, root: str) -> List[Dict[str, Any]]:
    """Containers that publish a port: name, image, and whether the project they belong to lies below `root`."""
    form = '{{.Names}}\t{{.Image}}\t{{.Label "com.docker.compose.project.working_dir"}}'
    _code, out, _err = _run(*client, "ps", "--filter", f"publish={port}/tcp", "--format", form)
    tops = {root.rstrip("/"), os.path.realpath(root)}
    found = []
    for line in out.splitlines():
        name, image, project = [*line.split("\t"), "", ""][:3]
        ours = any(project == top or project.startswith(f"{top}/") for top in tops)
        found.append({"name": name, "image": image, "ours": ours})
    return found


def _run(*command: str) -> Tuple[int, str, str]:
    """Status, output and error output of a command; one that cannot be run has the reason as error output."""
    try:
        done = subprocess.run(list(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def _which(name: str) -> str:
    """Path of a program, also where a login over SSH has a short PATH; empty when there is none."""
    return shutil.which(name) or shutil.which(name, path=_PLACES) or ""


def _version(text: str) -> str:
    match = _VERSION.search(text)
    return match.group(0) if match else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
