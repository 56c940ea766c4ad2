# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Deep verification for real: flipped bits are found, named and repaired in one run; and how it looks on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from sites import REPOSITORY, Site, SshHost, make_bundle, make_model

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server for several users needs root")

BIG = 12 * 1024 * 1024
ENTRIES = [{"model_uid": "a", "source": {"path": "/models/alpha"}}]


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    host = SshHost(tmp_path_factory.mktemp("ssh") / "server").start()
    yield host
    host.stop()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    files = {"weights.bin": BIG, "config.json": 700, **{f"part{number:02}": 4000 for number in range(40)}}
    return make_bundle(tmp_path / "source", {"alpha": make_model(tmp_path / "source/alpha", files)})


def ship(site: Site, bundle: Path, *arguments: str, **more: Any) -> Dict[str, Any]:
    options = {"bundle": str(bundle), "root": str(site.root), "models": ENTRIES, **more}
    return site.run("xinference_ship", options, *arguments)


def flip(path: Path) -> None:
    """Flip one bit, so that nothing but reading shows it."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(status.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def damaged_files(result: Dict[str, Any]) -> List[str]:
    return sorted(name for row in result["deep"]["damaged"] for name in row["files"])


def test_flipped_bits_are_found_named_and_repaired_in_one_run(ssh_host: SshHost, bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, ssh_host.variables())
    first = ship(site, bundle)
    assert not first.get("failed"), first["msg"]
    tree = Path(first["artifacts"]["models"]["alpha"]["path"])
    for name in ("weights.bin", "part07"):
        flip(tree / name)
    assert ship(site, bundle)["changed"] is False

    looked = ship(site, bundle, "--check", deep=True)
    assert damaged_files(looked) == ["models/alpha: part07", "models/alpha: weights.bin"] and looked["changed"]
    compare = ["cmp", "-s", str(tree / "weights.bin"), str(tmp_path / "source/alpha/weights.bin")]
    assert subprocess.run(compare, check=False).returncode

    with (tree / "weights.bin").open("rb") as running:
        result = ship(site, bundle, deep=True)
        assert not result.get("failed"), result["msg"]
        assert os.fstat(running.fileno()).st_nlink == 0
    assert damaged_files(result) == damaged_files(looked) and result["sent_bytes"] == BIG + 4000
    assert result["deep"]["read_bytes"] == Bundle.open(bundle).size and str(tree) in result["deep"]["made"]
    assert "2 damaged blobs (models/alpha: " in result["msg"] and "until it is started again" in result["msg"]
    same = subprocess.run(["diff", "-r", str(tmp_path / "source/alpha"), str(tree)], check=False)
    assert same.returncode == 0

    again = ship(site, bundle, deep=True)
    assert not again["changed"] and again["deep"]["damaged"] == [] and "nothing is damaged" in again["msg"]
    assert again["sent_bytes"] == 0 and again["deep"]["read_bytes"] == Bundle.open(bundle).size


def test_a_damaged_bundle_repairs_nothing_and_is_told(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"})
    tree = Path(ship(site, bundle)["artifacts"]["models"]["alpha"]["path"])
    weights = next(digest for digest, size in Bundle.open(bundle).blobs.items() if size == BIG)
    # Stamps vouch for both.
    flip(tree / "weights.bin")
    flip(bundle / "blobs/sha256" / weights.partition(":")[2])
    result = ship(site, bundle, deep=True)
    assert result["failed"] and "is damaged; nothing was sent" in result["msg"] and weights in result["msg"]
    result = ship(site, bundle, deep_bundle=True)
    assert result["failed"] and "models/alpha: weights.bin" in result["msg"]


# --- on a terminal ----------------------------------------------------------------------------------------------------


def watched(place: Path, variables: List[Dict[str, Any]], options: Dict[str, Any]) -> str:
    """What two hosts that are shipped to slowly write to a terminal of 100 columns."""
    hosts = {f"gpu-{number}": {"root": str(place / f"root{number}"), **one} for number, one in enumerate(variables, 1)}
    (place / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts}}))
    task = {"name": "Ship", "airgap.xinference.xinference_ship": {"root": "{{ root }}", **options}}
    (place / "play.json").write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": [task]}]))
    site = Site(place, {})
    kept = {
        name: value for name, value in site.surroundings().items() if name not in ("CI", "NO_COLOR", "ANSIBLE_NOCOLOR")
    }
    environment = {**kept, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    pid, above = pty.fork()
    if pid == 0:
        os.chdir(REPOSITORY)
        os.execve(program, [program, "-i", str(place / "hosts.json"), str(place / "play.json")], environment)
    output = b""
    try:
        while chunk := os.read(above, 65536):
            output += chunk
    except OSError:  # This is how a terminal says that nobody writes to it any more.
        pass
    os.close(above)
    text = output.decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    return text


def drawings(text: str) -> List[List[str]]:
    """The lines of every drawing."""
    found = re.findall(r"\r\x1b\[J((?:\r\n[^\r\n]*)+)\r\x1b\[\d+A", text)
    return [one.split("\r\n")[1:] for one in found]


def test_two_hosts_that_are_shipped_to_slowly(ssh_host: SshHost, bundle: Path, tmp_path: Path) -> None:
    variables = {"ansible_python_interpreter": "/usr/bin/python3"}
    hosts = [{**variables, "ansible_connection": "local"}, {**variables, **ssh_host.variables()}]
    options = {"bundle": str(bundle), "models": ENTRIES, "rate_limit": "2M"}
    text = watched(tmp_path, hosts, options)
    drawn = drawings(text)
    counts = [re.findall(r"^(gpu-\d) +(\d+) %  .*iB of 1\d\.\d MiB", line) for lines in drawn for line in lines]
    seen = {
        host: [int(percent) for found in counts for name, percent in found if name == host]
        for host in ("gpu-1", "gpu-2")
    }
    for host, percents in seen.items():
        assert len(set(percents)) >= 4 and percents == sorted(percents), (host, percents, text)
    assert any(line.startswith("together") and "MiB/s" in line and "left" in line for lines in drawn for line in lines)
    plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text)
    assert "changed: [gpu-1]" in plain and "changed: [gpu-2]" in plain
    assert re.search(r"together, 2 hosts: 2\d\.\d MiB sent in ", plain), plain
    for host in ("gpu-1", "gpu-2"):
        assert re.search(rf"{host}: \d+ blobs: 1\d\.\d MiB sent", plain), plain

    for number in (1, 2):
        flip(next((tmp_path / f"root{number}/models/alpha").iterdir()) / "weights.bin")
    text = watched(tmp_path, hosts, {**options, "deep": True})
    plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text)
    assert plain.count("1 damaged blobs (models/alpha: weights.bin) were replaced") == 2, plain
