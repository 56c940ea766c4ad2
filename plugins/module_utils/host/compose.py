# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Compose project that runs a server in a container. Pure: data in, data out.

Whatever is in the project and differs makes Compose recreate the container, and nothing else does. So the project
names no release, no model and no secret, and files that are mounted are in it by a hash of their content.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..server.engines import INDEX, INDEX_SERVICE, WHEELS, WHEELS_DIRECTORY, Engines
from ..server.keeper_release import PROGRAM
from . import guarding, hardening, isolation
from .gpus import Given
from .ports import is_address

SERVICE = "server"
KEEPER = "keeper"
PORT = 9997
"""The port inside the container, whatever port is published."""
MODELS = "/models"
PIP_CONF = "pip.conf"
GUARD = "/etc/airgap"
"""Where the container has what `guarded` needs, laid out as in a release."""
START = 'exec "$(command -v python3 || command -v python)" "$0" "$@"'
"""Starts the server through `guarded` with any Python of the image; `guarded` finds the server's own."""
MOUNTED = "airgap.xinference.mounted"
"""The label that changes with the content of mounted files."""
LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")

OWN = ".xinference"
"""What the server keeps, below its home directory in the container."""
CACHES = {
    "huggingface": ".cache/huggingface",
    "modelscope": ".cache/modelscope",
    "vllm": ".cache/vllm",
    "flashinfer": ".cache/flashinfer",
    "triton": ".triton",
}
"""Directories below `cache` on the host, and where libraries look for them below the home directory."""


def places(server: Server) -> Dict[str, str]:
    """The variables that tell a server and its libraries where everything is."""
    home = hardening.home(server.user)
    own = f"{home}/{OWN}"
    found = {
        "XINFERENCE_HOME": own,
        "HF_HOME": f"{home}/{CACHES['huggingface']}",
        "MODELSCOPE_CACHE": f"{home}/{CACHES['modelscope']}",
        # Xinference moves XDG_CACHE_HOME, and what vLLM compiles with it.
        "VLLM_CACHE_ROOT": f"{home}/{CACHES['vllm']}",
        "TRITON_CACHE_DIR": f"{home}/{CACHES['triton']}/cache",
        # FlashInfer adds .cache/flashinfer.
        "FLASHINFER_WORKSPACE_BASE": home,
        # Files that libraries otherwise fetch at the first request; a site puts them here.
        "TIKTOKEN_CACHE_DIR": f"{own}/tiktoken",
        "NLTK_DATA": f"{own}/nltk_data",
    }
    if server.user or server.read_only:
        found["HOME"] = hardening.HOME
    if server.user:
        # Libraries ask for a name, and the image knows none for a number.
        found["USER"] = "xinference"
    if server.isolated:
        found.update(isolation.ENVIRONMENT)
    return found


HEALTH_CHECK = f"""exec "$(command -v python3 || command -v python)" -c '
import os, signal, urllib.error, urllib.request as ask
count = "/tmp/.airgap-half-dead"
try:
    ask.build_opener(ask.ProxyHandler({{}})).open("http://{LOOPBACK}:{PORT}/status", timeout=8)
except urllib.error.HTTPError as error:
    if error.code >= 500:
        open(count, "a").write("xx" if b"refused" in error.read() else "x")
        if os.path.getsize(count) > 4:
            os.remove(count)
            os.kill(1, signal.SIGTERM)
    raise
else:
    if os.path.exists(count):
        os.remove(count)
'"""
"""Asks the server with the image's own Python; no image is sure to have curl.

A server whose worker was killed may live on and answer with nothing but internal errors (1.x does). After five of them,
or three that say that nobody listens behind the API, it is told to end, and the engine starts it anew.
"""

KEEP = 'exec "$(command -v python3 || command -v python)" -E -s "$0" --root "$1" run'
"""Runs the keeper of the release in force with the image's own Python; arguments are the program and the root."""

OWN_SETTINGS = {
    "command": "xinference_server_arguments",
    "environment": "xinference_server_environment or xinference_server_secrets",
    "env_file": "xinference_server_secrets",
    "image": "xinference_image",
    "ports": "xinference_host and xinference_port",
    "read_only": "xinference_server_read_only",
    "user": "xinference_server_user",
    "volumes": "xinference_server_mounts",
}
"""What `options` may not say, as it would take away what the server needs or let everyone read a secret."""
NO_PROJECT = "must begin with a small letter or a digit and go on with these, - and _"
_PROJECT = re.compile(r"[a-z0-9][a-z0-9_-]*\Z")
_SIZE = re.compile(r"\d+(?:\.\d+)? ?[kmgt]?b?\Z", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\Z")
_SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|KEY)\Z", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s:]+:[^/@\s]+@")


@dataclass(frozen=True)
class Mount:
    """A file or directory of the host in the container."""

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Server:
    """What is to be run. `image` and `index_image` are ids; `wheels` is the host's directory of engines' wheels.

    `environment` has no secrets. `guard` are the files of the release that `guarding` is about, empty for a server that
    needs no such start. `mounted` is a hash of the content of mounted files. `options` go over the finished service.
    `gpu_driver` is nvidia or cdi. `keeper` is the user whose files the keeper reads and writes, as `uid:gid`, empty for
    no keeper; `user_namespace` is set where the engine has others. `user` is that of the server, as `uid:gid`, empty
    for the image's own, and `capabilities` are what it keeps. `isolated`: on a network without a way out.
    """

    project: str
    image: str
    command: Tuple[str, ...]
    root: PurePosixPath
    home: str
    host: str
    port: int
    environment: Mapping[str, str]
    guard: Tuple[str, ...]
    gpus: Sequence[Given]
    engines: Engines
    shm_size: str
    ulimits: Mapping[str, Any]
    log_max_size: str
    log_max_files: int
    stop_timeout: int
    start_timeout: int
    selinux: bool = False
    mounts: Sequence[Mount] = ()
    mounted: str = ""
    wheels: str = ""
    index_image: str = ""
    options: Optional[Mapping[str, Any]] = None
    gpu_driver: str = "nvidia"
    keeper: str = ""
    user_namespace: str = ""
    user: str = ""
    capabilities: Sequence[str] = ()
    read_only: bool = True
    isolated: bool = False


def project(server: Server) -> Dict[str, Any]:
    """The Compose file's content. Texts are escaped, so that Compose takes a dollar sign for what it is."""
    services = {SERVICE: merged(_server(server), server.options or {})}
    if server.engines.source == INDEX:
        services[INDEX_SERVICE] = {
            "image": server.index_image,
            "pull_policy": "never",
            "restart": "unless-stopped",
            **hardening.BOUND,
            "cap_add": hardening.INDEX_CAPABILITIES,
            **(isolation.INSIDE if server.isolated else {}),
            "logging": _logging(server),
        }
    if server.keeper:
        services[KEEPER] = _keeper(server)
    networks = {}
    if server.isolated:
        services[isolation.SERVICE] = _ingress(server)
        networks = {"networks": isolation.NETWORKS}
    return _escaped({"name": server.project, "services": services, **networks})


def inner_endpoint(server: Server) -> str:
    """Where another container of the project reaches the server."""
    return f"http://{LOOPBACK if _on_host_network(server) else SERVICE}:{PORT}"


def faults(server: Server, secrets: Iterable[str] = ()) -> List[str]:
    """What Compose or the engine would refuse after the server before was stopped, or would misunderstand.

    `secrets` are the names of secret variables.
    """
    found = []
    if not _PROJECT.match(server.project):
        found.append(f"xinference_server_service is {server.project!r} and {NO_PROJECT}")
    if not 0 < server.port < 65536:
        found.append(f"xinference_port is {server.port} and must be from 1 to 65535")
    if server.host != "localhost" and not is_address(server.host):
        found.append(f"xinference_host is {server.host!r} and must be an IP address of the host, or localhost")
    if not _SIZE.match(server.log_max_size):
        found.append(f"xinference_server_log_max_size is {server.log_max_size!r} and no size such as 100m")
    if server.log_max_files < 1:
        found.append(f"xinference_server_log_max_files is {server.log_max_files} and must be 1 or more")
    names = [str(name) for name in (*server.environment, *secrets) if not _VARIABLE.match(str(name))]
    found += [f"{name!r} is no name of an environment variable" for name in names]
    if server.isolated:
        found += isolation.faults(server.options)
    if _on_host_network(server) and server.host not in EVERYWHERE:
        found.append(
            "xinference_server_container_options.network_mode: on the host's network the server listens on all its "
            f"addresses, and xinference_host is {server.host}; say 0.0.0.0 there, or leave the network"
        )
    return [*found, *_mount_faults(server), *_option_faults(server)]


def _mount_faults(server: Server) -> Iterator[str]:
    """Of two mounts on one place Compose takes one and says nothing. The site may replace caches, and nothing else."""
    home = hardening.home(server.user)
    caches = [f"{home}/{place}" for place in CACHES.values()]
    ours = [mount.target for mount in mounts(replace(server, mounts=())) if mount.target not in caches]
    taken = set(ours)
    for mount in server.mounts:
        target = str(PurePosixPath(mount.target))
        if not target.startswith("/"):
            yield f"xinference_server_mounts: the target {mount.target} does not begin with /"
        elif target in taken:
            yield f"xinference_server_mounts: {target} is taken" + (" by the collection" if target in ours else "")
        taken.add(target)


def _option_faults(server: Server) -> Iterator[str]:
    base = _server(server)
    if server.guard and (server.options or {}).get("entrypoint"):
        yield (
            "xinference_server_container_options.entrypoint: the server has accounts or secrets, and an entrypoint "
            "could start it without them. Leave it out, or say [] to go without the image's"
        )
    for name, value in (server.options or {}).items():
        if name in OWN_SETTINGS:
            yield f"xinference_server_container_options.{name}: use {OWN_SETTINGS[name]}"
        elif isinstance(base.get(name), Mapping) and value is not None and not isinstance(value, Mapping):
            yield f"xinference_server_container_options.{name} must be a mapping, or it replaces what is needed"


def directories(server: Server) -> List[str]:
    """The directories on the host that have to be there before the container."""
    kept = [str(server.root / "state")] if server.keeper else []
    return [*written(server.root, server.home), str(server.root / "models"), *kept]


def written(root: PurePosixPath, home: str) -> List[str]:
    """The directories on the host that the server writes; `home` is what it keeps."""
    return [home, *(str(root / "cache" / name) for name in CACHES)]


def mounts(server: Server) -> List[Mount]:
    """All files and directories of the host that the container sees."""
    home = hardening.home(server.user)
    found = [Mount(server.home, f"{home}/{OWN}", False), Mount(str(server.root / "models"), MODELS)]
    found += [Mount(str(server.root / "cache" / name), f"{home}/{place}", False) for name, place in CACHES.items()]
    if server.engines.source == WHEELS:
        found.append(Mount(server.wheels, WHEELS_DIRECTORY))
    if server.engines.pip_conf:
        # Through `current`, so that another release alone does not change the project.
        found.append(Mount(str(server.root / "current" / PIP_CONF), "/etc/pip.conf"))
    found += [Mount(str(server.root / "current" / name), f"{GUARD}/{name}") for name in server.guard]
    return [*found, *server.mounts]


def split_secrets(environment: Mapping[str, str]) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Variables that may be read by everyone, and those whose name or value says that they may not."""
    secret = {
        name: value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) or _SECRET_VALUE.search(str(value))
    }
    return {name: value for name, value in environment.items() if name not in secret}, secret


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Dict[str, Any]:
    """Two mappings as one, mappings in them too; anything else in `over` replaces what is in `base`."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def published(host: str) -> List[str]:
    """Addresses to publish the port on: the one asked for, and loopback for the collection's own modules."""
    host = LOOPBACK if host == "localhost" else host
    return [host] if host in (*EVERYWHERE, LOOPBACK) else [host, LOOPBACK]


def _server(server: Server) -> Dict[str, Any]:
    service: Dict[str, Any] = {
        "image": server.image,
        "pull_policy": "never",
        "command": _command(server),
        "restart": "unless-stopped",
        "environment": {**places(server), **server.environment},
        **_network(server),
        "volumes": [_volume(mount, server.selinux) for mount in mounts(server)],
        "shm_size": server.shm_size,
        **hardening.server(server.user, server.read_only, server.capabilities),
        "healthcheck": {
            "test": ["CMD-SHELL", HEALTH_CHECK],
            "interval": "10s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{server.start_timeout}s",
        },
        "logging": _logging(server),
        "stop_grace_period": f"{server.stop_timeout}s",
    }
    if server.ulimits:
        service["ulimits"] = dict(server.ulimits)
    if server.mounted:
        service["labels"] = {MOUNTED: server.mounted}
    if server.engines.source == INDEX:
        service["depends_on"] = [INDEX_SERVICE]
    if server.gpus:
        names = [f"nvidia.com/gpu={gpu.index}" if server.gpu_driver == "cdi" else gpu.name for gpu in server.gpus]
        device = {"driver": server.gpu_driver, "device_ids": names, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    else:
        # Images of CUDA ask for all GPUs, which an engine with nvidia's runtime as its default one would give.
        without = {"NVIDIA_VISIBLE_DEVICES": "void", "CUDA_VISIBLE_DEVICES": "-1"}
        service["environment"] = {**without, **service["environment"]}
    service["environment"] = dict(sorted(service["environment"].items()))
    return service


def _command(server: Server) -> List[str]:
    if not server.guard:
        return list(server.command)
    return ["/bin/sh", "-c", START, *guarding.command(GUARD, server.guard, server.command)]


def _keeper(server: Server) -> Dict[str, Any]:
    """The keeper: the server's image, its own little container, so that neither ends with the other.

    It follows `current` by itself, so nothing in here changes with a release.
    """
    service: Dict[str, Any] = {
        **_little(server),
        "entrypoint": ["/bin/sh", "-c", KEEP, str(server.root / "current" / PROGRAM), str(server.root)],
        "volumes": [
            _volume(Mount(str(server.root), str(server.root)), server.selinux),
            _volume(Mount(str(server.root / "state"), str(server.root / "state"), False), server.selinux),
        ],
        "user": server.keeper,
    }
    if server.user_namespace:
        service["userns_mode"] = server.user_namespace
    if server.isolated:
        service.update(isolation.INSIDE)
    elif _on_host_network(server):
        service["network_mode"] = "host"
    elif (server.options or {}).get("networks"):
        service["networks"] = list((server.options or {})["networks"])
    return service


def _ingress(server: Server) -> Dict[str, Any]:
    """The way to an isolated server: the server's image, and the one program that it is to run.

    It is mounted through `current`, so that another release alone does not change the project.
    """
    program = Mount(str(server.root / "current" / isolation.PROGRAM), isolation.TARGET)
    return {
        **_little(server),
        **isolation.service(SERVICE, PORT),
        "ports": _ports(server),
        "volumes": [_volume(program, server.selinux)],
        "labels": {MOUNTED: hashlib.sha256(isolation.program().encode()).hexdigest()[:16]},
    }


def _little(server: Server) -> Dict[str, Any]:
    """What is the same for all programs of ours that stand beside the server."""
    return {
        "image": server.image,
        "pull_policy": "never",
        "restart": "unless-stopped",
        # No GPU, also where the engine's default runtime would give it all.
        "environment": {"CUDA_VISIBLE_DEVICES": "-1", "NVIDIA_VISIBLE_DEVICES": "void"},
        **hardening.SEALED,
        "healthcheck": {"disable": True},
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
        "stop_grace_period": "10s",
    }


def _network(server: Server) -> Dict[str, Any]:
    """Where the server can be reached: at its published port, or from inside a network of its own alone."""
    return isolation.INSIDE if server.isolated else {"ports": _ports(server)}


def _on_host_network(server: Server) -> bool:
    return (server.options or {}).get("network_mode") == "host"


def _ports(server: Server) -> List[Dict[str, Any]]:
    return [_port(address, server.port) for address in published(server.host)]


def _port(address: str, port: int) -> Dict[str, Any]:
    return {"target": PORT, "published": str(port), "host_ip": address, "protocol": "tcp"}


def _volume(mount: Mount, selinux: bool) -> Dict[str, Any]:
    volume: Dict[str, Any] = {"type": "bind", "source": mount.source, "target": mount.target}
    if mount.read_only:
        volume["read_only"] = True
    volume["bind"] = {"create_host_path": False, **({"selinux": "z"} if selinux else {})}
    return volume


def _logging(server: Server) -> Dict[str, Any]:
    return {
        "driver": "json-file",
        "options": {"max-size": server.log_max_size, "max-file": str(server.log_max_files)},
    }


def _escaped(value: Any) -> Any:
    """The same with every dollar sign doubled, as Compose wants it."""
    if isinstance(value, Mapping):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(each) for each in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
