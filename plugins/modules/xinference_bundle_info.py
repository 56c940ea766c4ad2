#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell what is in a bundle, and whether it arrived undamaged."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_bundle_info
short_description: Tell what is in a bundle
version_added: "0.1.0"
description:
  - Reads the bundle in O(path), checks that its index and manifests are sound and every blob is there with the right
    size, and returns what it holds. Fails with everything that is wrong in one message.
  - With O(verify) every file is also hashed, unless it is known from an earlier run and did not change since.
options:
  path:
    description: Directory of the bundle.
    type: path
    required: true
  verify:
    description: Hash the content as well, and fail when a blob is damaged.
    type: bool
    default: false
  signers:
    description:
      - Who may have signed the bundle, the text of an allowed signers file as L(ssh-keygen,
        https://man.openbsd.org/ssh-keygen#ALLOWED_SIGNERS) reads it, or the path of such a file. Fails when none of
        them signed it, before anything in it is looked at.
      - Needs C(ssh-keygen) of OpenSSH 8.2 or newer, 8.8 or newer where keys have dates.
      - Empty means that nobody asks.
    type: str
    default: ""
  cache_dir:
    description:
      - Directory where it is remembered which files were already hashed. It is not part of the bundle.
      - Defaults to O(path) with C(.cache) appended. Used with O(verify) only.
    type: path
extends_documentation_fragment:
  - airgap.xinference.attributes.info
seealso:
  - module: airgap.xinference.xinference_bundle
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Check the bundle that was carried in
  airgap.xinference.xinference_bundle_info:
    path: /media/usb/bundle
    verify: true
    signers: /etc/xinference/allowed_signers
  register: bundle

- name: Show licences, origins and code
  ansible.builtin.debug:
    msg: "{{ bundle.origins }}"
"""

RETURN = r"""
artifacts:
  description: What is in the bundle, in order of kind and name.
  returned: success
  type: list
  elements: dict
  contains:
    kind:
      description: Kind of the artifact.
      type: str
      sample: models
    name:
      description: Name of the artifact.
      type: str
      sample: bge-m3
    revision:
      description: Revision of its source; empty when the source has none.
      type: str
    annotations:
      description: What its manifest says about it.
      type: dict
    files:
      description: Number of files.
      type: int
    size:
      description: Bytes of all files together.
      type: int
    size_text:
      description: The same for people.
      type: str
    digest:
      description: Digest of its manifest.
      type: str
table:
  description: The artifacts as lines of a table with name, revision, number of files and size.
  returned: success
  type: list
  elements: str
origins:
  description: The models as lines of a table with licence, whether they bring code of their own, source and revision.
  returned: success
  type: list
  elements: str
signed_by:
  description: The identity of the allowed signer who signed the bundle. Empty where nobody asked.
  returned: success
  type: str
  sample: release@bank.example
signing_key:
  description:
    - Fingerprint of the key that the bundle is signed with, as C(ssh-keygen -l) prints it; empty when it is not signed.
    - Without O(signers) nobody checked that it is right.
  returned: success
  type: str
  sample: SHA256:rYMvZ0uEzs/jz+9l9pAnNjaRXmDcIdkZHRm6LzH5Oh8
trust:
  description:
    - Why the bundle is not to be trusted, V(missing), V(index), V(signature), V(mismatch), V(unknown signer),
      V(expired), V(not yet valid), or V(namespace), or why that cannot be told, V(ssh-keygen) or V(signers).
  returned: failure, when that is why
  type: str
size:
  description: Bytes of the bundle, every blob counted once.
  returned: success
  type: int
hashed_bytes:
  description: Bytes that had to be read and hashed.
  returned: success
  type: int
problems:
  description: Everything that is wrong, damaged blobs with the files they are.
  returned: failure
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import (
    Bundle,
    BundleError,
    cache_dir,
    verify,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import MODELS
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.origin import code_of
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.report import (
    artifact_values,
    origin_table,
    table,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import (
    TrustError,
    signers_text,
    signing_key_of,
)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "verify": {"type": "bool", "default": False},
            "signers": {"type": "str", "default": ""},
            "cache_dir": {"type": "path"},
        },
        supports_check_mode=True,
    )
    params = module.params
    with failing(module, BundleError, TrustError, OSError):
        bundle = Bundle.open(params["path"], signers_text(params["signers"]))
        hashed = _verify(bundle, params["cache_dir"]) if params["verify"] else 0
        artifacts = [
            artifact_values(
                item.kind,
                item.name,
                item.annotations,
                len(item.files or item.layers),
                item.size,
                item.digest,
                code_of(item) if item.kind == MODELS else None,
            )
            for item in bundle.artifacts
        ]
        module.exit_json(
            changed=False,
            artifacts=artifacts,
            table=table(artifacts),
            origins=origin_table(artifacts),
            signed_by=bundle.signer.identity if bundle.signer else "",
            signing_key=signing_key_of(bundle.signature),
            size=bundle.size,
            hashed_bytes=hashed,
        )


def _verify(bundle: Bundle, cache: str | None) -> int:
    """Hash what no stamp vouches for; returns the bytes read, raises BundleError when blobs are damaged."""
    stamps = Stamps(f"{cache or cache_dir(bundle.root)}/stamps.json")
    damaged = verify(bundle, stamps)
    if damaged:
        raise BundleError(
            f"The bundle {bundle.root} is damaged ({len(damaged)} blobs); copy it again from where it was made:",
            [str(blob) for blob in damaged],
        )
    return stamps.hashed_bytes


if __name__ == "__main__":
    main()
