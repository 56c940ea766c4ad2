# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ssh command line for rsync says the same as Ansible's own."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils.ssh import SshCommand

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


def words(**options):
    command = SshCommand.of(Connection(**options))
    assert command is not None
    return list(command.arguments)


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
    assert said[0] == "/opt/ssh" and said[-1] == "-v"
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


def test_a_compressing_connection_is_not_shared_unless_it_needed_a_password():
    said = words(ssh_args="-C -o ControlMaster=auto -o ControlPersist=60s")
    assert "-C" not in said and said.index("ControlPath=none") < said.index("ControlMaster=auto")
    said = words(ssh_args="-C -o ControlMaster=auto -o ControlPersist=60s", password="secret")
    assert 'ControlPath="/home/me/.ansible/cp/abc123"' in said and "secret" not in " ".join(said)


def test_other_connections_have_no_ssh():
    local = Connection()
    local.transport = "local"
    assert SshCommand.of(local) is None
    odd = Connection()
    del odd.options["ssh_args"]
    assert SshCommand.of(odd) is None


@pytest.mark.parametrize("host", ["10.0.0.7", "fe80::1%eth0", "a b"])
def test_the_script_puts_the_real_host_in_the_place_of_rsyncs(host):
    script = SshCommand(("ssh", "-o", 'User="x y"'), host).script()
    assert script.startswith("#!/bin/sh\nshift\nexec ssh -o 'User=\"x y\"' ")
    assert script.rstrip().endswith('"$@"') and host in script
