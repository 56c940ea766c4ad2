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
  - A list without mistakes takes the place of the one in the release in force, below O(root), before any model changes,
    so that the keeper goes by the same list. A host that has no release gets none. When this changes nothing but the
    release, the result is changed all the same.
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
      - C(fallbacks) lists alternatives, tried in their order when the model cannot be launched. Each is a dictionary of
        the fields that differ from the entry's, which it takes over otherwise, except that another C(model_name) brings
        its own C(source), size, format and quantization, another size or format its own C(source), and another
        C(model_engine) its own C(options). An alternative serves under the uid of the entry, until somebody runs this
        module again with O(first_choice=true).
      - C(relaunch) is O(relaunch) for one model.
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
  docker_host:
    description:
      - Address of the engine whose log of the server shows why a launch failed, by default what the client of the host
        is set up for.
    type: str
  prune:
    description:
      - Which models that are not in O(models) are terminated.
      - V(managed) those that this collection launched or took over; V(all) every one; V(none) none.
    type: str
    choices: [managed, all, none]
    default: managed
  relaunch:
    description:
      - How a changed model takes the place of the one that serves, where its entry does not say.
      - With V(replace) that one is ended first, and brought back when neither the new one nor an alternative can be
        launched.
      - With V(beside) the new one is first launched under another uid and asked something, and the old one is ended
        only when the new one works. Xinference cannot rename a model, so it is then launched once more under its own
        uid, which does not serve for that long. Where there is no room for both, it is done as with V(replace).
    type: str
    choices: [replace, beside]
    default: replace
  first_choice:
    description:
      - Whether a model that runs as one of its C(fallbacks) goes back to its first choice. It is ended for that, unless
        O(relaunch=beside), and comes back when the first choice still fails. It is left alone where the server says
        that the engine of the first choice still cannot be used.
    type: bool
    default: true
  parallel:
    description: How many models are launched at the same time.
    type: int
    default: 4
  wait_timeout:
    description:
      - How many seconds one launch may take to become ready before it is cancelled. An alternative has as long.
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
      - Asks the server, and writes no file and changes no model and no release.
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

- name: Serve a reranker with vLLM, or a smaller one where vLLM or the memory for it is missing
  airgap.xinference.xinference_model_set:
    models:
      - model_uid: reranker
        model_name: bge-reranker-v2-m3
        model_type: rerank
        model_engine: vLLM
        source:
          modelscope: BAAI/bge-reranker-v2-m3
        gpus: [0]
        options:
          gpu_memory_utilization: 0.2
        fallbacks:
          - model_name: bge-reranker-base
            model_engine: sentence_transformers
            source:
              modelscope: BAAI/bge-reranker-base
    server_gpus: [0]
    relaunch: beside

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
        name:
          description: Name of the row in the table of known failures; empty where it has none.
          type: str
        heals:
          description: Whether it may pass by itself; then the same launch is tried again, up to twice.
          type: bool
    choice:
      description:
        - Which choice serves now, V(0) for the first, V(1) for the first of the C(fallbacks) and so on. V(-1) is the
          launch that ran before, brought back or left because nothing of what is wanted could be launched.
      type: int
      sample: 0
    runs:
      description: What that is; empty when nothing serves.
      type: str
      sample: bge-reranker-base on sentence_transformers
    why:
      description: What was wrong with the first choice, where another one serves; else empty.
      type: str
      sample: "The engine vLLM cannot be used here: No module named 'vllm'."
    attempts:
      description: Every launch of this run, in their order.
      type: list
      elements: dict
      contains:
        choice:
          description: Which choice it was.
          type: int
        runs:
          description: What that is.
          type: str
        error:
          description: What went wrong, in the server's words; empty when nothing did.
          type: str
        diagnosis:
          description: Cause and cure of the error, where they are known; else null.
          type: dict
        duration:
          description: Seconds it took.
          type: float
        beside:
          description: Whether it was launched under another uid, to see whether it works.
          type: bool
        log:
          description: Lines of the server's log that show more of a failure than its error does.
          type: list
          elements: str
requests:
  description: HTTP requests sent to the server.
  returned: always, once the server has answered
  type: int
  sample: 2
"""

from pathlib import Path

from ansible_collections.airgap.xinference.plugins.module_utils._ansible import DiscreetModule, hide
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    conclude,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.model_list import put_in_force
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import ServiceError
from ansible_collections.airgap.xinference.plugins.module_utils.host.release import ReleaseError
from ansible_collections.airgap.xinference.plugins.module_utils.host.server_log import reader
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.fields import RELAUNCH
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import LockHeld
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError


def main() -> None:
    module = DiscreetModule(
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "server_gpus": {"type": "list", "elements": "raw", "default": [], "aliases": ["gpus"]},
            "root": {"type": "path", "default": "/opt/xinference"},
            "docker_host": {"type": "str"},
            "prune": {"type": "str", "choices": ["managed", "all", "none"], "default": "managed"},
            "relaunch": {"type": "str", "choices": list(RELAUNCH), "default": "replace"},
            "first_choice": {"type": "bool", "default": True},
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
    with talking(module, SpecError, ServerError, LockHeld, ReleaseError, ServiceError, OSError):
        specs = specs_from(client, given["models"], given["server_gpus"], given["root"], module.check_mode)
        # The keeper goes by the release. It leaves what is new in it to us for a while.
        switched = put_in_force(Path(given["root"]), given["models"], module.check_mode)
        applied = apply(
            client,
            specs,
            given["root"],
            prune=given["prune"],
            how=given["relaunch"],
            first_choice=given["first_choice"],
            limit=max(1, given["parallel"]),
            timeout=given["wait_timeout"],
            lock_wait=given["lock_wait"],
            rehearse=module.check_mode,
            who="the Ansible module xinference_model_set",
            log=reader(given["root"], given["docker_host"]),
        )
        applied.changed = applied.changed or switched
    conclude(module, client, applied)


if __name__ == "__main__":
    main()
