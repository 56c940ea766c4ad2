#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_restore; the work is done by module_utils/host/restore.py and restore_place.py."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_restore
short_description: Put a backup in place on a host
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Puts the accounts and keys, the registrations and the records of an archive that
    M(airgap.xinference.xinference_backup) wrote in place on a host that is served and whose server is stopped.
  - The configuration of the archive is for reading. What is in force is what the inventory says; where the backup had
    something else, RV(notes) tells.
  - Where the root directory or the home has another name than on the host of the backup, paths in the files follow.
  - An archive that is damaged, is encrypted for somebody else, or has anything that no backup has, is refused before
    anything changes, and so is one of a later server.
  - What is replaced is copied to C(<root>/state/before-restore-<time>) first. A run that was interrupted loses nothing,
    and the next run of the same archive completes it.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  home:
    description: Home of the server on the host, by default C(home) below O(root).
    type: path
  from:
    description:
      - On the controller; an archive, which may be that of another host, or a directory with archives, of which the
        newest of this host is taken.
    type: path
    default: backups
  key:
    description: Private key in PEM form and without a passphrase, on the controller, for an archive that is encrypted.
    type: path
  replace:
    description:
      - Whether accounts and keys of this host's server may be replaced. The account O(administrator) always may.
    type: bool
    default: false
  administrator:
    description: Name of the account that serving makes by itself.
    type: str
    default: ""
  host:
    description: Name of the host whose newest archive is taken, by default the one in the inventory.
    type: str
  index:
    description: Given by the action plugin.
    type: str
  archive:
    description: Given by the action plugin.
    type: path
  time:
    description: Given by the action plugin.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - Lists files by name, without what is in them.
  idempotent:
    support: full
    details:
      - An archive that was restored is not restored again, whatever the server did since. To have it so, remove
        C(<home>/.restored.json).
seealso:
  - module: airgap.xinference.xinference_backup
"""

EXAMPLES = r"""
- name: See what the newest backup of this host would put in place
  airgap.xinference.xinference_restore:
    root: /opt/xinference
    from: /srv/backups
    key: /root/backup.key
  check_mode: true
  diff: true

- name: Restore the backup of another host
  airgap.xinference.xinference_restore:
    root: /opt/xinference
    from: /srv/backups/gpu-1/gpu-1-20261120T201500Z.tar
"""

RETURN = r"""
path:
  description: The archive on the controller.
  returned: success
  type: str
  sample: /srv/backups/gpu-1/gpu-1-20261120T201500Z.tar.cms
host:
  description: Name of the host that the backup is of.
  returned: success
  type: str
  sample: gpu-1
time:
  description: When the backup was made, UTC.
  returned: success
  type: str
  sample: "2026-11-20T20:15:00Z"
files:
  description: The files that are restored, and what was done with each, or would be in check mode.
  returned: success
  type: list
  elements: dict
  sample: [{"name": "home/auth/auth.db", "kind": "accounts", "size": 118784, "action": "replace"}]
aside:
  description: Directory with what was there before; empty when nothing was, or nothing was done.
  returned: success
  type: str
  sample: /opt/xinference/state/before-restore-20261120T203000Z
notes:
  description: What is not restored, and why.
  returned: success
  type: list
  elements: str
  sample: []
problems:
  description: Why the archive is not restored.
  returned: failure
  type: list
  elements: str
msg:
  description: One line about it.
  returned: always
  type: str
  sample: "6 files, 152 KiB, of the backup of gpu-1 of 2026-11-20T20:15:00Z are in place"
"""

from pathlib import Path
from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import (
    BackupError,
    Index,
    read_index,
    unpack,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import ServiceError
from ansible_collections.airgap.xinference.plugins.module_utils.host.restore import Plan, plan
from ansible_collections.airgap.xinference.plugins.module_utils.host.restore_place import look, place, receive


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "home": {"type": "path"},
            "from": {"type": "path", "default": "backups"},
            "key": {"type": "path", "no_log": False},
            "replace": {"type": "bool", "default": False},
            "administrator": {"type": "str", "default": ""},
            "host": {"type": "str"},
            # It has hashes of files that hold a password and not much else.
            "index": {"type": "str", "no_log": True},
            "archive": {"type": "path"},
            "time": {"type": "str"},
        },
        supports_check_mode=True,
    )
    given = module.params
    root = Path(given["root"])
    home = Path(given["home"] or root / "home")
    aside = ""
    with failing(module, BackupError, ServiceError, OSError):
        if given["archive"]:
            index, contents = unpack(receive(Path(given["archive"])))
        else:
            index, contents = read_index((given["index"] or "").encode("utf-8")), {}
        todo = plan(index, look(root, home, index), given["replace"], given["administrator"])
        if todo.problems:
            module.fail_json(msg=" ".join(todo.problems), problems=todo.problems)
        if todo.changed and given["archive"] and not module.check_mode:
            mark = place(root, home, index, contents, todo, given["time"] or "")
            aside = str(root / "state" / mark.aside) if mark.aside else ""
    result = told(index, todo, aside, bool(given["archive"]) and not module.check_mode)
    if not module._diff:
        del result["diff"]
    module.exit_json(**result)


def told(index: Index, todo: Plan, aside: str, done: bool) -> Dict[str, Any]:
    """The result of the module."""
    rows = [row for row in todo.rows if row.action != "keep"]
    of = f"of the backup of {index.host} of {index.time}"
    size = size_text(sum(row.file.size for row in rows))
    count = f"{len(rows)} file{'' if len(rows) == 1 else 's'}, {size},"
    if todo.changed:
        msg = f"{count} {of} {'are' if done else 'would be put'} in place" + (f"; before: {aside}" if aside else "")
    else:
        msg = f"Everything {of} is in place"
    listing = "".join(f"{row.action:<8}{row.file.name}  {size_text(row.file.size)}\n" for row in rows)
    return {
        "changed": todo.changed,
        "host": index.host,
        "time": index.time,
        "files": [
            {"name": row.file.name, "kind": row.file.kind, "size": row.file.size, "action": row.action}
            for row in todo.rows
        ],
        "aside": aside,
        "notes": todo.notes,
        "msg": msg,
        "diff": {"before": "", "after": listing},
    }


if __name__ == "__main__":
    main()
