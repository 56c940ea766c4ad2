# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two plays that change one host: the modules of the second wait for the first."""

from __future__ import annotations

import importlib
import json
import threading

import pytest
from ansible.module_utils import basic
from ansible_collections.airgap.xinference.plugins.module_utils.host import definition, modes, native_ctl, release

MODULES = "ansible_collections.airgap.xinference.plugins.modules."
SERVICE = {
    "name": "xinference",
    "manager": "supervisord",
    "command": ["python"],
    "environment": {},
    "directory": "",
    "host": "127.0.0.1",
    "port": 9,
    "stop_timeout": 1,
    "user": "",
    "writable": [],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("xinference_release", {"service": SERVICE}), ("xinference_service", {"state": "stopped"})],
)
@pytest.mark.parametrize("check_mode", [False, True])
def test_whoever_comes_second_waits_and_a_dry_run_does_not(tmp_path, monkeypatch, capfd, name, options, check_mode):
    home = tmp_path / "home"
    home.mkdir(mode=0o750)
    if "service" in options:
        options = {"service": {**options["service"], "directory": str(home)}}
    files = definition.files(tmp_path, {**SERVICE, "directory": str(home)}, [], {})
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    modes.close(modes.too_open(tmp_path))
    arguments = {"root": str(tmp_path), "_ansible_check_mode": check_mode, **options}
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode())
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
    module = importlib.import_module(MODULES + name)
    ended = threading.Event()

    def second():
        with pytest.raises(SystemExit):
            module.main()
        ended.set()

    other = threading.Thread(target=second)
    with native_ctl.locked(tmp_path):
        # The second is a thread here, and must not pass for the holder.
        monkeypatch.setattr(native_ctl, "_held", set())
        other.start()
        assert ended.wait(0.5 if not check_mode else 10) is check_mode
    assert ended.wait(10)
    other.join()
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["changed"] is False
