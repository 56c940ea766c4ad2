#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action plugin of the same name, which does the work on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_certificate
short_description: Have a certificate for a gateway
version_added: "0.1.0"
description:
  - Makes a certificate with the site's own authority, and the authority with the first one. Both stay on the
    controller.
  - The certificate is made again when it ends soon, when its names are others, or when it is damaged. The authority
    never is, because every client would have to learn of it first.
  - With O(certificate) the site brings its own. It is checked to be for the names, in time, and of that key.
  - Runs on the controller and talks to no host.
options:
  name:
    description: Name of the files below O(authority), usually that of the gateway's host.
    type: str
    required: true
  names:
    description: Names and addresses that clients use.
    type: list
    elements: str
    required: true
  authority:
    description:
      - Directory of the authority on the controller. C(authority.crt) is what clients have to trust; C(authority.key)
        and the keys of the gateways are for their owner only.
    type: path
  days:
    description: How long a certificate counts.
    type: int
    default: 397
  renew_before:
    description: Days before its end at which it is made again.
    type: int
    default: 30
  certificate:
    description:
      - File of a certificate of the site, followed by those of authorities between it and the one that clients trust.
    type: path
  certificate_key:
    description: File of its key, without a passphrase.
    type: path
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
- name: Have a certificate
  airgap.xinference.xinference_certificate:
    name: "{{ inventory_hostname }}"
    names: [models.bank.example, 10.0.0.5]
    authority: "{{ inventory_dir }}/gateway-authority"
"""

RETURN = r"""
certificate:
  description: File of the certificate on the controller.
  returned: success
  type: str
  sample: /srv/site/gateway-authority/gpu-1.crt
certificate_key:
  description: File of its key on the controller.
  returned: success
  type: str
  sample: /srv/site/gateway-authority/gpu-1.key
expires:
  description: Until when it counts.
  returned: success
  type: str
  sample: "2027-12-22"
msg:
  description: Why one was made, or would be; empty when none was.
  returned: success
  type: str
  sample: "A certificate was made: its names are others"
"""
