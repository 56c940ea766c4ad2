# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module that collects wheels fails with a message, whatever becomes of its directory."""

from __future__ import annotations

import json
import sys

import pytest
from ansible.module_utils import basic
from ansible_collections.airgap.xinference.plugins.modules import xinference_wheelhouse


def test_a_directory_that_goes_away_is_a_message(tmp_path, monkeypatch, capfd):
    arguments = {"path": str(tmp_path / "wheels"), "requirements": ["x"], "python": sys.executable}
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
    monkeypatch.setattr(xinference_wheelhouse, "up_to_date", lambda *_args: True)
    with pytest.raises(SystemExit):
        xinference_wheelhouse.main()
    answer = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert answer["failed"] and "No such file or directory" in answer["msg"] and "exception" not in answer
