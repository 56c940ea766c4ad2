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
    list of what was shipped, and the programs that run and control the server. Its id is a hash of its content.
  - Then points C(<root>/current) at it, in one step.
  - Restarts nothing; M(airgap.xinference.xinference_service) does, when the definition of the server differs.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  service:
    description: Definition of the server.
    type: dict
    required: true
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
  models:
    description: The models the host shall serve, as in the inventory.
    type: list
    elements: dict
    default: []
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
definition:
  description: Digest of what makes a running server what it is. The list of models is not part of it.
  returned: success
  type: str
directory:
  description: Directory of the release.
  returned: success
  type: str
  sample: /opt/xinference/releases/5d41402abc4b
"""

import json
from pathlib import Path
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.host import definition, release

SERVICE = {
    "name": {"type": "str", "default": "xinference"},
    "manager": {"type": "str", "choices": ["auto", "systemd", "supervisord"], "default": "auto"},
    "command": {"type": "list", "elements": "str", "required": True},
    "environment": {"type": "dict", "required": True},
    "directory": {"type": "path", "required": True},
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "stop_timeout": {"type": "int", "default": 30},
}


def shipped(root: Path) -> Any:
    """What shipping recorded on this host; nothing when it has not run."""
    path = root / "state" / "artifacts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "service": {"type": "dict", "required": True, "options": SERVICE},
            "models": {"type": "list", "elements": "dict", "default": []},
        },
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    service = dict(module.params["service"])
    service["environment"] = {key: str(value) for key, value in service["environment"].items()}
    with failing(module, OSError, ValueError):
        files = definition.files(root, service, module.params["models"], shipped(root))
        wanted, previous = release.identity(files), release.current(root)
        before = release.read(root / "current")
        changed = wanted != previous or not release.whole(root, files)
        if changed and not module.check_mode:
            release.make(root, files)
            release.switch(root, wanted)
    result: Dict[str, Any] = {
        "definition": definition.digest(files),
        "release": wanted,
        "previous": previous,
        "directory": str(root / release.RELEASES / wanted),
    }
    if module._diff and changed:
        result["diff"] = release.difference(before, {path: entry.text for path, entry in files.items()})
    module.exit_json(changed=changed, **result)


if __name__ == "__main__":
    main()
