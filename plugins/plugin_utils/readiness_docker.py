# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a host's Docker Engine, its Compose and its driver can run the server: facts in, findings out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.reference import repository_and_tag
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import image_needs

from .findings import Facts, Finding, Needs

# Oldest versions. The engine: GPUs by device requests and images by digest in the way they are used here, tested with
# this one. Compose: what the module community.docker.docker_compose_v2 asks for (MINIMUM_COMPOSE_VERSION there).
ENGINE = "20.10"
COMPOSE = "2.18.0"
COMPOSE_TOOL = ("tools", "docker-compose")
"""The artifact of the bundle that brings Compose to hosts that lack it."""


def judge_docker(needs: Needs, facts: Facts, bundle: Bundle | None, gpus: bool) -> list[Finding]:
    """Everything about the engine; `gpus` tells whether containers have to get any."""
    engine = facts["engine"]
    carried = COMPOSE_TOOL[1] in needs.tools and bundle is not None and bundle.find(*COMPOSE_TOOL) is not None
    return [
        *judge_engine(engine, facts["machine"]["user"]),
        *judge_compose(engine, carried),
        *(judge_nvidia(engine) if gpus and not engine["problem"] else []),
        *(judge_driver(needs, facts) if gpus else []),
        *judge_labels(needs, facts),
    ]


def judge_engine(engine: Mapping[str, Any], user: str) -> list[Finding]:
    """Whether the engine is there, running, ours to use, and recent enough."""
    wanted, problem = f"a running Docker Engine, {ENGINE} or newer", engine["problem"]
    if not engine["client"]:
        cure = (
            "install Docker Engine from packages of the site (docker.io, docker-ce or moby-engine), or serve natively"
        )
        return [Finding("docker engine", wanted, problem, cure)]
    if "permission denied" in problem.lower():
        cure = "set ansible_become: true, or add the user to the group docker"
        return [Finding("docker engine", f"{user} may use the Docker Engine", problem, cure)]
    if problem:
        cure = "start it (systemctl start docker); `journalctl -u docker` tells why it does not stay up"
        return [Finding("docker engine", wanted, problem, cure)]
    if numbers(engine["version"]) < numbers(ENGINE):
        cure = "install a newer one from packages of the site"
        return [Finding("docker engine", wanted, f"Docker Engine {engine['version']}", cure)]
    return []


def judge_compose(engine: Mapping[str, Any], carried: bool) -> list[Finding]:
    """Whether Compose is the plugin and recent enough, or comes with the bundle (`carried`)."""
    there = engine["compose"]
    if carried or not engine["client"] or (there["v2"] and numbers(there["v2"]) >= numbers(COMPOSE)):
        return []
    wanted = f"the Compose plugin of Docker, {COMPOSE} or newer"
    cure = (
        "install docker-compose-plugin (docker-compose-v2 on Ubuntu) from packages of the site, or carry the plugin in "
        "the bundle as the tool docker-compose"
    )
    if there["v2"]:
        return [Finding("compose", wanted, f"Compose {there['v2']}", cure)]
    if there["v1"]:
        found = (
            f"Compose v1 ({there['v1']}): a program of its own, not maintained since 2023, that does not know what the "
            "project of the server uses"
        )
        return [Finding("compose", wanted, found, cure)]
    return [Finding("compose", wanted, "`docker compose` is no command of the client", cure)]


def judge_nvidia(engine: Mapping[str, Any]) -> list[Finding]:
    """Whether the engine can give GPUs to containers."""
    ways = engine["nvidia"]
    if ways["runtime"] or ways["hook"] or ways["cdi"]:
        return []
    return [
        Finding(
            "nvidia runtime",
            "an engine that gives GPUs to containers",
            "neither the runtime nvidia, nor nvidia-container-runtime-hook, nor descriptions of nvidia.com/gpu (CDI)",
            "install nvidia-container-toolkit from packages of the site, then `nvidia-ctk runtime configure "
            "--runtime=docker` and restart Docker",
        )
    ]


def judge_driver(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether the driver is new enough for the CUDA in the server's image."""
    tag = repository_and_tag(needs.image)[1] if needs.image else ""
    asked = image_needs(tag) if tag else None
    there = facts["gpus"]["list"] if facts["gpus"] else []
    if asked is None or not there:
        return []
    cuda, oldest = asked
    old = sorted({gpu["driver"] for gpu in there if numbers(gpu["driver"]) < [oldest]})
    if not old:
        return []
    return [
        Finding(
            "nvidia driver",
            f"driver {oldest} or newer, for CUDA {cuda} in {needs.image}",
            f"driver {', '.join(old)}",
            f"install a driver {oldest}, or name an image with an older CUDA in xinference_image",
        )
    ]


def judge_labels(needs: Needs, facts: Facts) -> list[Finding]:
    """Whether SELinux lets containers read what is mounted into them."""
    state = facts["selinux"]
    confined = any("name=selinux" in option for option in facts["engine"]["security"])
    if state["mode"] != "enforcing" or not confined or state["labels"]:
        return []
    return [
        Finding(
            "selinux",
            f"a file system below {needs.root} that keeps SELinux labels, which containers need to read it",
            "SELinux is enforcing, and the file system has no labels",
            "choose an xinference_root on a local file system, or mount that one with "
            "context=system_u:object_r:container_file_t:s0",
        )
    ]


def numbers(version: str) -> list[int]:
    """A version as numbers that can be compared; whatever is no number ends it."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return found
