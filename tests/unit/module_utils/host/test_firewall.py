# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules of nftables: our ports, and nothing else. Where nft is a stand-in, it only keeps what it was given."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import firewall, ssh_session
from ansible_collections.airgap.xinference.plugins.module_utils.host.firewall_table import (
    LINK,
    LOADED,
    RULES,
    UNIT,
    FirewallError,
    Table,
    never_loaded,
)

SERVER: Dict[str, Any] = {"name": "server", "port": 9997, "clients": ["10.1.2.3", "10.1.0.0/16", "fd00::1/64"]}
PEERS: Dict[str, Any] = {"name": "peers", "port": 4711, "clients": []}


def test_each_port_is_for_its_clients_and_then_for_nobody() -> None:
    lines = [line.strip() for line in firewall.rules([SERVER, PEERS]).splitlines()]
    ports = [line for line in lines if line.startswith("tcp")]
    assert ports == [
        'tcp dport 9997 ip saddr { 10.1.0.0/16 } accept comment "server"',
        'tcp dport 9997 ip6 saddr { fd00::/64 } accept comment "server"',
        'tcp dport 9997 counter drop comment "server"',
        'tcp dport 4711 counter drop comment "peers"',
    ]


def test_nobody_is_locked_out_by_a_table_that_knows_our_ports_only() -> None:
    text = firewall.rules([SERVER, PEERS])
    assert "policy accept" in text and set(re.findall(r"dport (\d+)", text)) == {"9997", "4711"}
    drops = [line for line in text.splitlines() if "drop" in line]
    assert len(drops) == 2 and all("tcp dport" in line for line in drops)
    first = [line.strip() for line in text.splitlines()]
    assert (
        first.index('iif "lo" accept') < first.index("fib daddr type != local accept") < first.index(drops[0].strip())
    )
    # Replaced in one step, also where there is none yet.
    assert re.search(
        r"^table inet airgap_xinference\ndelete table inet airgap_xinference\ntable inet", text, re.MULTILINE
    )
    # Before Docker changes the address of what is published, which it does at -100.
    assert "hook prerouting priority -110" in text


def test_what_is_no_port_or_address_is_refused_all_at_once() -> None:
    assert firewall.faults([SERVER, PEERS]) == []
    wrong: List[Dict[str, Any]] = [
        {"name": "a", "port": 0, "clients": ["gpu.site"]},
        {"name": "b", "port": 22, "clients": ["fe80::1%eth0"]},
        {"name": "c", "port": 9997, "clients": []},
        {"name": "d", "port": 9997, "clients": []},
        {"name": 'e" accept', "port": 1, "clients": []},
    ]
    told = "; ".join(firewall.faults(wrong))
    for part in (
        "port of a is 0",
        "'gpu.site' of a is no address",
        "the port of b is 22, and that is the one of SSH",
        "d and c",
        "e\" accept' must be",
    ):
        assert part in told, part


def test_the_port_that_the_host_is_managed_through_is_refused_whatever_it_is() -> None:
    gateway = {"name": "gateway", "port": 2222, "clients": ["10.0.0.0/8"]}
    assert firewall.faults([gateway], [22]) == []
    (told,) = firewall.faults([gateway], [22, 2222], "gpu-1")
    assert "port of gateway is 2222" in told and "gpu-1 is managed" in told and "Give gateway another port" in told


def process(top: Path, pid: int, parent: int, *environment: str) -> None:
    (top / str(pid)).mkdir()
    (top / str(pid) / "environ").write_text("\0".join(environment))
    (top / str(pid) / "status").write_text(f"Name:\tsh\nPid:\t{pid}\nPPid:\t{parent}\n")


def test_the_port_of_the_session_is_found_above_a_sudo_that_takes_it_away(tmp_path: Path) -> None:
    process(tmp_path, 40, 1, "PATH=/bin", "SSH_CONNECTION=10.0.0.1 40022 10.0.0.2 2222")
    process(tmp_path, 41, 40, "PATH=/bin", "OTHER_SSH_CONNECTION=10.0.0.1 1 10.0.0.2 3")
    process(tmp_path, 42, 41)
    process(tmp_path, 50, 1, "SSH_CONNECTION=fe80::1%eth0 40022 fe80::2%eth0 2200")
    assert ssh_session.ports(tmp_path, 42) == {2222} and ssh_session.ports(tmp_path, 50) == {2200}
    process(tmp_path, 60, 61)
    process(tmp_path, 61, 1)
    assert ssh_session.ports(tmp_path, 60) == set() == ssh_session.ports(tmp_path, 99)


NFT = """#!/bin/sh
case "$*" in
  "-c -f -") grep -q table ;;
  "-f -") cat > "$STATE.new"; grep -q chain "$STATE.new" && mv "$STATE.new" "$STATE" || rm -f "$STATE" ;;
  *list*) cat "$STATE" 2>/dev/null || { echo "Error: No such file or directory" >&2; exit 1; } ;;
esac
"""


@pytest.fixture(name="state")
def a_kernel(tmp_path: Path, monkeypatch: Any) -> Path:
    """Where the stand-in of nft keeps the table; /etc has systemd's directory."""
    nft = tmp_path / "bin/nft"
    nft.parent.mkdir()
    nft.write_text(NFT)
    nft.chmod(0o755)
    (tmp_path / UNIT).parent.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{nft.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path / "kernel"))
    return tmp_path / "kernel"


def test_rules_are_in_force_now_and_after_a_boot(tmp_path: Path, state: Path) -> None:
    table, rules = Table(tmp_path), firewall.rules([SERVER])
    assert table.differs(rules) and not table.differs("") and never_loaded(tmp_path)
    table.check(rules)
    table.load(rules)
    assert state.read_text() == (tmp_path / RULES).read_text() == table.before() == rules
    assert (tmp_path / RULES).stat().st_mode & 0o777 == 0o640 and (tmp_path / RULES).parent.stat().st_mode & 0o007 == 0
    unit = (tmp_path / UNIT).read_text()
    assert f"ExecStart={tmp_path}/bin/nft -f /etc/airgap-xinference/firewall.nft" in unit
    assert "Before=network-pre.target docker.service" in unit and "After=local-fs.target nftables.service" in unit
    # nftables.service empties the whole set of rules whenever it is restarted or reloaded.
    assert "PartOf=nftables.service\nReloadPropagatedFrom=nftables.service\n" in unit
    assert f"ExecReload={tmp_path}/bin/nft -f /etc/airgap-xinference/firewall.nft" in unit
    assert (tmp_path / LINK).resolve() == (tmp_path / UNIT).resolve()
    assert not table.differs(rules) and not never_loaded(tmp_path)
    assert table.differs(firewall.rules([PEERS]))


@pytest.mark.parametrize("lost", ["kernel", RULES, LOADED, UNIT])
def test_rules_that_were_changed_or_lost_are_seen(tmp_path: Path, state: Path, lost: str) -> None:
    table, rules = Table(tmp_path), firewall.rules([SERVER])
    table.load(rules)
    (tmp_path / lost).write_text("another\n")
    assert table.differs(rules)
    (tmp_path / lost).unlink()
    assert table.differs(rules)


def test_rules_that_no_boot_would_load_any_more_are_seen(tmp_path: Path, state: Path) -> None:
    table, rules = Table(tmp_path), firewall.rules([SERVER])
    table.load(rules)
    (tmp_path / LINK).unlink()  # as `systemctl disable` does
    assert table.differs(rules)
    table.load(rules)
    assert (tmp_path / LINK).is_symlink() and not table.differs(rules)


def test_rules_go_without_a_trace(tmp_path: Path, state: Path) -> None:
    table = Table(tmp_path)
    table.load(firewall.rules([SERVER]))
    assert table.differs("")
    table.remove()
    assert not state.exists() and not table.differs("") and never_loaded(tmp_path)
    assert not (tmp_path / LINK).is_symlink() and not (tmp_path / RULES).parent.exists()


def test_rules_that_nft_does_not_take_are_told(tmp_path: Path, state: Path) -> None:
    with pytest.raises(FirewallError, match="nft does not take the rules"):
        Table(tmp_path).check("nonsense")


def test_a_host_without_nft_is_told_what_to_do(monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("shutil.which", lambda *_arguments, **_more: None)
    with pytest.raises(FirewallError, match=r"no nft on this host.*xinference_firewall: none"):
        Table()
