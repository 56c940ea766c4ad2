# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Data written as YAML is read back as the same data, by YAML's own reader."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ansible_collections.airgap.xinference.plugins.module_utils.host.yaml_text import yaml_text


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "",
        "yes",
        "No",
        "null",
        "1.0",
        "0777",
        "1e3",
        "12:30:45",
        "- a",
        "a: b",
        "# c",
        "{x}",
        "*x",
        "&x",
        "!x",
        "%x",
        "@x",
        "`x",
        'say "x"',
        "two\nlines\ttab",
        "ends with space ",
        "ü € 漢字",
        "\u2028\x85\x7f\ufeff",
        "/opt/x",
        "=",
        "~",
        "<<",
        7,
        -1,
        1.5,
        True,
        None,
        [],
        {},
        ["a", ["b", []], {"c": 1, "d": ["e"]}],
        {"a": {"b": {"c": [{"d": "e", "f": {}}]}}},
    ],
)
def test_what_is_written_is_what_is_read(value: Any) -> None:
    assert yaml.safe_load(yaml_text({"key": value, "9997": "x", "yes": value})) == {
        "key": value,
        "9997": "x",
        "yes": value,
    }


def test_it_is_made_for_people() -> None:
    assert yaml_text(
        {"services": {"server": {"command": ["a", "b c"], "ports": [{"target": 1, "published": "1"}]}}}
    ) == (
        'services:\n  server:\n    command:\n      - a\n      - "b c"\n    ports:\n'
        '      - target: 1\n        published: "1"\n'
    )
