# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filter that reads the config.ini of a hand-made site."""

from __future__ import annotations

DOCUMENTATION = r"""
name: config_ini_site
short_description: Read the config.ini of a hand-made site as inventory variables
version_added: "0.1.0"
description:
  - Takes the text of a C(config.ini) with XINFERENCE_GPUS, MODELS_VOLUMES_DIRECTORY and, for each of EMBEDDING,
    RERANKER, TTS and STT, C(_INSTALL_ENABLE) and C(_GPU).
positional: _input
options:
  _input:
    description: The text of the file.
    type: str
    required: true
author:
  - airgap.xinference engineers (@airgap)
"""

EXAMPLES = r"""
- name: Show which models the old site serves
  ansible.builtin.debug:
    msg: "{{ (lookup('ansible.builtin.file', 'config.ini') | airgap.xinference.config_ini_site).models }}"
"""

RETURN = r"""
_value:
  description: >-
    C(gpus), a list of numbers; C(root), a directory of its own below the one for models; C(models), entries for
    C(xinference_models); and C(problems), a list of messages.
  type: dict
"""

from typing import Any

from ansible_collections.airgap.xinference.plugins.plugin_utils.config_ini import read_site


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Any]:
        """Names and functions."""
        return {"config_ini_site": read_site}
