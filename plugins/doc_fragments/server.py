# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the options with which every module reaches a Xinference server."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  endpoint:
    description:
      - Address of the Xinference server, as seen from the host on which the module runs.
      - Proxy settings of that host are ignored.
      - When not given, the environment variable E(XINFERENCE_ENDPOINT) of the module is used.
    type: str
    default: http://127.0.0.1:9997
  api_key:
    description:
      - API key of a server that asks for one.
      - When not given, the environment variable E(XINFERENCE_API_KEY) of the module is used.
      - The keys of Xinference 2.9 and later may list and use models, not launch or register them. For those give
        O(username) and O(password), which are used when both are given.
      - A key that the server refuses is tried once; Xinference bans an address that fails often.
    type: str
  username:
    description:
      - User to log in as. A refused login is not repeated.
    type: str
  password:
    description:
      - Password of O(username).
    type: str
  ca_bundle:
    description:
      - File in PEM format, on the host on which the module runs, with the authority that signed the certificate of an
        V(https://) endpoint. Without it the authorities of the C(requests) library are trusted.
    type: path
  request_timeout:
    description:
      - How long one request may take, in seconds.
    type: float
    default: 30
requirements:
  - requests
notes:
  - The bundle carries C(requests); the roles of this collection put it on C(PYTHONPATH) of the modules.
"""
