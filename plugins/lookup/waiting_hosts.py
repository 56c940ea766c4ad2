# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup of the hosts that wait to be shipped to together."""

from __future__ import annotations

DOCUMENTATION = r"""
name: waiting_hosts
short_description: Name the hosts that wait to be shipped to together
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Of some hosts, returns those that M(airgap.xinference.xinference_ship) found to lack something in this run of
    ansible-playbook and has put off, with O(airgap.xinference.xinference_ship#module:defer).
  - The role P(airgap.xinference.xinference_ship#role) decides by it whether the hosts shall help each other.
options:
  _terms:
    description: Inventory names of hosts.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Say who waits
  ansible.builtin.debug:
    msg: "{{ query('airgap.xinference.waiting_hosts', *ansible_play_batch) }}"
"""

RETURN = r"""
_list:
  description: Those of the hosts that wait, in the same order.
  type: list
  elements: str
"""

from typing import Any

from ansible.plugins.lookup import LookupBase
from ansible_collections.airgap.xinference.plugins.plugin_utils.credential import Run
from ansible_collections.airgap.xinference.plugins.plugin_utils.notes import Notes


class LookupModule(LookupBase):
    """Reads the notes of this run."""

    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """The hosts that wait."""
        self.set_options(var_options=variables, direct=kwargs)
        return Notes(Run()).waiting(str(term) for term in terms)
