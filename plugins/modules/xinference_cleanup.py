#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove from a host what no kept release needs."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_cleanup
short_description: Remove from a host what no kept release needs
version_added: "0.1.0"
description:
  - Keeps the releases that were put in force last, and removes the others with what only they needed, which is blobs,
    directories of models, wheels and tools, virtual environments, unpacked libraries, and images in the Docker Engine.
  - Kept in any case are the release in force, the one before (for a rollback) and the one a running server was started
    from, what was shipped last or is being shipped, what a process has open or mapped, what a container runs from or
    has mounted, and the models of C(<root>/state/launched.json).
  - Images are removed only if shipping loaded them (they are listed in C(<root>/state/images.json)), and by their name,
    so that one that has another name stays. Nothing else that the collection did not make is touched, and neither are
    accounts, registrations, caches and logs of servers.
  - Where it cannot be told what is needed (a list that cannot be read, an engine that does not answer), it fails and
    removes nothing. A run that is interrupted leaves nothing half removed under its name; the next one goes on.
options:
  root:
    description: Root directory of the collection on the host.
    type: path
    required: true
  keep_releases:
    description: How many releases are kept, at least 2.
    type: int
    default: 3
  docker_host:
    description: Address of the engine, by default what the client of the host is set up for.
    type: str
  wait:
    description: Seconds to wait for a controller that is shipping to this host.
    type: int
    default: 120
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details: Lists what goes, with the bytes that are free then.
  idempotent:
    support: full
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Keep the release in force and the four before it
  airgap.xinference.xinference_cleanup:
    root: /opt/xinference
    keep_releases: 5

- name: See what would go
  airgap.xinference.xinference_cleanup:
    root: /opt/xinference
  check_mode: true
  diff: true
"""

RETURN = r"""
removed:
  description: What went, or in check mode would go.
  returned: success
  type: list
  elements: dict
  contains:
    what:
      description:
        - What it is; C(release), C(image), C(environment), C(model), C(wheels), C(tool), C(library), C(blobs),
          C(unfinished) (received in part) or C(leftovers) (of interrupted runs).
      type: str
      sample: model
    name:
      description: Its name, mostly its path below the root.
      type: str
      sample: models/bge-m3/6a1e2b0f7c5d
    count:
      description: How many there are of it.
      type: int
      sample: 1
    bytes:
      description:
        - Bytes on the disk that are free then. A file that a directory and the store share, or several directories,
          counts once, and only when its last name goes.
      type: int
      sample: 2270101504
    size:
      description: The same as people read it.
      type: str
      sample: 2.1 GiB
freed_bytes:
  description: All of these bytes together.
  returned: success
  type: int
  sample: 2270101504
kept:
  description: Ids of the releases that are kept, the one that was put in force last first.
  returned: success
  type: list
  elements: str
  sample: [5d41402abc4b, 9f2c1e07aa53]
notes:
  description: What stays although no kept release names it, and why.
  returned: success
  type: list
  elements: str
  sample: ["models/bge-m3/1f0c9a3be2d4 stays: process 4711 (python3) uses it"]
msg:
  description: One line about it.
  returned: success
  type: str
  sample: "2.1 GiB are free again: 1 release, 1 model, 12 blobs"
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError
from ansible_collections.airgap.xinference.plugins.module_utils.host.cleanup import clean
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import DockerError
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import ServiceError
from ansible_collections.airgap.xinference.plugins.module_utils.host.retention import RetentionError


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "keep_releases": {"type": "int", "default": 3},
            "docker_host": {"type": "str"},
            "wait": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    given = module.params
    with failing(module, RetentionError, StoreError, DockerError, ServiceError, OSError):
        store = Store(given["root"], dry_run=module.check_mode)
        cleaned = clean(store, given["keep_releases"], given["docker_host"], given["wait"])
        module.exit_json(
            changed=bool(cleaned.rows),
            removed=[{**asdict(row), "size": size_text(row.bytes)} for row in cleaned.rows],
            freed_bytes=cleaned.freed_bytes,
            kept=cleaned.kept,
            notes=cleaned.notes,
            msg=cleaned.summary(module.check_mode),
            diff={"before": cleaned.listing(), "after": ""},
        )


if __name__ == "__main__":
    main()
