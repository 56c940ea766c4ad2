#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep artifacts of a bundle in the store of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_store
short_description: Keep artifacts of a bundle in the store of a host
version_added: "0.1.0"
author:
  - airgap.xinference engineers (@airgap)
description:
  - Takes the blobs that were received into the store after checking their SHA-256, says which are still missing, and
    once none is, makes the directories of models, wheels and tools out of them.
  - Usually called by M(airgap.xinference.xinference_ship), again and again until nothing is missing. Of use by itself
    where blobs come to the host on a disk, C(<root>/partial/<64 hex digits>).
  - Blobs that a stamp (size, modification time, inode) vouches for are not read again, unless O(deep) is set.
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
  artifacts:
    description:
      - The artifacts to keep. Everything about them but these four facts comes from their manifests in the store.
      - C(<root>/state/artifacts.json) will list exactly these.
    type: list
    elements: dict
    required: true
    suboptions:
      kind:
        description: The kind of the artifact, the first part of its name in the bundle's index.
        type: str
        required: true
      name:
        description: The name of the artifact, the second part of its name in the bundle's index.
        type: str
        required: true
      digest:
        description: The digest of its manifest, C(sha256:) and 64 hex digits.
        type: str
        required: true
      size:
        description: The size of its manifest in bytes.
        type: int
        required: true
      layers:
        description:
          - Layers of an image, by digest, that are to be in the store. Manifest and configuration always are, layers
            only on their way to the engine.
        type: list
        elements: str
        default: []
      manifest:
        description:
          - The manifest itself, compressed with zlib and written in base64, for hosts that may lack it.
          - It is not secret. It is kept out of logs because it is long.
        type: str
  trust:
    description:
      - What shows that somebody who may signed the bundle these artifacts are of. It is checked before anything is
        taken in; artifacts that the signed index does not name just so are refused.
      - Needs C(ssh-keygen) of OpenSSH 8.2 or newer on the host, 8.8 or newer where keys have dates.
      - C(<root>/state/index.json) and C(<root>/state/index.json.sig) keep what was signed, to be looked at later.
    type: dict
    suboptions:
      index:
        description: The bundle's C(index.json), compressed with zlib and written in base64.
        type: str
        required: true
      signature:
        description: The bundle's C(index.json.sig); without it the bundle is refused.
        type: str
      signers:
        description: Who may sign, the text of an allowed signers file.
        type: str
        required: true
  owner:
    description:
      - The numeric user that uploads with the connection plugin, when it is not the one this module runs as.
      - The receiving area is made to belong to it.
    type: int
  deep:
    description:
      - Read everything that is wanted and there again, over all processors and from the disk itself, whatever the
        stamps say. What is damaged is removed and named, and counts as missing.
      - A directory that had a damaged file is made again as soon as the blob has come anew. A process that has the old
        file open goes on with that until it opens it again.
    type: bool
    default: false
  deep_seconds:
    description: About how many seconds to read; the rest is for another call with O(deep_after). V(0) means all.
    type: float
    default: 0
  deep_after:
    description: RV(deep.after) of the call before.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Take in what was copied to the receiving area by hand
  airgap.xinference.xinference_store:
    root: /opt/xinference
    artifacts:
      - kind: models
        name: bge-m3
        digest: sha256:6a1e2b0f7c5d4e3f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f
        size: 4127
  register: kept

- name: Read all of it again
  airgap.xinference.xinference_store:
    root: /opt/xinference
    artifacts: "{{ artifacts }}"
    deep: true
"""

RETURN = r"""
missing:
  description: Sizes in bytes of the blobs that are not in the store, by digest.
  returned: success
  type: dict
  sample: {}
partial:
  description: Bytes already received of the missing blobs, by digest.
  returned: success
  type: dict
  sample: {}
damaged:
  description: Why a blob or a received file was thrown away, by digest.
  returned: success
  type: dict
  sample: {}
made:
  description: Directories and files that were made.
  returned: success
  type: list
  elements: str
  sample: ["/opt/xinference/models/bge-m3/6a1e2b0f7c5d"]
faults:
  description: Files of directories that O(deep) found to be others than they should be, some of them, and how.
  returned: success
  type: list
  elements: str
  sample: ["models/bge-m3: config.json is missing"]
artifacts:
  description: The content of C(<root>/state/artifacts.json), empty while blobs are missing.
  returned: success
  type: dict
  sample: {"models": {"bge-m3": {"digest": "sha256:6a1e…", "path": "/opt/xinference/models/bge-m3/6a1e2b0f7c5d"}}}
hashed_bytes:
  description: Bytes that had to be read.
  returned: success
  type: int
  sample: 0
given_bytes:
  description: Bytes of manifests that came with the question and were lacking.
  returned: success
  type: int
  sample: 0
signed_by:
  description: The identity of the allowed signer who signed the bundle.
  returned: with O(trust)
  type: str
  sample: release@bank.example
trust:
  description: Why the bundle was refused, as RV(airgap.xinference.xinference_bundle_info#module:trust) has it.
  returned: failure, when that is why
  type: str
blobs:
  description: Blobs that were verified and taken in.
  returned: success
  type: int
  sample: 0
deep:
  description: What was read again.
  returned: with O(deep)
  type: dict
  contains:
    files:
      description: Files read, those of the calls before included.
      type: int
    of_files:
      description: Files there are to be read.
      type: int
    read_bytes:
      description: Bytes read, those of the calls before included.
      type: int
    of_bytes:
      description: Bytes there are to be read.
      type: int
    after:
      description: What to give O(deep_after) to go on; empty at the end.
      type: str
receive:
  description: Where missing blobs are to be put, and what the host offers for it.
  returned: success
  type: dict
  contains:
    path:
      description: The receiving area.
      type: str
    free_bytes:
      description: Bytes that can still be written there.
      type: int
    turn:
      description: A number that changes when somebody begins or ends to ship to this host.
      type: int
    aes:
      description: Whether the processor of the host computes AES, so that ciphers made of it are the fastest ones.
      type: bool
"""

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.deep import Deep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import free_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import Signer, TrustError, vouch
from ansible_collections.airgap.xinference.plugins.module_utils.host.system_facts import aes


def main() -> None:
    """Run the module."""
    artifact = {
        "kind": {"type": "str", "required": True},
        "name": {"type": "str", "required": True},
        "digest": {"type": "str", "required": True},
        "size": {"type": "int", "required": True},
        "layers": {"type": "list", "elements": "str", "default": []},
        "manifest": {"type": "str", "no_log": True},
    }
    trust = {
        # Not secret, but long.
        "index": {"type": "str", "required": True, "no_log": True},
        "signature": {"type": "str"},
        "signers": {"type": "str", "required": True},
    }
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "artifacts": {"type": "list", "elements": "dict", "required": True, "options": artifact},
            "trust": {"type": "dict", "options": trust},
            "owner": {"type": "int"},
            "deep": {"type": "bool", "default": False},
            "deep_seconds": {"type": "float", "default": 0},
            "deep_after": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    with failing(module, StoreError, TrustError, OSError):
        wanted = [Wanted(**{**entry, "layers": tuple(entry["layers"])}) for entry in module.params["artifacts"]]
        signer = _vouch(module, wanted)
        store = Store(module.params["root"], dry_run=module.check_mode)
        deep = Deep(module.params["deep_after"], module.params["deep_seconds"]) if module.params["deep"] else None
        answer = keep(store, wanted, module.params["owner"], deep)
        module.exit_json(
            **({"deep": answer.reread._asdict()} if answer.reread else {}),
            **({"signed_by": signer.identity} if signer else {}),
            changed=answer.changed,
            missing=answer.missing,
            partial=answer.partial,
            damaged=answer.damaged,
            made=answer.paths,
            faults=list(answer.faults),
            artifacts=answer.artifacts,
            hashed_bytes=store.hashed_bytes,
            given_bytes=answer.given_bytes,
            blobs=store.adopted,
            receive={
                "path": str(store.partial),
                "free_bytes": free_bytes(store.partial),
                "turn": store.turn(),
                "aes": aes(),
            },
        )


def _vouch(module: AnsibleModule, wanted: list) -> Signer | None:
    """Check who signed what is wanted, when that was asked for, and keep the proof of it."""
    trust = module.params["trust"]
    if trust is None:
        return None
    proof = None if module.check_mode else Path(module.params["root"], "state")
    return vouch(trust["index"], trust["signature"], trust["signers"], wanted, proof)


if __name__ == "__main__":
    main()
