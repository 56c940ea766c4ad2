# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that is managed through another port than 22 keeps its administrator; the rules are tried in tests/testbed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
from plays import run
from sites import Site, SshHost

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server for several users needs root")


def firewall(site: Site, variables: Dict[str, Any], expect: int) -> str:
    """Run the real playbook for a host, in check mode, and return what it printed."""
    inventory = {"xinference": {"hosts": {"gpu-1": {"ansible_python_interpreter": sys.executable, **variables}}}}
    path = site.place / "inventory.json"
    path.write_text(json.dumps(inventory))
    done = run("-i", str(path), "playbooks/firewall.yml", "--check", environment=site.surroundings())
    assert done.returncode == expect, done.stdout
    return " ".join(done.stdout.split())


def test_no_service_takes_the_port_of_ssh(tmp_path: Path) -> None:
    host = SshHost(tmp_path / "server").start()
    site = Site(tmp_path, {})
    try:
        over_ssh = host.variables()
        closed = {"xinference_firewall": "nftables", "xinference_host": "0.0.0.0", "xinference_port": host.port}
        refusal = f"the port of server is {host.port}, and that is the one of SSH"
        told = firewall(site, {**over_ssh, **closed}, 2)
        assert "fatal: [gpu-1]" in told and "Nothing was changed" in told and refusal in told
        assert "Give server another port" in told
        # The inventory says nothing of the port, and then something else: the session itself tells.
        option = f"{over_ssh.pop('ansible_ssh_common_args')} -p {host.port}"
        del over_ssh["ansible_port"]
        hidden = {**over_ssh, "ansible_ssh_common_args": option}
        assert refusal in firewall(site, {**hidden, **closed}, 2)
        # Nothing is refused where nothing is closed.
        firewall(site, {**hidden, **closed, "xinference_firewall": "none"}, 0)
    finally:
        host.stop()
