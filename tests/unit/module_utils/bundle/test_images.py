# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images in bundles: every kind of archive gives the same artifact, and a bad one gives none."""

from __future__ import annotations

import gzip
import io
import json
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.images import ArchiveFile, ImageRequest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Outcome, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle, BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.reference import (
    familiar,
    image_name,
    reference_problem,
)

NAME = "xprobe/xinference:v4.1.0-cpu"
Members = List[Tuple[str, Any]]


def tar(members: Members) -> bytes:
    """A tar archive; a value is content, or a TarInfo to be put in as it is."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, value in members:
            entry = tarfile.TarInfo(name)
            if isinstance(value, tarfile.TarInfo):
                value.name = name
                archive.addfile(value)
                continue
            entry.size = len(value)
            archive.addfile(entry, io.BytesIO(value))
    return memory.getvalue()


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


LAYERS = [tar([("program", b"p" * 5000)]), tar([("etc/config", b"c" * 300)])]
CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [hash_bytes(x) for x in LAYERS]}}
).encode()


def hexed(content: bytes) -> str:
    return hash_bytes(content).partition(":")[2]


def saved(tags: Optional[List[str]] = None, layers: Optional[List[bytes]] = None, config: bytes = CONFIG) -> Members:
    """What `docker save` of an engine before 25 writes: layers first, the manifest last."""
    layers = LAYERS if layers is None else layers
    entry = {
        "Config": f"{hexed(config)}.json",
        "RepoTags": [NAME] if tags is None else tags,
        "Layers": [f"{number}/layer.tar" for number in range(len(layers))],
    }
    members: Members = [(f"{number}/layer.tar", layer) for number, layer in enumerate(layers)]
    return [*members, (f"{hexed(config)}.json", config), ("manifest.json", json.dumps([entry]).encode())]


def descriptor(content: bytes, **more: Any) -> Dict[str, Any]:
    return {"mediaType": "x", "digest": hash_bytes(content), "size": len(content), **more}


def blob(content: bytes) -> Tuple[str, bytes]:
    return f"blobs/sha256/{hexed(content)}", content


def layout(
    pack: Callable[[bytes], bytes] = bytes, annotations: Optional[Dict[str, str]] = None, nested: bool = False
) -> Members:
    """An OCI archive, its layers packed in some way."""
    layers = [pack(layer) for layer in LAYERS]
    manifest = json.dumps({"config": descriptor(CONFIG), "layers": [descriptor(layer) for layer in layers]}).encode()
    blobs = [blob(content) for content in (*layers, CONFIG, manifest)]
    entry = descriptor(manifest)
    if nested:
        ours = {**entry, "platform": {"os": "linux", "architecture": "amd64"}}
        other = {**descriptor(b"{ }"), "platform": {"os": "linux", "architecture": "s390x"}}
        attestation = {**descriptor(b"{  }"), "platform": {"os": "unknown", "architecture": "unknown"}}
        inner = json.dumps({"manifests": [other, ours, attestation]}).encode()
        blobs.append(blob(inner))
        entry = descriptor(inner)
    entry["annotations"] = {"io.containerd.image.name": f"docker.io/{NAME}"} if annotations is None else annotations
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    return [*blobs, ("index.json", index), ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')]


@pytest.fixture(autouse=True)
def architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    yield


def build(tmp_path: Path, content: bytes, name: str = NAME, check: bool = False) -> Outcome:
    archive = tmp_path / "image.tar"
    if not archive.exists() or archive.read_bytes() != content:
        archive.write_bytes(content)
    return write_bundle(tmp_path / "bundle", [], images=[ImageRequest(name, ArchiveFile(archive))], check=check)


def refused(tmp_path: Path, content: bytes, name: str = NAME) -> str:
    """Why an archive is refused; nothing of it may be left."""
    with pytest.raises(BundleError) as caught:
        build(tmp_path, content, name)
    left = [path.name for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert left == []
    return str(caught.value)


def zstd(content: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=content, stdout=subprocess.PIPE, check=True).stdout


needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="the program zstd is not on this machine")
ARCHIVES = {
    "docker": lambda: tar(saved()),
    "docker, with ./": lambda: tar([(f"./{name}", value) for name, value in saved()]),
    "docker, saved by id": lambda: tar(saved(tags=[])),
    "docker, manifest first": lambda: tar(saved()[::-1]),
    "docker, gzip layers": lambda: tar(saved(layers=[gzip.compress(layer) for layer in LAYERS])),
    "docker, gzip": lambda: gzip.compress(tar(saved())),
    "docker, two gzip members": lambda: gzip.compress(tar(saved())[:3000]) + gzip.compress(tar(saved())[3000:]),
    "oci": lambda: tar(layout()),
    "oci, gzip layers": lambda: tar(layout(gzip.compress)),
    "oci, index in index": lambda: tar(layout(nested=True)),
    "oci, tag only": lambda: tar(layout(annotations={"org.opencontainers.image.ref.name": "v4.1.0-cpu"})),
    "oci, no name": lambda: tar(layout(annotations={})),
}


@pytest.mark.parametrize("kind", sorted(ARCHIVES))
def test_every_archive_gives_the_same_artifact(tmp_path: Path, kind: str) -> None:
    outcome = build(tmp_path, ARCHIVES[kind]())
    artifact = Bundle.open(tmp_path / "bundle").artifacts[0]
    assert (artifact.kind, artifact.name) == ("images", "xprobe-xinference-v4.1.0-cpu")
    assert artifact.blobs[1].digest == hash_bytes(CONFIG), "the configuration's digest is the image id"
    assert [layer.digest for layer in artifact.layers] == [hash_bytes(layer) for layer in LAYERS], "diff ids"
    assert artifact.annotations == {"io.containerd.image.name": NAME}
    assert outcome.artifacts[0].digest == artifact.digest
    (tmp_path / "other").mkdir()
    assert build(tmp_path / "other", tar(saved())).artifacts[0].digest == artifact.digest
    index = json.loads((tmp_path / "bundle/index.json").read_text())
    assert "artifactType" not in index["manifests"][0]


@needs_zstd
def test_zstd_outside_and_inside(tmp_path: Path) -> None:
    first = build(tmp_path, zstd(tar(saved())))
    (tmp_path / "other").mkdir()
    second = build(tmp_path / "other", tar(layout(zstd)))
    assert first.artifacts[0].digest == second.artifacts[0].digest
    (tmp_path / "cut").mkdir()
    assert "zstd data is damaged" in refused(tmp_path / "cut", zstd(tar(saved()))[:-20])


def test_without_zstd_the_message_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert "the program zstd is not on this machine" in refused(tmp_path, b"\x28\xb5\x2f\xfd" + b"x" * 100)


def test_an_unchanged_archive_is_not_read_again(tmp_path: Path) -> None:
    content = tar(saved())
    assert build(tmp_path, content, check=True).changed
    first = build(tmp_path, content)
    assert first.changed and first.hashed_bytes > 5000
    for check in (True, False):
        again = build(tmp_path, content, check=check)
        assert (again.changed, again.hashed_bytes) == (False, 0)
        assert again.artifacts[0].digest == first.artifacts[0].digest
    next((tmp_path / "bundle/blobs/sha256").glob(hexed(LAYERS[0]))).unlink()
    healed = build(tmp_path, content)
    assert healed.changed and Bundle.open(tmp_path / "bundle")


def test_layers_that_images_share_are_there_once(tmp_path: Path) -> None:
    more = [*LAYERS, tar([("new", b"n")])]
    diffs = {"rootfs": {"type": "layers", "diff_ids": [hash_bytes(layer) for layer in more]}}
    config = json.dumps(diffs).encode()
    (tmp_path / "a.tar").write_bytes(tar(saved()))
    (tmp_path / "b.tar").write_bytes(tar(saved(tags=["new:1"], layers=more, config=config)))
    requests = [
        ImageRequest(NAME, ArchiveFile(tmp_path / "a.tar")),
        ImageRequest("new:1", ArchiveFile(tmp_path / "b.tar")),
    ]
    outcome = write_bundle(tmp_path / "bundle", [], images=requests)
    assert outcome.copied_bytes == sum(len(layer) for layer in more)
    assert [item.files for item in outcome.artifacts] == [2, 3]
    fewer = write_bundle(tmp_path / "bundle", [], images=requests[:1])
    assert fewer.changed and fewer.dropped_bytes > len(more[2])
    assert not (tmp_path / "bundle/blobs/sha256" / hexed(more[2])).exists()


def test_a_layer_may_occur_twice_and_be_a_link(tmp_path: Path) -> None:
    twice = [LAYERS[1], LAYERS[0], LAYERS[1]]
    config = json.dumps({"rootfs": {"diff_ids": [hash_bytes(layer) for layer in twice]}}).encode()
    members = saved(layers=twice, config=config)
    members[2] = ("2/layer.tar", link("../0/layer.tar"))
    build(tmp_path, tar(members))
    artifact = Bundle.open(tmp_path / "bundle").artifacts[0]
    assert [layer.digest for layer in artifact.layers] == [hash_bytes(LAYERS[1]), hash_bytes(LAYERS[0])]
    manifest = json.loads((tmp_path / "bundle/blobs/sha256" / artifact.digest[7:]).read_text())
    assert [layer["digest"] for layer in manifest["layers"]] == [hash_bytes(layer) for layer in twice]


def without(members: Members, name: str) -> Members:
    return [member for member in members if member[0] != name]


def changed(members: Members, name: str, content: bytes) -> Members:
    return [(key, content if key == name else value) for key, value in members]


OTHER = tar([("program", b"q" * 5000)])
BAD: Dict[str, Tuple[Callable[[], bytes], str]] = {
    "a path upwards": (lambda: tar([("../evil", b"x"), *saved()]), "`..` component"),
    "an absolute path": (lambda: tar([("/evil", b"x"), *saved()]), "is absolute"),
    "a link that leaves": (lambda: tar([("0/x", link("../../../etc/passwd")), *saved()]), "a link that leaves it"),
    "a hard link that leaves": (lambda: tar([("x", link("/etc/shadow", tarfile.LNKTYPE)), *saved()]), "leaves it"),
    "a device": (lambda: tar([("x", link("", tarfile.CHRTYPE)), *saved()]), "neither a file nor a link"),
    "a name twice": (lambda: tar([*saved(), saved()[0]]), "occurs twice"),
    "a layer missing": (lambda: tar(without(saved(), "1/layer.tar")), "missing: 1/layer.tar"),
    "a link to nowhere": (lambda: tar(changed(saved(), "1/layer.tar", link("2"))), "missing: 1/layer.tar"),  # type: ignore[arg-type]
    "another layer": (lambda: tar(changed(saved(), "0/layer.tar", OTHER)), "layer 1 is sha256:"),
    "another configuration": (
        lambda: tar(changed(saved(), f"{hexed(CONFIG)}.json", CONFIG + b" ")),
        "damaged or lies: the content of",
    ),
    "a configuration missing": (lambda: tar(without(saved(), f"{hexed(CONFIG)}.json")), "configuration"),
    "a blob that lies": (lambda: tar(changed(layout(), blob(LAYERS[0])[0], OTHER)), "damaged or lies: the content of"),
    "an index without its manifest": (lambda: tar(layout()[:2] + layout()[4:]), "is missing"),
    "a layer of another size": (
        lambda: tar(changed(layout(), "index.json", dict(layout())["index.json"].replace(b'"size": ', b'"size": 1'))),
        "its descriptor says",
    ),
    "no manifest": (lambda: tar(without(saved(), "manifest.json")), "neither manifest.json nor index.json"),
    "nothing": (lambda: b"", "not"),
    "no archive": (lambda: b"hello" * 1000, "not a whole image archive"),
    "cut in a layer": (lambda: tar(saved())[:4000], "not a whole image archive"),
    "cut gzip": (lambda: gzip.compress(tar(saved()))[:-30], "gzip data"),
    "damaged gzip": (lambda: gzip.compress(tar(saved()))[:200] + b"\0" * 50, "the gzip data"),
    "JSON that is none": (lambda: tar(changed(saved(), "manifest.json", b"[nonsense")), "not JSON"),
    "no layers": (lambda: tar(saved(layers=[], config=b'{"rootfs": {"diff_ids": []}}')), "does not name its layers"),
    "for Windows": (
        lambda: tar(saved(config=json.dumps({**json.loads(CONFIG), "os": "windows"}).encode())),
        "for 'windows'",
    ),
    "another image": (lambda: tar(saved(tags=["nginx:1"])), f"it does not have {NAME}; it has nginx:1"),
    "another OCI image": (lambda: tar(layout(annotations={"io.containerd.image.name": "nginx:1"})), "it has nginx:1"),
}


@pytest.mark.parametrize("fault", sorted(BAD))
def test_bad_archives_are_refused(tmp_path: Path, fault: str) -> None:
    make, words = BAD[fault]
    message = refused(tmp_path, make())
    assert words in message and str(tmp_path / "image.tar") in message


def test_only_the_right_architecture_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "0 images for linux/arm64" in refused(tmp_path, tar(layout(nested=True)))


def test_wrong_requests_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(saved()))
    here = ArchiveFile(tmp_path / "a.tar")
    requests = [ImageRequest(name, here) for name in (NAME, f"docker.io/{NAME}", "Bad Name", "a@sha256:" + "0" * 64)]
    with pytest.raises(BundleError) as caught:
        write_bundle(tmp_path / "bundle", [], images=[*requests, ImageRequest("b", ArchiveFile(tmp_path / "absent"))])
    assert len(caught.value.problems) == 4 and not (tmp_path / "bundle").exists()
    assert "asked for twice" in caught.value.problems[0] and "no digest" in caught.value.problems[2]
    assert "does not exist on this machine" in caught.value.problems[3]


@pytest.mark.parametrize(
    ("reference", "full", "name"),
    [
        ("nginx", "nginx:latest", "nginx-latest"),
        ("docker.io/library/nginx:1", "nginx:1", "nginx-1"),
        ("docker.io/xprobe/xinference:v4.1.0", "xprobe/xinference:v4.1.0", "xprobe-xinference-v4.1.0"),
        ("registry.corp:5000/ai/server", "registry.corp:5000/ai/server:latest", "registry.corp-5000-ai-server-latest"),
    ],
)
def test_names_of_images(reference: str, full: str, name: str) -> None:
    assert reference_problem(reference) is None
    assert (familiar(reference), image_name(reference)) == (full, name)


@pytest.mark.parametrize("reference", ["", None, 3, "a/UPPER", "a b", "a:b:c", "-x", "a//b", "../a", "a:" + "t" * 129])
def test_what_is_no_name_of_an_image(reference: Any) -> None:
    assert reference_problem(reference)
