#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let a host pass blobs on to the others while a playbook ships."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_peer
short_description: Let a host pass blobs on to the others while a playbook ships
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Starts a small server on the host that gives the blobs of its store to the other hosts of the same run of a
    playbook, or ends it. M(airgap.xinference.xinference_ship) with
    O(airgap.xinference.xinference_ship#module:together) makes use of it, and the role
    P(airgap.xinference.xinference_ship#role) does all of this by itself.
  - The server speaks TLS with a key pair that is made for the run and thrown away after it. Who does not have it is not
    let in. It gives blobs by their SHA-256, those included that are still arriving, and nothing else.
  - It ends when it is told to, when nobody was connected for O(idle) seconds, and after a day in any case. A controller
    that was killed leaves nothing that listens for longer.
  - A host on which it cannot listen is no failure. O(state=started) says so in RV(msg), and the host gets its blobs all
    the same.
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  root:
    description: The root directory of the host.
    type: path
    required: true
  state:
    description:
      - With V(started), a server of this run listens afterwards. With V(stopped), none does.
    type: str
    choices: [started, stopped]
    default: started
  address:
    description:
      - The name or address under which the other hosts reach this one; the server listens there only.
      - Where it does not lead to this host itself, the address from which the host reaches O(others) is taken, and if
        there is none, the one that the controller is connected to.
    type: str
    default: ""
  port:
    description: The port to listen on. V(0) is any that is free.
    type: int
    default: 0
  idle:
    description: Seconds without a connection after which the server ends by itself.
    type: int
    default: 300
  others:
    description:
      - Names or addresses of other hosts that will fetch. The action plugin takes a few hosts of the play.
    type: list
    elements: str
    default: []
  wanted:
    description:
      - Digests of blobs about which to say whether the host has them. The action plugin asks for those that other hosts
        of the play were found to lack.
    type: list
    elements: str
    default: []
  keep:
    description:
      - Digests of blobs to hold open once they are in the store, because they leave it while other hosts still want
        them, as layers of images do when the engine has them. Their room on the disk is free when the server has ended.
        The action plugin names them.
    type: list
    elements: str
    default: []
  session:
    description:
      - What E(SSH_CONNECTION) says where the controller logs in. The action plugin finds out when it is needed.
    type: str
    default: ""
  run:
    description: The name of the run of the playbook. The action plugin sets it.
    type: str
    default: ""
  credential:
    description: The key pair of the run. The action plugin sets it.
    type: str
"""

EXAMPLES = r"""
- name: Let the hosts pass blobs on to each other
  airgap.xinference.xinference_peer:
    root: /opt/xinference
    address: "{{ ansible_host | default(inventory_hostname) }}"

- name: No more of it
  airgap.xinference.xinference_peer:
    root: /opt/xinference
    state: stopped
"""

RETURN = r"""
address:
  description: Where the server listens; empty when there is none.
  returned: success
  type: str
  sample: 10.20.0.11
port:
  description: The port it listens on, or 0.
  returned: success
  type: int
  sample: 41873
has:
  description: Those of the O(wanted) blobs that are in the store and were verified.
  returned: success
  type: list
  elements: str
  sample: []
msg:
  description: Why there is no server although there should be one.
  returned: when it cannot listen
  type: str
  sample: "No address of this host was found under which others reach it (tried gpu-7.example.org)."
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer import Credential
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer_process import (
    Standing,
    own_address,
    standing,
    start,
    stop,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.peer_server import LIMIT
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped"], "default": "started"},
            "address": {"type": "str", "default": ""},
            "port": {"type": "int", "default": 0},
            "idle": {"type": "int", "default": 300},
            "others": {"type": "list", "elements": "str", "default": []},
            "wanted": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "list", "elements": "str", "default": []},
            "session": {"type": "str", "default": ""},
            "run": {"type": "str", "default": ""},
            "credential": {"type": "str", "no_log": True},
        },
        required_if=[("state", "started", ["run"])],
        supports_check_mode=True,
    )
    with failing(module, StoreError, OSError, ValueError):
        store = Store(module.params["root"], dry_run=module.check_mode)
        mine = [server for server in standing(store) if server.run == module.params["run"]]
        if module.params["state"] == "stopped":
            if not module.check_mode:
                stop(store, mine)
            module.exit_json(changed=bool(mine), address="", port=0, has=[])
        answer = _started(module, store, mine)
        module.exit_json(has=sorted(store.sound(module.params["wanted"])), **answer)


def _started(module: AnsibleModule, store: Store, mine: list[Standing]) -> dict[str, object]:
    """See to it that a server with the right credential runs, and say where."""
    options = module.params
    if not module.check_mode and not options["credential"]:
        raise ValueError("A server needs a credential, which the action plugin of this module supplies.")
    credential = Credential(options["credential"]) if options["credential"] else None
    for server in mine:
        if credential is None or server.fingerprint == credential.fingerprint:
            return {"changed": False, "address": server.address, "port": server.port}
    session = options["session"] or os.environ.get("SSH_CONNECTION", "")
    address = own_address(options["address"], options["others"], session)
    nowhere = {"changed": False, "address": "", "port": 0}
    if not address:
        tried = ", ".join(name for name in [options["address"], *options["others"]] if name)
        return {**nowhere, "msg": f"No address of this host was found under which others reach it (tried {tried})."}
    if module.check_mode or credential is None:
        return {"changed": True, "address": address, "port": options["port"]}
    stop(store, mine)
    try:
        server = start(
            store, options["run"], credential, address, options["port"], options["idle"], LIMIT, options["keep"]
        )
    except OSError as error:
        return {
            **nowhere,
            "msg": f"Cannot listen on {address} port {options['port'] or '(any)'}: {error.strerror or error}.",
        }
    return {"changed": True, "address": server.address, "port": server.port}


if __name__ == "__main__":
    main()
