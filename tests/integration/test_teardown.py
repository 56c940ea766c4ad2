# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A teardown removes what the collection made, and nothing else. On whole sites it is tested by molecule."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import List

import plays
import yaml
from ansible_collections.airgap.xinference.plugins.module_utils.host import facts, firewall_table
from plays import REPOSITORY

ROLE = REPOSITORY / "roles" / "xinference_teardown"
KEPT = ["blobs", "images", "home"]


def tear_down(root: Path, keep: List[str], **more: str) -> subprocess.CompletedProcess[str]:
    variables = {"xinference_root": str(root), "xinference_teardown_keep": keep, "xinference_teardown_confirm": "yes"}
    settings = json.dumps({**variables, **more})
    return plays.run("-i", "inventories/quickstart", "playbooks/teardown.yml", "-e", settings)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode, done.stdout
    return " ".join(done.stdout.split())


def names(root: Path) -> List[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_others_made_is_not_touched(tmp_path: Path) -> None:
    weights = tmp_path / "models" / "precious" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("weights")
    (tmp_path / "logs").mkdir()
    done = tear_down(tmp_path, [])
    assert done.returncode and "has nothing of this collection" in " ".join(done.stdout.split()), done.stdout
    assert weights.read_text() == "weights" and names(tmp_path) == ["logs", "models"]


def test_what_is_kept_is_known_as_ours_afterwards(tmp_path: Path) -> None:
    root = tmp_path / "site"
    for name in ("blobs/sha256", "home", "models", "partial", "state"):
        (root / name).mkdir(parents=True)
    (root / "state" / "store.lock").touch()
    done = tear_down(root, ["home"])
    assert done.returncode == 0 and names(root) == ["home", "state"], done.stdout
    assert facts.place(str(root))["foreign"] == []
    done = tear_down(root, [])
    assert done.returncode == 0 and not root.exists(), done.stdout
    again = tear_down(root, [])
    assert again.returncode == 0 and "changed=0" in again.stdout, again.stdout


def test_copies_of_accounts_go_with_the_home_and_leftovers_always(tmp_path: Path) -> None:
    root = tmp_path / "site"
    aside = "before-restore-20261120T203000Z"
    for name in ("blobs/sha256", "home/auth", "home/.restoring-a", "state/.keeping-a", f"state/{aside}/home/auth"):
        (root / name).mkdir(parents=True)
    for name in (
        "store.lock",
        "seed",
        ".arriving-1",
        "stamps.json",
        f"{aside}/home/auth/auth.db",
    ):
        (root / "state" / name).touch()
    done = tear_down(root, ["blobs", "home"])
    assert done.returncode == 0, done.stdout
    assert names(root / "home") == ["auth"]
    assert names(root / "state") == [aside, "seed", "stamps.json", "store.lock"]
    done = tear_down(root, ["blobs"])
    assert done.returncode == 0 and names(root) == ["blobs", "state"], done.stdout
    assert names(root / "state") == ["stamps.json", "store.lock"]
    again = tear_down(root, ["blobs"])
    assert again.returncode == 0 and "changed=0" in again.stdout, again.stdout


def test_a_host_that_only_has_a_gateway_is_ours(tmp_path: Path) -> None:
    root = tmp_path / "site"
    release = root / "gateway" / "releases" / "a"
    for made in (release, root / "logs"):
        made.mkdir(parents=True)
    (release / "nginx.conf").touch()
    (root / "gateway" / "current").symlink_to("releases/a")
    assert facts.place(str(root))["foreign"] == []
    done = tear_down(root, [])
    assert done.returncode == 0 and not root.exists(), done.stdout


def test_who_is_asked_reads_what_goes(tmp_path: Path) -> None:
    """Here nobody can be asked, and the refusal says it."""
    root, rules = tmp_path / "site", tmp_path / "rules"
    (root / "blobs/sha256").mkdir(parents=True)
    unsure = {"xinference_teardown_confirm": "", "__xinference_teardown_rules": str(rules)}
    assert "; the server, its models, its releases would go" in said(tear_down(root, KEPT, **unsure))
    (root / "gateway").mkdir()
    rules.mkdir()
    told = said(tear_down(root, ["blobs"], **unsure))
    assert "its releases, the gateway, the rules of the firewall, images, home would go" in told
    assert names(root) == ["blobs", "gateway"]


def test_preflight_and_teardown_mean_the_same_names() -> None:
    told = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())
    assert told["__xinference_teardown_marks"] == list(facts.MARKS)
    assert told["__xinference_teardown_rules"] == f"/{firewall_table.DIRECTORY}"
    gone = {name.split("/")[0] for name in told["__xinference_teardown_always"]}
    assert gone | {"blobs", "home"} == set(facts.OURS)
