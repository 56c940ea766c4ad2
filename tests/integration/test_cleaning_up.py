# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cleaning up a host for real: versions are shipped and put in force, and the playbook removes what nothing needs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import plays
import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.engine import Engine
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.images import EngineImage, ImageRequest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from engines import PrivateEngine, tar_of
from sites import Site, make_bundle, make_model, make_wheel

WEIGHTS = 3 * 1024 * 1024


class Host(Site):
    """A site of one host that runs natively."""

    def version(self, number: int) -> Path:
        """Ship a version of the model, and put it in force; returns the bundle."""
        place = self.place / f"version{number}"
        model = make_model(place / "m", {"weights.bin": WEIGHTS}, seed=number)
        make_model(place / "m", {"tokens.json": 5000}, seed=0)
        bundle = make_bundle(place, {"m": model})
        shipped = self.ship(bundle)
        # A site's environment takes half a minute to build; what it consists of is of no matter here.
        venv = self.root / "venvs" / shipped["artifacts"]["wheels"]["server"]["digest"][7:19]
        venv.mkdir(parents=True, exist_ok=True)
        (venv / ".complete").write_text("{}")
        self.put_in_force(str(venv), number)
        return bundle

    def put_in_force(self, venv: str, number: int) -> None:
        """Make a release that runs from an environment, and that is not like any other."""
        service = {
            "command": [f"{venv}/bin/python", "serve"],
            "environment": {"VERSION": str(number)},
            "directory": str(self.root / "home"),
            "host": "127.0.0.1",
            "port": 9,
        }
        self.done("xinference_release", {"root": str(self.root), "service": service})

    def ship(self, bundle: Path, **options: Any) -> Dict[str, Any]:
        models = [{"model_uid": "m", "source": {"path": "m"}}]
        return self.done(
            "xinference_ship", {"bundle": str(bundle), "root": str(self.root), "models": models, **options}
        )

    def done(self, action: str, options: Dict[str, Any], *arguments: str) -> Dict[str, Any]:
        result = self.run(action, options, *arguments)
        assert not result.get("failed"), result["msg"]
        return result

    def cleanup(self, *arguments: str) -> str:
        """Run the playbook and return what it says."""
        self.command("xinference_store", {}, [])
        inventory = ["-i", str(self.place / "hosts.json"), "-e", f"xinference_hosts=all xinference_root={self.root}"]
        done = plays.run("playbooks/cleanup.yml", *inventory, *arguments, environment={"COLUMNS": "200"})
        assert done.returncode == 0, done.stdout
        return done.stdout

    def releases(self) -> List[str]:
        return sorted(path.name for path in (self.root / "releases").iterdir())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, {"ansible_connection": "local", "ansible_python_interpreter": sys.executable})


def test_an_old_version_goes_and_a_rollback_has_all_it_needs(host: Host) -> None:
    bundles = [host.version(number) for number in range(1, 4)]
    trees = [found.digest[7:19] for bundle in bundles if (found := Bundle.open(bundle).find("models", "m"))]
    releases = host.releases()
    assert len(releases) == 3

    entries = {"m": {"fingerprint": "f", "payload": {"model_path": str(host.root / "models/m" / trees[0])}}}
    (host.root / "state/launched.json").write_text(json.dumps({"format": 1, "models": entries}))
    result = host.done("xinference_cleanup", {"root": str(host.root), "keep_releases": 2}, "--check")
    assert result["notes"] == [f"models/m/{trees[0]} stays: the record of launched models uses it"]
    assert result["freed_bytes"] == sum(row["bytes"] for row in result["removed"]) < WEIGHTS
    (host.root / "state/launched.json").unlink()

    said = host.cleanup("--check", "--diff", "-e", "xinference_keep_releases=2")
    assert re.search(r"3\.\d MiB would be free again: 1 release, .*1 model, ", said) and "changed=1" in said
    assert f"-model        models/m/{trees[0]}" in said
    assert host.releases() == releases

    assert " MiB are free again: 1 release" in host.cleanup("-e", "xinference_keep_releases=2")
    assert len(host.releases()) == 2
    assert sorted(path.name for path in (host.root / "models/m").iterdir()) == sorted(trees[1:])
    assert "changed=0" in host.cleanup("-e", "xinference_keep_releases=2")

    # What is in force is as it was shipped, and the version before needs nothing to be sent again.
    again = host.ship(bundles[2])
    assert (again["changed"], again["hashed_bytes"]) == (False, 0)
    assert host.ship(bundles[1])["sent_bytes"] == 0
    # And one that went comes back whole, with only what it does not share.
    old = host.ship(bundles[0])
    assert WEIGHTS <= old["sent_bytes"] < WEIGHTS + 5000
    tree = Path(old["artifacts"]["models"]["m"]["path"])
    assert subprocess.run(["diff", "-r", str(host.place / "version1/m"), str(tree)], check=False).returncode == 0


def test_nothing_goes_while_another_controller_ships_or_when_too_few_are_to_stay(host: Host) -> None:
    host.version(1)
    result = host.run("xinference_cleanup", {"root": str(host.root), "keep_releases": 1})
    assert result["failed"] and "too few to keep" in result["msg"]
    holder = "import fcntl, json, sys, time; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_SH); "
    holder += "json.dump({'controller': 'ctl-9', 'user': 'ops'}, lock); lock.flush(); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", holder, str(host.root / "state/receiving.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        result = host.run("xinference_cleanup", {"root": str(host.root), "wait": 0})
        process.kill()
    assert result["failed"] and "ctl-9" in result["msg"]


# --- with a Docker Engine ---------------------------------------------------------------------------------------------

MEBIBYTE = 1024 * 1024
IMAGES = [f"airgap.test/server:{version}" for version in (1, 2, 3)]


@pytest.fixture
def engine() -> Iterator[PrivateEngine]:
    """An engine that builds the images first, and is that of the host then."""
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        pytest.skip("a Docker Engine of our own needs dockerd and root")
    engine = PrivateEngine().start()
    yield engine
    engine.stop()


def test_images_go_with_the_releases_that_named_them(engine: PrivateEngine, host: Host) -> None:
    source = random.Random(4)
    base = {"program": source.randbytes(8 * MEBIBYTE)}
    engine.make_image(IMAGES[0], base, {"one": source.randbytes(2 * MEBIBYTE)})
    for number, reference in enumerate(IMAGES[1:]):
        engine.docker("tag", IMAGES[0], reference)
        container = engine.docker("create", reference)
        engine.docker("cp", "-", f"{container}:/", content=tar_of({f"{number}": source.randbytes(MEBIBYTE)}))
        engine.docker("commit", container, reference)
        engine.docker("rm", container)
    make_wheel(host.place / "wheels", "kindly")
    origin = Engine(engine.address)
    images = [ImageRequest(name, EngineImage(origin, name)) for name in IMAGES]
    write_bundle(host.place / "bundle", [Request("wheels", "host", str(host.place / "wheels"))], images=images)
    engine.docker("image", "rm", *IMAGES)
    engine.make_image("somebody/else:1", {"program": b"theirs"})

    root, bundle = str(host.root), str(host.place / "bundle")
    for number, reference in enumerate(IMAGES):
        options = {"bundle": bundle, "root": root, "backend": "docker", "images": [reference]}
        shipped = host.done("xinference_ship", {**options, "docker_host": engine.address})
        assert shipped["images"][0]["action"] == "load"
        host.put_in_force(f"{root}/venvs/none", number)

    ask = {"root": root, "keep_releases": 2, "docker_host": engine.address}
    container = engine.docker("create", IMAGES[0])
    result = host.done("xinference_cleanup", ask, "--check")
    assert f"the image {IMAGES[0]} stays: a container uses it" in result["notes"]
    assert [row["what"] for row in result["removed"]] == ["release", "blobs"]
    engine.docker("rm", container)

    result = host.done("xinference_cleanup", ask)
    (image,) = [row for row in result["removed"] if row["what"] == "image"]
    # Its lower layers are those of the others, too.
    assert image["name"] == IMAGES[0] and image["bytes"] == 0
    assert not engine.image(IMAGES[0]) and engine.image(IMAGES[1]) and engine.image(IMAGES[2])
    assert engine.image("somebody/else:1")
    assert host.done("xinference_cleanup", ask)["changed"] is False

    # What went comes back; what was there before anybody shipped is not ours to remove.
    options = {"bundle": bundle, "root": root, "backend": "docker", "images": IMAGES[:1]}
    assert host.done("xinference_ship", {**options, "docker_host": engine.address})["images"][0]["action"] == "load"
