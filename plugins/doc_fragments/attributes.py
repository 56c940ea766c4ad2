# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Descriptions of the attributes that the modules of this collection state their support for."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can tell what would change without changing anything.
  diff_mode:
    description: Returns what changed, or would change, when run with C(--diff).
  idempotent:
    description: A second run with the same input changes nothing.
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    description: Can tell what would change without changing anything.
    support: full
    details:
      - Only reads.
  diff_mode:
    description: Returns what changed, or would change, when run with C(--diff).
    support: N/A
    details:
      - Changes nothing.
  idempotent:
    description: A second run with the same input changes nothing.
    support: full
"""
