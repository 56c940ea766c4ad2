# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_preflight
short_description: Check everything about a host before anything on it is changed
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Looks for every reason why the host could not be served from the bundle, and names all of them in one message, each
    with what was wanted, what was found, and what to do.
  - "The bundle: signed by somebody who may, readable, complete, nothing missing, truncated or damaged, with all that
    the host needs, and without models that bring code of their own where their entries do not allow it."
  - "The model entries: fields, identifiers, GPUs, and whether their models are in the bundle."
  - "The host: root directory, disk, port, the Python and machine that the wheels are for, GPUs, memory, swap, clock,
    and whether it is cut off from the internet."
  - "For the backend docker: Docker Engine, Compose, the ways to GPUs, the driver that the image's CUDA wants, room for
    the layers that the engine lacks, SELinux."
  - A host that cannot be reached is a finding as well.
  - Changes nothing, with or without check mode.
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.attributes.info
attributes: {}
options:
  bundle:
    description: The directory of the bundle on the controller. A relative path counts from where Ansible was started.
    type: str
    required: true
  cache_dir:
    description: The directory on the controller for the stamps of the bundle. The default is beside the bundle.
    type: str
  signers:
    description:
      - Who may have signed the bundle, the text of an allowed signers file as L(ssh-keygen,
        https://man.openbsd.org/ssh-keygen#ALLOWED_SIGNERS) reads it, or the path of such a file on the controller. With
        it, a bundle that none of them signed is a problem.
      - Needs C(ssh-keygen) of OpenSSH 8.2 or newer on the controller and the host, 8.8 or newer where keys have dates.
      - Empty means that nobody asks who made the bundle.
    type: str
    default: ""
  signers_on_host:
    description: Whether the host will check the signature for itself, so that it must be able to.
    type: bool
    default: true
  root:
    description: The root directory on the host.
    type: str
    required: true
  models:
    description: The model entries of the host, as in its inventory.
    type: list
    elements: raw
    default: []
  registrations:
    description:
      - Custom models that the inventory registers, C(model_type) and C(definition) of each.
      - Entries for those whose definition says where the files are (C(model_uri)) need no source.
    type: list
    elements: dict
    default: []
  backend:
    description: How the host serves.
    type: str
    choices: [docker, native]
    default: native
  gpus:
    description: The host's GPUs that the server may use, by number or UUID as C(nvidia-smi -L) prints them.
    type: list
    elements: str
    default: []
  address:
    description: The address the server shall listen on.
    type: str
    default: 127.0.0.1
  open_allowed:
    description: Whether the server may be reached from other hosts without authentication, or has authentication.
    type: bool
    default: false
  login:
    description:
      - What is wrong with the administrator of a server with authentication. V(missing) has no name or no password,
        V(short) a password that the server would not take.
    type: str
    choices: ["", missing, short]
    default: ""
  port:
    description: The port the server shall listen on. A server of ours on it is no problem.
    type: int
    default: 9997
  python:
    description: The interpreter for the server's environment. Without it one that fits the wheels is looked for.
    type: str
  image:
    description: Name of the image the server runs in, for the backend V(docker).
    type: str
    default: ""
  images:
    description: Names of images the host needs beside that.
    type: list
    elements: str
    default: []
  tools:
    description: Names of programs of the bundle the host needs.
    type: list
    elements: str
    default: []
  engines:
    description:
      - Where launches get packages of engines that the image lacks, as for M(airgap.xinference.xinference_ship).
    type: str
    choices: [image, bundle, wheels, index]
    default: image
  docker_host:
    description: Address of the host's engine, by default what the client there is set up for.
    type: str
  min_memory:
    description: Memory the host must have at least, such as V(64G). More is wanted where the models need more.
    type: str
    default: "0"
  max_clock_skew:
    description: Seconds by which the clocks of host and controller may differ.
    type: float
    default: 300
  airgap_addresses:
    description:
      - Addresses outside of the site, as C(host:port), which the host must not reach. A TCP connection to each is tried
        and nothing is sent. Without any, nothing is tried.
    type: list
    elements: str
    default: []
  airgap_timeout:
    description: Seconds for all these connections together.
    type: float
    default: 2
  require_airgap:
    description: Whether a host that reaches one of them is refused, and not only reported.
    type: bool
    default: false
  report_only:
    description: Return the findings, and do not fail because of them.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Check the host
  airgap.xinference.xinference_preflight:
    bundle: /media/usb/bundle
    root: /opt/xinference
    gpus: [0, 1]
    models:
      - model_uid: bge-m3
        model_name: bge-m3
        model_type: embedding
        model_engine: sentence_transformers
        gpus: [1]
        source:
          modelscope: BAAI/bge-m3
"""

RETURN = r"""
ready:
  description: Whether nothing is in the way.
  returned: success
  type: bool
findings:
  description: Everything that was found. On failure the message has what is in the way.
  returned: success
  type: list
  elements: dict
  contains:
    check:
      description: What was looked at.
      type: str
      sample: port
    wanted:
      description: What has to be there.
      type: str
      sample: 127.0.0.1:9997 free for the server
    found:
      description: What is there.
      type: str
      sample: nginx (pid 4711, user root) listens on 0.0.0.0:9997
    cure:
      description: What to do.
      type: str
      sample: stop that program, or set xinference_port to a free one
    severity:
      description: V(problem) for what is in the way, V(warning) for what is not.
      type: str
      sample: problem
"""
