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
  - Installs every wheel of a directory, and nothing else, into a new virtual environment. No index is asked, and neither
    pip's nor uv's settings on the host count.
  - Uses C(uv) when its wheel is among the wheels, otherwise C(pip) from its wheel, otherwise the host's own C(ensurepip).
    A host needs Python with its C(venv) module and nothing more.
  - An environment counts as built only when its marker is there, which is written last. One that was left half built is
    built again.
options:
  wheels:
    description: Directory of the wheels.
    type: path
    required: true
  path:
    description:
      - Directory of the environment. An existing complete one is left alone, so name it after the content of the wheels.
    type: path
    required: true
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
    wheels: /opt/xinference/wheels/server/1f0c9a3be2d4
    path: /opt/xinference/venvs/1f0c9a3be2d4
"""

RETURN = r"""
path:
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

from dataclasses import asdict
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.host import venv


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "wheels": {"type": "path", "required": True},
            "path": {"type": "path", "required": True},
            "python": {"type": "str"},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    existing = venv.complete(path)
    if existing or module.check_mode:
        module.exit_json(**{"path": str(path), **(asdict(existing) if existing else {})}, changed=existing is None)
    with failing(module, venv.VenvError, OSError):
        built = venv.build(Path(module.params["wheels"]), path, module.params["python"])
        module.exit_json(changed=True, **asdict(built))


if __name__ == "__main__":
    main()
