#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make a Xinference server run exactly the models of a list."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_model_set
short_description: Make a Xinference server run the models of a list
version_added: "0.1.0"
description:
  - Compares the list with what the server runs and with a record of what was launched before, and launches, relaunches
    and terminates what differs. A model that runs as wanted is left alone.
  - Several models are launched at once. On one GPU, models whose engine measures the free memory (vLLM, SGLang) start
    one after another, embedding, rerank and audio models before LLMs.
  - A model that fails does not stop the others. The module then fails with one message that names each failed model
    with cause and cure, and returns the results of all.
  - Every mistake in the list is found before anything changes, and all are reported in one message.
options:
  models:
    description:
      - The models, each a dictionary of Xinference's launch fields, such as C(model_uid), C(model_name), C(model_type),
        C(model_engine), C(model_format), C(model_size_in_billions), C(quantization), C(replica), C(n_gpu),
        C(request_limits), C(envs), C(peft_model_config).
      - Options of the engine stand in a dictionary C(options).
      - C(source) names a model of the bundle, whose directory becomes the C(model_path); C(gpus) lists GPUs of the host
        by index or UUID; an entry with C(enabled=false) is checked and otherwise as if it were not there; C(probe) is
        for verification.
    type: list
    elements: dict
    required: true
  server_gpus:
    description:
      - The GPUs of the host that the server may use, as indexes or UUIDs, in the order in which it was given them.
      - The place of a GPU in this list is the index the server knows it by.
    type: list
    elements: raw
    default: []
    aliases: [gpus]
  root:
    description:
      - Root directory of the installation on the host. The record and its lock are in C(state) below it, and so is the
        list of shipped models.
    type: path
    default: /opt/xinference
  prune:
    description:
      - Which models that are not in O(models) are terminated.
      - V(managed) those that this collection launched or took over; V(all) every one; V(none) none.
    type: str
    choices: [managed, all, none]
    default: managed
  parallel:
    description: How many models are launched at the same time.
    type: int
    default: 4
  wait_timeout:
    description: How many seconds one model may take to become ready before its launch is cancelled.
    type: float
    default: 1800
  lock_wait:
    description: How many seconds to wait while somebody else changes the models of this server.
    type: float
    default: 600
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.server
attributes:
  check_mode:
    support: full
    details:
      - Asks the server, and writes no file and changes no model.
  diff_mode:
    support: full
    details:
      - Shows the launch fields of every model that changes, before and after. Values that look like secrets are hidden.
  idempotent:
    support: full
seealso:
  - module: airgap.xinference.xinference_model
  - module: airgap.xinference.xinference_model_info
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Serve an embedding model and an LLM
  airgap.xinference.xinference_model_set:
    models:
      - model_uid: bge-m3
        model_name: bge-m3
        model_type: embedding
        model_engine: sentence_transformers
        source:
          modelscope: BAAI/bge-m3
        gpus: [0]
      - model_uid: qwen
        model_name: qwen2.5-instruct
        model_engine: vLLM
        model_format: pytorch
        model_size_in_billions: 7
        source:
          modelscope: Qwen/Qwen2.5-7B-Instruct
        gpus: [0]
        options:
          gpu_memory_utilization: 0.8
    server_gpus: [0, 1]

- name: Show what the server would be missing
  airgap.xinference.xinference_model_set:
    models: "{{ xinference_models }}"
    prune: all
  check_mode: true
  diff: true
"""

RETURN = r"""
models:
  description: What happened, or would happen in check mode, to every model of the list and every model removed.
  returned: always, once the server has answered
  type: list
  elements: dict
  contains:
    model_uid:
      description: The model.
      type: str
      sample: bge-m3
    action:
      description:
        - C(keep), C(launch), C(relaunch), C(terminate), C(adopt) (ran already as wanted, and is in the record now) or
          C(cleanup) (is not wanted and does not run, and is out of the record now).
      type: str
      sample: relaunch
    reason:
      description: Why.
      type: str
      sample: model_path was /opt/xinference/models/bge-m3/1f, becomes /opt/xinference/models/bge-m3/9c
    model:
      description: The model as the server shows it; null when it does not run.
      type: dict
    duration:
      description: Seconds it took.
      type: float
      sample: 8.1
    error:
      description: What went wrong, in the server's words; empty when nothing did.
      type: str
    diagnosis:
      description: Cause and cure of the error, where they are known; else null.
      type: dict
      contains:
        cause:
          description: Why it failed.
          type: str
        cure:
          description: What to do.
          type: str
requests:
  description: HTTP requests sent to the server.
  returned: always, once the server has answered
  type: int
  sample: 2
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import hide
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    conclude,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import LockHeld
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "server_gpus": {"type": "list", "elements": "raw", "default": [], "aliases": ["gpus"]},
            "root": {"type": "path", "default": "/opt/xinference"},
            "prune": {"type": "str", "choices": ["managed", "all", "none"], "default": "managed"},
            "parallel": {"type": "int", "default": 4},
            "wait_timeout": {"type": "float", "default": 1800.0},
            "lock_wait": {"type": "float", "default": 600.0},
            **SERVER_OPTIONS,
        },
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    given = module.params
    hide(module, given["models"])
    client = client_from(module)
    with talking(module, SpecError, ServerError, LockHeld, OSError):
        applied = apply(
            client,
            specs_from(client, given["models"], given["server_gpus"], given["root"], module.check_mode),
            given["root"],
            prune=given["prune"],
            limit=max(1, given["parallel"]),
            timeout=given["wait_timeout"],
            lock_wait=given["lock_wait"],
            rehearse=module.check_mode,
            who="the Ansible module xinference_model_set",
        )
    conclude(module, client, applied)


if __name__ == "__main__":
    main()
