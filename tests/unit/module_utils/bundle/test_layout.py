# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading bundles, above all those that lie."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps, hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import (
    MAX_ARTIFACTS,
    SHOWN_PROBLEMS,
    Bundle,
    BundleError,
    cache_dir,
    verify,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import (
    MAX_MANIFEST,
    MEDIA_INDEX,
    REF_NAME,
    Blob,
    paths_problems,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.pack import image_manifest, index_entry


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
        ("size", 12.5, "not a number of bytes"),
        ("size", MAX_MANIFEST + 1, "over the limit"),
        ("digest", "sha256:" + "0" * 64 + "\n", "is not sha256"),
        ("digest", "sha512:" + "0" * 128, "is not sha256"),
        ("digest", "x" * 10**6, "is not sha256"),
        ("mediaType", 3, "mediaType"),
        ("mediaType", "application/vnd.oci.image.index.v1+json", "is not known here"),
        ("artifactType", "application/vnd.airgap.xinference.files.v1", "is not that of models"),
        ("annotations", {REF_NAME: "k" * 33 + "/tiny"}, "is not <kind>/<name>"),
        ("annotations", {REF_NAME: "models/tiny\n"}, "control characters"),
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
    assert len(found) == 1 and words in found[0] and len(found[0]) < 300
    assert "entry 1" in found[0] or "models/tiny" in found[0]


def test_an_index_of_another_sort_or_of_far_too_many_artifacts(bundle: Path) -> None:
    rewrite_index(bundle, lambda index: index.update(mediaType="application/vnd.oci.image.manifest.v1+json"))
    assert "is not that of an image index" in problems_of(bundle)[0]
    rewrite_index(bundle, lambda index: index.update(mediaType=MEDIA_INDEX, manifests=[{}] * (MAX_ARTIFACTS + 1)))
    assert problems_of(bundle) == [f"index.json: {MAX_ARTIFACTS + 1} artifacts are more than a bundle can have (4096)"]


def test_manifests_that_are_small_each_and_absurd_together_are_not_read(bundle: Path) -> None:
    def change(index: Dict[str, Any]) -> None:
        entry = index["manifests"][0]
        index["manifests"] = [
            {**entry, "size": MAX_MANIFEST, "annotations": {REF_NAME: f"models/m{number}"}} for number in range(9)
        ]

    rewrite_index(bundle, change)
    assert problems_of(bundle) == [
        f"index.json: {9 * MAX_MANIFEST} bytes of manifests are more than a bundle can have (268435456)"
    ]


def test_a_key_twice_in_one_object_is_no_document(bundle: Path) -> None:
    text = (bundle / "index.json").read_text()
    (bundle / "index.json").write_text(text.replace('"schemaVersion": 2', '"schemaVersion": 2, "schemaVersion": 2'))
    assert problems_of(bundle) == ["index.json: not JSON (the key 'schemaVersion' occurs twice in one object)"]


def test_an_empty_configuration_that_is_not_empty(bundle: Path) -> None:
    rewrite_manifest(
        bundle,
        "tools/some",
        lambda manifest: manifest["config"].update(
            manifest["layers"][0], mediaType="application/vnd.oci.empty.v1+json", annotations={}
        ),
    )
    assert "is not the empty one it says it is" in problems_of(bundle)[0]


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
        "d/" * 64 + "z",
        "\udcff",
        "a\x1b[2Jb",
        "a\x9bb",
        "C:/Windows",
        "c:x",
        "NUL",
        "sub/con",
        "Com1/x",
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


def test_long_and_foreign_names_that_harm_nobody_are_allowed(bundle: Path) -> None:
    names = ["x" * 255, "é/ü.bin", "aux.py", "console", "com10", "ab:c", "d/" * 63 + "z"]

    def change(manifest: Dict[str, Any]) -> None:
        layer = manifest["layers"][0]
        manifest["layers"] = [{**layer, "annotations": {"org.cncf.model.filepath": name}} for name in names]

    rewrite_manifest(bundle, "models/tiny", change)
    tiny = Bundle.open(bundle).find("models", "tiny")
    assert tiny is not None and sorted(file.path for file in tiny.files) == sorted(names)


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
        lambda manifest: manifest["layers"][0].update(size=2.0),
        lambda manifest: manifest["layers"][0].update(size=float("inf")),
        lambda manifest: manifest["layers"][0].update(size=None),
        lambda manifest: manifest["layers"][0].update(mediaType="application/vnd.cncf.model.weight.v1.tar"),
        lambda manifest: manifest["layers"][0].update(mediaType="application/octet-stream"),
        lambda manifest: manifest["layers"][0].update(mediaType="x" * 100000),
        lambda manifest: manifest["config"].update(mediaType="application/vnd.oci.empty.v1+json"),
        lambda manifest: manifest["config"].update(size=MAX_MANIFEST + 1),
        lambda manifest: manifest.update(artifactType="application/vnd.airgap.xinference.files.v1"),
        lambda manifest: manifest.update(annotations={"a": "\x1b]0;owned\x07"}),
        lambda manifest: manifest.update(annotations={"a\ud800": "b"}),
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


@pytest.mark.parametrize("place", ["index.json", "oci-layout", "manifest", "blob"])
@pytest.mark.parametrize("thing", ["link", "pipe", "directory", "device"])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(bundle: Path, place: str, thing: str) -> None:
    opened = Bundle.open(bundle)
    blobs = {"manifest": opened.artifacts[0].digest, "blob": opened.artifacts[0].files[0].digest}
    path = opened.blob_path(blobs[place]) if place in blobs else bundle / place
    path.rename(bundle / "elsewhere")
    if thing == "link":
        path.symlink_to(bundle / "elsewhere")
    elif thing == "pipe":
        os.mkfifo(str(path))
    elif thing == "directory":
        path.mkdir()
    else:
        try:
            os.mknod(str(path), stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    found = problems_of(bundle)
    assert len(found) == 1 and found[0].endswith("not a regular file")


@pytest.mark.parametrize("place", ["blobs", "blobs/sha256"])
def test_blobs_lie_in_plain_directories(bundle: Path, place: str) -> None:
    (bundle / place).rename(bundle / "elsewhere")
    (bundle / place).symlink_to(bundle / "elsewhere")
    assert problems_of(bundle) == [f"{place}: not a plain directory"]


def test_a_volume_and_a_half_joined_bundle_are_told_from_a_bundle(bundle: Path) -> None:
    (bundle / "index.json").unlink()
    (bundle / "partial").mkdir()
    assert "go on with playbooks/join.yml" in problems_of(bundle)[0]
    (bundle / "volume.json").write_text("{}")
    assert "one volume of a bundle that was split" in problems_of(bundle)[0]


def add_image(bundle: Path, config: bytes, layers: List[str], name: str = "server:1") -> None:
    """Put an image with these layers into the bundle by hand."""
    blobs = [Blob(hash_bytes(content.encode()), len(content)) for content in layers]
    manifest = image_manifest(config, blobs, name)
    for content in (config, manifest, *(content.encode() for content in layers)):
        (bundle / "blobs/sha256" / hash_bytes(content)[7:]).write_bytes(content)
    entry = index_entry("images/server-1", "", manifest)
    rewrite_index(bundle, lambda index: index["manifests"].append(entry))


def image_config(layers: List[str], **more: Any) -> bytes:
    """The configuration of an image with these layers."""
    names = [hash_bytes(content.encode()) for content in layers]
    return json.dumps({"rootfs": {"type": "layers", "diff_ids": names}, **more}).encode()


def test_an_image_says_in_both_places_the_same(bundle: Path) -> None:
    add_image(bundle, image_config(["one", "two"], os="linux"), ["one", "two"])
    image = Bundle.open(bundle).find("images", "server-1")
    assert image is not None and len(image.layers) == 2


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        (image_config(["one", "two"]), "nginx:1", "calls the image 'nginx:1', which has another name"),
        (image_config(["one", "two"]), "-rf", "calls the image '-rf'"),
        (image_config(["one"]), "server:1", "has other layers than the configuration"),
        (image_config(["one", "other"]), "server:1", "has other layers than the configuration"),
        (image_config(["one", "two"], os="windows"), "server:1", "for 'windows', not for Linux"),
        (b"{}", "server:1", "no rootfs"),
        (b'{"rootfs": {"diff_ids": ["latest"]}}', "server:1", "by digest"),
        (b"[" * 100_000, "server:1", "not JSON"),
    ],
)
def test_an_image_that_lies(bundle: Path, config: bytes, name: str, words: str) -> None:
    add_image(bundle, config, ["one", "two"], name)
    found = problems_of(bundle)
    assert len(found) == 1 and found[0].startswith("images/server-1: ") and words in found[0]


def test_a_great_many_deep_paths_are_judged_in_no_time() -> None:
    began = time.monotonic()
    paths = [f"{number:05}/" + "d/" * 60 + "f" for number in range(20_000)]
    assert paths_problems(paths) == []
    assert len(paths_problems([*paths, *paths, "00007"])) == 20_001
    assert time.monotonic() - began < 60


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
