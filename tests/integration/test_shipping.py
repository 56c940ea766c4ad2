# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shipping for real: over SSH with rsync and without, over the local connection, with become, cut and damaged."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from sites import Site, SshHost, make_bundle, make_model, path_without

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server for several users needs root")

BIG = 24 * 1024 * 1024
MODELS = {
    "alpha": {"weights.bin": BIG, "config.json": 700, "deep/er/empty.txt": 0},
    "beta": {f"part{number:03}.bin": 3000 + number for number in range(300)},
}
ENTRIES = [
    {"model_uid": "a", "source": {"path": "/models/alpha"}},
    {"model_uid": "b", "source": {"path": "/models/beta/"}},
    {"model_uid": "c", "source": {"path": "/models/absent"}, "enabled": False},
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and the model directories it was made of."""
    place = tmp_path_factory.mktemp("material")
    models = {name: make_model(place / name, sizes, seed) for seed, (name, sizes) in enumerate(MODELS.items())}
    make_bundle(place, models)
    return place


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    host = SshHost(tmp_path_factory.mktemp("ssh") / "server").start()
    yield host
    host.stop()


@pytest.fixture
def bundle(material: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own, without stamps."""
    shutil.copytree(material / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


def ship(site: Site, bundle: Path, *arguments: str) -> Dict[str, Any]:
    options = {"bundle": str(bundle), "root": str(site.root), "models": ENTRIES}
    return site.run("xinference_ship", options, *arguments)


def same_content(site: Site, material: Path) -> bool:
    """Whether the trees on the host are what went into the bundle, bit for bit."""
    models = json.loads((site.root / "state/artifacts.json").read_text())["models"]
    return sorted(models) == sorted(MODELS) and all(
        subprocess.run(["diff", "-r", str(material / name), entry["path"]], check=False).returncode == 0
        for name, entry in models.items()
    )


def big_blob(bundle: Path) -> str:
    """The digest of the one large file."""
    return next(digest for digest, size in Bundle.open(bundle).blobs.items() if size == BIG)


@pytest.mark.parametrize("way", ["rsync", "ssh without rsync there", "ssh without rsync here", "local"])
def test_ships_over_every_connection_and_does_nothing_twice(
    way: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"} if way == "local" else ssh_host.variables())
    other = None
    if way == "ssh without rsync there":
        other = SshHost(tmp_path / "other", path_without(tmp_path / "bin", "rsync")).start()
        site.variables = other.variables()
    elif way == "ssh without rsync here":
        site.environment["PATH"] = path_without(tmp_path / "bin", "rsync")
    try:
        first = ship(site, bundle)
        assert not first.get("failed"), first["msg"]
        total = Bundle.open(bundle).size
        assert first["changed"] and first["sent_bytes"] == total and first["hashed_bytes"] == 2 * total
        assert first["transports"] == ["rsync" if way == "rsync" else "put_file"]
        assert same_content(site, material)

        second = ship(site, bundle)
        assert (second["changed"], second["sent_bytes"], second["hashed_bytes"], second["blobs"]) == (False, 0, 0, 0)
        assert second["skipped_bytes"] == total and second["seconds"] < 3
        assert second["artifacts"] == first["artifacts"]
    finally:
        if other:
            other.stop()


def test_what_lies_on_the_host_is_readable_and_cannot_be_written_by_mistake(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"})
    before = os.umask(0o077)
    try:
        result = ship(site, bundle)
    finally:
        os.umask(before)
    tree = Path(result["artifacts"]["models"]["alpha"]["path"])
    file = tree / "deep/er/empty.txt"
    assert stat.S_IMODE(file.stat().st_mode) == 0o444 and (tree / "weights.bin").stat().st_nlink == 2
    for directory in (file.parent, tree, tree.parent, site.root / "models", site.root / "blobs/sha256", site.root):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    library = site.root / "lib/python/kindly/__init__.py"
    assert stat.S_IMODE(library.stat().st_mode) == 0o644
    code = "import kindly; print(kindly.NAME)"
    environment = {"PYTHONPATH": str(site.root / "lib/python")}
    assert subprocess.check_output(["/usr/bin/python3", "-c", code], env=environment).split() == [b"kindly"]


@pytest.mark.parametrize("way", ["ssh", "local"])
def test_only_what_is_lost_or_damaged_is_sent_again(
    way: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, ssh_host.variables() if way == "ssh" else {"ansible_connection": "local"})
    ship(site, bundle)
    blob = site.root / "blobs/sha256" / big_blob(bundle).partition(":")[2]

    # A partial with wrong content but the right size: dropped, and only that blob is sent.
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(b"x" * BIG)
    again = ship(site, bundle)
    assert again["sent_bytes"] == BIG and same_content(site, material)

    # A good partial: rsync goes on where it ends, put_file sends the file again.
    half = blob.read_bytes()[: BIG // 2]
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(half)
    again = ship(site, bundle)
    assert same_content(site, material)
    assert again["sent_bytes"] == (BIG // 2 if way == "ssh" else BIG)

    # A partial that is damaged in the part that is there already: noticed at the end, then sent whole.
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(b"y" * (BIG // 2))
    again = ship(site, bundle)
    assert same_content(site, material) and again["blobs"] == 1

    # A complete partial: nothing is sent.
    content = blob.read_bytes()
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(content)
    again = ship(site, bundle)
    assert (again["sent_bytes"], again["blobs"]) == (0, 1) and same_content(site, material)

    # A committed blob that was changed afterwards: no stamp vouches for it, and its tree is made again.
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.write(b"changed")
    again = ship(site, bundle)
    assert again["sent_bytes"] == BIG and same_content(site, material)

    # A file of a tree that was replaced: nothing to send, the tree is made again.
    tree = Path(again["artifacts"]["models"]["beta"]["path"])
    (tree / "part007.bin").unlink()
    (tree / "part007.bin").write_bytes(b"not this")
    again = ship(site, bundle)
    assert again["changed"] and again["sent_bytes"] == 0 and same_content(site, material)


def test_a_damaged_bundle_is_refused_and_named_before_anything_is_sent(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"})
    blob = bundle / "blobs/sha256" / big_blob(bundle).partition(":")[2]
    with blob.open("r+b") as file:
        file.seek(1000)
        file.write(b"!")
    result = ship(site, bundle)
    assert result["failed"] and big_blob(bundle) in result["msg"] and "models/alpha: weights.bin" in result["msg"]
    assert not site.root.exists()


def test_a_model_that_the_bundle_lacks_is_named(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"})
    options = {"bundle": str(bundle), "root": str(site.root), "models": [{"source": {"modelscope": "org/nowhere"}}]}
    result = site.run("xinference_ship", options)
    assert result["failed"] and "models/nowhere" in result["msg"] and not site.root.exists()


def test_check_mode_writes_nothing_and_shows_the_plan(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"})
    result = ship(site, bundle, "--check", "--diff")
    assert result["changed"] and not site.root.exists()
    assert "+models/alpha" in site.output and "-models/alpha" in site.output
    ship(site, bundle)
    assert not ship(site, bundle, "--check", "--diff")["changed"]
    (site.root / "blobs/sha256" / big_blob(bundle).partition(":")[2]).unlink()
    before = sorted(str(path) for path in site.root.rglob("*"))
    result = ship(site, bundle, "--check")
    assert result["changed"] and before == sorted(str(path) for path in site.root.rglob("*"))


def family(pid: int) -> List[int]:
    """A process and all that descend from it (Ansible's workers have sessions of their own)."""
    listing = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True).split()
    parents = dict(zip(map(int, listing[::2]), map(int, listing[1::2])))
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def test_goes_on_after_the_controller_was_killed(
    ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    wrapper = slow / "rsync"
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {shutil.which("rsync")} --version\n'
        f'exec {shutil.which("rsync")} --bwlimit=6M "$@"\n'
    )
    wrapper.chmod(0o755)
    site = Site(tmp_path, ssh_host.variables(), {"PATH": f"{slow}:{os.environ['PATH']}"})
    options = {"bundle": str(bundle), "root": str(site.root), "models": ENTRIES}
    process = subprocess.Popen(
        site.command("xinference_ship", options, []),
        env=site.surroundings(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = site.root / "partial" / big_blob(bundle).partition(":")[2]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > BIG // 8):
        time.sleep(0.05)
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    arrived = partial.stat().st_size
    assert BIG // 8 < arrived < BIG
    del site.environment["PATH"]
    result = ship(site, bundle)
    assert not result.get("failed"), result["msg"]
    assert result["sent_bytes"] <= Bundle.open(bundle).size - arrived and same_content(site, material)


@pytest.fixture
def ordinary_user() -> Iterator[str]:
    """A user of this machine who may become root without a password."""
    if shutil.which("sudo") is None:
        subprocess.run(
            ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "sudo"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    name = f"ops{os.getpid()}x{time.monotonic_ns() % 1000000}"
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", "--password", "*", name], check=True)
    rule = Path("/etc/sudoers.d", name)
    rule.write_text(f"{name} ALL=(ALL) NOPASSWD: ALL\n")
    rule.chmod(0o440)
    yield name
    rule.unlink()
    # By force: Ansible keeps a connection open for a minute.
    subprocess.run(["userdel", "--force", "--remove", name], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("rsync", [True, False], ids=["rsync", "put_file"])
def test_an_ordinary_user_uploads_and_root_commits(
    rsync: bool, ordinary_user: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    for directory in (tmp_path, *tmp_path.parents, ssh_host.place, ssh_host.place.parent):
        if "pytest-of" in str(directory):
            directory.chmod(0o755)
    site = Site(tmp_path, {**ssh_host.variables(ordinary_user), "ansible_become": True})
    if not rsync:
        site.environment["PATH"] = path_without(tmp_path / "bin", "rsync")
    result = ship(site, bundle)
    assert not result.get("failed"), result["msg"]
    assert result["transports"] == ["rsync" if rsync else "put_file"] and same_content(site, material)
    assert {path.stat().st_uid for path in (site.root / "blobs/sha256").iterdir()} == {0}
    assert (site.root / "partial").stat().st_uid == pwd.getpwnam(ordinary_user).pw_uid
    assert ship(site, bundle)["changed"] is False


def test_two_thousand_small_files_do_not_cost_two_thousand_round_trips(ssh_host: SshHost, tmp_path: Path) -> None:
    model = make_model(tmp_path / "many", {f"{number:04}": 2000 for number in range(2000)})
    bundle = make_bundle(tmp_path, {"many": model})
    site = Site(tmp_path, ssh_host.variables(), {"PATH": path_without(tmp_path / "bin", "rsync")})
    options = {"bundle": str(bundle), "root": str(site.root), "models": [{"source": {"path": "many"}}]}
    result = site.run("xinference_ship", options)
    assert result["blobs"] > 2000 and result["transports"] == ["put_file"] and result["seconds"] < 15
