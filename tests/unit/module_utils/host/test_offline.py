# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The switches that a server lacks, as they stand in its environment."""

from __future__ import annotations

from typing import Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host.offline import SWITCHES, missing, switches


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"HF_HUB_OFFLINE": None}, ["HF_HUB_OFFLINE"]),
        ({"HF_HUB_OFFLINE": "0"}, ["HF_HUB_OFFLINE"]),
        ({"HF_HUB_OFFLINE": "true", "XINFERENCE_ENABLE_OTEL": "0", "GRADIO_ANALYTICS_ENABLED": "false"}, []),
        ({"XINFERENCE_ENABLE_OTEL": "1"}, ["XINFERENCE_ENABLE_OTEL"]),
        ({"XINFERENCE_ENABLE_VIRTUAL_ENV": "1"}, ["XINFERENCE_ENABLE_VIRTUAL_ENV"]),
        ({"PIP_NO_INDEX": None, "UV_OFFLINE": None}, ["PIP_NO_INDEX", "UV_OFFLINE"]),
        # Packages from the site itself need another setting of these, and of these only.
        ({"PIP_NO_INDEX": None, "UV_OFFLINE": None, "UV_INDEX_URL": "http://engines-index:8080/simple"}, []),
        ({"XINFERENCE_ENABLE_VIRTUAL_ENV": "1", "UV_FIND_LINKS": "/wheels"}, []),
        ({"DO_NOT_TRACK": None, "UV_FIND_LINKS": "/wheels"}, ["DO_NOT_TRACK"]),
    ],
)
def test_what_is_missing(changes: Dict[str, str], expected: list) -> None:
    environment = {name: value for name, value in {**SWITCHES, **changes}.items() if value is not None}
    assert missing(switches(environment)) == expected


def test_no_other_variable_is_told() -> None:
    told = switches({"HF_TOKEN": "s3cret", "HF_HUB_OFFLINE": "1", "PATH": "/bin"})
    assert told == {"HF_HUB_OFFLINE": "1"}
