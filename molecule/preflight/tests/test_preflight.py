# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts broken in every way: all of it in one table, each finding with its cure, and nothing changed on any host."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, run_playbook

EXPECTED = {
    "ready": set(),
    "stopped": {"docker engine"},
    "old-compose": {"compose"},
    "bare": {"compose", "nvidia runtime", "gpu"},
    "old-driver": {"nvidia driver", "gpu"},
    "full": {"disk"},
    "open": {"air gap"},
    "stranger": {"docker engine", "root directory"},
    "locked": {"become"},
    "pythonless": {"python"},
    "undocked": {"docker engine"},
    "asleep": {"connection"},
    "odd": {"models", "memory", "clock", "port"},
}
TOLD = {
    "old-compose": ["Compose v1 (1.29.2)"],
    "old-driver": ["driver 580 or newer, for CUDA 13.0", "driver 550.54.15", "GPU 1"],
    "full": ["/opt/xinference", "/var/lib/docker while images are loaded"],
    "stranger": ["permission denied", "belongs to root"],
    "odd": ["modle_type; did you mean model_type", "bge-m3 is not in the bundle", "s behind it", "http.server 9997"],
}
CHANGES = (
    "find / /opt /var/lib/docker/image /var/lib/docker/containers -xdev -newer /etc/before -type f "
    "-not -path '/proc/*' -not -path '/run/*' -not -path '/tmp/*' -not -path '/var/log/*' -not -path '*/.ansible/*' "
    "-not -path '/var/lib/docker/[!ic]*' 2>/dev/null || true"
)


@pytest.fixture(scope="module")
def outside() -> Iterator[str]:
    """An address that only a host with a way out reaches: this machine, where its own way out begins."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as server:
        threading.Thread(target=lambda: [server.accept() for _call in range(99)], daemon=True).start()
        yield f"{address}:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def broken(bed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The hosts, one of them switched off, each with a file that tells later what is newer."""
    for host in bed.values():
        host.exec("touch", "/etc/before")
    bed["asleep"].stop()
    yield {name: host for name, host in bed.items() if name != "asleep"}
    bed["asleep"].start()


def preflight(outside: str, *arguments: str, playbook: str = "preflight") -> Run:
    """Run a playbook that begins with preflight."""
    reached = json.dumps({"xinference_preflight_airgap_addresses": [outside]})
    return run_playbook(playbook, "-e", reached, "-e", "ansible_ssh_timeout=20", *arguments)


def untouched(hosts: dict[str, Any]) -> dict[str, str]:
    """What changed on hosts, by name; empty when nothing did."""
    changed = {}
    for name, host in hosts.items():
        found = host.exec("sh", "-c", CHANGES).strip()
        engine_runs = host.spec.engine and name != "undocked"
        found += host.docker("image", "ls", "--quiet") + host.docker("ps", "--all", "--quiet") if engine_runs else ""
        if found:
            changed[name] = found
    return changed


@pytest.fixture(scope="module")
def checked(outside: str, broken: dict[str, Any]) -> Run:
    """Preflight in check mode."""
    return preflight(outside, "--check")


def test_every_fault_of_every_host_is_in_one_table(
    outside: str, broken: dict[str, Any], checked: Run, tmp_path: Path
) -> None:
    path = tmp_path / "findings.json"
    run = preflight(outside, "-e", f"xinference_preflight_report={path}")
    findings = json.loads(path.read_text())["findings"]
    assert {host: {row["check"] for row in rows} for host, rows in findings.items()} == EXPECTED
    assert run.status != 0 and run.output.count("HOST ") == 1
    for host, texts in TOLD.items():
        told = json.dumps(findings[host])
        assert [text for text in texts if text not in told] == []
    cures = [row for rows in findings.values() for row in rows if not row["cure"] and row["check"] != "models"]
    assert cures == [] and f"Ready: 1 of {len(EXPECTED)} hosts" in run.output

    def table(output: str) -> str:
        lines = output[output.index("HOST ") : output.index("Ready:")]
        # Numbers differ from run to run, and so does what the network says of a host that is off.
        return re.sub(r"(connect to host N port N:) .*", r"\1", re.sub(r"\d[\d.]*", "N", lines))

    assert table(checked.output) == table(run.output)


def test_nothing_changed_on_any_host(outside: str, broken: dict[str, Any], checked: Run) -> None:
    assert untouched(broken) == {}
    print(f"\npreflight of {len(EXPECTED)} hosts: {checked.tasks} tasks, {checked.seconds:.1f} s")


def test_hosts_that_belong_together_are_served_together_or_left_alone(outside: str, broken: dict[str, Any]) -> None:
    run = preflight(outside, "-e", "xinference_preflight_all_or_none=true", playbook="site")
    assert run.status != 0 and "keeps the hosts together" in run.output
    assert "PLAY [Ship the bundle" not in run.output and untouched(broken) == {}
