# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Air-gapped GPU hosts for tests: containers with their own Docker Engine and SSH server, and simulated GPUs.

`tests/testbed/testbed` is the door on the command line; `hosts.Testbed` and `images` are the doors for code.
"""
