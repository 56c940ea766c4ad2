# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading bundles, above all those that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps, hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import (
    SHOWN_PROBLEMS,
    Bundle,
    BundleError,
    cache_dir,
    verify,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import MAX_MANIFEST, REF_NAME


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a model of two files, sharing one of them with a set of tools."""
    model = tmp_path / "source" / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("[]")
    (model / "sub" / "model.safetensors").write_bytes(b"weights" * 1000)
    tools = tmp_path / "source" / "tools"
    tools.mkdir()
    (tools / "same.bin").write_bytes(b"weights" * 1000)
    write_bundle(
        tmp_path / "bundle",
        [
            Request("models", "tiny", str(model), {"org.opencontainers.image.revision": "abc"}),
            Request("tools", "some", str(tools)),
        ],
    )
    return tmp_path / "bundle"


def problems_of(path: Path) -> List[str]:
    """What opening a bundle complains about."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert all(problem in str(caught.value) for problem in caught.value.problems[:SHOWN_PROBLEMS])
    return caught.value.problems


def rewrite_index(bundle: Path, change: Callable[[Dict[str, Any]], Any]) -> None:
    """Change the index."""
    index = json.loads((bundle / "index.json").read_text())
    change(index)
    (bundle / "index.json").write_text(json.dumps(index))


def rewrite_manifest(bundle: Path, name: str, change: Callable[[Dict[str, Any]], Any]) -> None:
    """Change a manifest and have the index refer to the changed one, as a forger would."""

    def apply(index: Dict[str, Any]) -> None:
        entry = next(entry for entry in index["manifests"] if entry["annotations"][REF_NAME] == name)
        content = json.loads((bundle / "blobs/sha256" / entry["digest"][7:]).read_text())
        change(content)
        raw = json.dumps(content).encode()
        entry["digest"], entry["size"] = hash_bytes(raw), len(raw)
        (bundle / "blobs/sha256" / entry["digest"][7:]).write_bytes(raw)

    rewrite_index(bundle, apply)


def test_a_sound_bundle(bundle: Path) -> None:
    found = Bundle.open(bundle)
    assert [artifact.reference for artifact in found.artifacts] == ["models/tiny", "tools/some"]
    tiny = found.find("models", "tiny")
    assert tiny is not None and tiny.revision == "abc" and tiny.size == 7002
    assert [(file.path, file.size) for file in tiny.files] == [("config.json", 2), ("sub/model.safetensors", 7000)]
    assert len(tiny.blobs) == 4 and tiny.blobs[0].digest == tiny.digest
    assert found.blob_path(tiny.files[1].digest).read_bytes() == b"weights" * 1000
    assert found.find("models", "other") is None
    assert found.size == sum(found.blobs.values()) and len(found.blobs) == 6


def test_no_directory_and_no_layout(tmp_path: Path) -> None:
    assert "no such directory" in problems_of(tmp_path / "none")[0]
    assert [problem.split(":")[0] for problem in problems_of(tmp_path)] == ["oci-layout", "index.json"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b'{"schemaVersion": 2}', b'{"schemaVersion": 2, "manifests": {}}', b"[" * 100000]
)
def test_an_index_that_is_none(bundle: Path, content: bytes) -> None:
    (bundle / "index.json").write_bytes(content)
    assert problems_of(bundle)[0].startswith("index.json")


def test_an_index_too_large_is_not_read(bundle: Path) -> None:
    with (bundle / "index.json").open("wb") as handle:
        handle.truncate(MAX_MANIFEST + 1)
    assert "more than a manifest can have" in problems_of(bundle)[0]


@pytest.mark.parametrize("version", ["0.9", None, 1])
def test_an_unknown_layout_version(bundle: Path, version: object) -> None:
    (bundle / "oci-layout").write_text(json.dumps({"imageLayoutVersion": version}))
    assert problems_of(bundle) == ["oci-layout: imageLayoutVersion is not 1.0.0"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("digest", "sha256:../../../etc/passwd", "is not sha256"),
        ("digest", None, "is not sha256"),
        ("size", -1, "not a number of bytes"),
        ("size", True, "not a number of bytes"),
        ("size", "12", "not a number of bytes"),
        ("size", 2**63, "over the limit"),
        ("mediaType", 3, "mediaType"),
        ("annotations", {REF_NAME: "models/../../x"}, "is not <kind>/<name>"),
        ("annotations", {REF_NAME: "models/"}, "is not <kind>/<name>"),
        ("annotations", {}, "is not <kind>/<name>"),
        ("annotations", {REF_NAME: 5}, "annotations"),
        ("annotations", [], "annotations"),
    ],
)
def test_an_index_entry_that_lies(bundle: Path, field: str, value: object, words: str) -> None:
    rewrite_index(bundle, lambda index: index["manifests"][0].update({field: value}))
    found = problems_of(bundle)
    assert len(found) == 1 and words in found[0] and "entry 1" in found[0]


def test_an_index_entry_that_is_no_object_and_a_name_used_twice(bundle: Path) -> None:
    rewrite_index(bundle, lambda index: index["manifests"].extend([None, "x", index["manifests"][0]]))
    found = problems_of(bundle)
    assert [problem.split(":")[0] for problem in found] == [f"index.json entry {number}" for number in (3, 4, 5)]
    assert "twice" in found[2]


def test_a_manifest_of_another_size_or_content_or_none(bundle: Path) -> None:
    rewrite_index(bundle, lambda index: index["manifests"][0].update(size=1))
    assert "is damaged" in problems_of(bundle)[0]
    manifest = bundle / "blobs/sha256" / json.loads((bundle / "index.json").read_text())["manifests"][1]["digest"][7:]
    manifest.write_bytes(manifest.read_bytes().replace(b"same", b"fake"))
    assert len(problems_of(bundle)) == 2
    manifest.unlink()
    assert "No such file" in problems_of(bundle)[1]
    manifest.symlink_to("/etc/passwd")
    assert "not a regular file" in problems_of(bundle)[1]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/./b",
        "",
        ".",
        "..",
        "a\\b",
        "a\nb",
        "a\x00b",
        "x" * 256,
        "y/" * 600 + "z",
        "\udcff",
    ],
)
def test_a_path_that_would_leave_or_break(bundle: Path, path: str) -> None:
    def change(manifest: Dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"]["org.cncf.model.filepath"] = path

    rewrite_manifest(bundle, "models/tiny", change)
    found = problems_of(bundle)
    assert len(found) == 1 and found[0].startswith("models/tiny layer 1:")


def test_paths_that_collide(bundle: Path) -> None:
    def change(manifest: Dict[str, Any]) -> None:
        layers = manifest["layers"]
        layers[0]["annotations"]["org.cncf.model.filepath"] = "sub"
        layers.append(layers[1])

    rewrite_manifest(bundle, "models/tiny", change)
    found = problems_of(bundle)
    assert any("occurs twice" in problem for problem in found)
    assert any("is a file and also the directory" in problem for problem in found)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("layers"),
        lambda manifest: manifest.update(layers={}),
        lambda manifest: manifest.update(layers=[None]),
        lambda manifest: manifest["layers"][0].pop("annotations"),
        lambda manifest: manifest.pop("config"),
        lambda manifest: manifest.update(schemaVersion=1),
        lambda manifest: manifest.update(mediaType="text/plain"),
        lambda manifest: manifest.update(annotations={"a": 1}),
        lambda manifest: manifest["layers"][0].update(size=10**30),
        lambda manifest: manifest["layers"][1].update(digest=manifest["layers"][0]["digest"]),
    ],
)
def test_a_manifest_that_makes_no_sense(bundle: Path, change: Callable[[Dict[str, Any]], Any]) -> None:
    rewrite_manifest(bundle, "models/tiny", change)
    assert all(problem.startswith("models/tiny") for problem in problems_of(bundle))


def test_all_missing_and_resized_blobs_are_named_with_their_files(bundle: Path) -> None:
    tiny = Bundle.open(bundle).find("models", "tiny")
    assert tiny is not None
    config, weights = (bundle / "blobs/sha256" / file.digest[7:] for file in tiny.files)
    config.unlink()
    os.truncate(weights, 10)
    found = problems_of(bundle)
    assert len(found) == 2
    assert "config.json" in found[0] and "missing" in found[0]
    assert "sub/model.safetensors" in found[1] and "has 10 bytes, expected 7000" in found[1]


def test_a_blob_that_is_a_link_or_a_directory(bundle: Path) -> None:
    tiny = Bundle.open(bundle).find("models", "tiny")
    assert tiny is not None
    config, weights = (bundle / "blobs/sha256" / file.digest[7:] for file in tiny.files)
    config.unlink()
    config.symlink_to(weights)
    weights.unlink()
    weights.mkdir()
    assert [problem.rpartition(": ")[2] for problem in problems_of(bundle)] == ["blob is not a regular file"] * 2


def test_sizes_must_agree_between_artifacts(bundle: Path) -> None:
    def change(manifest: Dict[str, Any]) -> None:
        manifest["layers"][0]["size"] = 6999

    rewrite_manifest(bundle, "tools/some", change)
    assert any("elsewhere" in problem for problem in problems_of(bundle))


def test_many_problems_are_all_kept_and_some_shown(bundle: Path) -> None:
    rewrite_index(bundle, lambda index: index.update(manifests=[None] * 100))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert len(caught.value.problems) == 100 and "and 75 more" in str(caught.value)
    assert caught.value.details == {"problems": caught.value.problems}


def test_verify_reads_only_what_no_stamp_vouches_for(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    stamps = Stamps(tmp_path / "fresh.json")
    assert verify(opened, stamps) == [] and stamps.hashed_bytes == opened.size
    again = Stamps(tmp_path / "fresh.json")
    assert verify(opened, again) == [] and again.hashed_bytes == 0
    builder = Stamps(cache_dir(bundle) / "stamps.json")
    assert verify(opened, builder) == [] and builder.hashed_bytes == 0


def test_verify_names_a_damaged_blob_and_every_file_it_is(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    tiny = opened.find("models", "tiny")
    assert tiny is not None
    weights = opened.blob_path(tiny.files[1].digest)
    content = bytearray(weights.read_bytes())
    content[3500] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    damaged = verify(opened, Stamps())
    assert [entry.digest for entry in damaged] == [tiny.files[1].digest]
    assert damaged[0].files == ("models/tiny: sub/model.safetensors", "tools/some: same.bin")
    assert "sub/model.safetensors" in str(damaged[0]) and hash_bytes(bytes(content)) in str(damaged[0])


def test_a_blob_that_cannot_be_read_counts_as_damaged(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.blob_path(opened.artifacts[0].files[0].digest).unlink()
    assert "cannot be read" in verify(opened, Stamps())[0].found
