#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_health; the work is done by module_utils/server/health.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_health
short_description: Wait until an Xinference server and its models serve
version_added: "0.1.0"
author: airgap.xinference engineers (@airgap)
description:
  - Waits until the server answers, enough workers have joined and the named models serve, and returns what it found.
  - With O(probe=true) asks every named model a real question of its type and judges the answer.
  - Fails with the reason, and where it is known its cause and cure. A refused key and a failed launch end the wait at
    once, because waiting does not mend them.
  - A server that asks for credentials can be waited for without any, as long as no model is named.
options:
  models:
    description:
      - Models that must serve, each an entry as in C(xinference_models) or at least with C(model_uid).
      - Entries with C(enabled) false are left out.
      - C(probe) in an entry overrides what is asked and expected, see the notes; V(false) leaves the model out of the
        probes.
    type: list
    elements: dict
    default: []
  root:
    description:
      - Root directory of the installation on the host. The record there says which models serve as one of their
        C(fallbacks); such a model is asked what its alternative says in C(probe).
    type: path
  workers:
    description:
      - How many workers must have joined the server.
    type: int
    default: 1
  probe:
    description:
      - Ask each of O(models) one real question.
    type: bool
    default: false
  wait_timeout:
    description:
      - How long to wait in seconds; with V(0) the server is asked once.
    type: float
    default: 0
  wait_sleep:
    description:
      - Pause between two looks, in seconds.
    type: float
    default: 1
  fail:
    description:
      - Fail when something is wrong. Otherwise only RV(healthy) says so.
    type: bool
    default: true
notes:
  - "Fields of C(probe): C(kind) (embedding, rerank, chat, generate, transcription, speech), C(input) (three texts of
    which the first two are akin; C(query) and C(documents); a text; the path of a sound file), C(expect)
    (C(dimensions), C(norm), C(related); C(best); C(words), C(contains); C(seconds)), C(sample) (a WAV with the voice to
    clone),
    C(request) (further fields of the request), C(timeout) in seconds. A null in C(expect) switches the expectation
    off."
extends_documentation_fragment:
  - airgap.xinference.attributes.info
  - airgap.xinference.server
attributes: {}
seealso:
  - module: airgap.xinference.xinference_model_info
"""

EXAMPLES = r"""
- name: Wait for the server
  airgap.xinference.xinference_health:
    endpoint: http://127.0.0.1:9997
    wait_timeout: 120

- name: Every model answers a real request
  airgap.xinference.xinference_health:
    models: "{{ xinference_models }}"
    probe: true

- name: A model of which little is expected
  airgap.xinference.xinference_health:
    models:
      - model_uid: tiny-reranker
        probe:
          expect:
            best: null
    probe: true
"""

RETURN = r"""
healthy:
  description: Whether nothing was found wrong.
  returned: always
  type: bool
  sample: true
problems:
  description: What is wrong, a sentence each.
  returned: always
  type: list
  elements: str
  sample: []
diagnosis:
  description: Cause and cure of the first problem that is known.
  returned: when one is known
  type: dict
  sample:
    name: gpu-not-visible
    cause: The model was put on GPU 3 of the server, which does not have it.
    cure: Choose gpus among those it was given; it numbers them 0, 1.
endpoint:
  description: Address of the server.
  returned: always
  type: str
  sample: http://127.0.0.1:9997
reachable:
  description: Whether it answered.
  returned: always
  type: bool
  sample: true
version:
  description: Version of the server; null when it does not tell without credentials.
  returned: always
  type: str
  sample: 4.1.0
supported:
  description: Whether this collection is made for the version.
  returned: always
  type: bool
  sample: true
auth:
  description: Whether it asks for credentials.
  returned: always
  type: bool
  sample: false
uptime_s:
  description: How long it has been running, in seconds.
  returned: always
  type: float
  sample: 31
listed:
  description: Whether it told its models. Without credentials that it takes it does not.
  returned: always
  type: bool
  sample: true
workers:
  description: Its workers; memory in bytes.
  returned: always
  type: list
  elements: dict
  sample:
    - address: 127.0.0.1:36681
      gpu_count: 2
      gpu_memory_total: 51539607552
      memory_available: 23229325312
      memory_total: 25276502016
models:
  description:
    - Every model the server knows, by uid.
    - C(state) is ready, starting, stopping, failed or lost, C(status) the server's own word, C(model) its entry in the
      list of models. With O(root), C(launched) is what the record says of it, as
      M(airgap.xinference.xinference_model_info) returns it.
  returned: always
  type: dict
  sample:
    minilm:
      state: ready
      status: READY
      replicas: [READY]
      error: ""
      model: {model_type: embedding, dimensions: 384}
required:
  description: The uids that had to serve, of O(models) those that are enabled.
  returned: always
  type: list
  elements: str
  sample: [minilm]
probes:
  description: Result of each probe, by uid. A model that does not serve is not probed.
  returned: when O(probe=true)
  type: dict
  sample:
    minilm:
      state: passed
      kind: embedding
      latency_s: 0.021
      detail: 384 dimensions, length 1.000, related 0.72, unrelated 0.04
      error: ""
      diagnosis: null
waited_s:
  description: How long it took, in seconds.
  returned: always
  type: float
  sample: 12.3
requests:
  description: How many requests were sent to the server.
  returned: always
  type: int
  sample: 6
"""

from dataclasses import asdict
from typing import Any, Dict, Mapping, Optional

from ansible_collections.airgap.xinference.plugins.module_utils import alternatives
from ansible_collections.airgap.xinference.plugins.module_utils._ansible import DiscreetModule, hide
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.health import probe_all, wait_healthy
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Entry, read


def main() -> None:
    """Entry point."""
    module = DiscreetModule(
        argument_spec={
            **SERVER_OPTIONS,
            "models": {"type": "list", "elements": "dict", "default": []},
            "root": {"type": "path"},
            "workers": {"type": "int", "default": 1},
            "probe": {"type": "bool", "default": False},
            "wait_timeout": {"type": "float", "default": 0},
            "wait_sleep": {"type": "float", "default": 1},
            "fail": {"type": "bool", "default": True},
        },
        required_together=SERVER_TOGETHER,
        supports_check_mode=True,
    )
    options = module.params
    hide(module, options["models"])
    entries = [one for one in options["models"] if module.boolean(one.get("enabled", True))]
    if not all(one.get("model_uid") for one in entries):
        module.fail_json(msg="Every entry of models needs a model_uid.")
    recorded = read(options["root"]) if options["root"] else {}
    client = client_from(module)
    result: Dict[str, Any] = {"required": [str(one["model_uid"]) for one in entries]}
    health = wait_healthy(
        client,
        required=result["required"],
        workers=options["workers"],
        timeout=options["wait_timeout"],
        pause=options["wait_sleep"],
    )
    if options["probe"]:
        ready = [one for one in entries if health.models.get(str(one["model_uid"]), {}).get("state") == "ready"]
        asked = [chosen(one, recorded.get(str(one["model_uid"]))) for one in ready]
        result["probes"] = {uid: asdict(found) for uid, found in probe_all(client, asked, health).items()}
    result.update(health.result(), requests=client.requests_made)
    if options["root"]:
        for uid, model in result["models"].items():
            model["launched"] = recorded[uid].told() if uid in recorded else None
    if options["fail"] and not health.healthy:
        words = list(health.problems)
        if health.diagnosis:
            words += [f"Cause: {health.diagnosis.cause}", f"Cure: {health.diagnosis.cure}"]
        module.fail_json(msg=" ".join(words), **result)
    module.exit_json(changed=False, **result)


def chosen(entry: Mapping[str, Any], recorded: Optional[Entry]) -> Mapping[str, Any]:
    """The entry of a model, or that of its alternative where this one serves."""
    choices = list(alternatives.choices(entry))
    number = recorded.instead.number if recorded and recorded.instead else 0
    return choices[number] if 0 <= number < len(choices) else entry


if __name__ == "__main__":
    main()
