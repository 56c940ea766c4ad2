# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role's page shows of its services is what the role takes, and what the page says comes of it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.airgap.xinference.plugins.module_utils.host import firewall

ROLE = Path(__file__).parents[3] / "roles/xinference_firewall"
SERVICES = "xinference_firewall_services"


def test_the_example_of_a_gateway_on_a_host_of_its_own() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROLE / "README.md").read_text(), re.DOTALL)
    (shown,) = [block for block in map(yaml.safe_load, blocks) if SERVICES in block]
    specs = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    taken = ArgumentSpecValidator({SERVICES: specs[SERVICES]}).validate({SERVICES: shown[SERVICES]})
    assert taken.error_messages == []
    services = taken.validated_parameters[SERVICES]
    assert firewall.faults(services, [22]) == []
    rules = [line.strip() for line in firewall.rules(services).splitlines() if "dport 9997" in line]
    # The gateway and nobody else.
    assert rules == [
        'tcp dport 9997 ip saddr { 10.1.0.5/32 } accept comment "server"',
        'tcp dport 9997 counter drop comment "server"',
    ]
