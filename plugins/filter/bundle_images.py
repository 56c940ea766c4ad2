# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter that lists the container images of an inventory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bundle_images
short_description: List the container images of an inventory
version_added: "0.1.0"
description:
  - Takes the images of several hosts and returns each once, with everything that is wrong with them.
positional: _input, servers, gateways
options:
  _input:
    description: The list C(xinference_images) of every host, by name of the host.
    type: dict
    required: true
  servers:
    description: The image that the server of every host runs, by name of the host; empty for none.
    type: dict
    default: {}
  gateways:
    description: The image that the gateway of every host runs, by name of the host; empty for none.
    type: dict
    default: {}
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: List the images of one host
  ansible.builtin.debug:
    msg: "{{ {inventory_hostname: xinference_images} | airgap.xinference.bundle_images }}"
"""

RETURN = r"""
_value:
  description: C(images), a list with C(name) and, where there is one, C(archive); and C(problems), a list of messages.
  type: dict
"""

from pathlib import Path
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather_images


def bundle_images(images: dict, servers: dict | None = None, gateways: dict | None = None) -> dict:
    """Images and problems; a relative archive is meant from the directory Ansible was started in."""
    found, problems = gather_images(images, servers or {}, gateways or {})
    for entry in found:
        if "archive" in entry:
            entry["archive"] = str(Path(entry["archive"]).expanduser().absolute())
    return {"images": found, "problems": problems}


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Names and functions."""
        return {"bundle_images": bundle_images}
