# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ssh command lines for streams say the same as Ansible's own."""

from __future__ import annotations

import subprocess

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils import ssh

DEFAULTS = {
    "host": "10.0.0.7",
    "port": None,
    "remote_user": None,
    "private_key_file": None,
    "password": None,
    "ssh_args": "-o ControlMaster=auto -o ControlPersist=60s",
    "ssh_common_args": "",
    "ssh_extra_args": "",
    "ssh_executable": "ssh",
    "host_key_checking": True,
    "timeout": 10,
    "control_path": None,
    "control_path_dir": "/home/me/.ansible/cp",
}


class Connection:
    transport = "ssh"
    control_path = "%(directory)s/abc123"

    def __init__(self, **options):
        self.options = {**DEFAULTS, **options}

    def get_option(self, name):
        return self.options[name]


CIPHERS = "chacha20-poly1305@openssh.com,aes256-ctr,aes128-gcm@openssh.com,aes256-gcm@openssh.com"
SETTINGS = {"ciphers": CIPHERS, "serveraliveinterval": "0"}


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What ssh says about itself here, whatever the configuration of this machine is."""
    said = dict(SETTINGS)
    monkeypatch.setattr(ssh, "_settings", lambda _command: said)
    return said


def commands(aes=False, **options):
    return {
        "own" if command.own else "shared": list(command.arguments)
        for command in ssh.SshCommand.of(Connection(**options), aes)
    }


def words(**options):
    return commands(**options)["shared"]


def test_everything_the_inventory_says_about_the_connection_is_said():
    said = words(
        port=2222,
        remote_user="ops",
        private_key_file="/keys/my key",
        host_key_checking=False,
        ssh_common_args='-o ProxyCommand="ssh -W %h:%p gate"',
        ssh_extra_args="-v",
        ssh_executable="/opt/ssh",
    )
    assert said[0] == "/opt/ssh" and said[-3:] == ["-v", "-T", "10.0.0.7"]
    for option in ("Port=2222", 'User="ops"', 'IdentityFile="/keys/my key"', "StrictHostKeyChecking=no"):
        assert option in said
    assert "ProxyCommand=ssh -W %h:%p gate" in said and "ConnectTimeout=10" in said


@pytest.mark.parametrize("said", [True, None])
def test_host_keys_are_checked_unless_the_user_says_no(said):
    assert "StrictHostKeyChecking" not in " ".join(words(host_key_checking=said))


def test_the_connection_that_stands_is_shared():
    assert 'ControlPath="/home/me/.ansible/cp/abc123"' in words()
    assert 'ControlPath="/run/%h"' in words(control_path="%(directory)s/%%h", control_path_dir="/run")
    own = words(ssh_args="-o ControlPersist=9 -o ControlPath=/tmp/mine")
    assert [word for word in own if word.startswith("ControlPath")] == ["ControlPath=/tmp/mine"]
    assert not [word for word in words(ssh_args="") if "ControlPath" in word]


def test_a_connection_of_its_own_comes_first_and_neither_compresses_nor_shares():
    both = commands(ssh_args="-C -o ControlMaster=auto -o ControlPersist=60s")
    assert list(both) == ["own", "shared"] and "-C" not in both["own"] + both["shared"]
    assert both["own"].index("ControlPath=none") < both["own"].index("ControlMaster=auto")
    assert "Compression=no" in both["own"] and 'ControlPath="/home/me/.ansible/cp/abc123"' in both["shared"]


def test_what_needed_a_password_stays_on_the_connection_that_stands():
    both = commands(ssh_args="-o ControlMaster=auto -o ControlPersist=60s", password="secret")
    assert list(both) == ["shared"] and 'ControlPath="/home/me/.ansible/cp/abc123"' in both["shared"]
    assert "secret" not in " ".join(both["shared"])


def test_ciphers_are_put_into_another_order_and_never_added(settings):
    own = commands(aes=True)["own"]
    quick = "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes256-ctr"
    assert f"Ciphers={quick}" in own
    assert "Ciphers" not in " ".join(commands(aes=False)["own"])
    settings["ciphers"] = "chacha20-poly1305@openssh.com,aes256-ctr"
    assert "Ciphers" not in " ".join(commands(aes=True)["own"])
    settings["ciphers"] = "aes256-gcm@openssh.com"
    assert "Ciphers=aes256-gcm@openssh.com" in commands(aes=True)["own"]
    settings.clear()
    assert "Ciphers" not in " ".join(commands(aes=True)["own"])


def test_a_dead_connection_is_noticed_as_the_user_wishes(settings):
    assert "ServerAliveInterval=15" in commands()["own"]
    settings["serveraliveinterval"] = "300"
    assert "ServerAlive" not in " ".join(commands()["own"])


def test_ssh_is_asked_with_all_options(monkeypatch):
    asked: list[list[str]] = []

    def run(command, **_options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 255, "", "")

    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", run)
    own = commands(aes=True, ssh_common_args="-o Ciphers=aes256-ctr")["own"]
    assert asked[0][-2:] == ["-G", "10.0.0.7"] and "Ciphers=aes256-ctr" in asked[0]
    assert [word for word in own if word.startswith("Ciphers")] == ["Ciphers=aes256-ctr"]


def test_other_connections_have_no_ssh():
    local = Connection()
    local.transport = "local"
    assert ssh.SshCommand.of(local) == []
    odd = Connection()
    del odd.options["ssh_args"]
    assert ssh.SshCommand.of(odd) == []
