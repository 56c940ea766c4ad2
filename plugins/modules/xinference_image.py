#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Give the Docker Engine of a host the images that were shipped to it."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_image
short_description: Give the Docker Engine of a host the images that were shipped to it
version_added: "0.1.0"
description:
  - Compares images of the bundle with what the engine has, by image id (by the digest of the manifest where the engine
    keeps images in containerd). What the engine has is not loaded again; a name it lacks is added.
  - Otherwise the image is loaded from the blobs of the store, without a second copy on the disk, and without the layers
    the engine has already. The result is looked at afterwards, and an error inside the engine's answer is an error.
  - Layers that the store would need for that are returned in RV(missing), and nothing is loaded then. Usually called by
    M(airgap.xinference.xinference_ship), which sends them and calls again.
  - Layers of an image leave the store as soon as the engine has the image.
options:
  root:
    description: Root directory of the host.
    type: path
    default: /opt/xinference
  images:
    description: The images, by the names and digests they have in the index of the bundle.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the image in the bundle.
        type: str
        required: true
      digest:
        description: Digest of its manifest.
        type: str
        required: true
      size:
        description: Size of its manifest in bytes.
        type: int
        required: true
      complete:
        description: Load it with all its layers, for an engine that refused an archive without those it has.
        type: bool
        default: false
  docker_host:
    description:
      - Address of the engine. By default the environment variable E(DOCKER_HOST), else the socket of this host.
    type: str
extends_documentation_fragment:
  - airgap.xinference.attributes
attributes:
  check_mode:
    support: full
    details:
      - Where the Python library C(docker) has not been shipped yet, an image counts as not there.
  diff_mode:
    support: full
  idempotent:
    support: full
requirements:
  - docker (the bundle carries it; see C(PYTHONPATH) in the example)
seealso:
  - module: airgap.xinference.xinference_ship
  - module: community.docker.docker_image_load
    description: Loads an archive that is on the host, whatever the engine has.
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Load an image whose blobs are in the store
  airgap.xinference.xinference_image:
    root: /opt/xinference
    images:
      - name: xprobe-xinference-v4.1.0
        digest: sha256:6a1e2b0f7c5d4e3f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f
        size: 1893
  environment:
    PYTHONPATH: /opt/xinference/lib/python
"""

RETURN = r"""
images:
  description: What was done about each image.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the image in the bundle.
      type: str
      sample: xprobe-xinference-v4.1.0
    reference:
      description: Name of the image in the engine.
      type: str
      sample: xprobe/xinference:v4.1.0
    image_id:
      description: Digest of its configuration.
      type: str
    id:
      description: What this engine calls the image; empty while it does not have it.
      type: str
    action:
      description:
        - V(keep), V(tag) or V(load); V(wait) when the store lacks layers; V(refused) when the engine did not take an
          archive without the layers it has.
      type: str
      sample: load
    layers:
      description: Layers loaded, or to be loaded.
      type: int
      sample: 1
    of_layers:
      description: Layers of the image.
      type: int
      sample: 14
    bytes:
      description: Bytes of the layers loaded, or to be loaded.
      type: int
      sample: 20480
    refused:
      description: What the engine said when it refused.
      type: str
    seconds:
      description: Duration of the load.
      type: float
missing:
  description: Layers that the store lacks, sizes in bytes by digest, by name of the image.
  returned: success
  type: dict
  sample: {}
freed_bytes:
  description: Bytes of layers that left the store because the engine has them.
  returned: success
  type: int
  sample: 20480
msg:
  description: One line about what was loaded; empty when nothing was.
  returned: success
  type: str
  sample: "xprobe/xinference:v4.1.0: 1 of 14 layers, 20.0 KiB, loaded in 0.2 s"
"""

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import failing
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.engine import DOCKER_ERROR, Engine, EngineError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.loaded import LoadedImage, note_loaded
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.loading import (
    Carried,
    Loaded,
    Plan,
    carried,
    carry_out,
    drop_layers,
    look,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import size_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trees import read_artifact


def main() -> None:
    """Run the module."""
    image = {
        "name": {"type": "str", "required": True},
        "digest": {"type": "str", "required": True},
        "size": {"type": "int", "required": True},
        "complete": {"type": "bool", "default": False},
    }
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/opt/xinference"},
            "images": {"type": "list", "elements": "dict", "required": True, "options": image},
            "docker_host": {"type": "str"},
        },
        supports_check_mode=True,
    )
    if DOCKER_ERROR:
        module.fail_json(
            msg=missing_required_lib("docker", reason="to talk to the engine; the bundle carries it, see PYTHONPATH"),
            exception=DOCKER_ERROR,
        )
    with failing(module, EngineError, StoreError, OSError):
        store = Store(module.params["root"], dry_run=module.check_mode)
        with store.locked():
            module.exit_json(**_run(store, Engine(module.params["docker_host"]), module.params["images"]))


def _run(store: Store, engine: Engine, wanted: list) -> dict:
    """Look at every image, load what can be loaded, and say what happened."""
    rows, missing, lines, there = [], {}, [], []
    before, after = [], []
    for entry in wanted:
        artifact = read_artifact(store, "images", entry["name"], entry["digest"], entry["size"])
        image = carried(store, artifact)
        plan = look(engine, store, image, entry["complete"])
        if plan.missing:
            missing[image.name] = plan.missing
            loaded = Loaded("wait", "", 0, 0.0)
        elif store.dry_run or plan.action == "keep":
            loaded = Loaded(plan.action, plan.known.id if plan.known else "", 0, 0.0)
        else:
            loaded = carry_out(engine, store, image, plan)
            if loaded.action == "load" and loaded.id:
                # Only what is noted here is ever removed from the engine again.
                note_loaded(store.state, _noted(image, loaded))
        if loaded.id:
            there.append(image)
        rows.append(_row(image, plan, loaded))
        lines += _line(image, plan, loaded)
        now = plan.known.id if plan.known else ""
        before.append(f"{image.reference} {now if now and plan.action == 'keep' else 'is not there'}\n")
        after.append(f"{image.reference} {now or image.config.digest}\n")
    freed = drop_layers(store, there)
    return {
        "changed": any(row["action"] != "keep" for row in rows) or freed > 0,
        "images": rows,
        "missing": missing,
        "freed_bytes": freed,
        "msg": "; ".join(lines),
        "diff": {"before": "".join(before), "after": "".join(after)},
    }


def _noted(image: Carried, loaded: Loaded) -> LoadedImage:
    layers = {layer.digest: layer.size for layer in image.layers}
    return LoadedImage(image.reference, loaded.id, image.config.digest, image.manifest.digest, layers)


def _row(image: Carried, plan: Plan, loaded: Loaded) -> dict:
    return {
        "name": image.name,
        "reference": image.reference,
        "image_id": image.config.digest,
        "id": loaded.id,
        "action": loaded.action,
        "layers": len(plan.layers),
        "of_layers": len(set(image.layers)),
        "bytes": sum(layer.size for layer in plan.layers),
        "refused": loaded.refused,
        "seconds": round(loaded.seconds, 2),
    }


def _line(image: Carried, plan: Plan, loaded: Loaded) -> list:
    """What there is to tell about an image: nothing, or one line."""
    if loaded.action == "tag":
        return [f"{image.reference}: was there under another name"]
    if loaded.action != "load" or not loaded.id:
        return []
    return [
        f"{image.reference}: {len(plan.layers)} of {len(set(image.layers))} layers, {size_text(loaded.bytes)}, "
        f"loaded in {loaded.seconds:.1f} s"
    ]


if __name__ == "__main__":
    main()
