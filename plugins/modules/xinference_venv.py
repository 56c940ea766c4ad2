#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build the virtual environment of a native server from the wheels of the bundle."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_venv
short_description: Build a virtual environment from a directory of wheels, without any index
version_added: "0.1.0"
description:
  - Installs the wheels that were shipped to the host, and nothing else, into a new virtual environment. No index is
    asked, and the settings of pip and uv on the host do not count.
  - The environment is C(<root>/venvs/<digest>), named after the content of the wheels, so other wheels are another
    environment and one that is in use is never touched.
  - Uses C(uv) when its wheel is among the wheels, otherwise C(pip) from its wheel, otherwise C(ensurepip) of the host.
    A host needs Python with its C(venv) module and nothing more.
  - An environment counts as built only when its marker is there, which is written last. One that was left half built is
    built again.
options:
  root:
    description: Root directory of the collection on the host. C(state/artifacts.json) in it says where the wheels are.
    type: path
    required: true
  name:
    description: Name of the wheels in the bundle.
    type: str
    default: server
  python:
    description:
      - Interpreter to build with.
      - When not given, the interpreter that runs this module if it fits the wheels, otherwise the one that is named
        after the version they need, such as C(python3.11).
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details: Where nothing was shipped yet, the name of the directory is not known.
  diff_mode:
    support: none
  idempotent:
    support: full
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Install Xinference from the shipped wheels
  airgap.xinference.xinference_venv:
    root: /opt/xinference
"""

RETURN = r"""
venv:
  description: Directory of the environment.
  returned: success
  type: str
  sample: /opt/xinference/venvs/1f0c9a3be2d4
python:
  description: Interpreter the environment was built with.
  returned: when the environment is there
  type: str
  sample: /usr/bin/python3.11
tool:
  description: What installed the wheels.
  returned: when the environment is there
  type: str
  sample: uv
seconds:
  description: How long the build took, whenever it was.
  returned: when the environment is there
  type: float
  sample: 26.8
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.host import venv


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "name": {"type": "str", "default": "server"},
            "python": {"type": "str"},
        },
        supports_check_mode=True,
    )
    root = Path(module.params["root"])
    if module.check_mode and not (root / "state" / "artifacts.json").exists():
        # Nothing was shipped yet, so the name that the wheels will give the directory is not known.
        module.exit_json(changed=True, venv=str(root / "venvs" / "not-shipped-yet"))
    with failing(module, venv.VenvError, OSError):
        wheels, path = venv.places(root, module.params["name"])
        found = venv.complete(path)
        built = None if found or module.check_mode else venv.build(wheels, path, module.params["python"] or None)
    known = found or built
    facts = {"python": known.python, "tool": known.tool, "seconds": known.seconds} if known else {}
    module.exit_json(changed=found is None, venv=str(path), **facts)


if __name__ == "__main__":
    main()
