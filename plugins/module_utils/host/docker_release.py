# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a release that runs in a container, from what the inventory says and what shipping left on the host."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..server.engines import INDEX, WHEELS, Engines, EnginesError, engines
from ..server.features import Features, features
from . import compose, guarding, isolation
from .definition import PRIVATE, json_text
from .docker_cli import Docker
from .gpus import Given
from .ports import cannot_listen
from .release import Entry
from .yaml_text import yaml_text

COMPOSE_FILE = "compose.yaml"
VIEW = "server.json"
PIECE = 1 << 20
MOUNTED = 0o444
"""Rights of a file that is seen in a container, by whoever runs there."""
_VERSION = re.compile(r"v?(\d+\.\d+[^-]*)")


class ContainerError(ValueError):
    """A container that cannot be run from what is on the host; the text says what is missing and how to get it."""


class Image(NamedTuple):
    """An image that was shipped: its name in the engine, and what the engine may call it, likeliest first."""

    reference: str
    ids: Tuple[str, ...]


def image_of(artifacts: Mapping[str, Any], wanted: str, what: str = "xinference_server_image") -> Image:
    """The shipped image that `wanted` names, by its reference or its name in the bundle; the only one when empty.

    Raises ContainerError when there is none, or more than one to choose from.
    """
    images: Mapping[str, Any] = artifacts.get("images") or {}
    chosen = [
        entry for name, entry in images.items() if not wanted or _same(wanted, entry["reference"]) or wanted == name
    ]
    if len(chosen) == 1:
        return Image(chosen[0]["reference"], (chosen[0]["image_id"], chosen[0]["digest"]))
    there = ", ".join(sorted(entry["reference"] for entry in images.values()))
    if chosen:
        raise ContainerError(f"Several images were shipped to this host: {there}. Name the server's in {what}.")
    raise ContainerError(
        f"The image {wanted or 'of the server'} was not shipped to this host, which has {there or 'none'}. Put it into "
        f"the bundle (playbooks/bundle.yml) and ship it (playbooks/ship.yml), or name another in {what}."
    )


def features_of(version: str, reference: str) -> Features:
    """The abilities of a server by its version, or where that is not given by the tag of its image (newest if none)."""
    tag = reference.rpartition(":")[2]
    return features(version or _tagged(tag) or tag)


def image_version(artifacts: Mapping[str, Any], image_id: str) -> str:
    """The version of the server in a shipped image, by its tag; empty where that tells none."""
    images: Mapping[str, Any] = artifacts.get("images") or {}
    named = [one["reference"] for one in images.values() if image_id in (one["image_id"], one["digest"])]
    return _tagged(named[0].rpartition(":")[2]) if named else ""


def _tagged(tag: str) -> str:
    match = _VERSION.match(tag)
    return match.group(1) if match else ""


def engines_of(wanted: str, found: Features, artifacts: Mapping[str, Any]) -> Tuple[Engines, str]:
    """How the server gets packages of engines, and the host's directory of their wheels, empty where it needs none.

    Raises ContainerError when the source makes no sense or was not shipped.
    """
    try:
        source = engines(wanted, found)
    except EnginesError as error:
        raise ContainerError(str(error)) from error
    if source.source != WHEELS:
        return source, ""
    entry = (artifacts.get("wheels") or {}).get("engines")
    if not entry:
        raise ContainerError(
            "xinference_server_engines wants wheels of engines, and none were shipped to this host. Name requirements "
            "in xinference_bundle_engine_requirements, build the bundle again and ship it."
        )
    return source, str(entry["path"])


def content_hash(paths: Sequence[str], texts: Mapping[str, str]) -> str:
    """A hash of the files among `paths` and of `texts`, empty without any. Directories are not looked into."""
    digest = hashlib.sha256()
    files = [Path(path) for path in sorted(paths) if Path(path).is_file()]
    for path in files:
        digest.update(f"{path}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:  # Piece by piece: it may be larger than the memory.
            for piece in iter(lambda: file.read(PIECE), b""):
                digest.update(piece)
    for name, text in sorted(texts.items()):
        content = text.encode()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16] if files or texts else ""


def refuse_faults(server: compose.Server, secrets: Mapping[str, str], there: bool = True) -> None:
    """Raise ContainerError with every setting that would keep the container from running as it is meant.

    `there`: whether what is mounted has to be on the host already.
    """
    unheard = "" if compose.faults(server, secrets) else cannot_listen(server.host)
    absent = [mount.source for mount in server.mounts if there and not Path(mount.source).exists()]
    found = [*compose.faults(server, secrets), *([f"xinference_host: {unheard}"] if unheard else [])]
    found += [f"xinference_server_mounts: this host has no {one}" for one in absent]
    if found:
        raise ContainerError("Nothing was changed. The inventory asks for what cannot be: " + "; ".join(found) + ".")


def refuse_strangers(docker: Docker, root: Path, project: str) -> None:
    """Raise ContainerError when a Compose project of that name was not made here; ours would remove its containers."""
    form = '{{.Names}}\t{{.Label "com.docker.compose.project.working_dir"}}'
    answer = docker.ask("ps", "--all", "--filter", f"label=com.docker.compose.project={project}", "--format", form)
    tops = [f"{top}/" for top in (root, os.path.realpath(root))]
    rows = [line.split("\t") for line in answer.out.splitlines() if "\t" in line]
    strangers = [f"{name} ({place})" for name, place in rows if not place.startswith(tuple(tops))]
    if strangers:
        raise ContainerError(
            f"Nothing was changed. The Compose project {project} on this host is not that of {root}: "
            f"{', '.join(strangers)}. Choose another name (xinference_server_service), or take it down where it lies "
            "(docker compose down)."
        )


def refuse_project(docker: Docker, directory: Path, plugin: str = "") -> None:
    """Raise ContainerError when Compose does not take the project in a directory, before the server is touched.

    `plugin` is Compose where the client does not know it yet.
    """
    command = ["--project-directory", str(directory), "--file", str(directory / COMPOSE_FILE), "config", "--quiet"]
    answer = docker.run([plugin, *command]) if plugin else docker.ask("compose", *command)
    if answer.code:
        said = answer.err.strip() or answer.out.strip()
        raise ContainerError(
            f"Nothing was changed. Compose does not take what the inventory says, mostly xinference_server_*: {said}"
        )


def files(
    server: compose.Server,
    models: Sequence[Any],
    artifacts: Mapping[str, Any],
    guard: Mapping[str, Entry],
    keeper: Optional[Mapping[str, Entry]] = None,
) -> Dict[str, Entry]:
    """Everything a release of the docker backend holds; `guard` are the files of guarding, `keeper` the keeper's."""
    found = {
        COMPOSE_FILE: Entry(HEADER + yaml_text(compose.project(server))),
        VIEW: Entry(json_text(view(server))),
        "models.json": Entry(json_text(list(models)), PRIVATE),
        "artifacts.json": Entry(json_text(artifacts)),
        **guard,
        **(keeper or {}),
    }
    if server.engines.pip_conf:
        found[compose.PIP_CONF] = Entry(server.engines.pip_conf, MOUNTED)
    if server.isolated:
        found[isolation.PROGRAM] = Entry(isolation.program(), MOUNTED)
    return found


HEADER = "# Written by airgap.xinference; change the inventory and run playbooks/serve.yml instead.\n"


def view(server: compose.Server) -> Dict[str, Any]:
    """How the server sees the host: read by whoever talks to the server about paths and GPUs of the host."""
    return {
        "backend": "docker",
        "project": server.project,
        "service": compose.SERVICE,
        "image": server.image,
        "endpoint": endpoint(server),
        "models": compose.MODELS,
        "gpus": [{"index": place, "names": gpu.names} for place, gpu in enumerate(server.gpus)],
    }


def endpoint(server: compose.Server) -> str:
    """Where the host itself reaches the server."""
    addresses = compose.published(server.host)
    return f"http://{'[::1]' if addresses == ['::'] else compose.LOOPBACK}:{server.port}"


def server_from(
    container: Mapping[str, Any],
    root: Path,
    image: str,
    index_image: str,
    environment: Mapping[str, str],
    gpus: Sequence[Given],
    source: Engines,
    wheels: str,
    gpu_driver: str,
    keeper: Tuple[str, str] = ("", ""),
    guard: Optional[Mapping[str, Entry]] = None,
    seed: str = "",
    user: Tuple[str, Sequence[str]] = ("", ()),
) -> compose.Server:
    """The server to run; `environment` has no secrets.

    `keeper` are the keeper's user and namespace of users, see `keeper_user`. `guard` are the files of guarding, and
    `seed` that of the host. `user` are the server's user and the capabilities that it keeps, see `container_user`.
    """
    mounts = [compose.Mount(one["source"], one["target"], bool(one["read_only"])) for one in container["mounts"]]
    texts = {compose.PIP_CONF: source.pip_conf} if source.pip_conf else {}
    guarded = tuple(name for name in guarding.FILES if name in guard) if guard and guarding.needed(guard) else ()
    if guard and guarded:
        texts["guarded"] = guarding.mark(guard, seed)
    return compose.Server(
        project=container["project"],
        image=image,
        command=tuple(container["command"]),
        root=PurePosixPath(root),
        home=container["home"],
        host=container["host"],
        port=int(container["port"]),
        environment=environment,
        guard=guarded,
        gpus=gpus,
        engines=source,
        shm_size=container["shm_size"],
        ulimits=container["ulimits"],
        log_max_size=container["log_max_size"],
        log_max_files=container["log_max_files"],
        stop_timeout=container["stop_timeout"],
        start_timeout=container["start_timeout"],
        selinux=selinux_enforced() if container["selinux"] == "auto" else container["selinux"] == "yes",
        mounts=mounts,
        mounted=content_hash([mount.source for mount in mounts], texts),
        wheels=wheels,
        index_image=index_image,
        options=container["options"],
        gpu_driver=gpu_driver,
        keeper=keeper[0],
        user_namespace=keeper[1],
        user=user[0],
        capabilities=user[1],
        read_only=container["read_only"] != "no",
        isolated=container["isolated"],
    )


def keeper_user(root: Path, info: Mapping[str, Any]) -> Tuple[str, str]:
    """As whom the keeper runs, and in which namespace of users: whoever owns the files that it reads and writes.

    `info` is what the engine tells of itself. In an engine without root, the container's root is that owner.
    """
    told = " ".join(str(one) for one in info.get("SecurityOptions") or [])
    if "name=rootless" in told:
        return "0:0", ""
    place = next((path for path in (root / "state", root) if path.is_dir()), None)
    owner = f"{place.stat().st_uid}:{place.stat().st_gid}" if place else f"{os.geteuid()}:{os.getegid()}"
    return owner, "host" if "name=userns" in told else ""


def environment_of(
    container: Mapping[str, Any], source: Engines, secrets: Mapping[str, Any]
) -> Tuple[Dict[str, str], Dict[str, str]]:
    """The environment: what everyone may read, and what is secret.

    It is the collection's, that of the source of engines over it, the inventory's over all. Secret are `secrets`,
    whatever they are called, and others by their name or value.
    """
    together = {**container["environment"], **source.environment, **container["overrides"], **secrets}
    texts = {name: str(value) for name, value in together.items() if value is not None}
    public, secret = compose.split_secrets({name: text for name, text in texts.items() if name not in secrets})
    return public, {**secret, **{name: text for name, text in texts.items() if name in secrets}}


def stop(docker: Docker, root: Path) -> None:
    """Stop the server of the release in force, if it runs: what it writes is about to be given to another user."""
    try:
        view = json.loads((root / "current" / VIEW).read_text(encoding="utf-8"))
        labels = {"com.docker.compose.project": view["project"], "com.docker.compose.service": view["service"]}
    except (OSError, KeyError):
        return
    seen = docker.container({**labels, "com.docker.compose.oneoff": "False"})
    if seen is not None and seen["State"].get("Running"):
        docker.ask("stop", seen["Id"])


def compose_plugin(artifacts: Mapping[str, Any]) -> Optional[Path]:
    """The Compose plugin that was shipped as the tool docker-compose, if it was."""
    entry = (artifacts.get("tools") or {}).get("docker-compose")
    found = sorted(path for path in Path(entry["path"]).rglob("*") if path.is_file()) if entry else []
    return found[0] if found else None


def link_plugin(plugin: Path, dry: bool) -> bool:
    """Let the client of this user find the Compose plugin; returns whether the link was not there. Raises OSError."""
    top = Path("/usr/local/lib/docker") if os.geteuid() == 0 else Path.home() / ".docker"
    link = top / "cli-plugins" / "docker-compose"
    if link.is_symlink() and os.readlink(str(link)) == str(plugin):
        return False
    if not dry:
        link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new = link.with_name(f".{link.name}.new")
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        new.symlink_to(plugin)
        new.replace(link)
    return True


def needs_index(source: Engines) -> bool:
    """Whether a companion serves packages."""
    return source.source == INDEX


def selinux_enforced(path: Path = Path("/sys/fs/selinux/enforce")) -> bool:
    """Whether the kernel enforces SELinux, so that mounts need labels."""
    try:
        return path.read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False


def _same(wanted: str, reference: str) -> bool:
    """Whether two names of images mean the same; a registry that is the default one may be left out."""
    prefixes = ("docker.io/library/", "docker.io/", "")
    plain = [
        next(name[len(prefix) :] for prefix in prefixes if name.startswith(prefix)) for name in (wanted, reference)
    ]
    return plain[0] == plain[1]
