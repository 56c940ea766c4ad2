#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_report
short_description: Show one table over all hosts
version_added: "0.1.0"
description:
  - With O(results) shows what verification found, a line for every model of the inventories, and below it the settings
    for an OpenAI-compatible client and for RAGFlow, beside the server and from inside Docker. Fails after that when a
    model did not prove that it works, a host is missing, or nothing was verified at all.
  - With O(findings) shows what preflight found on all hosts, each with its cure.
  - With O(standing) shows what runs where, and since when.
  - With O(diagnosis) shows what is wrong with each host, the worst first, each with its cure. Fails after that where
    O(fail) says so and there is anything.
  - Writes the same as JSON to the controller.
  - Runs on the controller and talks to no host; roles and playbooks run it once for all hosts.
options:
  results:
    description: What M(airgap.xinference.xinference_health) returned, by host; empty for a host that was not reached.
    type: dict
  findings:
    description: What M(airgap.xinference.xinference_preflight) returned, by host.
    type: dict
  standing:
    description: What M(airgap.xinference.xinference_status) returned, by host; empty for a host that was not reached.
    type: dict
  diagnosis:
    description: What M(airgap.xinference.xinference_diagnose) returned, by host.
    type: dict
  failures:
    description:
      - Hosts that were left out before verification, each with the C(step) that failed and C(messages) that say why.
    type: dict
    default: {}
  fail:
    description:
      - With O(results), whether to fail when something did not prove that it works. With O(diagnosis), whether to fail
        when anything was found.
    type: bool
    default: true
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

- name: Show what is in the way
  airgap.xinference.xinference_report:
    findings:
      gpu1: "{{ hostvars.gpu1.preflight }}"
"""

RETURN = r"""
problems:
  description: What did not prove that it works, by host; an empty list for a host on which everything did.
  returned: with O(results)
  type: dict
  sample: {gpu1: [], gpu2: ["gpu2: bge-m3: the server does not run it"]}
report:
  description: The report, as the file has it.
  returned: success
  type: dict
  contains:
    verified:
      description: How many models passed their probe.
      returned: with O(results)
      type: int
    failed:
      description: How many lines of the table are bad.
      returned: with O(results)
      type: int
    models:
      description: The lines of the table, each with what is wrong with it or was seen as C(detail).
      returned: with O(results)
      type: list
      elements: dict
    clients:
      description: Settings for the clients of every endpoint.
      returned: with O(results)
      type: list
      elements: dict
    findings:
      description: What preflight found, by host.
      returned: with O(findings)
      type: dict
    hosts:
      description: What runs, by host.
      returned: with O(standing)
      type: dict
"""
