# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Releases are immutable, appear at once, and are named after what they hold."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import (
    definition,
    native_ctl,
    release,
    release_files,
)
from ansible_collections.airgap.xinference.plugins.module_utils.host.release import Entry
from ansible_collections.airgap.xinference.plugins.module_utils.host.yaml_text import yaml_text

FILES = {"service.json": Entry("{}\n", 0o400), "bin/run": Entry("#!/bin/sh\n", 0o555)}
SERVICE = {
    "name": "xinference",
    "manager": "auto",
    "command": ["/opt/x/venvs/1/bin/python", "serve"],
    "environment": {"XINFERENCE_HOME": "/opt/x/home"},
    "directory": "/opt/x/home",
    "host": "127.0.0.1",
    "port": 9997,
    "stop_timeout": 30,
}


def test_a_release_is_written_once_and_put_in_force(tmp_path: Path) -> None:
    wanted = release.identity(FILES)
    assert release.current(tmp_path) is None
    assert release.make(tmp_path, FILES) and release.switch(tmp_path, wanted)
    assert not release.make(tmp_path, FILES) and not release.switch(tmp_path, wanted)
    assert release.current(tmp_path) == wanted
    assert stat.S_IMODE((tmp_path / "current/bin/run").stat().st_mode) == 0o555
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [wanted]


def test_the_release_in_force_can_be_made_again_with_a_part_of_it_changed(tmp_path: Path) -> None:
    files = {**FILES, "bin/keeper.pyz": Entry(data=b"PK\xff\x00")}
    assert release.in_force(tmp_path) == {}
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    assert release.in_force(tmp_path) == files
    (tmp_path / "current/bin/run").chmod(0o755)
    with pytest.raises(release.ReleaseError, match=r"not as it was written \(bin/run has mode 0755 instead of 0555\)"):
        release.in_force(tmp_path)


def test_files_of_a_release_that_somebody_changed_are_named(tmp_path: Path) -> None:
    files = {"a.json": Entry("one"), "b.json": Entry("one"), "c.json": Entry("one"), "server.env": Entry("PIN=1234\n")}
    release.make(tmp_path, files)
    release.switch(tmp_path, release.identity(files))
    current = tmp_path / "current"
    for name, text in (("a.json", "two"), ("b.json", "three"), ("more", "")):
        (current / name).unlink(missing_ok=True)
        (current / name).write_text(text)
        (current / name).chmod(0o440)
    (current / "c.json").unlink()
    with pytest.raises(release.ReleaseError) as caught:
        release.in_force(tmp_path)
    assert caught.value.changed == [
        "a.json has other content",
        "b.json has 5 bytes instead of 3",
        "c.json is missing",
        "more does not belong to it",
    ]
    noted = tmp_path / release_files.PLACE
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600
    hashes = [hash_(b"PIN=1234\n").hexdigest() for hash_ in (hashlib.sha256, hashlib.blake2b)]
    assert "1234" not in noted.read_text() and not any(one in noted.read_text() for one in hashes)
    for path in list(current.iterdir()):
        path.unlink()
    with pytest.raises(release.ReleaseError, match=r"a\.json is missing, .*server\.env is missing"):
        release.in_force(tmp_path)
    # Of a release that an older collection made nothing is known.
    noted.unlink()
    with pytest.raises(release.ReleaseError, match=r"not as it was written\. Run playbooks/serve.yml"):
        release.in_force(tmp_path)


def test_releases_are_known_in_the_order_in_which_they_were_put_in_force(tmp_path: Path) -> None:
    made = []
    for number in range(3):
        files = {"service.json": Entry(f"{number}\n")}
        made.append(release.identity(files))
        release.make(tmp_path, files)
        release.switch(tmp_path, made[-1])
    assert release.history(tmp_path) == made[::-1]
    release.switch(tmp_path, made[0])
    (tmp_path / "releases/.new-left").mkdir()
    assert release.history(tmp_path) == [made[0], made[2], made[1]]
    assert release.history(tmp_path / "nowhere") == []


def test_the_order_holds_when_the_clock_of_the_host_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for day in (20_000, 3, 2, 20_001):
        files = {"service.json": Entry(f"{day}\n")}
        made.append(release.identity(files))
        release.make(tmp_path, files)
        monkeypatch.setattr(time, "time_ns", lambda day=day: day * 86_400 * 10**9)
        release.switch(tmp_path, made[-1])
        assert release.history(tmp_path) == made[::-1]


def test_only_the_owner_reads_what_may_hold_secrets(tmp_path: Path) -> None:
    files = definition.files(tmp_path, SERVICE, [{"model_uid": "m"}], {})
    release.make(tmp_path, files)
    directory = tmp_path / "releases" / release.identity(files)
    for name in ("service.json", "models.json"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o400


def test_nobody_else_may_put_another_release_in_force_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for root in (tmp_path / "gateway", tmp_path / "opt"):
            with native_ctl.locked(tmp_path / "opt"):
                release.make(root, {"bin/a": Entry("b")})
            release.switch(root, release.identity({"bin/a": Entry("b")}))
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o022] == []


def test_a_release_that_was_tampered_with_is_written_again(tmp_path: Path) -> None:
    release.make(tmp_path, FILES)
    path = tmp_path / "releases" / release.identity(FILES) / "service.json"
    path.chmod(0o600)
    path.write_text("{'by': 'hand'}")
    assert release.make(tmp_path, FILES)
    assert path.read_text() == "{}\n"
    assert len(list((tmp_path / "releases").iterdir())) == 1


def test_rights_that_somebody_changed_are_put_right(tmp_path: Path) -> None:
    release.make(tmp_path, FILES)
    path = tmp_path / "releases" / release.identity(FILES) / "service.json"
    path.chmod(0o444)
    assert not release.whole(tmp_path, FILES)
    assert release.make(tmp_path, FILES)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400


def test_a_line_end_of_its_own_in_a_file_is_no_change(tmp_path: Path) -> None:
    files = {"server.env": Entry("A='one\rtwo\r\nthree'\n", 0o400)}
    release.make(tmp_path, files)
    assert release.whole(tmp_path, files)


def test_what_interrupted_runs_left_is_removed(tmp_path: Path) -> None:
    release.make(tmp_path, FILES)
    for place in (".new-1", ".old-1/old"):
        (tmp_path / "releases" / place).mkdir(parents=True)
        (tmp_path / "releases" / place / "server.env").write_text("A='secret'\n")
    (tmp_path / ".current-1").symlink_to("releases/1")
    release.make(tmp_path, {"a": Entry("1")})
    release.switch(tmp_path, release.identity(FILES))
    assert len(list((tmp_path / "releases").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "releases", "state"]


def test_a_link_that_leads_out_of_the_releases_is_put_right(tmp_path: Path) -> None:
    wanted = release.identity(FILES)
    release.make(tmp_path, FILES)
    (tmp_path / "current").symlink_to(f"/nowhere/releases/{wanted}")
    assert release.current(tmp_path) is None
    assert release.switch(tmp_path, wanted)
    assert (tmp_path / "current" / "service.json").exists() and release.current(tmp_path) == wanted


def test_what_is_no_link_is_left_alone(tmp_path: Path) -> None:
    release.make(tmp_path, FILES)
    (tmp_path / "current").mkdir()
    with pytest.raises(release.ReleaseError, match=r"current is no link to a release.*Move it away"):
        release.switch(tmp_path, release.identity(FILES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "releases"]


@pytest.mark.parametrize(
    "other",
    [
        {**FILES, "service.json": Entry("{ }\n", 0o400)},
        {**FILES, "bin/run": Entry("#!/bin/sh\n", 0o500)},
        {"bin/run": FILES["bin/run"]},
    ],
)
def test_another_content_is_another_release(other: dict) -> None:
    assert release.identity(other) != release.identity(FILES)


def test_models_are_part_of_the_release_and_not_of_the_definition_of_the_server() -> None:
    one = definition.files(Path("/opt/x"), SERVICE, [], {})
    two = definition.files(Path("/opt/x"), SERVICE, [{"model_uid": "minilm"}], {})
    assert release.identity(one) != release.identity(two)
    assert definition.digest(one) == definition.digest(two)


def test_a_variable_is_part_of_the_definition_of_the_server() -> None:
    one = definition.files(Path("/opt/x"), SERVICE, [], {})
    environment = {"XINFERENCE_HOME": "/opt/x/other"}
    two = definition.files(Path("/opt/x"), {**SERVICE, "environment": environment}, [], {})
    assert definition.digest(one) != definition.digest(two)


def test_a_diff_shows_what_changes_and_no_secret() -> None:
    def texts(port: int, secret: str) -> dict:
        environment = {
            "XINFERENCE_HOME": f"/{port}",
            "s3_token": secret,
            "DATABASE": f"x://u:{secret}@h",
            "MINE": secret,
        }
        entry = {"model_uid": "m", "envs": {"hf_token": secret, "OMP": secret}, "options": {"auth": {"pin": secret}}}
        service = {"port": port, "environment": environment}
        return {
            "service.json": definition.json_text(service),
            "models.json": definition.json_text([entry, {"replica": port}]),
            "compose.yaml": yaml_text({"services": {"x": {**service, "secrets": [secret]}}, "name": "p"}),
            "server.env": f"ANY={secret}\nMY-OWN.PIN='{secret}'\n",
            "server.json": f"not JSON, {secret}",
            "bin/run": secret,
        }

    changes = release.difference(texts(1, "0ldSecret"), texts(2, "n3wSecret"))
    assert [change["after_header"] for change in changes] == sorted(set(texts(1, "")) - {"bin/run"})
    assert "0ldSecret" not in repr(changes) and "n3wSecret" not in repr(changes)
    shown = {change["after_header"]: change for change in changes}
    for name in ("service.json", "compose.yaml"):
        assert "/1" in shown[name]["before"] and "/2" in shown[name]["after"]
        assert "MINE" in shown[name]["after"]
    assert '"replica": 2' in shown["models.json"]["after"]
    assert "name: p" in shown["compose.yaml"]["after"]
