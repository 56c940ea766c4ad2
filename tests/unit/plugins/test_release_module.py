# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the module xinference_release refuses before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import pytest
from ansible.module_utils import basic
from ansible_collections.airgap.xinference.plugins.modules import xinference_release

SERVICE = {"command": ["python"], "environment": {}, "directory": "/", "host": "127.0.0.1", "port": 9}


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of the following is required: service, container"),
        ({"service": SERVICE, "keeper": {"interval": 90}}, "xinference_keeper_interval is 90, and has to be from 1"),
    ],
)
def test_it_is_refused_and_nothing_is_there(
    tmp_path: Path, monkeypatch: Any, capfd: Any, options: Dict[str, Any], said: str, check_mode: bool
) -> None:
    arguments = {"root": str(tmp_path), "_ansible_check_mode": check_mode, **options}
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
    with pytest.raises(SystemExit):
        xinference_release.main()
    told = json.loads(capfd.readouterr().out)
    assert told["failed"] and said in told["msg"]
    assert not list(tmp_path.iterdir())
