#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Split a bundle into volumes for disks and sticks, and join it on the other side."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_bundle_volumes
short_description: Split a bundle into volumes for disks and sticks, or join it from them
version_added: "0.1.0"
description:
  - With O(state=split), writes the bundle as directories C(<name>-<n>-of-<m>), each no larger than O(size), and each to
    be checked by itself with C(sha256sum -c SHA256SUMS). Every byte is read once. A volume gets its C(volume.json)
    last, so one without it is not finished. A run that was cut goes on where it stopped.
  - With O(state=joined), takes in whatever volumes lie in O(directory), all of them or one stick after another, and
    says which are still to come. Every blob is verified before it becomes part of the bundle. The bundle's index is
    written last, so a half-joined bundle is never taken for a whole one. Damaged or missing pieces are named with
    their volume. Everything that is right is kept, and a mended volume is read only where it was bad.
  - A differential set holds only what an earlier bundle lacks. Joining it where that bundle is not changes nothing and
    tells exactly what is missing.
  - Runs on the machine where the bundle is, which is the controller.
options:
  bundle:
    description:
      - Directory of the bundle.
      - With O(state=joined) it may be an earlier bundle, which stays as it is until the new one is whole. Blobs that
        only the earlier one used are removed then.
    type: path
    required: true
  state:
    description: Whether there are to be volumes, or a bundle made of them.
    type: str
    choices: [split, joined]
    required: true
  directory:
    description:
      - With O(state=split), the one directory to write volumes into.
      - With O(state=joined), directories that are volumes or hold some.
    type: list
    elements: path
    required: true
  size:
    description:
      - Bytes of a volume, lists included, as text. V(30G) and V(30GiB) are binary, V(32GB) is decimal. A stick has less
        room than its label says; C(df -h) tells how much.
      - Required with O(state=split).
    type: str
  max_file:
    description:
      - Bytes of the largest file on a volume, written like O(size). The default is what FAT32 can hold; V(0) means that
        any size will do (exFAT, ext4).
    type: str
    default: "4294967295"
  base:
    description:
      - With O(state=split), an earlier bundle that the site has; what is in it is left out. It takes the bundle, a
        directory with its C(index.json) and manifests, or any volume of it.
      - With O(state=joined), an earlier bundle to take from what the volumes leave out, when that is not O(bundle)
        itself.
    type: path
  name:
    description:
      - With O(state=split), what volumes are called. Defaults to the name of the bundle's directory.
      - With O(state=joined), the set to join, where volumes of several lie about.
    type: str
    default: ""
  volumes:
    description:
      - With O(state=split), numbers of the volumes to write. The others are left for another run, into the same or
        another directory. By default all are written.
    type: list
    elements: int
    default: []
  signers:
    description:
      - With O(state=joined), who may have signed the bundle, the text of an allowed signers file or the path of one, as
        for M(airgap.xinference.xinference_bundle_info). Nothing is taken from volumes that none of them signed.
      - The signature of a bundle goes along on every volume.
    type: str
    default: ""
  cache_dir:
    description:
      - Directory of what is remembered about files between runs. It is not part of the bundle.
      - Defaults to O(bundle) with C(.cache) appended.
    type: path
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Nothing is hashed in check mode. Splitting counts a piece that no stamp vouches for as a change; joining takes
        files of the right size for right.
  diff_mode:
    support: full
  idempotent:
    support: full
seealso:
  - module: airgap.xinference.xinference_bundle
  - module: airgap.xinference.xinference_bundle_info
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Write the bundle as volumes that fit sticks sold as 32 GB
  airgap.xinference.xinference_bundle_volumes:
    bundle: /srv/bundle
    state: split
    directory: /srv/volumes
    size: 29G

- name: Write the second volume straight to the stick that is plugged in
  airgap.xinference.xinference_bundle_volumes:
    bundle: /srv/bundle
    state: split
    directory: /media/usb
    size: 29G
    volumes: [2]

- name: Write only what the site does not have yet
  airgap.xinference.xinference_bundle_volumes:
    bundle: /srv/bundle
    state: split
    directory: /srv/volumes
    size: 29G
    base: /srv/carried/2026-10/bundle-1-of-3

- name: Take in the stick that is plugged in
  airgap.xinference.xinference_bundle_volumes:
    bundle: /srv/bundle
    state: joined
    directory: /media/usb
  register: joined

- name: Say which stick to plug in next
  ansible.builtin.debug:
    msg: "Still to come: {{ joined.to_come | join(', ') }}"
  when: not joined.complete
"""

RETURN = r"""
volumes:
  description: With O(state=split), the volumes asked for. With O(state=joined), all of the set.
  returned: success
  type: list
  elements: dict
  contains:
    title:
      description: Name of the volume and of its directory.
      type: str
      sample: bundle-2-of-3
    path:
      description: Its directory, empty for one that was not there.
      type: str
    state:
      description:
        - With O(state=split), V(written), V(there already), or in check mode V(to write).
        - With O(state=joined), V(taken), V(to come) or V(damaged).
      type: str
    size:
      description: Bytes of its files.
      type: int
    size_text:
      description: The same for people.
      type: str
      sample: 28.9 GiB
    artifacts:
      description: The artifacts it has files of.
      type: list
      elements: str
      sample: [models/bge-m3, models/Qwen2.5-7B-Instruct]
set:
  description: Identity of the set. The same bundle split in the same way is the same set.
  returned: success
  type: str
count:
  description: Number of volumes in the set.
  returned: success
  type: int
complete:
  description: Whether the bundle is whole. Always true with O(state=split).
  returned: success
  type: bool
to_come:
  description: With O(state=joined), names of the volumes that are needed and were not there.
  returned: success and failure
  type: list
  elements: str
  sample: [bundle-3-of-3]
lacking:
  description: With O(state=joined), what is not there yet, a line for each artifact.
  returned: success and failure
  type: list
  elements: str
  sample: ["models/Qwen2.5-7B-Instruct: 2 of 15 files, 7.5 GiB"]
table:
  description: The volumes as lines of a table with name, size, state and what they hold.
  returned: success
  type: list
  elements: str
new_bytes:
  description: Bytes that came in, copied or linked.
  returned: success
  type: int
new_text:
  description: The same for people.
  returned: success
  type: str
hashed_bytes:
  description: Bytes that had to be read and hashed.
  returned: success
  type: int
omitted_bytes:
  description: With O(state=split), bytes left out because the earlier bundle has them.
  returned: success
  type: int
dropped_bytes:
  description: With O(state=joined), bytes of blobs that only the bundle before used.
  returned: success
  type: int
missing:
  description: What a differential set builds on and this machine does not have.
  returned: failure, when that is why
  type: list
  elements: dict
  sample: [{"reference": "models/bge-m3", "files": 13, "of": 13, "size": 91618861}]
trust:
  description: Why the volumes are not to be trusted, as in RV(airgap.xinference.xinference_bundle_info#module:trust).
  returned: failure, when that is why
  type: str
problems:
  description: Everything that is wrong; damaged or missing pieces with their volume.
  returned: failure
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.join import JoinOutcome, join_volumes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.report import volume_table, volume_values
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import bytes_of, size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.split import (
    SplitOutcome,
    split_bundle,
    volume_size,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import TrustError, signers_text


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "bundle": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["split", "joined"], "required": True},
            "directory": {"type": "list", "elements": "path", "required": True},
            "size": {"type": "str"},
            "max_file": {"type": "str", "default": "4294967295"},
            "base": {"type": "path"},
            "name": {"type": "str", "default": ""},
            "volumes": {"type": "list", "elements": "int", "default": []},
            "signers": {"type": "str", "default": ""},
            "cache_dir": {"type": "path"},
        },
        required_if=[("state", "split", ["size"])],
        supports_check_mode=True,
    )
    with failing(module, BundleError, TrustError, ValueError, OSError):
        module.exit_json(**(_split(module) if module.params["state"] == "split" else _join(module)))


def _split(module: AnsibleModule) -> dict:
    """Write volumes; the module's return values."""
    params = module.params
    if len(params["directory"]) != 1:
        raise ValueError("Volumes are written into one directory; name one.")
    outcome = split_bundle(
        params["bundle"],
        params["directory"][0],
        volume_size(params["size"]),
        bytes_of(params["max_file"]),
        params["base"],
        params["name"],
        params["volumes"],
        params["cache_dir"],
        module.check_mode,
    )
    new = outcome.copied_bytes + outcome.linked_bytes
    return {**_common(outcome, new), "count": outcome.count, "complete": True, "to_come": [], "lacking": []}


def _join(module: AnsibleModule) -> dict:
    """Take in volumes; the module's return values."""
    params = module.params
    outcome = join_volumes(
        params["bundle"],
        params["directory"],
        params["base"],
        params["name"],
        params["cache_dir"],
        module.check_mode,
        signers_text(params["signers"]),
    )
    new = outcome.joined_bytes + outcome.base_bytes
    return {
        **_common(outcome, new),
        "count": len(outcome.volumes),
        "complete": outcome.complete,
        "to_come": outcome.to_come,
        "lacking": outcome.lacking,
    }


def _common(outcome: SplitOutcome | JoinOutcome, new: int) -> dict:
    """What both states return; `new` are the bytes that came in."""
    return {
        "changed": outcome.changed,
        "set": outcome.set,
        "volumes": volume_values(outcome.volumes),
        "table": volume_table(outcome.volumes),
        "new_bytes": new,
        "new_text": size_text(new),
        "hashed_bytes": outcome.hashed_bytes,
        "omitted_bytes": getattr(outcome, "omitted_bytes", 0),
        "dropped_bytes": getattr(outcome, "dropped_bytes", 0),
        "diff": {
            "before": "".join(f"{line}\n" for line in outcome.before),
            "after": "".join(f"{line}\n" for line in outcome.after),
        },
    }


if __name__ == "__main__":
    main()
