# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Writing bundles: exactly what was asked for, by link or copy, the same bytes every time."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, Dict, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import ingest, writer
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps, hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle, BundleError, verify
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.lock import locked
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.pack import model_media_type

WEIGHTS = b"weights" * 10_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model directory."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "empty.txt").write_text("")
    (directory / "sub" / "model.safetensors").write_bytes(WEIGHTS)
    return directory


def tree(directory: Path) -> Dict[str, bytes]:
    """Every file of a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system refuse hard links, as between file systems."""

    def refuse(*_args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)


def wrong(requests: List[Request], path: Path) -> List[str]:
    """What is wrong with requests; nothing may have been written."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        write_bundle(path, requests)
    assert sorted(path.parent.iterdir()) == before
    return caught.value.problems


def test_a_model_is_linked_and_described_as_modelpack(tmp_path: Path, model: Path) -> None:
    outcome = write_bundle(
        tmp_path / "bundle", [Request("models", "tiny", str(model), {"org.opencontainers.image.revision": "r1"})]
    )
    assert outcome.changed and outcome.linked_bytes == outcome.hashed_bytes == len(WEIGHTS) + 2
    assert outcome.copied_bytes == 0
    bundle = Bundle.open(tmp_path / "bundle")
    artifact = bundle.artifacts[0]
    weights = bundle.blob_path(artifact.files[2].digest)
    assert weights.samefile(model / "sub" / "model.safetensors")
    manifest = json.loads(bundle.blob_path(artifact.digest).read_text())
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert [layer["annotations"]["org.cncf.model.filepath"] for layer in manifest["layers"]] == [
        "config.json",
        "empty.txt",
        "sub/model.safetensors",
    ]
    config = json.loads(bundle.blob_path(manifest["config"]["digest"]).read_text())
    assert config["descriptor"] == {"name": "tiny", "revision": "r1"}
    assert config["config"] == {"format": "safetensors"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}


def test_files_are_described_as_oras_does(tmp_path: Path, model: Path) -> None:
    write_bundle(tmp_path / "bundle", [Request("wheels", "server", str(model), {"a.b": "c"})])
    bundle = Bundle.open(tmp_path / "bundle")
    manifest = json.loads(bundle.blob_path(bundle.artifacts[0].digest).read_text())
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert bundle.blob_path(manifest["config"]["digest"]).read_bytes() == b"{}"
    assert manifest["layers"][2]["annotations"] == {"org.opencontainers.image.title": "sub/model.safetensors"}
    assert manifest["annotations"] == {"a.b": "c"}


def test_one_file_is_an_artifact_too(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    write_bundle(tmp_path / "bundle", [Request("models", "one", str(tmp_path / "model.gguf"))])
    assert [file.path for file in Bundle.open(tmp_path / "bundle").artifacts[0].files] == ["model.gguf"]


@pytest.mark.parametrize("links", [True, False])
def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    requests = [Request("models", "tiny", str(model)), Request("tools", "t", str(model / "sub"))]
    write_bundle(tmp_path / "one", requests)
    if not links:
        no_links(monkeypatch)
    os.utime(model / "config.json", (1, 1))
    outcome = write_bundle(tmp_path / "two", list(reversed(requests)))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert bool(outcome.copied_bytes) is not links and bool(outcome.linked_bytes) is links


@pytest.mark.parametrize("links", [True, False])
def test_a_second_build_hashes_and_writes_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        no_links(monkeypatch)
    requests = [Request("models", "tiny", str(model))]
    first = write_bundle(tmp_path / "bundle", requests)
    assert first.hashed_bytes == len(WEIGHTS) + 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "build.lock"}
    again = write_bundle(tmp_path / "bundle", requests)
    assert not again.changed and again.before == again.after
    assert (again.hashed_bytes, again.linked_bytes, again.copied_bytes, again.dropped_bytes) == (0, 0, 0, 0)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "build.lock"}


def test_copying_reads_each_byte_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_links(monkeypatch)
    outcome = write_bundle(tmp_path / "bundle", [Request("models", "tiny", str(model))])
    assert outcome.copied_bytes == outcome.hashed_bytes == len(WEIGHTS) + 2
    assert verify(Bundle.open(tmp_path / "bundle"), Stamps()) == []


def test_only_what_changed_is_hashed_and_what_is_unused_is_dropped(tmp_path: Path, model: Path) -> None:
    requests = [Request("models", "tiny", str(model))]
    write_bundle(tmp_path / "bundle", requests)
    (model / "config.json").unlink()
    (model / "config.json").write_text('{"new": 1}')
    outcome = write_bundle(tmp_path / "bundle", requests)
    assert outcome.changed and outcome.hashed_bytes == 10 and outcome.linked_bytes == 10
    bundle = Bundle.open(tmp_path / "bundle")
    assert {f"sha256:{path.name}" for path in (tmp_path / "bundle/blobs/sha256").iterdir()} == set(bundle.blobs)
    emptied = write_bundle(tmp_path / "bundle", [])
    assert emptied.changed and emptied.dropped_bytes == bundle.size
    assert Bundle.open(tmp_path / "bundle").artifacts == []


def test_a_source_changed_in_place_does_not_leave_a_wrong_blob(tmp_path: Path, model: Path) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "model.safetensors").write_bytes(WEIGHTS)
    requests = [Request("models", "tiny", str(model)), Request("models", "twin", str(twin))]
    write_bundle(tmp_path / "bundle", requests)
    for path in (model / "sub" / "model.safetensors", twin / "model.safetensors"):
        if path.samefile(tmp_path / "bundle/blobs/sha256" / hash_bytes(WEIGHTS)[7:]):
            with path.open("r+b") as handle:
                handle.write(b"WEIGHTS")
            os.utime(path, (5, 5))
    write_bundle(tmp_path / "bundle", requests)
    assert verify(Bundle.open(tmp_path / "bundle"), Stamps()) == []
    assert hash_bytes(WEIGHTS) in Bundle.open(tmp_path / "bundle").blobs


def test_a_damaged_or_lost_blob_is_repaired_by_building_again(tmp_path: Path, model: Path) -> None:
    requests = [Request("models", "tiny", str(model))]
    write_bundle(tmp_path / "bundle", requests)
    blob = tmp_path / "bundle/blobs/sha256" / hash_bytes(WEIGHTS)[7:]
    blob.unlink()
    blob.write_bytes(b"damaged" * 10_000)
    assert write_bundle(tmp_path / "bundle", requests, check=True).changed
    assert write_bundle(tmp_path / "bundle", requests).changed
    blob.unlink()
    assert write_bundle(tmp_path / "bundle", requests).changed
    assert verify(Bundle.open(tmp_path / "bundle"), Stamps()) == []


def test_lost_stamps_cost_one_reading_of_the_sources_and_nothing_else(tmp_path: Path, model: Path) -> None:
    requests = [Request("models", "tiny", str(model))]
    write_bundle(tmp_path / "bundle", requests)
    (tmp_path / "bundle.cache" / "stamps.json").unlink()
    again = write_bundle(tmp_path / "bundle", requests)
    assert not again.changed and again.hashed_bytes == len(WEIGHTS) + 2


def test_check_mode_writes_nothing_and_foretells_the_digest(tmp_path: Path, model: Path) -> None:
    requests = [Request("models", "tiny", str(model))]
    plan = write_bundle(tmp_path / "bundle", requests, check=True)
    assert plan.changed and plan.hashed_bytes == 0 and plan.artifacts[0].digest == ""
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]
    done = write_bundle(tmp_path / "bundle", requests)
    plan = write_bundle(tmp_path / "bundle", requests, check=True)
    assert not plan.changed and plan.artifacts[0].digest == done.artifacts[0].digest
    assert write_bundle(tmp_path / "bundle", [], check=True).changed


def test_a_failed_build_leaves_the_old_bundle(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("models", "tiny", str(model))]
    write_bundle(tmp_path / "bundle", requests)
    before = tree(tmp_path / "bundle")
    (model / "new.bin").write_bytes(b"new")
    no_links(monkeypatch)

    def no_space(*_args: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "copy_and_hash", no_space)
    with pytest.raises(OSError):
        write_bundle(tmp_path / "bundle", requests)
    assert tree(tmp_path / "bundle") == before


def test_every_problem_of_every_request_in_one_error(tmp_path: Path, model: Path) -> None:
    not_text: Any = {"a": 1}
    hostile = tmp_path / "hostile"
    (hostile / "empty").mkdir(parents=True)
    (hostile / "leaves").symlink_to(tmp_path / "model" / "config.json")
    (hostile / "nowhere").symlink_to("gone")
    (hostile / "folder").symlink_to("empty")
    (hostile / "back\\slash").write_text("x")
    (hostile / os.fsdecode(b"not-utf8-\xff")).write_text("x")
    os.mkfifo(hostile / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(hostile / "socket"))
        found = wrong(
            [
                Request("models", "hostile", str(hostile)),
                Request("models", "none", str(tmp_path / "none")),
                Request("models", "../up", str(model)),
                Request("Models", "tiny", str(model)),
                Request("models", "tiny", str(model)),
                Request("models", "tiny", str(model)),
                Request("models", "marks", str(model), not_text),
            ],
            tmp_path / "bundle",
        )
    text = "\n".join(found)
    for words in (
        "empty: empty directory",
        "leaves: symbolic link that leaves",
        "nowhere: No such file",
        "folder: symbolic link to a directory",
        "back\\\\slash",
        "is not UTF-8",
        "pipe: a device, socket or pipe",
        "socket: a device, socket or pipe",
        "models/none:",
        "'../up' is not a name",
        "'Models' is not a kind",
        "models/tiny: asked for twice",
        "models/marks: annotations",
    ):
        assert words in text, words
    assert len(found) == 13


def test_a_directory_without_files(tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    assert "there is no file in it" in wrong([Request("models", "void", str(tmp_path / "void"))], tmp_path / "b")[0]


def test_links_inside_the_directory_are_the_files_they_lead_to(tmp_path: Path, model: Path) -> None:
    (model / "alias.safetensors").symlink_to("sub/model.safetensors")
    linked = tmp_path / "linked"
    linked.symlink_to(model)
    write_bundle(tmp_path / "bundle", [Request("models", "tiny", str(linked))])
    bundle = Bundle.open(tmp_path / "bundle")
    by_path = {file.path: file.digest for file in bundle.artifacts[0].files}
    assert by_path["alias.safetensors"] == by_path["sub/model.safetensors"]
    assert not bundle.blob_path(by_path["alias.safetensors"]).is_symlink()


def test_a_directory_that_is_not_a_bundle_is_not_touched(tmp_path: Path, model: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert "not a bundle" in wrong([Request("models", "tiny", str(model))], tmp_path / "home")[0]
    assert tree(tmp_path / "home") == {"letter.txt": b"dear"}


def test_two_builds_at_once_are_refused(tmp_path: Path, model: Path) -> None:
    lock = locked(tmp_path / "bundle.cache" / "build.lock", "held by the test")
    with lock, pytest.raises(BundleError, match="another build"):
        write_bundle(tmp_path / "bundle", [Request("models", "tiny", str(model))])
    assert not (tmp_path / "bundle").exists()


def test_too_little_disk_is_told_before_anything_is_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "free_bytes", lambda _path: 999)
    monkeypatch.setattr(ingest, "device_of", lambda path: 1 if path == tmp_path else 2)
    with pytest.raises(BundleError, match=r"needs 68.4 KiB more and its file system has 999 B free"):
        write_bundle(tmp_path / "bundle", [Request("models", "tiny", str(model))])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model-00001-of-00002.safetensors", "weight"),
        ("pytorch_model.bin", "weight"),
        ("q4/model.GGUF", "weight"),
        ("tokenizer.json", "weight.config"),
        ("vocab.txt", "weight.config"),
        ("README.md", "doc"),
        ("LICENSE", "doc"),
        ("modeling_qwen.py", "code"),
    ],
)
def test_media_types(path: str, kind: str) -> None:
    assert model_media_type(path) == f"application/vnd.cncf.model.{kind}.v1.raw"
