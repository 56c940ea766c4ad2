# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's own description agrees with what lies in it."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "plugins/modules"


def test_action_group_holds_exactly_the_modules_that_talk_to_a_server() -> None:
    group = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["action_groups"]["server"]
    talking = [path.stem for path in sorted(MODULES.glob("*.py")) if "airgap.xinference.server" in path.read_text()]
    assert group == talking


def test_wings_import_neither_ansible_nor_each_other() -> None:
    strangers = []
    for wing, other in (("bundle", "server"), ("server", "bundle"), ("gateway", "server")):
        for path in sorted((ROOT / "plugins/module_utils" / wing).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                words = line.split()
                if words[:1] in (["import"], ["from"]) and (
                    words[1].startswith("ansible") or f".{other}" in words[1] or words[1] == other
                ):
                    strangers.append(f"{path.relative_to(ROOT)}:{number}: {line}")
    assert strangers == []
