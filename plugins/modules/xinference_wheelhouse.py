#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Collect the wheels that a virtual environment without any index will be made of."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_wheelhouse
short_description: Collect wheels for an air-gapped site
version_added: "0.1.0"
description:
  - Makes the directory O(path) hold the wheels of O(requirements) and of everything they need, as the pip of O(python)
    resolves them for itself. What has no wheel is built into one.
  - Which index pip uses is left to pip's own configuration.
  - A second run with the same options, and a Python of the same version and platform, does not start pip.
options:
  path:
    description:
      - Directory of the wheels. It is replaced as a whole, in one step, when all are there.
      - A note of what was asked for is kept beside it, with C(.json) appended.
    type: path
    required: true
  requirements:
    description: Requirements as pip understands them.
    type: list
    elements: str
    required: true
  constraints:
    description: Constraints as pip understands them, for versions of what is not required by name.
    type: list
    elements: str
    default: []
  exclude:
    description:
      - Distributions to leave out although something requires them. The rest must then be installed without resolving.
    type: list
    elements: str
    default: []
  portable:
    description:
      - Take only pure-Python wheels that are good for Python 3.8 and later on any machine.
      - Nothing is resolved then, so O(requirements) must list everything, best with exact versions.
    type: bool
    default: false
  python:
    description: The Python that runs pip, and for which the wheels are unless something else is said.
    type: str
    default: python3
  target_version:
    description:
      - Collect for this version of CPython, such as V(3.12), and not for O(python).
      - Nothing is built then, so everything must have a wheel.
    type: str
    default: ""
  target_platform:
    description:
      - Collect for this platform, such as V(manylinux_2_28_x86_64), with everything for older C libraries, and not for
        the platform of O(python).
      - Nothing is built then, so everything must have a wheel.
    type: str
    default: ""
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
requirements:
  - pip, of O(python) or of the Python that runs the module
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Collect Xinference for the processor
  airgap.xinference.xinference_wheelhouse:
    path: /srv/wheels
    python: python3.11
    requirements:
      - torch==2.13.0
      - xinference==4.1.0
      - sentence-transformers
    exclude:
      - torchvision

- name: Collect an engine for the Python of an image
  airgap.xinference.xinference_wheelhouse:
    path: /srv/engines
    requirements: [vllm==0.19.0]
    target_version: "3.12"
    target_platform: manylinux_2_35_x86_64
"""

RETURN = r"""
directory:
  description: The directory.
  returned: success
  type: str
annotations:
  description: Facts about the wheels for the bundle, such as the tag of the Python and the oldest C library.
  returned: success
  type: dict
  sample: {airgap.xinference.python: cp311, airgap.xinference.platform: linux_x86_64}
files:
  description: Number of wheels. Left out in check mode when they would be collected.
  returned: success
  type: int
size:
  description: Bytes of all wheels. Left out in check mode when they would be collected.
  returned: success
  type: int
size_text:
  description: The same for people.
  returned: success
  type: str
  sample: 405 MiB
problems:
  description: What pip said at the end, or what is wrong with the wheels.
  returned: failure
  type: list
  elements: str
"""

import sys
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.wheelhouse import (
    Order,
    collect,
    facts_of,
    interpreter_facts,
    pip_of,
    up_to_date,
    wheels_in,
)

# Wheels that are built here get one fixed time stamp inside, so that building again gives the same file.
FIXED_TIME = "315532800"


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "requirements": {"type": "list", "elements": "str", "required": True},
            "constraints": {"type": "list", "elements": "str", "default": []},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "portable": {"type": "bool", "default": False},
            "python": {"type": "str", "default": "python3"},
            "target_version": {"type": "str", "default": ""},
            "target_platform": {"type": "str", "default": ""},
        },
        mutually_exclusive=[("portable", "target_version"), ("portable", "target_platform")],
        supports_check_mode=True,
    )
    with failing(module, BundleError):
        module.exit_json(**_run(module))


def _run(module: AnsibleModule) -> dict:
    """Collect when needed and return the result."""
    params = module.params
    directory = Path(params["path"])
    order = Order(
        tuple(params["requirements"]),
        tuple(params["constraints"]),
        tuple(params["exclude"]),
        params["portable"],
        params["target_version"],
        params["target_platform"],
    )

    def run(command: list) -> tuple:
        return module.run_command(
            command,
            environ_update={"SOURCE_DATE_EPOCH": FIXED_TIME},
            handle_exceptions=False,
        )

    try:
        interpreter = interpreter_facts(params["python"], run)
        key = order.key(interpreter)
        changed = not up_to_date(directory, key)
        if changed and module.check_mode:
            return {"changed": True, "directory": params["path"], "annotations": facts_of([], order, interpreter)}
        if changed:
            collect(directory, order, pip_of(params["python"], sys.executable, run), key, run, interpreter)
        wheels = wheels_in(directory)
        size = sum((directory / wheel.file).stat().st_size for wheel in wheels)
    except OSError as error:
        raise BundleError(f"Collecting wheels with {params['python']} into {directory}: {error}") from error
    return {
        "changed": changed,
        "directory": params["path"],
        "annotations": facts_of(wheels, order, interpreter),
        "files": len(wheels),
        "size": size,
        "size_text": size_text(size),
    }


if __name__ == "__main__":
    main()
