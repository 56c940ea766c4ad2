# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""As whom a native server runs, and that it can reach what it needs."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import definition, release, service_user
from ansible_collections.airgap.xinference.plugins.module_utils.host.native_ctl import ServiceError
from ansible_collections.airgap.xinference.plugins.module_utils.host.release import Entry

SERVICE = {"name": "x", "command": ["/usr/bin/python3"], "environment": {}, "directory": "/x", "host": "::", "port": 1}


def test_only_systemd_gives_a_server_a_user() -> None:
    assert service_user.user_of("", "supervisord") == service_user.user_of("models", "supervisord") == ""
    assert service_user.user_of("", "systemd") == "xinference"
    assert service_user.user_of("models", "systemd") == "models" and service_user.user_of("root", "systemd") == "root"
    for wrong in ("1000:1000", "Models", "a b", "x" * 40):
        with pytest.raises(ServiceError, match="must be the name of a user"):
            service_user.user_of(wrong, "systemd")


def test_a_user_who_is_missing_is_made_without_a_login(tmp_path: Path, monkeypatch: Any) -> None:
    assert not service_user.missing("root") and not service_user.missing("") and service_user.missing("nobody-here")
    assert service_user.group_of("root") is None and service_user.group_of("nobody-here") is None
    program = tmp_path / "useradd"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    service_user.make("xinference", "/opt/x/home")
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--system --user-group --no-create-home --home-dir /opt/x/home --shell /")
    assert asked.endswith(" xinference\n")
    program.write_text("#!/bin/sh\necho group xinference exists >&2\nexit 9\n")
    with pytest.raises(ServiceError, match="cannot be made: group xinference exists"):
        service_user.make("xinference", "/opt/x/home")


def test_a_place_that_the_user_cannot_enter_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "closed"
    (inner / "venv").mkdir(parents=True)
    inner.chmod(0o700)
    service_user.refuse_closed("xinference", ["/usr/bin/python3", "/opt"])
    service_user.refuse_closed("root", [str(inner / "venv")])
    service_user.refuse_closed("", [str(inner / "venv")])
    with pytest.raises(ServiceError, match=rf"xinference, who cannot enter .*{inner}\. .*_user: root"):
        service_user.refuse_closed("xinference", [str(inner / "venv"), "/usr/bin/python3"])


def test_the_group_of_the_user_reads_the_definition_and_no_other_secret(tmp_path: Path) -> None:
    shared = definition.files(tmp_path, {**SERVICE, "user": "xinference"}, [], {})
    assert shared["service.json"].mode == 0o440 and shared["models.json"].mode == 0o400
    assert definition.files(tmp_path, {**SERVICE, "user": ""}, [], {})["service.json"].mode == 0o400


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a program as another user")
def test_a_server_starts_as_its_user_from_a_release_of_root() -> None:
    """As systemd would start it: another user, with the group of the release and no other, and nothing of root's."""
    nobody = pwd.getpwnam("nobody")
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # the tests' own directory is closed to others
    try:
        root.chmod(0o755)
        said = "import os; print('I am', os.geteuid(), sorted(os.listdir('.')), flush=True)"
        told = {**SERVICE, "command": ["/usr/bin/python3", "-c", said], "user": "nobody", "stop_timeout": 5}
        told.update(directory=str(root / "home"), manager="systemd")
        files = {**definition.files(root, told, [], {}), "credentials.json": Entry("{}", 0o400)}
        release.make(root, files, nobody.pw_gid)
        release.switch(root, release.identity(files))
        for name in ("home", "run"):
            (root / name).mkdir(mode=0o750)
            os.chown(root / name, nobody.pw_uid, nobody.pw_gid)
        command = [str(root / "current/bin/run"), str(root)]
        who = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--no-new-privs"]
        as_nobody = ["setpriv", *who, "--inh-caps=-all", "--bounding-set=-all"]
        done = subprocess.run([*as_nobody, *command], capture_output=True, text=True, check=False)
        assert f"I am {nobody.pw_uid} []" in done.stdout, done.stderr
        # What is the keeper's stays the keeper's.
        read = [*as_nobody, "cat", str(root / "current/credentials.json"), str(root / "current/models.json")]
        assert subprocess.run(read, capture_output=True, check=False).stdout == b""
    finally:
        shutil.rmtree(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to a group that is not its own")
def test_a_release_belongs_to_the_group_as_a_whole(tmp_path: Path) -> None:
    group = pwd.getpwnam("nobody").pw_gid
    files = {"bin/run": Entry("#!/bin/sh\n", 0o550), "a": Entry("a")}
    before = os.umask(0o077)
    try:
        assert release.make(tmp_path, files) and not release.make(tmp_path, files)
        assert release.make(tmp_path, files, group) and not release.make(tmp_path, files, group)
    finally:
        os.umask(before)
    top = tmp_path / "releases" / release.identity(files)
    for path in (top.parent, top, *top.rglob("*")):
        assert path.stat().st_gid == group, path
    assert {stat.S_IMODE(path.stat().st_mode) for path in (top, top / "bin")} == {0o750}
