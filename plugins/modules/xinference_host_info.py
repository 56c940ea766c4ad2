# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell what a host offers to a bundle."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_host_info
short_description: Tell what a host offers for serving from a bundle
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Reads the facts that M(airgap.xinference.xinference_preflight) judges. Changes nothing and judges nothing.
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.attributes.info
attributes: {}
options:
  root:
    description: The root directory, whether it exists or not.
    type: path
    required: true
  address:
    description: The address a server shall listen on.
    type: str
    default: 127.0.0.1
  port:
    description: The TCP port a server shall listen on. Without it no port is looked at.
    type: int
  python:
    description: Name or path of the interpreter the server's environment shall be built with. Without it one is chosen.
    type: str
  python_tag:
    description: The Python the wheels were compiled for, such as V(cp311). Without it no interpreter is looked for.
    type: str
  gpus:
    description: Whether to ask C(nvidia-smi) for the GPUs.
    type: bool
    default: false
  engine:
    description: Whether to ask the Docker Engine what it is and has.
    type: bool
    default: false
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
  addresses:
    description:
      - Addresses outside of the site, as C(host:port). A TCP connection to each is tried, and nothing is sent.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds for all these connections together.
    type: float
    default: 2
"""

EXAMPLES = r"""
- name: Look at the host
  airgap.xinference.xinference_host_info:
    root: /opt/xinference
    port: 9997
    python_tag: cp311
    gpus: true
    addresses: ["huggingface.co:443"]
  register: host
"""

RETURN = r"""
machine:
  description: Architecture, system, C library, user and number of processors.
  returned: success
  type: dict
  sample: {architecture: x86_64, libc: glibc, libc_version: "2.36", processors: 64, system: Linux, user: root}
python:
  description: The interpreter that fits, or why there is none; null when none was looked for.
  returned: success
  type: dict
  sample: {path: /usr/bin/python3.11, problem: ""}
place:
  description: The nearest existing directory of the root, who may write there, and the bytes that are free.
  returned: success
  type: dict
  sample:
    {existing: /opt, free_bytes: 81604378624, mode: "0755", noexec: false, obstacle: "", owner: root, read_only: false,
     writable: true}
contents:
  description: Sizes of the blobs and received parts in the store by digest, and the names of built directories.
  returned: success
  type: dict
  sample: {blobs: {}, lib: [], partial: {}, venvs: []}
listeners:
  description: Programs that keep the server from its port. C(ours) is true for those that run from below the root.
  returned: success
  type: list
  elements: dict
  sample: [{address: 127.0.0.1, ours: false, pid: 4711, program: nginx, user: root}]
address_problem:
  description: Why nothing can listen on O(address) of the host; empty when something can.
  returned: success
  type: str
  sample: "10.1.2.3: Cannot assign requested address"
gpus:
  description: The GPUs, and why there is no list of them; null when not asked for.
  returned: success
  type: dict
  sample: {list: [{driver: 580.65.06, index: 0, name: NVIDIA L40S, uuid: GPU-6b8d…}], problem: ""}
memory:
  description: Bytes of memory and swap.
  returned: success
  type: dict
  sample: {available: 515396075520, swap_free: 8589930496, swap_total: 8589930496, total: 540946751488}
clock:
  description: Seconds since 1970, as the host believes.
  returned: success
  type: float
  sample: 1795156000.25
selinux:
  description: The mode, and whether the file system of the root keeps labels.
  returned: success
  type: dict
  sample: {labels: true, mode: enforcing}
reached:
  description: Those of O(addresses) that answered.
  returned: success
  type: list
  elements: str
engine:
  description: The engine, its Compose, its ways to GPUs, the layers it has; null when not asked for.
  returned: success
  type: dict
  sample:
    {client: /usr/bin/docker, compose: {v1: "", v2: 2.26.1}, containerd: false,
     data: {device: 41, free_bytes: 81604378624, path: /var/lib/docker}, images: [],
     nvidia: {cdi: [], hook: /usr/bin/nvidia-container-runtime-hook, runtime: true}, problem: "", publishers: [],
     security: ["name=seccomp,profile=default"], version: 20.10.24}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils.host import engine_facts, facts, ports, system_facts


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "address": {"type": "str", "default": "127.0.0.1"},
            "port": {"type": "int"},
            "python": {"type": "str"},
            "python_tag": {"type": "str"},
            "gpus": {"type": "bool", "default": False},
            "engine": {"type": "bool", "default": False},
            "docker_host": {"type": "str"},
            "addresses": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 2},
        },
        supports_check_mode=True,
    )
    options = module.params
    module.exit_json(
        changed=False,
        machine=facts.machine(),
        python=facts.interpreter(options["python_tag"], options["python"]) if options["python_tag"] else None,
        place=facts.place(options["root"]),
        contents=facts.contents(options["root"]),
        listeners=ports.listeners(options["port"], options["address"], options["root"]) if options["port"] else [],
        address_problem=ports.cannot_listen(options["address"]),
        gpus=facts.gpus() if options["gpus"] else None,
        memory=system_facts.memory(),
        clock=system_facts.clock(),
        selinux=system_facts.selinux(options["root"]),
        reached=system_facts.reached(options["addresses"], options["timeout"]),
        engine=engine_facts.look(options["root"], options["port"], options["docker_host"])
        if options["engine"]
        else None,
    )


if __name__ == "__main__":
    main()
