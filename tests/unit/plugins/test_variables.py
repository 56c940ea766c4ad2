# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Misspelt variables, and servers that would be open."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import WARNING, Needs
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness import judge_access
from ansible_collections.airgap.xinference.plugins.plugin_utils.variables import judge_variables, known_variables


def test_a_misspelt_variable_is_told_with_the_right_one() -> None:
    (finding,) = judge_variables(["xinference_bundel_dir", "xinference_port", "ansible_host", "my_xinference_thing"])
    assert finding.found == "nothing reads xinference_bundel_dir; did you mean xinference_bundle_dir?"
    assert finding.severity == WARNING


def test_what_roles_and_playbooks_read_is_known() -> None:
    for name in ("xinference_models", "xinference_hosts", "xinference_server_auth", "xinference_bundle_dir"):
        assert name in known_variables()


def needs(address: str, open_allowed: bool) -> Needs:
    return Needs("/opt/x", address, 9997, [], [], [], backend="docker", open_allowed=open_allowed)


@pytest.mark.parametrize(("address", "allowed"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_a_closed_server_is_fine(address: str, allowed: bool) -> None:
    assert judge_access(needs(address, allowed)) == []


def test_a_native_server_beyond_loopback_is_more_open_than_its_port() -> None:
    (finding,) = judge_access(needs("10.0.0.11", True)._replace(backend="native"))
    assert finding.severity == WARNING and "behind a gateway" in finding.cure
    assert judge_access(needs("127.0.0.1", True)._replace(backend="native")) == []


@pytest.mark.parametrize("login", ["missing", "short"])
def test_an_administrator_who_could_not_log_in_is_a_problem(login: str) -> None:
    (finding,) = judge_access(needs("0.0.0.0", True)._replace(login=login))
    assert finding.severity == "problem" and "xinference_password" in finding.cure


@pytest.mark.parametrize("address", ["0.0.0.0", "10.0.0.11", "::"])
def test_an_open_server_is_a_problem(address: str) -> None:
    (finding,) = judge_access(needs(address, False))
    assert address in finding.found and "xinference_server_allow_open" in finding.cure
