# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter that lists the tools of an inventory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bundle_tools
short_description: List the tools of an inventory
version_added: "0.1.0"
description:
  - Takes the tools of several hosts and returns each once, with everything that is wrong with them.
positional: _input
options:
  _input:
    description: The list C(xinference_tools) of every host, by name of the host.
    type: dict
    required: true
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: List the tools of one host
  ansible.builtin.debug:
    msg: "{{ {inventory_hostname: xinference_tools} | airgap.xinference.bundle_tools }}"
"""

RETURN = r"""
_value:
  description: >-
    C(tools), a list with C(kind), C(name) and C(path) as M(airgap.xinference.xinference_bundle) takes them; and
    C(problems), a list of messages.
  type: dict
"""

from pathlib import Path
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather_tools


def bundle_tools(tools: dict) -> dict:
    """Tools and problems; a relative path is meant from the directory Ansible was started in."""
    found, problems = gather_tools(tools)
    paths = {entry["name"]: Path(entry["path"]).expanduser().absolute() for entry in found if entry["path"]}
    absent = [
        f"xinference_tools: {path} does not exist on this machine" for path in paths.values() if not path.exists()
    ]
    return {
        "tools": [{"kind": "tools", "name": name, "path": str(path)} for name, path in paths.items()],
        "problems": problems + absent,
    }


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Names and functions."""
        return {"bundle_tools": bundle_tools}
