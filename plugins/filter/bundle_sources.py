# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter that lists where the models of an inventory come from."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bundle_sources
short_description: List where the models of an inventory come from
version_added: "0.1.0"
description:
  - Takes the models of several hosts and returns every source once, with everything that is wrong with them.
  - A local path is made absolute, and one that does not exist on the controller is a problem.
  - What the models would download beside themselves at launch is listed like a model, and so are their alternatives
    (C(fallbacks)).
positional: _input, companions
options:
  _input:
    description: The list C(xinference_models) of every host, by name of the host.
    type: dict
    required: true
  companions:
    description: Whether to list what the models need beside themselves.
    type: bool
    default: true
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: List the sources of the models of one host
  ansible.builtin.debug:
    msg: "{{ {inventory_hostname: xinference_models} | airgap.xinference.bundle_sources }}"
"""

RETURN = r"""
_value:
  description: >-
    C(local), a list with C(name) and C(path); C(modelscope), a list with C(name), C(modelscope), C(revision),
    C(allow_patterns) and C(ignore_patterns); C(files), a list with C(name), C(url), C(file) and C(sha256); C(notices),
    what models will try to download all the same; and C(problems), a list of messages.
  type: dict
"""

from pathlib import Path
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sources import gather, notices


def bundle_sources(models: dict, companions: bool = True) -> dict:
    """Sources and problems; relative paths are meant from the directory Ansible was started in."""
    sources, problems = gather(models, companions)
    result: dict[str, list] = {"local": [], "modelscope": [], "files": [], "problems": problems}
    result["notices"] = notices(models) if companions else []
    for source in sources:
        if "url" in source.content:
            result["files"].append({"name": source.name, **source.content})
            continue
        if "path" not in source.content:
            result["modelscope"].append({"name": source.name, **source.content})
            continue
        path = Path(source.content["path"]).expanduser().absolute()
        fields = {"license": "license", "origin": "source"}
        told = {ours: source.content[field] for field, ours in fields.items() if field in source.content}
        result["local"].append({"name": source.name, "path": str(path), **told})
        if not path.exists():
            problems.append(f"{source.wanted_by[0]}: source.path {path} does not exist on this machine")
    return result


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Names and functions."""
        return {"bundle_sources": bundle_sources}
