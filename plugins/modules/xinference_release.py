#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the release that says what a host serves, and put it in force."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_release
short_description: Make the release that says what a host serves, and put it in force
version_added: "0.1.0"
description:
  - Writes C(<root>/releases/<id>), an immutable directory with the definition of the server, the desired models, the
    list of what was shipped, and how the server sees the host. Its id is a hash of its content.
  - A server with a definition (O(service)) runs natively, and the release holds the programs that run and control it.
    A server in a container (O(container)) is a Compose project, in C(compose.yaml).
  - Then points C(<root>/current) at it, in one step.
  - Restarts nothing. M(airgap.xinference.xinference_service) does when the definition of the server differs, and
    M(community.docker.docker_compose_v2) when the project does; the list of models is in neither.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  service:
    description: Definition of a native server. One of this and O(container) is required.
    type: dict
    suboptions:
      name:
        description: Name of the systemd unit or of supervisord's program.
        type: str
        default: xinference
      manager:
        description: What starts the server again when it dies; V(auto) is systemd for root where systemd runs the host.
        type: str
        choices: [auto, systemd, supervisord]
        default: auto
      command:
        description: The command with its arguments; first of all the interpreter of the virtual environment.
        type: list
        elements: str
        required: true
      environment:
        description: The whole environment of the server. It gets no other variable.
        type: dict
        required: true
      directory:
        description: Working directory of the server.
        type: path
        required: true
      host:
        description: Address the server listens on.
        type: str
        required: true
      port:
        description: Port the server listens on.
        type: int
        required: true
      stop_timeout:
        description: Seconds the server may take to stop before it is killed.
        type: int
        default: 30
      user:
        description:
          - As whom systemd runs the server; the user is made where there is none. Empty means C(xinference).
          - Under supervisord it is whoever starts it.
        type: str
        default: ""
      writable:
        description: More directories that a server under systemd may write. They are given to its user.
        type: list
        elements: path
        default: []
  container:
    description: Definition of a server in a container.
    type: dict
    suboptions:
      project:
        description: Name of the Compose project.
        type: str
        default: xinference
      image:
        description:
          - The image, by its name in the engine or in the bundle. It must have been shipped; the project names it by
            its id, so that no other image is ever run under that name.
          - Empty means the only one that was shipped.
        type: str
        default: ""
      version:
        description: Version of the server, where the tag of the image does not begin with it.
        type: str
        default: ""
      command:
        description: The command with its arguments.
        type: list
        elements: str
        required: true
      environment:
        description: Variables of the collection.
        type: dict
        default: {}
      overrides:
        description:
          - Variables of the inventory, which come before all others. V(null) takes a variable away.
          - A variable whose name ends in TOKEN, SECRET, PASSWORD, KEY or the like, or whose value is an address with a
            password, goes to a file that only its owner can read, like those of O(secrets).
        type: dict
        default: {}
      gpus:
        description: The host's GPUs the server is given, by number or UUID. None means that it runs on processors.
        type: list
        elements: raw
        default: []
      host:
        description: Address the port is published on. Loopback always is one more.
        type: str
        required: true
      port:
        description: Port that is published.
        type: int
        required: true
      home:
        description: Directory of what the server keeps.
        type: path
        required: true
      engines:
        description:
          - Where a launch gets packages of an engine that the image lacks. V(image) means nowhere, and nothing is
            installed.
          - V(wheels) is the artifact C(wheels/engines) of the bundle, for Xinference 4.0 and later. V(index) is an
            image that serves an index, O(container.index_image). V(bundle) is whichever suits the server's version.
        type: str
        choices: [image, bundle, wheels, index]
        default: image
      index_image:
        description: Image that serves an index of packages on port 8080, by its name in the engine or in the bundle.
        type: str
        default: ""
      shm_size:
        description: Size of C(/dev/shm), as Compose writes it.
        type: str
        default: 16g
      ulimits:
        description: Limits of processes, as Compose writes them.
        type: dict
        default: {}
      log_max_size:
        description: Size at which the container's log is rotated, as Docker writes it.
        type: str
        default: 100m
      log_max_files:
        description: How many files of the log are kept.
        type: int
        default: 10
      stop_timeout:
        description: Seconds the server may take to stop before it is killed.
        type: int
        default: 30
      start_timeout:
        description: Seconds the server may take until it answers before it counts as unhealthy.
        type: int
        default: 180
      selinux:
        description: Whether mounts get SELinux labels; V(auto) where the kernel enforces SELinux.
        type: str
        choices: [auto, "yes", "no"]
        default: auto
      user:
        description:
          - As whom the container runs, a number or C(uid:gid). What the server writes on the host is given to them.
          - Empty means the user of the image.
        type: str
        default: ""
      read_only:
        description:
          - Whether the container's own files are read-only, so that the server writes to its mounted directories and to
            memory, and nowhere else. V(auto) means yes.
        type: str
        choices: [auto, "yes", "no"]
        default: auto
      isolated:
        description:
          - Whether the server is on a network without a way out. The port is then published by a container beside it,
            which passes connections on and begins none.
        type: bool
        default: false
      mounts:
        description: More files and directories of the host. A file whose content changes recreates the container.
        type: list
        elements: dict
        default: []
        suboptions:
          source:
            description: Path on the host.
            type: path
            required: true
          target:
            description: Path in the container.
            type: str
            required: true
          read_only:
            description: Whether the container may only read it.
            type: bool
            default: true
      options:
        description: Anything else that Compose knows of a service; it is laid over what the collection writes.
        type: dict
        default: {}
  secrets:
    description:
      - Variables whose values are secret. They come before all others, and are kept in a file that only its owner can
        read.
    type: dict
    default: {}
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
  models:
    description: The models the host shall serve, as in the inventory.
    type: list
    elements: dict
    default: []
  registrations:
    description:
      - Custom models that the keeper registers when the server lost them, with C(model_type) and C(definition).
    type: list
    elements: dict
    default: []
  keeper:
    description: How the keeper looks after the models. Without it the release has none.
    type: dict
    suboptions:
      policy:
        description:
          - What happens to a model that somebody stopped or changed by hand. V(restore) puts it back, V(report) leaves
            it and counts it as drift in the metrics, V(leave) leaves it. Faults are mended in any case.
        type: str
        choices: [restore, report, leave]
        default: restore
      interval:
        description: Seconds between two questions to the server, from 1 to 60.
        type: float
        default: 5
      grace:
        description: Seconds for which what is new in a release is left to Ansible.
        type: float
        default: 60
      wait_timeout:
        description: Seconds one launch may take before it is cancelled, at least 1.
        type: float
        default: 1800
      parallel:
        description: How many models are launched at the same time, at least 1.
        type: int
        default: 4
      verify:
        description: Seconds between two probes of one model; 0 for none.
        type: float
        default: 600
  accounts:
    description:
      - Asks for authentication. The release then starts the server through C(bin/guarded.py), which makes the
        administrator before anything listens, at every start, or starts nothing.
      - Kept in a file for its owner only, and never in the environment of a container.
    type: dict
    suboptions:
      username:
        description: The administrator.
        type: str
        required: true
      password:
        description: Password for the account when it is made.
        type: str
        required: true
      reset:
        description: Whether an account that is there gets the password and the rights of an administrator too.
        type: bool
        default: false
      api_keys:
        description: Keys of clients that the server has before it listens.
        type: list
        elements: dict
        default: []
        suboptions:
          name:
            description: Name of the client.
            type: str
            required: true
          key:
            description: Its key, C(sk-) and 13 letters or digits.
            type: str
            required: true
  login:
    description: Credentials for the keeper, where the server asks for them; kept in a file for its owner only.
    type: dict
    default: {}
    suboptions:
      username:
        description: User to log in as.
        type: str
      password:
        description: Password of that user.
        type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Values of variables whose name ends in TOKEN, SECRET, PASSWORD or KEY are left out.
  idempotent:
    support: full
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Put the release in force
  airgap.xinference.xinference_release:
    root: /opt/xinference
    service:
      command: [/opt/xinference/venvs/1f0c9a3be2d4/bin/python, /opt/xinference/venvs/1f0c9a3be2d4/bin/xinference-local]
      environment:
        XINFERENCE_HOME: /opt/xinference/home
      directory: /opt/xinference/home
      host: 127.0.0.1
      port: 9997
    models: "{{ xinference_models }}"

- name: Put a release with a container in force
  airgap.xinference.xinference_release:
    root: /opt/xinference
    container:
      image: xprobe/xinference:v4.1.0
      command: [xinference-local, --host, 0.0.0.0, --port, "9997"]
      gpus: [0, 1]
      home: /opt/xinference/home
      host: 127.0.0.1
      port: 9997
    models: "{{ xinference_models }}"
"""

RETURN = r"""
release:
  description: Id of the release.
  returned: success
  type: str
  sample: 5d41402abc4b
previous:
  description: Id of the release that was in force before; V(null) when there was none.
  returned: success
  type: str
  sample: 9f2c1e07aa53
redefined:
  description:
    - Whether a native server is started from something else than before. The list of models is not part of it.
    - No text tells, for Ansible blots out of a result whatever is a secret, be it one digit.
  returned: with O(service)
  type: bool
keeper:
  description: Whether the release has a keeper.
  returned: success
  type: bool
directory:
  description: Directory of the release.
  returned: success
  type: str
  sample: /opt/xinference/releases/5d41402abc4b
"""

import contextlib
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Mapping, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import DiscreetModule, failing, hide
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    compose,
    container_user,
    definition,
    docker_release,
    facts,
    guarding,
    keeper_app,
    modes,
    native_run,
    release,
    service_user,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.backends import OtherBackend, refuse_other
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Docker, DockerError
from ansible_collections.airgap.xinference.plugins.module_utils.host.engine_facts import gpu_driver
from ansible_collections.airgap.xinference.plugins.module_utils.host.gpus import Given, given
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import ServiceError, locked
from ansible_collections.airgap.xinference.plugins.module_utils.host.service import endpoint

SERVICE = {
    "name": {"type": "str", "default": "xinference"},
    "manager": {"type": "str", "choices": ["auto", "systemd", "supervisord"], "default": "auto"},
    "command": {"type": "list", "elements": "str", "required": True},
    "environment": {"type": "dict", "required": True},
    "directory": {"type": "path", "required": True},
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "stop_timeout": {"type": "int", "default": 30},
    "user": {"type": "str", "default": ""},
    "writable": {"type": "list", "elements": "path", "default": []},
}
MOUNT = {
    "source": {"type": "path", "required": True},
    "target": {"type": "str", "required": True},
    "read_only": {"type": "bool", "default": True},
}
CONTAINER = {
    "project": {"type": "str", "default": "xinference"},
    "image": {"type": "str", "default": ""},
    "version": {"type": "str", "default": ""},
    "command": {"type": "list", "elements": "str", "required": True},
    "environment": {"type": "dict", "default": {}},
    "overrides": {"type": "dict", "default": {}},
    "gpus": {"type": "list", "elements": "raw", "default": []},
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "home": {"type": "path", "required": True},
    "engines": {"type": "str", "choices": ["image", "bundle", "wheels", "index"], "default": "image"},
    "index_image": {"type": "str", "default": ""},
    "shm_size": {"type": "str", "default": "16g"},
    "ulimits": {"type": "dict", "default": {}},
    "log_max_size": {"type": "str", "default": "100m"},
    "log_max_files": {"type": "int", "default": 10},
    "stop_timeout": {"type": "int", "default": 30},
    "start_timeout": {"type": "int", "default": 180},
    "selinux": {"type": "str", "choices": ["auto", "yes", "no"], "default": "auto"},
    "user": {"type": "str", "default": ""},
    "read_only": {"type": "str", "choices": ["auto", "yes", "no"], "default": "auto"},
    "isolated": {"type": "bool", "default": False},
    "mounts": {"type": "list", "elements": "dict", "default": [], "options": MOUNT},
    "options": {"type": "dict", "default": {}},
}
KEEPER = {
    "policy": {"type": "str", "choices": ["restore", "report", "leave"], "default": "restore"},
    "interval": {"type": "float", "default": 5},
    "grace": {"type": "float", "default": 60},
    "wait_timeout": {"type": "float", "default": 1800},
    "parallel": {"type": "int", "default": 4},
    "verify": {"type": "float", "default": 600},
}
CLIENT = {"name": {"type": "str", "required": True}, "key": {"type": "str", "required": True, "no_log": True}}
ACCOUNTS = {
    "username": {"type": "str", "required": True},
    "password": {"type": "str", "required": True, "no_log": True},
    "reset": {"type": "bool", "default": False},
    "api_keys": {"type": "list", "elements": "dict", "default": [], "options": CLIENT, "no_log": False},
}
LOGIN = {"username": {"type": "str"}, "password": {"type": "str", "no_log": True}}


def main() -> None:
    module = DiscreetModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "service": {"type": "dict", "options": SERVICE},
            "container": {"type": "dict", "options": CONTAINER},
            "secrets": {"type": "dict", "no_log": True, "default": {}},
            "accounts": {"type": "dict", "options": ACCOUNTS},
            "docker_host": {"type": "str"},
            "models": {"type": "list", "elements": "dict", "default": []},
            "registrations": {"type": "list", "elements": "dict", "default": []},
            "keeper": {"type": "dict", "options": KEEPER},
            "login": {"type": "dict", "options": LOGIN, "default": {}},
        },
        mutually_exclusive=[("service", "container")],
        required_one_of=[("service", "container")],
        supports_check_mode=True,
    )
    hide(module, *(module.params[name] for name in ("service", "container", "models", "registrations")))
    root = Path(module.params["root"])
    result: Dict[str, Any] = {}
    # Two plays on one host: the second waits.
    alone = contextlib.nullcontext() if module.check_mode else locked(root)
    with failing(module, ValueError):
        keeper_app.refuse_faults(module.params["keeper"] or {})
        modes.refuse_shared(root, [*homes(module), *(module.params["service"] or {}).get("writable", [])])
    with failing(module, OSError, ValueError, DockerError, OtherBackend, ServiceError, release.ReleaseError), alone:
        if module.params["service"]:
            files = native(module, root)
            result["redefined"] = definition.digest(files) != native_run.digest(root)
        else:
            files = container(module, root)
        plugin = docker_release.compose_plugin(definition.shipped(root)) if module.params["container"] else None
        wanted, previous = release.identity(files), release.current(root)
        before = release.read(root / "current")
        user, others = owner(module, root)
        runs_as = service_user_of(files)
        group = int(user.partition(":")[2]) if user else service_user.group_of(runs_as)
        changed = wanted != previous or not release.whole(root, files, group) or service_user.missing(runs_as)
        changed = changed or bool(others or modes.too_open(root, homes(module)))
        if changed and not module.check_mode:
            refuse_other(root, "native" if module.params["service"] else "docker", module.params["docker_host"])
            if service_user.missing(runs_as):
                service_user.make(runs_as, json.loads(files["service.json"].text)["directory"])
                group = service_user.group_of(runs_as)
            release.make(root, files, group)
            if module.params["container"]:
                check_project(module, root, wanted, str(plugin or ""))
            if others:
                docker_release.stop(Docker(module.params["docker_host"]), root)
                container_user.hand_over(user, others)
            release.switch(root, wanted)
            modes.close(modes.too_open(root, homes(module)))
        if plugin and docker_release.link_plugin(plugin, module.check_mode):
            changed = True
    result["keeper"] = module.params["keeper"] is not None
    result.update(release=wanted, previous=previous, directory=str(root / release.RELEASES / wanted))
    if module._diff and changed:
        result["diff"] = release.difference(before, {path: entry.text for path, entry in files.items()})
    module.exit_json(changed=changed, **result)


def native(module: AnsibleModule, root: Path) -> Dict[str, release.Entry]:
    """The files of a release that runs natively."""
    service = dict(module.params["service"])
    secrets = texts(module.params["secrets"])
    service["environment"] = {
        name: value for name, value in texts(service["environment"]).items() if name not in secrets
    }
    service["user"] = service_user.user_of(service["user"], service["manager"])
    service_user.refuse_closed(service["user"], [str(root / "x"), service["command"][0], service["directory"]])
    guard = guarding.files(secrets, module.params["accounts"] or {}, seed(module, root), bool(service["user"]))
    numbers = service["environment"].get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus_of([number for number in numbers if number.isdigit()])
    mine = {"pid_file": str(root / native_run.STATE), "mark": f"{native_run.MARK}={root}"}
    keeper = keeper_files(module, endpoint(service), **mine)
    shipped = definition.shipped(root)
    return definition.files(root, service, module.params["models"], shipped, gpus, keeper, guard)


def texts(variables: Mapping[str, Any]) -> Dict[str, str]:
    """Variables of an environment as texts."""
    return {name: str(value) for name, value in variables.items()}


def seed(module: AnsibleModule, root: Path) -> str:
    """The seed of the host; check mode keeps none that it makes."""
    return guarding.seed(root, not module.check_mode)


def service_user_of(files: Mapping[str, release.Entry]) -> str:
    """As whom the native server of a release runs; empty where the release does not say."""
    return str(json.loads(files["service.json"].text).get("user") or "") if "service.json" in files else ""


def keeper_files(module: AnsibleModule, where: str, **more: str) -> Dict[str, release.Entry]:
    """The files of the keeper, which reaches the server at `where`, with `more` of its settings; none without one."""
    told = module.params["keeper"]
    if told is None:
        return {}
    registrations, login = module.params["registrations"], module.params["login"]
    return keeper_app.files({**told, **more}, where, registrations, login, definition.json_text)


def container(module: AnsibleModule, root: Path) -> Dict[str, release.Entry]:
    """The files of a release that runs in a container; makes the directories that the container will see."""
    wanted, artifacts = module.params["container"], definition.shipped(root)
    if module.check_mode and not artifacts.get("images"):
        artifacts = foretold(artifacts, [wanted["image"], wanted["index_image"]])
    docker = Docker(module.params["docker_host"])
    image = docker_release.image_of(artifacts, wanted["image"])
    found = docker_release.features_of(wanted["version"], image.reference)
    source, wheels = docker_release.engines_of(wanted["engines"], found, artifacts)
    index_image = ""
    if docker_release.needs_index(source):
        index = docker_release.image_of(artifacts, wanted["index_image"], "xinference_server_index_image")
        index_image = engine_id(module, docker, index)
    info = docker.info()
    user = container_user.user_of(wanted["user"], info)
    written = compose.written(PurePosixPath(root), wanted["home"])
    environment, secrets = docker_release.environment_of(wanted, source, module.params["secrets"])
    own = seed(module, root)
    guard = guarding.files(secrets, module.params["accounts"] or {}, own, bool(user))
    server = docker_release.server_from(
        wanted,
        root,
        engine_id(module, docker, image),
        index_image,
        environment,
        gpus_of(wanted["gpus"]),
        source,
        wheels,
        gpu_driver(info) if wanted["gpus"] else "nvidia",
        docker_release.keeper_user(root, info) if module.params["keeper"] is not None else ("", ""),
        guard,
        own,
        (user, container_user.capabilities(user, written, info)),
    )
    docker_release.refuse_strangers(docker, root, wanted["project"])
    docker_release.refuse_faults(server, secrets, not module.check_mode)
    if not module.check_mode:
        for directory in compose.directories(server):
            Path(directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    keeper = keeper_files(module, compose.inner_endpoint(server))
    return docker_release.files(server, module.params["models"], artifacts, guard, keeper)


def homes(module: AnsibleModule) -> List[str]:
    """Where the server keeps what it keeps."""
    return [
        one[key] for one, key in ((module.params["container"], "home"), (module.params["service"], "directory")) if one
    ]


def owner(module: AnsibleModule, root: Path) -> Tuple[str, List[str]]:
    """As whom a container of its own user runs, and the directories that have to be given to that user first."""
    wanted = module.params["container"]
    if not wanted or not wanted["user"]:
        return "", []
    user = container_user.user_of(wanted["user"], {})
    return user, container_user.not_theirs(user, compose.written(PurePosixPath(root), wanted["home"]))


def check_project(module: AnsibleModule, root: Path, wanted: str, plugin: str) -> None:
    """Raise ContainerError, and leave no trace, when Compose does not take the release that was written."""
    directory = root / release.RELEASES / wanted
    try:
        docker_release.refuse_project(Docker(module.params["docker_host"]), directory, plugin)
    except docker_release.ContainerError:
        if release.current(root) != wanted:
            shutil.rmtree(directory)
        raise


def gpus_of(wanted: List[Any]) -> List[Given]:
    """The GPUs of the inventory as the host knows them."""
    if not wanted:
        return []
    there = facts.gpus()
    return given(wanted, there["list"], there["problem"])


def engine_id(module: AnsibleModule, docker: Docker, image: docker_release.Image) -> str:
    """What the engine calls an image that was shipped. Raises DockerError when it lost it."""
    found = docker.image_id(image.ids)
    if found is None and not module.check_mode:
        raise DockerError(
            f"{image.reference} ({image.ids[0]}) was shipped to this host, but its Docker Engine does not have it any "
            "more. Run playbooks/ship.yml, which loads it again."
        )
    return found or image.ids[0]


def foretold(artifacts: Mapping[str, Any], references: List[str]) -> Dict[str, Any]:
    """What shipping will have recorded about images, for check mode before the first run."""
    entries = {name: {"reference": name, "image_id": name, "digest": name} for name in references if name}
    return {**artifacts, "images": entries or {"": {"reference": "", "image_id": "", "digest": ""}}}


if __name__ == "__main__":
    main()
