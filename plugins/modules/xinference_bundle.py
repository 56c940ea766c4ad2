#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write a bundle: an OCI image layout that holds exactly the models, images and files asked for."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_bundle
short_description: Write the bundle that is carried to an air-gapped site
version_added: "0.1.0"
description:
  - Makes the directory O(path) an L(OCI image layout, https://github.com/opencontainers/image-spec) that holds exactly
    the models, images and files asked for. Artifacts that are no longer asked for are removed from it.
  - A model directory becomes a CNCF ModelPack manifest with one raw blob a file. Other files become an artifact as ORAS
    writes it. Files are hard links of their sources where the file system allows, otherwise copies.
  - A container image becomes an OCI image with uncompressed layers, so that the digest of its configuration is the
    image id. It is read once, from the Docker Engine of this machine or from an archive, and not again while it is the
    same.
  - The same input gives the same digests, on any machine. A second run reads nothing that has not changed, which is
    known from size, modification time and inode of every file.
  - Refuses, before anything is written and with every problem in one message, symbolic links that leave a directory,
    devices, empty directories, unsafe names, and too little disk.
options:
  path:
    description: Directory of the bundle. It is made when it does not exist; a directory with other content is refused.
    type: path
    required: true
  models:
    description: Models to put in, as C(models/<name>).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the model in the bundle and of its directory on the hosts.
        type: str
        required: true
      path:
        description: Directory of the model's files, or the one file that is the model.
        type: path
        required: true
      source:
        description: Where the model comes from. Recorded in the bundle, so it must not be a path of this machine.
        type: str
      revision:
        description: Revision of the source. Recorded in the bundle.
        type: str
      license:
        description:
          - The model's licence. Recorded in the bundle.
          - By default what the model's own card (C(README.md)) names, else the name of its licence file.
        type: str
  files:
    description: Other things to put in, as C(<kind>/<name>).
    type: list
    elements: dict
    default: []
    suboptions:
      kind:
        description: Kind of the artifact, for example V(wheels) or V(tools).
        type: str
        required: true
      name:
        description: Name of the artifact among its kind.
        type: str
        required: true
      path:
        description: Directory whose files are put in, or one file.
        type: path
        required: true
      annotations:
        description: Facts about the files that belong to the artifact. Values must not differ from build to build.
        type: dict
        default: {}
  images:
    description: Container images to put in, as C(images/<name>), with C(-) for C(/) and C(:).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name and tag of the image, as the hosts will know it.
        type: str
        required: true
      archive:
        description:
          - An archive that holds the image, as C(docker save), podman, skopeo or buildx write it (docker or OCI form),
            plain or compressed with gzip or zstd (for which the program C(zstd) is needed).
          - Without it the image comes from the Docker Engine of this machine, which pulls it when it does not have it.
        type: path
  docker_host:
    description:
      - Address of the Docker Engine, for images without an archive. By default the environment variable E(DOCKER_HOST),
        else the socket of this machine.
    type: str
  signing_key:
    description:
      - File of an OpenSSH key to sign the bundle with; C(ssh-keygen) of OpenSSH 8.2 or newer does it. The key itself
        goes nowhere. The bundle gets C(index.json.sig), a signature of the exact bytes of C(index.json), which names
        all else by its SHA-256.
      - Nobody is asked for a passphrase. Give a key that has one to C(ssh-agent) before, and name its file or its
        public one (C(.pub)) here; so also for keys on tokens.
      - A signature by this key that is still right stays as it is. Without a key, a signature stays as long as the
        index does, and goes with it.
    type: path
  cache_dir:
    description:
      - Directory of what is remembered about files between runs. It is not part of the bundle.
      - Defaults to O(path) with C(.cache) appended.
    type: path
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Nothing is hashed and nothing is pulled in check mode, so a file or an image that is new or was touched counts
        as a change.
  diff_mode:
    support: full
  idempotent:
    support: full
seealso:
  - module: airgap.xinference.xinference_bundle_info
  - module: airgap.xinference.modelscope_snapshot
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Put two models and a wheelhouse into the bundle
  airgap.xinference.xinference_bundle:
    path: /srv/bundle
    models:
      - name: bge-m3
        path: /srv/models/bge-m3
      - name: Qwen2.5-7B-Instruct
        license: apache-2.0
        path: /srv/bundle.cache/modelscope/Qwen2.5-7B-Instruct
        source: modelscope:Qwen/Qwen2.5-7B-Instruct
        revision: a09a35458c702b33eeacc393d103063234e8bc28
    files:
      - kind: wheels
        name: server
        path: /srv/wheels
        annotations:
          airgap.xinference.python: cp311
    signing_key: ~/.ssh/bundle_ed25519

- name: Put images into the bundle, one from the engine and one from an archive
  airgap.xinference.xinference_bundle:
    path: /srv/bundle
    images:
      - name: xprobe/xinference:v4.1.0
      - name: nginx:1.29
        archive: /srv/nginx.tar.zst
"""

RETURN = r"""
directory:
  description: The bundle.
  returned: success
  type: str
  sample: /srv/bundle
artifacts:
  description: What is in the bundle, in the order asked for.
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
      description: Number of files, of an image the number of layers.
      type: int
      sample: 13
    size:
      description: Bytes of all files together.
      type: int
      sample: 91618861
    size_text:
      description: The same for people.
      type: str
      sample: 87.4 MiB
    digest:
      description: Digest of its manifest. Empty in check mode when files would have to be hashed to know it.
      type: str
table:
  description: The artifacts as lines of a table with name, revision, number of files and size.
  returned: success
  type: list
  elements: str
hashed_bytes:
  description: Bytes that had to be read and hashed.
  returned: success
  type: int
linked_bytes:
  description: Bytes that came in as hard links.
  returned: success
  type: int
copied_bytes:
  description: Bytes that were copied.
  returned: success
  type: int
new_text:
  description: Bytes linked and copied, for people.
  returned: success
  type: str
hashed_text:
  description: Bytes hashed, for people.
  returned: success
  type: str
dropped_bytes:
  description: Bytes of blobs that were removed because no artifact uses them any more.
  returned: success
  type: int
signing_key:
  description: Fingerprint of the key that the bundle is signed with, as C(ssh-keygen -l) prints it. Empty without one.
  returned: success
  type: str
  sample: SHA256:rYMvZ0uEzs/jz+9l9pAnNjaRXmDcIdkZHRm6LzH5Oh8
trust:
  description: Why the bundle could not be signed, V(ssh-keygen) or V(key).
  returned: failure, when that is why
  type: str
problems:
  description: Everything that is wrong.
  returned: failure
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.engine import DOCKER_ERROR, Engine, EngineError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.images import (
    ArchiveFile,
    EngineImage,
    ImageRequest,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Outcome, Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import LICENSE, REVISION, SOURCE
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.report import artifact_values, table
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import TrustError


def main() -> None:
    """Entry point."""
    model_spec = {
        "name": {"type": "str", "required": True},
        "path": {"type": "path", "required": True},
        "source": {"type": "str"},
        "revision": {"type": "str"},
        "license": {"type": "str"},
    }
    files_spec = {
        "kind": {"type": "str", "required": True},
        "name": {"type": "str", "required": True},
        "path": {"type": "path", "required": True},
        "annotations": {"type": "dict", "default": {}},
    }
    image_spec = {"name": {"type": "str", "required": True}, "archive": {"type": "path"}}
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "models": {"type": "list", "elements": "dict", "default": [], "options": model_spec},
            "files": {"type": "list", "elements": "dict", "default": [], "options": files_spec},
            "images": {"type": "list", "elements": "dict", "default": [], "options": image_spec},
            "docker_host": {"type": "str"},
            "signing_key": {"type": "path", "no_log": False},
            "cache_dir": {"type": "path"},
        },
        supports_check_mode=True,
    )
    params = module.params
    requests = [
        Request("models", model["name"], model["path"], _model_annotations(model)) for model in params["models"]
    ]
    requests += [Request(item["kind"], item["name"], item["path"], item["annotations"]) for item in params["files"]]
    with failing(module, BundleError, EngineError, TrustError, OSError):
        images = _images(module, params["images"])
        outcome = write_bundle(
            params["path"],
            requests,
            params["cache_dir"],
            module.check_mode,
            images=images,
            signing_key=params["signing_key"],
        )
        module.exit_json(directory=params["path"], **_result(outcome))


def _images(module: AnsibleModule, entries: list) -> list:
    """Requests for images; the engine is asked for only where some image is to come from it."""
    engine = None
    if any(not entry["archive"] for entry in entries):
        if DOCKER_ERROR:
            module.fail_json(
                msg=missing_required_lib("docker", reason="to take images from the Docker Engine of this machine"),
                exception=DOCKER_ERROR,
            )
        engine = Engine(module.params["docker_host"])
    return [
        ImageRequest(
            entry["name"],
            EngineImage(engine, entry["name"]) if engine and not entry["archive"] else ArchiveFile(entry["archive"]),
        )
        for entry in entries
    ]


def _model_annotations(model: dict) -> dict:
    """What the manifest of a model says about its origin."""
    origin = {SOURCE: model["source"], REVISION: model["revision"], LICENSE: model["license"]}
    return {key: value for key, value in origin.items() if value}


def _result(outcome: Outcome) -> dict:
    """The module's return values."""
    artifacts = [
        artifact_values(item.kind, item.name, item.annotations, item.files, item.size, item.digest)
        for item in outcome.artifacts
    ]
    return {
        "changed": outcome.changed,
        "artifacts": artifacts,
        "table": table(artifacts),
        "signing_key": outcome.signing_key,
        "hashed_bytes": outcome.hashed_bytes,
        "linked_bytes": outcome.linked_bytes,
        "copied_bytes": outcome.copied_bytes,
        "dropped_bytes": outcome.dropped_bytes,
        "new_text": size_text(outcome.linked_bytes + outcome.copied_bytes),
        "hashed_text": size_text(outcome.hashed_bytes),
        "diff": {
            "before": "".join(f"{line}\n" for line in outcome.before),
            "after": "".join(f"{line}\n" for line in outcome.after),
        },
    }


if __name__ == "__main__":
    main()
