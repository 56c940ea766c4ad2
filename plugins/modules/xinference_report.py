#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_report
short_description: Show what verification found on all hosts, and how clients reach it
version_added: "0.1.0"
description:
  - Prints one table over all hosts, with a line for every model of their inventories, and below it the settings for an
    OpenAI-compatible client and for RAGFlow, beside the server and from inside Docker.
  - Writes the same as JSON to the controller.
  - Fails after that when a model did not prove that it works, a host is missing, or nothing was verified at all.
  - Runs on the controller and talks to no host; the role P(airgap.xinference.xinference_verify#role) runs it once for
    all hosts.
options:
  results:
    description: What M(airgap.xinference.xinference_health) returned, by host; empty for a host that was not reached.
    type: dict
    required: true
  path:
    description: File on the controller to write the report to. Not written in check mode.
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
    details: The file has latencies in it and is written every time; that does not count as a change.
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Show what the hosts serve
  airgap.xinference.xinference_report:
    results:
      gpu1: "{{ hostvars.gpu1.health }}"
      gpu2: "{{ hostvars.gpu2.health }}"
    path: report.json
"""

RETURN = r"""
report:
  description: The report, as the file has it.
  returned: always
  type: dict
  contains:
    verified:
      description: How many models passed their probe.
      type: int
    failed:
      description: How many lines of the table are bad.
      type: int
    models:
      description: The lines of the table, each with what is wrong with it or was seen as C(detail).
      type: list
      elements: dict
    clients:
      description: Settings for the clients of every endpoint.
      type: list
      elements: dict
"""
