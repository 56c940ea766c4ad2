#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Launch, relaunch or terminate one model of a Xinference server."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: xinference_model
short_description: Launch, relaunch or terminate one model of a Xinference server
version_added: "0.1.0"
description:
  - Makes one model run with the given launch fields, or makes it go. Launches only what does not run, and relaunches
    only what runs differently.
  - A server never tells the path or the engine options of a model. They are compared with a record that this module
    shares with M(airgap.xinference.xinference_model_set).
options:
  state:
    description:
      - With V(present) the model runs as described; it is relaunched when the record or the server shows a difference.
      - With V(absent) it does not run, whoever launched it. Only O(model_uid) is needed.
      - With V(relaunched) it is terminated and launched anew even when nothing differs.
    type: str
    choices: [present, absent, relaunched]
    default: present
  model_uid:
    description:
      - Name under which clients use the model. At most 100 characters, without C(/), and not ending in C(-rep) and a
        number.
    type: str
    required: true
  model_name:
    description: Name of a built-in or registered model. Required unless O(state=absent).
    type: str
  model_type:
    description: Type of the model.
    type: str
    choices: [LLM, embedding, rerank, image, audio, video, flexible, world]
    default: LLM
  model_engine:
    description: Engine that runs it, such as C(vLLM), C(transformers) or C(sentence_transformers). An LLM needs one.
    type: str
  model_format:
    description: Format of the weights, such as C(pytorch), C(gptq), C(awq) or C(ggufv2).
    type: str
  model_size_in_billions:
    description: Size, such as V(7), V(0.5) or V(0_5).
    type: raw
  quantization:
    description: Quantization, such as C(Int4) or C(none).
    type: str
  model_path:
    description: Directory or file of the weights, as the server sees it. Excludes O(source).
    type: str
  source:
    description:
      - The model of the bundle whose directory becomes the path, a dictionary with C(path) or C(modelscope), or with
        C(name) beside them, as in the list of models of the inventory.
    type: dict
  replica:
    description: How many replicas.
    type: int
  replica_config:
    description: Where each replica runs; see Xinference.
    type: list
    elements: dict
  gpus:
    description:
      - GPUs of the host to run on, as indexes or UUIDs. They must be among O(server_gpus).
    type: list
    elements: raw
  n_gpu:
    description: How many GPUs, V(auto), or V(none) for CPU only. Not together with O(gpus).
    type: raw
  n_worker:
    description: How many workers one replica spans.
    type: int
  worker_ip:
    description: Address of the worker to run on.
    type: str
  request_limits:
    description: How many requests it takes at the same time.
    type: int
  peft_model_config:
    description: LoRA adapters; see Xinference.
    type: dict
  envs:
    description: Environment variables of the model's process.
    type: dict
  enable_virtual_env:
    description: Whether the server installs packages for the model first. Needs a package index on the site.
    type: bool
  virtual_env_packages:
    description: Packages for that.
    type: list
    elements: str
  virtual_env_find_links:
    description: Directories or addresses to find those packages in.
    type: list
    elements: str
  download_hub:
    description: Hub for a model without a path. Nothing can be downloaded on an air-gapped site.
    type: str
  enable_thinking:
    description: Whether a model that can think does.
    type: bool
  options:
    description: Options of the engine, as Xinference takes them.
    type: dict
  probe:
    description:
      - What to ask the model with O(relaunch=beside), and what to expect; V(false) asks nothing. See
        M(airgap.xinference.xinference_health).
    type: raw
  fallbacks:
    description:
      - Alternatives, tried in their order when the model cannot be launched, each a dictionary of the fields that
        differ. See M(airgap.xinference.xinference_model_set).
    type: list
    elements: raw
  relaunch:
    description:
      - How a changed model takes the place of the one that serves.
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
      - Whether the model goes back to its first choice when it runs as one of its O(fallbacks). It is ended for that,
        unless O(relaunch=beside), and comes back when the first choice still fails. It is left alone where the server
        says that the engine of the first choice still cannot be used.
    type: bool
    default: true
  server_gpus:
    description:
      - The GPUs of the host that the server may use, in the order in which it was given them.
    type: list
    elements: raw
    default: []
  root:
    description:
      - Root directory of the installation on the host, with the record and its lock.
    type: path
    default: /opt/xinference
  docker_host:
    description:
      - Address of the engine whose log of the server shows why a launch failed, by default what the client of the host
        is set up for.
    type: str
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
      - Asks the server, and writes no file and changes no model.
  diff_mode:
    support: full
    details:
      - Shows the launch fields before and after. Values that look like secrets are hidden.
  idempotent:
    support: partial
    details:
      - Not with O(state=relaunched), which always launches.
seealso:
  - module: airgap.xinference.xinference_model_set
  - module: airgap.xinference.xinference_model_info
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Serve a reranker from a directory on the host
  airgap.xinference.xinference_model:
    model_uid: reranker
    model_name: bge-reranker-base
    model_type: rerank
    model_engine: sentence_transformers
    model_path: /data/bge-reranker-base

- name: Launch it anew
  airgap.xinference.xinference_model:
    state: relaunched
    model_uid: reranker
    model_name: bge-reranker-base
    model_type: rerank
    model_engine: sentence_transformers
    model_path: /data/bge-reranker-base

- name: Stop a model
  airgap.xinference.xinference_model:
    state: absent
    model_uid: qwen
"""

RETURN = r"""
models:
  description: What happened, or would happen in check mode; one row, or none when an absent model was absent already.
  returned: always, once the server has answered
  type: list
  elements: dict
  contains:
    model_uid:
      description: The model.
      type: str
      sample: reranker
    action:
      description:
        - C(keep), C(launch), C(relaunch), C(terminate), C(adopt) (ran already as wanted, and is in the record now) or
          C(cleanup) (does not run, and is out of the record now).
      type: str
      sample: launch
    reason:
      description: Why.
      type: str
      sample: not running
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

from ansible_collections.airgap.xinference.plugins.module_utils._ansible import DiscreetModule, hide
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    conclude,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.server_log import reader
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply, specs_from
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.fields import FIELDS, MODEL_TYPES, RELAUNCH
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import LockHeld
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import SpecError


def main() -> None:
    module = DiscreetModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent", "relaunched"], "default": "present"},
            "model_uid": {"type": "str", "required": True},
            "model_name": {"type": "str"},
            "model_type": {"type": "str", "choices": list(MODEL_TYPES), "default": "LLM"},
            "model_engine": {"type": "str"},
            "model_format": {"type": "str"},
            "model_size_in_billions": {"type": "raw"},
            "quantization": {"type": "str"},
            "model_path": {"type": "str"},
            "source": {"type": "dict"},
            "replica": {"type": "int"},
            "replica_config": {"type": "list", "elements": "dict"},
            "gpus": {"type": "list", "elements": "raw"},
            "n_gpu": {"type": "raw"},
            "n_worker": {"type": "int"},
            "worker_ip": {"type": "str"},
            "request_limits": {"type": "int"},
            "peft_model_config": {"type": "dict"},
            "envs": {"type": "dict"},
            "enable_virtual_env": {"type": "bool"},
            "virtual_env_packages": {"type": "list", "elements": "str"},
            "virtual_env_find_links": {"type": "list", "elements": "str"},
            "download_hub": {"type": "str"},
            "enable_thinking": {"type": "bool"},
            "options": {"type": "dict"},
            "probe": {"type": "raw"},
            "fallbacks": {"type": "list", "elements": "raw"},
            "relaunch": {"type": "str", "choices": list(RELAUNCH), "default": "replace"},
            "first_choice": {"type": "bool", "default": True},
            "server_gpus": {"type": "list", "elements": "raw", "default": []},
            "root": {"type": "path", "default": "/opt/xinference"},
            "docker_host": {"type": "str"},
            "wait_timeout": {"type": "float", "default": 1800.0},
            "lock_wait": {"type": "float", "default": 600.0},
            **SERVER_OPTIONS,
        },
        required_if=[("state", "present", ["model_name"]), ("state", "relaunched", ["model_name"])],
        required_together=SERVER_TOGETHER,
        mutually_exclusive=[("source", "model_path"), ("gpus", "n_gpu")],
        supports_check_mode=True,
    )
    given = module.params
    hide(module, {name: given[name] for name in FIELDS if name in given})
    entry = {name: given[name] for name in FIELDS if given.get(name) is not None}
    uid = given["model_uid"]
    client = client_from(module)
    with talking(module, SpecError, ServerError, LockHeld, OSError):
        wanted = []
        if given["state"] != "absent":
            wanted = specs_from(client, [entry], given["server_gpus"], given["root"], module.check_mode)
        applied = apply(
            client,
            wanted,
            given["root"],
            relaunch=[uid] if given["state"] == "relaunched" else [],
            only=uid,
            first_choice=given["first_choice"],
            timeout=given["wait_timeout"],
            lock_wait=given["lock_wait"],
            rehearse=module.check_mode,
            who="the Ansible module xinference_model",
            log=reader(given["root"], given["docker_host"]),
        )
    conclude(module, client, applied)


if __name__ == "__main__":
    main()
