# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying for real: playbooks split a bundle onto sticks (small file systems), one is damaged, and join it again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List

import plays
import pytest
from ad_hoc import ROOT, run_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from sites import Site, make_model

MIB = 1024**2


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier and a later bundle with the wheels a host needs."""
    place = tmp_path_factory.mktemp("material")
    alpha = make_model(place / "alpha", {"model.safetensors": 21 * MIB, "config.json": 700, "deep/er/empty": 0}, 1)
    beta = make_model(place / "beta", {f"part{number:03}.bin": 3000 + number for number in range(200)}, 2)
    gamma = make_model(place / "gamma", {"model.gguf": 9 * MIB}, 3)
    requests = [Request("models", "alpha", str(alpha)), Request("models", "beta", str(beta))]
    write_bundle(place / "bundle", requests)
    write_bundle(place / "later" / "bundle", [*requests, Request("models", "gamma", str(gamma))])
    return place


def play(name: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the collection on this machine; its output without line breaks, which YAML puts anywhere."""
    words = [part for variable, value in variables.items() for part in ("-e", f"{variable}={value}")]
    ended = plays.run(f"playbooks/{name}.yml", "-i", "localhost,", *words, *arguments)
    ended.stdout = " ".join(ended.stdout.split())
    return ended


def content(place: Path) -> Dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def sticks(tmp_path: Path) -> Iterator[List[Path]]:
    """Three file systems of 12 MiB."""
    places = [tmp_path / f"usb{number}" for number in (1, 2, 3)]
    mounted: List[Path] = []
    try:
        for place in places:
            place.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("file systems cannot be mounted here")
            mounted.append(place)
        yield places
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_bundle_goes_over_three_sticks_of_which_one_is_damaged(
    material: Path, sticks: List[Path], tmp_path: Path
) -> None:
    bundle, site = material / "bundle", tmp_path / "site"
    asked = play("split", xinference_bundle_dir=bundle)
    assert asked.returncode and "-e xinference_carry_size=29G" in asked.stdout
    small = play(
        "split", xinference_bundle_dir=bundle, xinference_carry_size="30M", xinference_carry_directory=sticks[0]
    )
    assert small.returncode and "free. Free some space, choose another directory" in small.stdout
    assert list(sticks[0].iterdir()) == []
    for number, stick in enumerate(sticks, 1):
        variables = {
            "xinference_bundle_dir": bundle,
            "xinference_carry_size": "11M",
            "xinference_carry_directory": stick,
        }
        numbers = json.dumps({"xinference_carry_volumes": [number]})
        written = play("split", "-e", numbers, **variables)
        assert written.returncode == 0 and f"bundle-{number}-of-3" in written.stdout, written.stdout
        assert "changed=0" in play("split", "-e", numbers, **variables).stdout
        volume = stick / f"bundle-{number}-of-3"
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=str(volume), check=True)

    variables = {"xinference_bundle_dir": site, "xinference_carry_directory": sticks[2]}
    joined = play("join", **variables)
    assert joined.returncode == 0 and "Still to come: bundle-1-of-3, bundle-2-of-3" in joined.stdout, joined.stdout
    assert "changed=0" in play("join", **variables).stdout
    info = run_module("xinference_bundle_info", {"path": str(site)})
    assert info["failed"] and "go on with playbooks/join.yml" in info["msg"]

    piece = sticks[1] / "bundle-2-of-3/pieces/0001"
    sound = piece.read_bytes()
    piece.write_bytes(sound[:1000] + b"\x00" * 1000 + sound[2000:])
    variables["xinference_carry_directory"] = f"{sticks[0]},{sticks[1]}"
    joined = play("join", **variables)
    assert joined.returncode and f"{sticks[1]}/bundle-2-of-3: pieces/0001 is damaged" in joined.stdout
    assert "models/alpha: 1 of 4 files, 21.0 MiB" in joined.stdout and "Traceback" not in joined.stdout

    piece.write_bytes(sound)
    variables["xinference_carry_directory"] = str(sticks[1])
    joined = play("join", "--check", **variables)
    assert "would be whole as far as sizes of files tell; check mode reads none" in joined.stdout, joined.stdout
    joined = play("join", **variables)
    assert joined.returncode == 0 and f"The bundle {site} is whole" in joined.stdout, joined.stdout
    assert content(site) == content(bundle)
    again = play("join", **variables)
    assert "changed=0" in again.stdout and "failed=0" in again.stdout
    verified = run_module("xinference_bundle_info", {"path": str(site), "verify": True})
    assert not verified["failed"] and verified["hashed_bytes"] < MIB


def test_a_size_may_be_a_number(material: Path, tmp_path: Path) -> None:
    size = json.dumps({"xinference_carry_size": 100 * MIB})
    done = play(
        "split", "-e", size, xinference_bundle_dir=material / "bundle", xinference_carry_directory=tmp_path / "out"
    )
    assert done.returncode == 0 and "bundle-1-of-1" in done.stdout, done.stdout


def test_paths_count_from_where_ansible_was_started(material: Path, tmp_path: Path) -> None:
    places = {"xinference_bundle_dir": material / "bundle", "xinference_carry_directory": tmp_path / "out"}
    relative = {name: os.path.relpath(path, ROOT) for name, path in places.items()}
    done = play("split", xinference_carry_size="100M", **relative)
    assert done.returncode == 0 and (tmp_path / "out/bundle-1-of-1").is_dir(), done.stdout
    relative["xinference_bundle_dir"] = os.path.relpath(tmp_path / "joined", ROOT)
    done = play("join", **relative)
    assert done.returncode == 0 and content(tmp_path / "joined") == content(material / "bundle"), done.stdout


def test_only_what_is_new_is_carried_and_needs_what_it_builds_on(material: Path, tmp_path: Path) -> None:
    options = {
        "bundle": str(material / "bundle"),
        "state": "split",
        "size": "1G",
        "directory": str(tmp_path / "october"),
    }
    assert run_module("xinference_bundle_volumes", options)["count"] == 1
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("volume.json", "index.json", "manifests"):
        shutil.copy(tmp_path / "october/bundle-1-of-1" / name, lists)
    later = {
        "bundle": str(material / "later/bundle"),
        "state": "split",
        "size": "1G",
        "directory": str(tmp_path / "november"),
        "base": str(lists),
        "name": "november",
    }
    rehearsed = run_module("xinference_bundle_volumes", later, check=True)
    assert rehearsed["changed"] and not (tmp_path / "november").exists()
    result = run_module("xinference_bundle_volumes", later)
    assert [volume["artifacts"] for volume in result["volumes"]] == [["models/gamma"]]
    assert result["new_bytes"] < 10 * MIB and result["omitted_bytes"] > 21 * MIB

    site = tmp_path / "site"
    join = {"bundle": str(site), "state": "joined", "directory": str(tmp_path / "november")}
    refused = run_module("xinference_bundle_volumes", join)
    assert refused["failed"] and not site.exists()
    assert [(row["reference"], row["files"], row["of"]) for row in refused["missing"]] == [
        ("models/alpha", 4, 4),
        ("models/beta", 201, 201),
    ]
    first = run_module("xinference_bundle_volumes", {**join, "directory": str(tmp_path / "october")})
    assert first["complete"] and content(site) == content(material / "bundle")
    rehearsed = run_module("xinference_bundle_volumes", join, check=True)
    assert rehearsed["changed"] and rehearsed["complete"] and rehearsed["new_bytes"] == 0
    assert content(site) == content(material / "bundle")
    second = run_module("xinference_bundle_volumes", join)
    assert second["complete"] and second["changed"] and content(site) == content(material / "later/bundle")
    third = run_module("xinference_bundle_volumes", join)
    assert (third["changed"], third["hashed_bytes"]) == (False, 0)


def test_a_joined_bundle_that_lies_is_not_shipped(material: Path, tmp_path: Path) -> None:
    """The door of shipping: everything wrong is named, and nothing gets to the host."""
    bundle = tmp_path / "bundle"
    shutil.copytree(material / "bundle", bundle)
    (bundle / "blobs/sha256").rename(tmp_path / "elsewhere")
    (bundle / "blobs/sha256").symlink_to(tmp_path / "elsewhere")
    index = (bundle / "index.json").read_text()
    (bundle / "index.json").write_text(index.replace("models/beta", "models/../beta"))
    site = Site(tmp_path, {"ansible_connection": "local"})
    answer = site.run("xinference_ship", {"bundle": str(bundle), "root": str(site.root), "models": []})
    assert answer["failed"] and not site.root.exists()
    assert "blobs/sha256: not a plain directory" in answer["msg"] and "is not <kind>/<name>" in answer["msg"]
