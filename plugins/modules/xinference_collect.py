#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_collect; the archive is made by module_utils/host/support_pack.py, the action plugin keeps it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_collect
short_description: Pack logs and configuration of a host for support, without secrets
version_added: "0.1.0"
description:
  - Packs configuration of the release in force, logs, what the engine says of the containers, and what the host is
    like, into one archive on the controller, C(HOST-TIME.tar.gz), which only its owner can read.
  - "Every secret is taken out: values by their names, everything that the files of secrets on the host hold wherever it
    stands (also in base64 and in URLs), and what looks like a key, a token or a private key. Databases and files of
    keys are never packed."
  - Only a list of known places is looked at. Writes nothing on the host.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  directory:
    description: Directory on the controller for the archive. It is made when it is not there.
    type: str
    required: true
  limit:
    description: How much of each log is packed, from its end, such as V(5M).
    type: str
    default: 5M
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
  hide:
    description: Further texts to take out, which the host does not know. Each has at least four characters.
    type: list
    elements: str
    default: []
  diagnosis:
    description: What M(airgap.xinference.xinference_diagnose) returned, to be packed as well.
    type: dict
    default: {}
  name:
    description: What the archive is called after. By default the host as the inventory names it.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Packs nothing.
  diff_mode:
    support: none
  idempotent:
    support: none
    details:
      - Every run makes another archive; that does not count as a change of the host.
seealso:
  - module: airgap.xinference.xinference_diagnose
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Pack what support needs
  airgap.xinference.xinference_collect:
    root: /opt/xinference
    directory: support
    limit: 20M
"""

RETURN = r"""
path:
  description: The archive on the controller; empty in check mode.
  returned: success
  type: str
  sample: support/gpu-1-20261120T210312Z.tar.gz
size:
  description: Its size in bytes.
  returned: success
  type: int
  sample: 312004
files:
  description: The files in it.
  returned: success
  type: list
  elements: str
  sample: [README.txt, diagnosis.json, logs/server.log, release/compose.yaml]
"""

import base64
from pathlib import Path
from typing import Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import bytes_of
from ansible_collections.airgap.xinference.plugins.module_utils.host.support_pack import Leak, pack
from ansible_collections.airgap.xinference.plugins.module_utils.masking import SHORTEST

BREAK = "\x1e"
"""Between pieces of the archive; no part of base64, and nobody's secret has it."""


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "directory": {"type": "str", "required": True},
            "limit": {"type": "str", "default": "5M"},
            "docker_host": {"type": "str"},
            "hide": {"type": "list", "elements": "str", "default": [], "no_log": True},
            "diagnosis": {"type": "dict", "default": {}},
            "name": {"type": "str"},
        },
        supports_check_mode=True,
    )
    options = module.params
    with failing(module, Leak, ValueError):
        limit = bytes_of(options["limit"])
        if any(len(text.strip()) < SHORTEST for text in options["hide"]):
            raise ValueError(
                f"xinference_diagnose_hide has a text of fewer than {SHORTEST} characters, which almost any file has "
                "by chance. Leave it out."
            )
        if module.check_mode:
            module.exit_json(changed=False, path="", size=0, files=[])
        top = options["name"] or "host"
        content, files = pack(
            Path(options["root"]), top, limit, options["docker_host"], options["hide"], options["diagnosis"]
        )
    # The action plugin turns it into a file and takes it out of the result.
    module.exit_json(changed=False, path="", size=len(content), files=files, archive=packed(content, options["hide"]))


def packed(content: bytes, hide: Sequence[str]) -> str:
    """The archive in base64, in pieces that are shorter than any text to hide.

    Ansible blots such a text out of every result, and an archive of some MiB has a short one by chance.
    """
    text = base64.b64encode(content).decode()
    size = min((len(one) for one in hide), default=len(text) + 1) - 1
    return BREAK.join(text[start : start + size] for start in range(0, len(text), size))


if __name__ == "__main__":
    main()
