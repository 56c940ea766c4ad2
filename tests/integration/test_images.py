# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images from a real Docker Engine into a bundle, and from the bundle into another real engine."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ad_hoc import run_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.engine import Engine
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.images import (
    ArchiveFile,
    EngineImage,
    ImageRequest,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.loading import (
    carried,
    carry_out,
    drop_layers,
    look,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.reference import image_name
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store
from engines import PrivateEngine
from sites import REPOSITORY, Site

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("dockerd"), reason="a Docker Engine of our own needs dockerd and root"
)

ONE, TWO, OTHER = "airgap.test/server:1", "airgap.test/server:2", "airgap.test/companion:latest"
BIG = 20 * 1024 * 1024
MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def builder() -> Iterator[PrivateEngine]:
    """The engine of the connected machine, with two images that share their big layers, and a third."""
    engine = PrivateEngine().start()
    source = random.Random(1)
    try:
        engine.make_image(ONE, {"program": source.randbytes(BIG)}, {"more": source.randbytes(BIG // 2)})
        engine.docker("tag", ONE, TWO)
        container = engine.docker("create", TWO)
        engine.docker("cp", "/etc/hostname", f"{container}:/added")
        engine.docker("commit", container, TWO)
        engine.make_image(OTHER, {"program": source.randbytes(MEBIBYTE)})
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries that bundles carry for the hosts."""
    place = tmp_path_factory.mktemp("wheels")
    names = REPOSITORY / "roles/xinference_bundle/files/host-requirements.txt"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip += ["--platform", "any", "--implementation", "py", "--abi", "none", "--python-version", "3.8"]
    subprocess.run([*pip, "--dest", str(place), "--requirement", str(names)], check=True)
    return place


@pytest.fixture(scope="module")
def bundle(builder: PrivateEngine, libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the three images, a tool and the libraries."""
    place = tmp_path_factory.mktemp("bundle")
    (place / "docker-compose").write_text("#!/bin/sh\necho compose\n")
    engine = Engine(builder.address)
    requests = [
        Request("wheels", "host", str(libraries)),
        Request("tools", "docker-compose", str(place / "docker-compose")),
    ]
    images = [ImageRequest(name, EngineImage(engine, name)) for name in (ONE, TWO, OTHER)]
    write_bundle(place / "bundle", requests, images=images)
    return place / "bundle"


@pytest.fixture(scope="module")
def engine() -> Iterator[PrivateEngine]:
    """The engine of the air-gapped host."""
    engine = PrivateEngine().start()
    yield engine
    engine.stop()


@pytest.fixture
def site(engine: PrivateEngine, tmp_path: Path) -> Iterator[Site]:
    """A host with an engine that has no image."""
    yield Site(tmp_path, {"ansible_connection": "local"}, {"PYTHONPATH": f"{tmp_path}/site/lib/python"})
    engine.remove_all()


def ship(site: Site, bundle: Path, engine: PrivateEngine, images: List[str], *arguments: str) -> Dict[str, Any]:
    options = {"bundle": str(bundle), "root": str(site.root), "backend": "docker", "images": images}
    return site.run("xinference_ship", {**options, "docker_host": engine.address}, *arguments)


def actions(result: Dict[str, Any]) -> List[str]:
    assert not result.get("failed"), result["msg"]
    return [row["action"] for row in result["images"]]


def artifact_of(bundle: Path, reference: str) -> Artifact:
    """An image of the bundle."""
    found = Bundle.open(bundle).find("images", image_name(reference))
    assert found is not None
    return found


def layer_blobs(site: Site, bundle: Path) -> List[str]:
    """Layers of images that lie in the store of the host."""
    layers = {layer.digest for artifact in Bundle.open(bundle).artifacts for layer in artifact.layers}
    return [digest for digest in layers if (site.root / "blobs/sha256" / digest[7:]).exists()]


def test_an_image_is_the_same_in_bundle_and_engines(
    builder: PrivateEngine, bundle: Path, engine: PrivateEngine, site: Site
) -> None:
    rehearsed = ship(site, bundle, engine, [ONE, OTHER], "--check", "--diff")
    assert rehearsed["changed"] and not site.root.exists() and not engine.image(ONE)

    result = ship(site, bundle, engine, [ONE, OTHER])
    assert actions(result) == ["load", "load"] and result["changed"]
    assert engine.image(ONE) == builder.image(ONE) and engine.image(OTHER) == builder.image(OTHER)
    assert not engine.image(TWO)
    listed = json.loads((site.root / "state/artifacts.json").read_text())
    entry = listed["images"]["airgap.test-server-1"]
    assert (entry["image_id"], entry["reference"]) == (builder.image(ONE), ONE)
    assert entry["digest"] == artifact_of(bundle, ONE).digest
    assert layer_blobs(site, bundle) == [], "layers leave the store when the engine has them"
    assert BIG * 3 // 2 < result["sent_bytes"] < BIG * 2

    again = ship(site, bundle, engine, [ONE, OTHER])
    assert actions(again) == ["keep", "keep"] and not again["changed"] and again["sent_bytes"] == 0
    rehearsed = ship(site, bundle, engine, [ONE, OTHER], "--check")
    assert not rehearsed["changed"] and actions(rehearsed) == ["keep", "keep"]

    # As after a teardown: the wheels of the library that asks the engine are there, and not unpacked.
    shutil.rmtree(site.root / "lib")
    rehearsed = ship(site, bundle, engine, [ONE, OTHER], "--check")
    assert rehearsed["changed"] and actions(rehearsed) == []


def test_only_layers_the_engine_lacks_are_sent(
    builder: PrivateEngine, bundle: Path, engine: PrivateEngine, site: Site
) -> None:
    ship(site, bundle, engine, [ONE])
    rehearsed = ship(site, bundle, engine, [ONE, TWO], "--check")
    assert rehearsed["changed"] and actions(rehearsed) == ["keep"] and not engine.image(TWO)

    result = ship(site, bundle, engine, [ONE, TWO])
    assert actions(result) == ["keep", "load"]
    assert engine.image(TWO) == builder.image(TWO)
    assert result["images"][1]["layers"] == 1 and result["images"][1]["of_layers"] == 3
    assert result["sent_bytes"] < artifact_of(bundle, TWO).size / 100
    assert layer_blobs(site, bundle) == []


def test_tools_arrive_executable_and_belong_to_docker_hosts(bundle: Path, engine: PrivateEngine, site: Site) -> None:
    options = {"bundle": str(bundle), "root": str(site.root), "backend": "docker", "tools": ["docker-compose"]}
    result = site.run("xinference_ship", options)
    tool = Path(result["artifacts"]["tools"]["docker-compose"]["path"]) / "docker-compose"
    assert subprocess.run([str(tool)], capture_output=True, text=True, check=True).stdout == "compose\n"
    assert not site.run("xinference_ship", options)["changed"]


def test_a_name_that_was_lost_is_given_again(bundle: Path, engine: PrivateEngine, site: Site) -> None:
    ship(site, bundle, engine, [ONE])
    before = engine.image(ONE)
    engine.docker("tag", ONE, "airgap.test/kept:1")
    engine.docker("rmi", ONE)
    result = ship(site, bundle, engine, [ONE])
    assert actions(result) == ["tag"] and result["changed"] and result["sent_bytes"] == 0
    assert engine.image(ONE) == before


def test_another_image_under_the_name_is_replaced(
    builder: PrivateEngine, bundle: Path, engine: PrivateEngine, site: Site
) -> None:
    engine.make_image(ONE, {"other": b"something else"})
    assert actions(ship(site, bundle, engine, [ONE])) == ["load"]
    assert engine.image(ONE) == builder.image(ONE)


class Boastful(Engine):
    """A real engine, but for one thing: it says it has the layers of every image there can be."""

    def __init__(self, address: str, layers: List[str]) -> None:
        super().__init__(address)
        self.claimed = layers

    def layers(self) -> List[List[str]]:
        return [self.claimed]


def test_an_engine_that_refuses_a_part_gets_the_whole_image(
    builder: PrivateEngine, bundle: Path, engine: PrivateEngine, site: Site
) -> None:
    opened, found = Bundle.open(bundle), artifact_of(bundle, TWO)
    store = Store(site.root)
    layers = tuple(layer.digest for layer in found.layers)
    wanted = Wanted(found.kind, found.name, found.digest, dict(found.blobs)[found.digest], layers)
    while (answer := keep(store, [wanted])).missing:
        for digest in answer.missing:
            shutil.copyfile(opened.blob_path(digest), store.partial_path(digest))
    image = carried(store, found)

    boastful = Boastful(engine.address, [layer.digest for layer in image.layers[:2]])
    plan = look(boastful, store, image, complete=False)
    assert (plan.action, [layer.digest for layer in plan.layers], plan.complete) == ("load", [layers[2]], False)
    outcome = carry_out(boastful, store, image, plan)
    assert outcome.action == "refused" and "no such file or directory" in outcome.refused and not engine.image(TWO)

    plan = look(boastful, store, image, complete=True)
    assert plan.complete and carry_out(boastful, store, image, plan).id == builder.image(TWO) == engine.image(TWO)
    assert drop_layers(store, [image]) == found.size


def test_an_error_inside_the_engines_answer_is_an_error(bundle: Path, tmp_path: Path) -> None:
    small = PrivateEngine(size=BIG).start()
    try:
        site = Site(tmp_path, {"ansible_connection": "local"}, {"PYTHONPATH": f"{tmp_path}/site/lib/python"})
        result = ship(site, bundle, small, [ONE])
        assert result["failed"] and "no space left on device" in result["msg"], result["msg"]
        assert "The Docker Engine could not load the image" in result["msg"]
        assert not small.image(ONE) and len(layer_blobs(site, bundle)) == 2, "what was sent stays for the next run"
    finally:
        small.stop()


def test_an_engine_that_is_down_is_named(bundle: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, {"ansible_connection": "local"}, {"PYTHONPATH": f"{tmp_path}/site/lib/python"})
    options = {"bundle": str(bundle), "root": str(site.root), "backend": "docker", "images": [ONE]}
    result = site.run("xinference_ship", {**options, "docker_host": "unix:///nonexistent/docker.sock"})
    assert result["failed"] and "No answer from a Docker Engine at unix:///nonexistent/docker.sock" in result["msg"]


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_an_archive_gives_the_same_artifact_as_the_engine(
    builder: PrivateEngine, bundle: Path, tmp_path: Path, compression: str
) -> None:
    archive = tmp_path / "saved"
    builder.docker("save", "--output", str(archive), ONE, OTHER)
    if compression:
        with (tmp_path / "packed").open("wb") as target:
            subprocess.run([compression, "--fast", "--stdout", str(archive)], stdout=target, check=True)
        archive = tmp_path / "packed"
    arguments = {"path": str(tmp_path / "bundle"), "images": [{"name": ONE, "archive": str(archive)}]}
    first = run_module("xinference_bundle", arguments)
    assert not first["failed"], first
    assert first["artifacts"][0]["digest"] == artifact_of(bundle, ONE).digest
    assert run_module("xinference_bundle", arguments, check=True)["changed"] is False
    second = run_module("xinference_bundle", arguments)
    assert (second["changed"], second["hashed_bytes"], second["copied_bytes"]) == (False, 0, 0)
    archive.touch()
    third = run_module("xinference_bundle", arguments)
    assert third["changed"] is False and third["hashed_bytes"] > BIG and third["copied_bytes"] == 0


def test_images_come_from_the_engine_when_no_archive_is_named(builder: PrivateEngine, tmp_path: Path) -> None:
    arguments = {"path": str(tmp_path / "bundle"), "images": [{"name": OTHER}], "docker_host": builder.address}
    rehearsed = run_module("xinference_bundle", arguments, check=True)
    assert rehearsed["changed"] and not (tmp_path / "bundle").exists()
    first = run_module("xinference_bundle", arguments)
    assert first["artifacts"][0]["name"] == "airgap.test-companion-latest"
    second = run_module("xinference_bundle", arguments)
    assert (second["changed"], second["hashed_bytes"]) == (False, 0)
    absent = run_module("xinference_bundle", {**arguments, "images": [{"name": "localhost:1/absent:1"}]})
    assert absent["failed"] and "could not pull localhost:1/absent:1" in absent["msg"]


def test_a_damaged_archive_leaves_the_bundle_as_it_was(builder: PrivateEngine, tmp_path: Path) -> None:
    archive = tmp_path / "saved.tar"
    builder.docker("save", "--output", str(archive), OTHER)
    write_bundle(tmp_path / "bundle", [], images=[ImageRequest(OTHER, ArchiveFile(archive))])
    index = (tmp_path / "bundle/index.json").read_bytes()
    with tarfile.open(archive) as saved:
        layer = next(entry for entry in saved if entry.name.endswith("layer.tar"))
    with archive.open("r+b") as file:
        file.seek(layer.offset_data + 700_000)
        file.write(b"damage")
    arguments = {"path": str(tmp_path / "bundle"), "images": [{"name": OTHER, "archive": str(archive)}]}
    result = run_module("xinference_bundle", arguments)
    assert result["failed"] and "damaged or lies: layer 1 is sha256:" in result["msg"]
    assert (tmp_path / "bundle/index.json").read_bytes() == index
    assert not list((tmp_path / "bundle/blobs/sha256").glob(".incoming-*"))
    assert len(Bundle.open(tmp_path / "bundle").artifacts) == 1
