#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_backup; reading is done by module_utils/host/backup_take.py, writing by the action plugin."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_backup
short_description: Back up what a host knows that its inventory does not
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Writes one archive on the controller with the accounts and keys of the server, the models registered with it, the
    record of what was launched and what the server remembers of it, and the files of the release in force.
  - Models, caches and logs are not in it; shipping brings models again.
  - The server goes on meanwhile. Its databases are copied by SQLite itself, as they are at one moment.
  - The archive is C(<directory>/<host>/<host>-<time in UTC>.tar), mode 0600 in a directory of mode 0700. With
    O(recipient) it is C(.tar.cms), encrypted by C(openssl cms) on the controller before anything is written there.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  home:
    description: Home of the server on the host, by default C(home) below O(root).
    type: path
  directory:
    description: Directory on the controller that archives are written to.
    type: path
    default: backups
  recipient:
    description:
      - Certificate in PEM form, on the controller. Only who has its private key can read the archive.
      - Without it the archive has keys and passwords that can be read.
    type: path
  keep:
    description: How many archives of the host are kept; older ones are removed after a new one is written. 0 keeps all.
    type: int
    default: 0
  host:
    description: Name of the host in the archive and in its path, by default the one in the inventory.
    type: str
  time:
    description: Given by the action plugin.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Tells what would be in the archive.
  diff_mode:
    support: none
    details:
      - Changes nothing on the host.
  idempotent:
    support: none
    details:
      - Every run writes an archive.
seealso:
  - module: airgap.xinference.xinference_restore
"""

EXAMPLES = r"""
- name: Back up a host for whoever has the key of the safe, and keep two weeks of it
  airgap.xinference.xinference_backup:
    root: /opt/xinference
    directory: /srv/backups
    recipient: /etc/xinference/backup.pem
    keep: 14
"""

RETURN = r"""
path:
  description: The archive on the controller.
  returned: success
  type: str
  sample: /srv/backups/gpu-1/gpu-1-20261120T201500Z.tar.cms
bytes:
  description: Size of the archive.
  returned: success, without check mode
  type: int
  sample: 235520
files:
  description: What is in it.
  returned: success
  type: list
  elements: dict
  sample: [{"name": "home/auth/auth.db", "kind": "accounts", "size": 118784}]
server_version:
  description: Version of the server, empty where its files do not tell.
  returned: success
  type: str
  sample: 4.1.0
removed:
  description: Older archives that were removed.
  returned: success
  type: list
  elements: str
  sample: []
summary:
  description: One line about what is in it.
  returned: success
  type: str
  sample: "accounts 3 files, 116 KiB; registrations 1 file, 712 B; records 2 files, 37 KiB"
msg:
  description: One line about it.
  returned: success
  type: str
"""

import base64
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import BackupError, kind_of, pack
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup_take import (
    belonging,
    server_version,
    take,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import ServiceError


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "home": {"type": "path"},
            "directory": {"type": "path", "default": "backups"},
            "recipient": {"type": "path"},
            "keep": {"type": "int", "default": 0},
            "host": {"type": "str"},
            "time": {"type": "str"},
        },
        supports_check_mode=True,
    )
    given = module.params
    root = Path(given["root"])
    home = Path(given["home"] or root / "home")
    with failing(module, BackupError, ServiceError, OSError):
        if module.check_mode:
            sizes = {name: path.stat().st_size for name, path in belonging(root, home).items()}
            files = [{"name": name, "kind": kind_of(name), "size": size} for name, size in sizes.items()]
            version = server_version(root)
            result = {}
        else:
            index, contents = take(root, home, given["host"] or "", given["time"] or "")
            files = [{"name": file.name, "kind": file.kind, "size": file.size} for file in index.files]
            version = index.server_version
            # The action plugin takes it out of the result.
            result = {"archive": base64.b64encode(pack(index, contents)).decode("ascii")}
    summary = summary_of(files)
    module.exit_json(changed=True, files=files, server_version=version, summary=summary, msg=summary, **result)


def summary_of(files: list) -> str:
    """One line about the files, by kind."""
    words = []
    for kind in dict.fromkeys(file["kind"] for file in files):
        sizes = [file["size"] for file in files if file["kind"] == kind]
        words.append(f"{kind} {len(sizes)} file{'s' if len(sizes) > 1 else ''}, {size_text(sum(sizes))}")
    return "; ".join(words)


if __name__ == "__main__":
    main()
