#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_model_info; what it returns is put together by module_utils/server/running.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_model_info
short_description: List the models of an Xinference server
version_added: "0.1.0"
author: airgap.xinference engineers (@airgap)
description:
  - Returns every model that the server knows, also those being launched and those whose launch failed.
  - The server never tells the path of a model nor its engine options.
options:
  model_uid:
    description:
      - Return only this model; RV(models) is empty when the server does not know it.
    type: str
  root:
    description:
      - Root directory of the installation on the host, with the record of what this collection launched.
    type: path
    default: /opt/xinference
  engines_of:
    description:
      - Also return the engines that the server has for a model, and why others cannot be used.
    type: dict
    suboptions:
      model_type:
        description: Type of the model.
        type: str
        required: true
      model_name:
        description: Name of the model, built-in or registered.
        type: str
        required: true
extends_documentation_fragment:
  - airgap.xinference.attributes.info
  - airgap.xinference.server
attributes: {}
seealso:
  - module: airgap.xinference.xinference_health
"""

EXAMPLES = r"""
- name: What does the server run?
  airgap.xinference.xinference_model_info:
  register: served

- name: Why can vLLM not be used?
  airgap.xinference.xinference_model_info:
    engines_of:
      model_type: LLM
      model_name: qwen2.5-instruct
  register: asked
"""

RETURN = r"""
models:
  description: The models, in the order of their uids.
  returned: always
  type: list
  elements: dict
  contains:
    model_uid:
      description: Name under which it serves.
      type: str
      returned: always
      sample: minilm
    state:
      description: V(ready), V(starting), V(stopping), V(failed), or V(lost) (said to run and not listed).
      type: str
      returned: always
      sample: ready
    status:
      description: The server's own word for it; null where it has none.
      type: str
      returned: always
      sample: READY
    progress:
      description: How far the launch is, between 0 and 1.
      type: float
      returned: while it is starting
      sample: 0.5
    replicas:
      description: States of its replicas, where the server tells (1.14 and later).
      type: list
      elements: str
      returned: always
      sample: [READY]
    error:
      description: Why its launch failed, where the server tells (1.14 and later).
      type: str
      returned: always
      sample: ""
    model:
      description: Its entry in the server's list of models; null when it is not listed.
      type: dict
      returned: always
      sample:
        id: minilm
        model_name: all-MiniLM-L6-v2
        model_type: embedding
        dimensions: 384
        replica: 1
    launched:
      description:
        - What the record says of it; null for a model that this collection neither launched nor took over, and where
          the record cannot be read.
      type: dict
      returned: always
      contains:
        by:
          description: Who launched it.
          type: str
          sample: the keeper
        launched_at:
          description: When, in seconds since 1970.
          type: float
          sample: 1795156020.5
        runs:
          description: What was launched.
          type: str
          sample: bge-reranker-base on sentence_transformers
        choice:
          description:
            - Which choice of its entry that is, V(0) for the first, V(1) for the first of its C(fallbacks) and so on,
              V(-1) for a launch of before, because nothing of what is wanted could be launched.
          type: int
          sample: 1
        why:
          description: What was wrong with the first choice, where it is another one.
          type: str
          sample: "The engine vLLM cannot be used here: No module named 'vllm'."
engines:
  description: By engine, a list of what it offers, or the reason why it cannot be used.
  returned: when O(engines_of) is given
  type: dict
  sample:
    Transformers:
      - model_format: pytorch
        model_size_in_billions: "0_5"
        quantizations: [none]
    vLLM: "Failed to import vLLM: No module named 'vllm'"
version:
  description: Version of the server.
  returned: always
  type: str
  sample: 4.1.0
requests:
  description: How many requests were sent to the server.
  returned: always
  type: int
  sample: 3
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import read
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import look


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            **SERVER_OPTIONS,
            "model_uid": {"type": "str"},
            "root": {"type": "path", "default": "/opt/xinference"},
            "engines_of": {
                "type": "dict",
                "options": {
                    "model_type": {"type": "str", "required": True},
                    "model_name": {"type": "str", "required": True},
                },
            },
        },
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    client = client_from(module)
    result: Dict[str, Any] = {"changed": False, "models": []}
    recorded = read(module.params["root"])
    with talking(module, ServerError):
        for uid, found in sorted(look(client).items()):
            if module.params["model_uid"] not in (None, uid):
                continue
            entry: Dict[str, Any] = {
                "model_uid": uid,
                "state": found.state,
                "status": found.status,
                "replicas": list(found.replicas),
                "error": found.error,
                "model": dict(found.model) if found.model is not None else None,
                "launched": recorded[uid].told() if uid in recorded else None,
            }
            if found.state == "starting":
                entry["progress"] = client.progress(uid)
            result["models"].append(entry)
        wanted = module.params["engines_of"]
        if wanted:
            result["engines"] = client.engines(wanted["model_type"], wanted["model_name"])
        result["version"] = client.version()
    module.exit_json(requests=client.requests_made, **result)


if __name__ == "__main__":
    main()
