#!/usr/bin/python
# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module xinference_registration; the work is done by module_utils/server/registration.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: xinference_registration
short_description: Register a custom model on an Xinference server
version_added: "0.1.0"
author: airgap.xinference engineers (@airgap)
description:
  - Makes a custom model known to the server, or unknown again.
  - Built-in names come and go between versions of Xinference; a registration is how to serve anything else.
  - The definition is compared field by field with what the server returns. Only fields that O(definition) names count;
    when one differs, the old registration is replaced. Models that already run are not touched.
  - The definition may be in the form of any version; it is put into the one that the server takes.
options:
  state:
    description:
      - Whether the server shall know the model.
    type: str
    choices: [present, absent]
    default: present
  model_type:
    description:
      - Type of the model.
    type: str
    required: true
    choices: [LLM, embedding, rerank, audio, image, video, flexible]
  model_name:
    description:
      - Name of the model. Needed with O(state=absent); otherwise the one in O(definition) is enough.
    type: str
  definition:
    description:
      - The definition, as Xinference documents it for the type.
      - It needs no path; the launch gives one. For embedding and rerank models C(model_hub) must be C(huggingface), or
        left out, or later versions find no engine.
      - Needed with O(state=present).
    type: dict
  persist:
    description:
      - Keep the registration under C(XINFERENCE_HOME), so that it is there after a restart.
    type: bool
    default: true
extends_documentation_fragment:
  - airgap.xinference.attributes
  - airgap.xinference.server
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
seealso:
  - module: airgap.xinference.xinference_model
"""

EXAMPLES = r"""
- name: Make all-MiniLM-L6-v2 known
  airgap.xinference.xinference_registration:
    model_type: embedding
    definition:
      model_name: all-MiniLM-L6-v2
      dimensions: 384
      max_tokens: 256
      language: [en]
      model_specs:
        - model_format: pytorch
          model_id: sentence-transformers/all-MiniLM-L6-v2
          quantization: none

- name: Forget it
  airgap.xinference.xinference_registration:
    state: absent
    model_type: embedding
    model_name: all-MiniLM-L6-v2
"""

RETURN = r"""
action:
  description: What was done, or would be in check mode.
  returned: success
  type: str
  choices: [keep, register, replace, unregister]
  sample: register
model_type:
  description: Type of the model.
  returned: success
  type: str
  sample: embedding
model_name:
  description: Name of the model.
  returned: success
  type: str
  sample: all-MiniLM-L6-v2
differences:
  description: Fields in which the server's definition differed.
  returned: success
  type: list
  elements: dict
  sample:
    - field: dimensions
      before: 768
      after: 384
definition:
  description: The definition as the server has it, or in check mode as it would be sent; null when absent.
  returned: success
  type: dict
  sample: {version: 2, model_name: all-MiniLM-L6-v2, dimensions: 384}
requests:
  description: How many requests were sent to the server.
  returned: success
  type: int
  sample: 3
"""

from ansible_collections.airgap.xinference.plugins.module_utils._ansible import DiscreetModule, hide
from ansible_collections.airgap.xinference.plugins.module_utils._server import (
    SERVER_OPTIONS,
    SERVER_TOGETHER,
    client_from,
    talking,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.registration import (
    REGISTRABLE,
    DefinitionError,
    apply,
    plan,
)


def main() -> None:
    """Entry point."""
    module = DiscreetModule(
        argument_spec={
            **SERVER_OPTIONS,
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "model_type": {"type": "str", "required": True, "choices": list(REGISTRABLE)},
            "model_name": {"type": "str"},
            "definition": {"type": "dict"},
            "persist": {"type": "bool", "default": True},
        },
        required_together=SERVER_TOGETHER,
        required_if=[("state", "present", ["definition"]), ("state", "absent", ["model_name"])],
        supports_check_mode=True,
    )
    options = module.params
    hide(module, options["definition"])
    client = client_from(module)
    with talking(module, ServerError, DefinitionError):
        todo = plan(client, options["model_type"], options["state"], options["model_name"], options["definition"])
        # What it replaces may hold an older secret; the server tells it.
        hide(module, todo.before)
        definition = todo.after if todo.changed else todo.before
        if todo.changed and not module.check_mode:
            apply(client, todo, options["persist"])
            definition = client.registration(todo.model_type, todo.name) if todo.after is not None else None
    module.exit_json(
        changed=todo.changed,
        action=todo.action,
        model_type=todo.model_type,
        model_name=todo.name,
        differences=[{"field": path, "before": old, "after": new} for path, old, new in todo.differences],
        definition=definition,
        requests=client.requests_made,
        diff=todo.diff(),
    )


if __name__ == "__main__":
    main()
