# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Shipping for real: in streams and file by file, over SSH and the local connection, with become, cut and damaged."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from sites import Site, SshHost, make_bundle, make_model

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


def ship(site: Site, bundle: Path, *arguments: str, **more: Any) -> Dict[str, Any]:
    options = {"bundle": str(bundle), "root": str(site.root), "models": ENTRIES, **more}
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


def without_streams(place: Path) -> Dict[str, Any]:
    """Variables of a host on which no receiver can be started."""
    ssh = place / "ssh-without-streams"
    ssh.write_text('#!/bin/sh\ncase "$*" in *"exec(eval("*) echo not here >&2; exit 1;; esac\nexec ssh "$@"\n')
    ssh.chmod(0o755)
    return {"ansible_ssh_executable": str(ssh)}


@pytest.mark.parametrize("way", ["ssh", "several streams", "ssh without streams", "local"])
def test_ships_over_every_connection_and_does_nothing_twice(
    way: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"} if way == "local" else ssh_host.variables())
    more = {"streams": 3} if way == "several streams" else {}
    if way == "ssh without streams":
        site.variables.update(without_streams(tmp_path))
    first = ship(site, bundle, **more)
    assert not first.get("failed"), first["msg"]
    total = Bundle.open(bundle).size
    assert first["changed"] and first["sent_bytes"] == total and first["hashed_bytes"] == 2 * total
    assert first["transports"] == ["put_file" if way == "ssh without streams" else "stream"]
    assert first["rate"] > 0 and first["skipped_bytes"] == first["deduplicated_bytes"] == 0
    if way == "ssh without streams":
        assert "the receiver cannot be run: not here; going on with put_file" in site.output
    assert same_content(site, material)

    second = ship(site, bundle, **more)
    assert (second["changed"], second["sent_bytes"], second["hashed_bytes"], second["blobs"]) == (False, 0, 0, 0)
    assert second["skipped_bytes"] == total
    assert second["artifacts"] == first["artifacts"]


def test_a_root_below_the_home_of_whoever_logs_in(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"}, {"HOME": str(tmp_path / "home")})
    (tmp_path / "home").mkdir()
    result = ship(site, bundle, root="~/site")
    assert result["transports"] == ["stream"] and "absolute path" not in site.output
    assert (tmp_path / "home/site/state/artifacts.json").exists()


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


@pytest.mark.parametrize("way", ["ssh", "ssh without streams"])
def test_only_what_is_lost_or_damaged_is_sent_again(
    way: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, ssh_host.variables())
    resumes = way != "ssh without streams"
    if not resumes:
        site.variables.update(without_streams(tmp_path))
    ship(site, bundle)
    blob = site.root / "blobs/sha256" / big_blob(bundle).partition(":")[2]

    # A partial with wrong content but the right size: dropped, and only that blob is sent.
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(b"x" * BIG)
    again = ship(site, bundle)
    assert again["sent_bytes"] == BIG and same_content(site, material)

    # A good partial: a stream goes on where it ends, put_file sends the file again.
    half = blob.read_bytes()[: BIG // 2]
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(half)
    again = ship(site, bundle)
    assert same_content(site, material)
    assert again["sent_bytes"] == (BIG // 2 if resumes else BIG)

    # A partial that is damaged in the part that is there already: noticed at the end, then sent whole.
    blob.unlink()
    (site.root / "partial" / blob.name).write_bytes(b"y" * (BIG // 2))
    again = ship(site, bundle)
    assert same_content(site, material) and again["blobs"] == 1
    assert again["sent_bytes"] == (BIG // 2 + BIG if resumes else BIG)

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


def kill(pids: Iterable[int]) -> None:
    """End processes at once; some end by themselves when the first is gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def receivers(root: Path) -> List[int]:
    """The receivers that write into a root directory."""
    listing = subprocess.run(["fuser", str(root / "state/receiving.lock")], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listing.stdout.split()]


def begin(site: Site, bundle: Path, **more: Any) -> subprocess.Popen[str]:
    """Start shipping slowly, and return when an eighth of the large blob has arrived."""
    options = {"bundle": str(bundle), "root": str(site.root), "models": ENTRIES, "rate_limit": "6M", **more}
    process = subprocess.Popen(
        site.command("xinference_ship", options, []),
        env=site.surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    partial = site.root / "partial" / big_blob(bundle).partition(":")[2]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > BIG // 8):
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("how", ["all", "ansible-playbook", "connection"])
def test_goes_on_after_whatever_was_killed(
    how: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, ssh_host.variables())
    process = begin(site, bundle)
    partial = site.root / "partial" / big_blob(bundle).partition(":")[2]
    everybody = family(process.pid)
    if how == "connection":
        streams = [pid for pid in everybody if b"exec(eval(" in cmdline(pid)]
        assert len(streams) == 1
        os.kill(streams[0], signal.SIGKILL)
        output, _nothing = process.communicate(timeout=240)
        assert process.returncode == 0 and "the connection to the receiver broke" in output, output
        assert "going on where it stopped" in output and same_content(site, material)
        result = json.loads((tmp_path / "result.json").read_text())
        # What the pipe and ssh had taken over when it was killed is lost.
        assert result["transports"] == ["stream"] and result["sent_bytes"] < Bundle.open(bundle).size + (8 << 20)
        return
    kill(everybody if how == "all" else [process.pid])
    process.wait()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and receivers(site.root):
        time.sleep(0.1)
    assert not receivers(site.root)
    # The connection that Ansible keeps open stays for its minute.
    while time.monotonic() < deadline and (left := [pid for pid in everybody if b"[mux]" not in cmdline(pid)]):
        if not any(map(cmdline, left)):
            break
        time.sleep(0.1)
    assert not any(map(cmdline, left)), [cmdline(pid) for pid in left]
    arrived = partial.stat().st_size
    assert BIG // 8 < arrived < BIG
    result = ship(site, bundle)
    assert not result.get("failed"), result["msg"]
    assert result["sent_bytes"] <= Bundle.open(bundle).size - arrived and same_content(site, material)


def cmdline(pid: int) -> bytes:
    """The command line of a process, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_two_controllers_do_not_meet(ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    site, other = Site(tmp_path, ssh_host.variables()), Site(tmp_path / "other", ssh_host.variables())
    process = begin(site, bundle, rate_limit="2M")
    options = {"bundle": str(bundle), "root": str(site.root), "models": ENTRIES}
    refused = other.run("xinference_ship", {**options, "wait": 0})
    assert refused["failed"] and f"(process {process.pid}), since " in refused["msg"]
    assert "Another controller is shipping to this host: root on" in " ".join(refused["msg"].split())
    waited = other.run("xinference_ship", options)
    assert f"site1: waiting for root on {os.uname().nodename} (process {process.pid}, " in other.output
    process.communicate(timeout=240)
    assert process.returncode == 0 and not waited.get("failed"), waited["msg"]
    sent = json.loads((tmp_path / "result.json").read_text())["sent_bytes"] + waited["sent_bytes"]
    assert same_content(site, material) and sent <= Bundle.open(bundle).size + BIG


def test_a_full_disk_is_told_in_numbers(ssh_host: SshHost, bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, ssh_host.variables())
    site.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(site.root)], check=True)
    ballast = site.root / "ballast"
    try:
        # Somebody else fills the disk while we are sending.
        process = begin(site, bundle)
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(b"x" * 65536)
                    file.flush()
            except OSError:
                pass
        output, _nothing = process.communicate(timeout=240)
        told = " ".join(output.split())
        assert process.returncode != 0 and "MiB are needed" in told and "0 B are free" in told, output
        arrived = (site.root / "partial" / big_blob(bundle).partition(":")[2]).stat().st_size
        assert arrived > BIG // 8
        ballast.unlink()
        result = ship(site, bundle)
        assert not result.get("failed"), result["msg"]
        assert result["sent_bytes"] <= Bundle.open(bundle).size - arrived
    finally:
        subprocess.run(["umount", str(site.root)], check=True)


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


@pytest.mark.parametrize("way", ["stream", "password", "put_file"])
def test_an_ordinary_user_logs_in_and_root_has_the_store(
    way: str, ordinary_user: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    for directory in (tmp_path, *tmp_path.parents, ssh_host.place, ssh_host.place.parent):
        if "pytest-of" in str(directory):
            directory.chmod(0o755)
    site = Site(tmp_path, {**ssh_host.variables(ordinary_user), "ansible_become": True})
    if way == "put_file":
        site.variables.update(without_streams(tmp_path))
    if way == "password":
        password = "only for tests"
        subprocess.run(["chpasswd"], input=f"{ordinary_user}:{password}", text=True, check=True)
        Path("/etc/sudoers.d", ordinary_user).write_text(f"{ordinary_user} ALL=(ALL) ALL\n")
        site.variables["ansible_become_password"] = password
    result = ship(site, bundle, "-vvv")
    assert not result.get("failed"), result["msg"]
    assert result["transports"] == ["put_file" if way == "put_file" else "stream"] and same_content(site, material)
    assert "only for tests" not in site.output
    assert {path.stat().st_uid for path in (site.root / "blobs/sha256").iterdir()} == {0}
    owner = pwd.getpwnam(ordinary_user).pw_uid if way == "put_file" else 0
    assert (site.root / "partial").stat().st_uid == owner
    assert ship(site, bundle)["changed"] is False


@pytest.mark.parametrize("method", ["sudo", "su"])
@pytest.mark.parametrize("way", ["ssh", "local"])
def test_the_store_belongs_to_whoever_was_become(
    way: str, method: str, ordinary_user: str, ssh_host: SshHost, material: Path, bundle: Path, tmp_path: Path
) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if "pytest-of" in str(directory):
            directory.chmod(0o755)
    become = {"ansible_become": True, "ansible_become_user": ordinary_user, "ansible_become_method": method}
    site = Site(tmp_path, {**({"ansible_connection": "local"} if way == "local" else ssh_host.variables()), **become})
    site.root.mkdir()
    owner = pwd.getpwnam(ordinary_user).pw_uid
    os.chown(site.root, owner, -1)
    result = ship(site, bundle)
    assert not result.get("failed"), result["msg"]
    assert result["transports"] == ["stream"] and same_content(site, material)
    assert {path.lstat().st_uid for path in site.root.rglob("*")} == {owner}


@pytest.mark.parametrize("way", ["stream", "put_file"])
def test_two_thousand_small_files_do_not_cost_two_thousand_round_trips(
    way: str, ssh_host: SshHost, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "many", {f"{number:04}": 2000 for number in range(2000)})
    bundle = make_bundle(tmp_path, {"many": model})
    site = Site(tmp_path, {**ssh_host.variables(), **(without_streams(tmp_path) if way == "put_file" else {})})
    options = {"bundle": str(bundle), "root": str(site.root), "models": [{"source": {"path": "many"}}]}
    result = site.run("xinference_ship", options)
    assert result["blobs"] > 2000 and result["transports"] == [way]


def test_no_blob_is_so_large_that_memory_notices(ssh_host: SshHost, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with (tmp_path / "model/hollow.bin").open("wb") as file:
        file.truncate(1 << 30)
    bundle = make_bundle(tmp_path, {"hollow": tmp_path / "model"})
    site = Site(tmp_path, ssh_host.variables())
    options = {"bundle": str(bundle), "root": str(site.root), "models": [{"source": {"path": "hollow"}}]}
    process = subprocess.Popen(
        site.command("xinference_ship", options, []), env=site.surroundings(), stdout=subprocess.DEVNULL
    )
    peaks: Dict[str, int] = {}
    while process.poll() is None:
        for pid in (*family(process.pid), *receivers(site.root)):
            words = cmdline(pid).split(b"\0")
            name = "receiver" if b"-I" in words and not words[0].endswith(b"ssh") else words[0].decode(errors="replace")
            peaks[name] = max(peaks.get(name, 0), peak(pid))
        time.sleep(0.1)
    assert process.returncode == 0 and json.loads((tmp_path / "result.json").read_text())["transports"] == ["stream"]
    assert "receiver" in peaks and max(peaks.values()) < 200 << 20, peaks


def peak(pid: int) -> int:
    """The most memory that a process ever had, in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
