# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Diagnosing a host with a real server: nothing where all is well, and each real fault by its name, with its cure.

The tests are a story in the order they stand: the server is started twice only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils.diagnosis import judge
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import Finding
from doors import run_module
from native_hosts import StartedHost
from servers import NEW, Missing

SECRET = "pl4nted-$ecret/of the site"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedHost]:
    """A host that serves with a real 4.1.0, without authentication, on loopback."""
    if os.geteuid() != 0:
        pytest.skip("files are given to other users here")
    try:
        found = StartedHost(tmp_path_factory.mktemp("diagnosed"), NEW)
    except Missing as error:
        pytest.skip(str(error))
    found.ship()
    found.release()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def running(host: StartedHost) -> StartedHost:
    """The same with its server up, as the tests before the first that stops it have it."""
    host.start()
    return host


def diagnosed(host: StartedHost, check: bool = False, **options: Any) -> List[Finding]:
    told, _seconds = run_module("xinference_diagnose", {"root": str(host.root), **options}, check)
    assert not told.get("failed") and not told["changed"], told
    return judge(told["facts"])


def one(found: List[Finding], check: str) -> Finding:
    assert [finding.check for finding in found] == [check], found
    return found[0]


def kept(root: Path) -> Dict[str, Any]:
    """Everything below the root directory but what the server itself writes meanwhile."""
    return {
        str(path): (status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns)
        for path in sorted(root.rglob("*"))
        for status in [path.lstat()]
        if "/logs" not in str(path) and "/home" not in str(path)
    }


def test_what_was_never_installed_is_told_in_one_sentence(host: StartedHost, tmp_path: Path) -> None:
    missing: Dict[str, Any] = {"xinference_root": str(tmp_path / "none")}
    printed = host.play("diagnose", expect=2, xinference_diagnose_strict=True, **missing)
    assert "1 finding" in printed and "playbooks/site.yml installs it" in printed
    assert not (tmp_path / "none").exists()


def test_what_was_shipped_and_never_started_is_told(host: StartedHost) -> None:
    found = one(diagnosed(host), "start-up log")
    assert found.found == "it does not run" and "xinferencectl start" in found.cure


def test_a_healthy_host_has_no_findings_and_stays_as_it_is(running: StartedHost) -> None:
    before = kept(running.root)
    printed = running.play("diagnose", xinference_diagnose_strict=True)
    assert "Diagnosed 1 host: nothing was found." in printed and "changed=0" in printed, printed
    assert diagnosed(running, check=True) == diagnosed(running, deep=True) == []
    assert kept(running.root) == before


def test_a_home_that_others_may_read_or_write(running: StartedHost) -> None:
    home = running.root / "home"
    home.chmod(0o755)
    found = one(diagnosed(running), "permissions")
    assert "mode 0755" in found.found and found.cure == f"chmod 0750 {home}"
    home.chmod(0o777)
    assert f"chmod o-w {home}" in one(diagnosed(running), "permissions").cure
    home.chmod(0o000)
    assert f"chmod u+rwx {home}" in one(diagnosed(running), "permissions").cure
    home.chmod(0o750)
    os.chown(home, 65534, -1)
    found = one(diagnosed(running), "permissions")
    assert str(home) in found.found and found.cure == f"chown -R root {home}"
    os.chown(home, 0, -1)
    assert diagnosed(running) == []


def test_a_file_of_secrets_that_others_may_read(running: StartedHost) -> None:
    definition = (running.root / "current/service.json").resolve()
    closed = [path for path in definition.parents if not path.stat().st_mode & 0o001]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (definition, *closed)}
    definition.chmod(0o444)
    # What lies in a directory that nobody else may enter is read by nobody else.
    assert [finding.check for finding in diagnosed(running)] == ["integrity"]
    for path in closed:
        path.chmod(modes[path] | 0o001)
    found = diagnosed(running)
    # A release is its modes, too.
    assert [finding.check for finding in found] == ["integrity", "permissions"]
    assert "service.json" in found[1].wanted and "chmod o-rwx" in found[1].cure
    for path, mode in modes.items():
        path.chmod(mode)
    assert diagnosed(running) == []


def test_a_damaged_and_a_lost_blob(running: StartedHost) -> None:
    weights = next((running.root / "models/alpha").glob("*/weights.bin"))
    whole, status = weights.read_bytes(), weights.stat()
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(1000)
        file.write(bytes([whole[1000] ^ 1]))
    found = one(diagnosed(running), "integrity")
    assert "damaged: models/alpha: weights.bin" in found.found and "xinference_ship_deep=true" in found.cure
    # A disk that loses bits changes no times: only who reads everything sees it.
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert diagnosed(running) == []
    assert "weights.bin" in one(diagnosed(running, deep=True), "integrity").found
    with weights.open("r+b") as file:
        file.write(whole)
    weights.chmod(stat.S_IMODE(status.st_mode))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert diagnosed(running, deep=True) == []
    blob = next(path for path in (running.root / "blobs/sha256").iterdir() if path.samefile(weights))
    blob.rename(running.place / "aside")
    found = one(diagnosed(running), "integrity")
    assert "missing: models/alpha: weights.bin" in found.found and found.cure == "playbooks/ship.yml"
    (running.place / "aside").rename(blob)
    assert diagnosed(running) == []


def test_a_server_that_was_killed_and_a_stranger_on_its_port(running: StartedHost) -> None:
    running.kill()
    found = one(diagnosed(running), "start-up log")
    assert re.match(r"it ended with code -9 after [\d.]+ s", found.found) and "xinferencectl start" in found.cure
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", running.port))
        stranger.listen()
        found, taken = diagnosed(running)
        assert found.check == "start-up log" and taken.check == "port"
        assert f"(pid {os.getpid()}, user root) listens on 127.0.0.1:{running.port}" in taken.found
        assert "xinference_port" in taken.cure
        running.start(wait=False)
        running.until(lambda: running.native.last_exit().get("code") not in (-9, None))
        checks = {finding.check: finding for finding in diagnosed(running)}
        assert "Another program listens on the port" in checks["start-up log"].found, checks
        running.stop()


def test_a_missing_switch_and_a_server_without_an_account(host: StartedHost) -> None:
    host.auth = True
    host.release({"HF_HUB_OFFLINE": None, "SITE_PASSWORD": SECRET}, models=[])
    host.start()
    found = {finding.check: finding for finding in diagnosed(host)}
    assert "HF_HUB_OFFLINE" in found["offline switches"].found
    assert "xinference_server_environment" in found["offline switches"].cure
    assert "no account yet" in found["authentication"].found
    assert SECRET not in json.dumps(run_module("xinference_diagnose", {"root": str(host.root)})[0])
    # The release is put right, and the server still runs as it was started.
    host.release({"SITE_PASSWORD": SECRET})
    told = {finding.check: finding for finding in diagnosed(host)}
    assert told["offline switches"].found == "the running server lacks HF_HUB_OFFLINE"
    assert "xinferencectl restart" in told["offline switches"].cure


def test_what_is_packed_for_support_has_no_secret(host: StartedHost) -> None:
    log = host.root / "logs/server.log"
    (token,) = set(re.findall(r"Setup token: (\S+)", log.read_text()))
    keys = [path.read_text().strip() for path in (host.root / "home/auth").glob("*key*")]
    with log.open("a") as file:
        file.write(f"somebody printed {SECRET}\nAuthorization: Bearer sk-abcdefgh12345678\n")
    support = host.place / "support"
    collecting: Dict[str, Any] = {"xinference_diagnose_directory": str(support), "xinference_diagnose_log_limit": "1M"}
    printed = host.play("diagnose", "--tags", "collect", **collecting)
    assert "changed=0" in printed, printed
    (archive,) = support.iterdir()
    assert re.fullmatch(rf"{host.name}-\d{{8}}T\d{{6}}Z\.tar\.gz", archive.name)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as packed:
        packed.extractall(host.place / "out", filter="data")
    texts = {str(path): path.read_text() for path in (host.place / "out").rglob("*") if path.is_file()}
    assert any(name.endswith("/logs/server.log") and "Setup token: (hidden)" in text for name, text in texts.items())
    secrets = [token, SECRET, "sk-abcdefgh12345678", *keys]
    assert keys and [name for name, text in texts.items() if any(secret in text for secret in secrets)] == []
    assert not any(name.endswith(".db") for name in texts) and SECRET not in printed
    # The search sees a secret where there is one.
    assert token in log.read_text() and SECRET in (host.root / "current/service.json").read_text().replace("\\", "")
    shutil.rmtree(host.place / "out")
