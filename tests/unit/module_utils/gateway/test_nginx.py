# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration of nginx, as text; what it does is tried with a real one (tests/integration/test_gateway.py)."""

from __future__ import annotations

import dataclasses

from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import Gateway, routes
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.nginx import configuration, keys_file
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import files, shown

KEY = "sk-0123456789.abcdef"
GATEWAY = Gateway(
    "0.0.0.0",
    443,
    ["Models.bank.example", "fd00::5"],
    routes({"one": "10.0.0.1:9997", "two": "10.0.0.2:9997"}, {"one": ["a"], "two": ["a"]}),
    admin_from=["10.0.0.0/24"],
    keys={"rag": KEY},
)


class Runner:
    """Where a configuration would be run."""

    scratch, log, user = "/run/gateway", "/dev/stdout", ""


def test_no_key_is_in_the_configuration_that_everybody_may_read() -> None:
    made = files(GATEWAY, Runner(), "certificate", "private")
    assert {name: entry.mode for name, entry in made.items()} == {
        "nginx.conf": 0o440,
        "tls.crt": 0o440,
        "tls.key": 0o400,
        "keys.conf": 0o400,
    }
    assert KEY not in made["nginx.conf"].text and "include keys.conf;" in made["nginx.conf"].text
    assert shown(made)["tls.key"] == "(hidden)\n"
    assert "(hidden) rag;" in shown(made)["keys.conf"] and "0123456789" not in shown(made)["keys.conf"]


def test_a_key_is_compared_to_its_end_and_with_its_case() -> None:
    assert '"~^(?i:bearer) sk\\-0123456789\\.abcdef$" rag;' in keys_file(GATEWAY)


def test_servers_that_ask_themselves_get_the_header() -> None:
    text = configuration(dataclasses.replace(GATEWAY, keys={}, server_auth=True), "/run", "/log")
    assert "proxy_set_header Authorization $http_authorization;" in text and "keys.conf" not in text
    assert "return 401" not in text


def test_hosts_of_one_model_are_one_group() -> None:
    text = configuration(GATEWAY, "/run", "/log")
    assert text.count("upstream xinference_") == 3
    assert text.count("server 10.0.0.1:9997 max_fails=1 fail_timeout=10s;") == 1
    assert '"~^/models/a/" xinference_0;' in text and "default xinference_0;" in text
    assert '"~^/hosts/two/" xinference_2;' in text


def test_names_and_addresses_are_written_as_nginx_reads_them() -> None:
    text = configuration(dataclasses.replace(GATEWAY, host="::", port=8443), "/run", "/log", "nobody nogroup", "abc")
    assert 'server_name models.bank.example "[fd00::5]";' in text and "listen [::]:8443 ssl;" in text
    assert text.startswith("# Written by airgap.xinference; what is changed here is lost.\nuser nobody nogroup;\n")
    assert "add_header X-Gateway-Configuration abc always;" in text


def test_limits_are_left_out_where_none_are_wanted() -> None:
    assert "limit_req" not in configuration(dataclasses.replace(GATEWAY, rate=0), "/run", "/log")
    assert "rate=7r/s" in configuration(dataclasses.replace(GATEWAY, rate=7), "/run", "/log")


def test_every_change_is_another_mark() -> None:
    marks = set()
    for gateway in (
        GATEWAY,
        dataclasses.replace(GATEWAY, rate=1),
        dataclasses.replace(GATEWAY, keys={"rag": "x" * 16}),
    ):
        text = files(gateway, Runner(), "certificate", "private")["nginx.conf"].text
        marks.add(text.partition("X-Gateway-Configuration ")[2][:12])
    assert len(marks) == 3
