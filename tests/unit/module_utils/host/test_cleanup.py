# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cleaning up a real directory: what goes, what stays, what is free afterwards, and what a kill in between leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.loaded import (
    LoadedImage,
    forget_loaded,
    loaded_images,
    note_loaded,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store, StoreError
from ansible_collections.airgap.xinference.plugins.module_utils.host import cleanup, definition, inspection, release
from ansible_collections.airgap.xinference.plugins.module_utils.host.cleanup import Cleaned, clean
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import DockerError
from ansible_collections.airgap.xinference.plugins.module_utils.host.retention import RetentionError

SHARED = b"tokens" * 2000
WEIGHTS = 40000


def wheel(directory: Path, name: str, content: str) -> None:
    directory.mkdir(parents=True)
    with zipfile.ZipFile(str(directory / f"{name}-1.0-py3-none-any.whl"), "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{name}/__init__.py", (2026, 1, 1, 0, 0, 0)), content)


class Host:
    """A host that was shipped to and served several times: one model whose weights change, and a file that does not."""

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, place / "root"
        self.bundles: List[Bundle] = []
        self.releases: List[str] = []

    def ship(self, version: int) -> Bundle:
        """Bring a version to the host."""
        source = self.place / f"source{version}"
        (source / "model").mkdir(parents=True)
        (source / "model/weights.bin").write_bytes(bytes([version]) * WEIGHTS)
        (source / "model/tokens").write_bytes(SHARED)
        wheel(source / "host", "kindly", f"VERSION = {version}\n")
        wheel(source / "server", "serving", f"VERSION = {version}\n")
        requests = [Request("models", "m", str(source / "model"))]
        requests += [Request("wheels", name, str(source / name)) for name in ("host", "server")]
        write_bundle(source / "bundle", requests)
        bundle = Bundle.open(source / "bundle")
        answer = keep(Store(self.root), wanted_of(bundle))
        while answer.missing:
            for digest in answer.missing:
                (self.root / "partial" / digest[7:]).write_bytes(bundle.blob_path(digest).read_bytes())
            answer = keep(Store(self.root), wanted_of(bundle))
        self.bundles.append(bundle)
        return bundle

    def serve(self, bundle: Bundle) -> str:
        """Make the environment and the release of a version, and put that in force."""
        found = bundle.find("wheels", "server")
        assert found
        venv = self.root / "venvs" / found.digest[7:19]
        (venv / "bin").mkdir(parents=True)
        (venv / "bin/python").symlink_to("/usr/bin/python3")
        (venv / "lib.so").write_bytes(b"x" * 10000)
        (venv / ".complete").write_text("{}")
        venv.with_name(f"{venv.name}.lock").touch()
        service = {
            "name": "xinference",
            "manager": "supervisord",
            "command": [f"{venv}/bin/python", f"{venv}/bin/xinference-local"],
            "environment": {"PATH": f"{venv}/bin"},
            "directory": str(self.root / "home"),
            "host": "127.0.0.1",
            "port": 9,
            "stop_timeout": 1,
        }
        artifacts = json.loads((self.root / "state/artifacts.json").read_text())
        files = definition.files(self.root, service, [{"model_uid": "m"}], artifacts)
        release.make(self.root, files)
        self.releases.append(release.identity(files))
        release.switch(self.root, self.releases[-1])
        return self.releases[-1]

    def tree(self, version: int) -> Path:
        found = self.bundles[version - 1].find("models", "m")
        assert found
        return self.root / "models/m" / found.digest[7:19]

    def venv(self, version: int) -> Path:
        found = self.bundles[version - 1].find("wheels", "server")
        assert found
        return self.root / "venvs" / found.digest[7:19]

    def clean(self, number: int = 2, **options: Any) -> Cleaned:
        return clean(Store(self.root, options.pop("dry_run", False)), number, **options)

    def is_right(self) -> bool:
        """Whether the release in force and the one before have all they name, and nothing is to be done about them."""
        for name in release.history(self.root):
            directory = self.root / release.RELEASES / name
            listed = json.loads((directory / "artifacts.json").read_text())
            for kind in ("models", "wheels"):
                for entry in listed[kind].values():
                    assert Path(entry["path"]).is_dir(), f"{name} misses {entry['path']}"
            service = json.loads((directory / "service.json").read_text())
            assert (Path(service["command"][0]).parents[1] / ".complete").exists(), f"{name} misses its environment"
        for version in (len(self.bundles) - 1, len(self.bundles)):
            tree = self.tree(version)
            assert (tree / "weights.bin").read_bytes() == bytes([version]) * WEIGHTS
            assert (tree / "tokens").read_bytes() == SHARED
        return not keep(Store(self.root, dry_run=True), wanted_of(self.bundles[-1])).changed

    def everything(self) -> Set[str]:
        """All paths below the root, without what only the collection's own bookkeeping changes."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.parent.name != "state"}


def wanted_of(bundle: Bundle) -> List[Wanted]:
    return [Wanted(one.kind, one.name, one.digest, bundle.blobs[one.digest]) for one in bundle.artifacts]


@pytest.fixture(scope="module", autouse=True)
def no_sync() -> Iterator[None]:
    """Nothing here goes down with the power, and waiting for the disk of a busy machine takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sync", lambda: None)
        patch.setattr(os, "fsync", lambda _file: None)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """Four versions, all of which were served."""
    host = Host(tmp_path_factory.mktemp("made"))
    for version in range(1, 5):
        host.serve(host.ship(version))
    return host


@pytest.fixture
def host(made: Host, tmp_path: Path) -> Host:
    """A copy of it for each test, links among its files kept; nothing in it names the place it was made in."""
    return copied(made, tmp_path)


def copied(made: Host, place: Path) -> Host:
    host = Host(place)
    host.bundles, host.releases = made.bundles, made.releases
    # Releases name absolute paths, so that the place of a copy has to be exchanged for the one that was copied.
    subprocess.run(["cp", "-a", str(made.root), str(host.root)], check=True)
    for path in host.root.rglob("*.json"):
        if path.is_file():
            status = path.stat()
            path.chmod(0o644)
            path.write_text(path.read_text().replace(f"{made.root}/", f"{host.root}/"))
            path.chmod(status.st_mode)
    keep(Store(host.root), wanted_of(host.bundles[-1]))
    for name in host.releases:
        os.utime(str(host.root / "releases" / name), ns=(0, host.releases.index(name)))
    return host


def used_bytes(root: Path) -> int:
    """What the files below a directory take on the disk, each once."""
    seen: Dict[Any, int] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        if not path.is_dir() or path.is_symlink():
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def test_what_only_old_releases_name_goes_and_so_many_bytes_are_free(host: Host) -> None:
    rehearsed = host.clean(dry_run=True)
    before, paths = used_bytes(host.root), host.everything()
    cleaned = host.clean()
    assert (cleaned.rows, cleaned.kept) == (rehearsed.rows, rehearsed.kept)
    assert cleaned.kept == host.releases[:1:-1] and cleaned.notes == []
    assert host.is_right() and release.history(host.root) == cleaned.kept
    # What the collection wrote about it into its state is not counted.
    assert abs(before - used_bytes(host.root) - cleaned.freed_bytes) <= 8192
    gone = paths - host.everything()
    assert {f"releases/{name}" for name in host.releases[:2]} <= gone
    for version in (1, 2):
        assert not host.tree(version).exists() and not host.venv(version).exists()
    models = [row for row in cleaned.rows if row.what == "model"]
    assert [row.bytes for row in models] == [40960, 40960]
    # Two libraries with their listings, and the link to the one in use.
    assert len(list((host.root / "lib").iterdir())) == 5
    assert (host.root / "blobs/sha256" / hash_bytes(SHARED)[7:]).stat().st_nlink == 3
    assert host.clean().rows == [] and host.clean().summary(False) == "nothing to clean up"


def test_the_rows_say_it_for_people(host: Host) -> None:
    cleaned = host.clean(dry_run=True)
    words = "would be free again: 2 releases, 2 environments, 2 models, 4 wheels, 2 libraries, 14 blobs"
    assert cleaned.summary(True).endswith(words) and "MiB" not in cleaned.summary(True)
    assert f"model        models/m/{host.tree(1).name}" in cleaned.listing()
    assert len(cleaned.listing().splitlines()) == len(cleaned.rows)


def test_a_dry_run_changes_nothing_at_all(host: Host) -> None:
    before = {str(path): path.lstat().st_mtime_ns for path in host.root.rglob("*")}
    assert host.clean(dry_run=True).rows
    assert before == {str(path): path.lstat().st_mtime_ns for path in host.root.rglob("*")}


def test_a_host_without_anything_has_nothing_to_go(tmp_path: Path) -> None:
    assert clean(Store(tmp_path / "root"), 3).rows == [] and not (tmp_path / "root").exists()


def test_after_a_rollback_the_release_before_it_stays(host: Host) -> None:
    release.switch(host.root, host.releases[0])
    cleaned = host.clean()
    assert cleaned.kept == [host.releases[0], host.releases[3]]
    assert host.tree(1).is_dir() and host.tree(4).is_dir() and not host.tree(2).exists()


def test_what_was_shipped_last_stays_even_unserved(host: Host) -> None:
    host.bundles = list(host.bundles)
    host.ship(5)
    cleaned = host.clean()
    assert host.tree(5).is_dir() and host.releases[3] in cleaned.kept
    assert not keep(Store(host.root), wanted_of(host.bundles[-1])).changed


def test_what_is_not_ours_stays(host: Host) -> None:
    mine = [host.root / name for name in ("models/m/by-hand/x", "models/mine/0123456789ab/x", "venvs/mine/x", "x")]
    mine += [host.root / "blobs/sha256/README", host.root / "partial/notes.txt", host.root / "lib/mine/x"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    cleaned = host.clean()
    assert all(path.read_text() == "mine" for path in mine)
    assert cleaned.notes == ["models/mine/0123456789ab stays: shipping did not make it"]


def test_links_out_of_the_root_are_not_followed(host: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere/0123456789ab"
    elsewhere.mkdir(parents=True)
    (elsewhere / "precious").write_text("precious")
    (host.root / "models/linked").symlink_to(elsewhere.parent)
    (host.root / "models/m/ffffffffffff").symlink_to(elsewhere)
    (host.tree(1) / "out").symlink_to(elsewhere)
    host.clean()
    assert (elsewhere / "precious").read_text() == "precious" and not host.tree(1).exists()


# --- what is in use ---------------------------------------------------------------------------------------------------


def test_a_launched_model_stays_with_everything_it_is_made_of(host: Host) -> None:
    payload = {"model_path": str(host.tree(1)), "vad_model": None}
    entries = {"m": {"fingerprint": "f", "payload": payload}}
    (host.root / "state/launched.json").write_text(json.dumps({"format": 1, "models": entries}))
    cleaned = host.clean()
    assert (host.tree(1) / "weights.bin").is_file() and not host.tree(2).exists()
    assert cleaned.notes == [f"models/m/{host.tree(1).name} stays: the record of launched models uses it"]
    (host.root / "state/launched.json").unlink()
    assert [row.what for row in host.clean().rows] == ["model", "blobs"]


def test_a_model_of_a_container_is_known_by_its_path_in_there(host: Host) -> None:
    options = {"deep": [{"cache": f"/models/m/{host.tree(1).name}/tokens"}]}
    entries = {"m": {"fingerprint": "f", "payload": options}}
    (host.root / "state/launched.json").write_text(json.dumps({"format": 1, "models": entries}))
    host.clean()
    assert host.tree(1).is_dir()


HOLD = "import mmap, os, sys; file = os.open(sys.argv[1], os.O_RDONLY); "
KEEP = "print(); sys.stdout.flush(); sys.stdin.read()"


@pytest.fixture(params=["open", "mapped"])
def holder(request: pytest.FixtureRequest, host: Host) -> Iterator[subprocess.Popen]:
    """A process that uses a file of the oldest model, of which no list knows."""
    mapped = "m = mmap.mmap(file, 0, prot=mmap.PROT_READ); os.close(file); " if request.param == "mapped" else ""
    command = [sys.executable, "-c", HOLD + mapped + KEEP, str(host.tree(1) / "weights.bin")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def test_a_model_that_a_process_has_open_or_mapped_stays(host: Host, holder: subprocess.Popen) -> None:
    cleaned = host.clean()
    assert cleaned.notes[0].startswith(f"models/m/{host.tree(1).name} stays: process {holder.pid} (")
    assert (host.tree(1) / "weights.bin").is_file() and not host.tree(2).exists()
    holder.kill()
    holder.wait()
    assert any(row.name == f"models/m/{host.tree(1).name}" for row in host.clean().rows)


def test_a_shared_file_in_use_keeps_no_old_directory(host: Host) -> None:
    command = [sys.executable, "-c", HOLD + KEEP, str(host.tree(4) / "tokens")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert host.clean().notes == [] and not host.tree(1).exists()
        process.kill()


def test_the_environment_of_a_process_stays(host: Host) -> None:
    python = host.venv(1) / "bin/python"
    with subprocess.Popen([str(python), "-c", "import time; time.sleep(60)"]) as process:
        deadline = time.monotonic() + 10
        while host.venv(1).name not in Path(f"/proc/{process.pid}/cmdline").read_text():
            assert time.monotonic() < deadline
        cleaned = host.clean()
        process.kill()
    assert (host.venv(1) / ".complete").exists() and not host.venv(2).exists()
    assert f"venvs/{host.venv(1).name} stays: process {process.pid} (" in cleaned.notes[0]


def test_the_release_of_the_server_that_runs_stays(host: Host) -> None:
    (host.root / "run").mkdir()
    (host.root / "run/server.json").write_text(json.dumps({"release": host.releases[0]}))
    assert host.releases[0] not in host.clean(dry_run=True).kept
    environment = {"XINFERENCE_SITE_ROOT": str(host.root)}
    with subprocess.Popen(["sleep", "60"], env=environment) as process:
        cleaned = host.clean()
        process.kill()
    assert host.releases[0] in cleaned.kept and host.tree(1).is_dir() and host.venv(1).is_dir()
    assert not host.tree(2).exists()


def test_an_environment_that_is_being_built_stays(host: Host) -> None:
    building = host.root / "venvs/0123456789ab"
    for path in (building, building.with_name("0123456789ab.k3j2")):
        path.mkdir()
    with building.with_name("0123456789ab.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        host.clean()
        assert building.is_dir() and building.with_name("0123456789ab.k3j2").is_dir()
    cleaned = host.clean()
    assert {row.what for row in cleaned.rows} == {"environment", "leftovers"}
    assert not building.exists() and not building.with_name("0123456789ab.k3j2").exists()


def test_a_plugin_of_the_docker_client_stays(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "PLUGIN_PLACES", (tmp_path / "docker",))
    tool = host.root / "tools/docker-compose/0123456789ab/docker-compose"
    tool.parent.mkdir(parents=True)
    os.link(str(host.tree(1) / "weights.bin"), str(tool))
    (tmp_path / "docker/cli-plugins").mkdir(parents=True)
    (tmp_path / "docker/cli-plugins/docker-compose").symlink_to(tool)
    assert host.clean().notes == ["tools/docker-compose/0123456789ab stays: the Docker client uses it"]
    assert tool.exists()


# --- what is being received -------------------------------------------------------------------------------------------


def test_what_a_shipping_left_unfinished_is_kept_and_what_nobody_wants_goes(host: Host) -> None:
    host.bundles = list(host.bundles)
    source = Host(host.place / "other")
    bundle = source.ship(9)
    answer = keep(Store(host.root), wanted_of(bundle))
    for digest in answer.missing:
        (host.root / "partial" / digest[7:]).write_bytes(bundle.blob_path(digest).read_bytes())
    answer = keep(Store(host.root), wanted_of(bundle))
    unfinished = max(answer.missing, key=lambda digest: answer.missing[digest])
    (host.root / "partial" / unfinished[7:]).write_bytes(b"half of it")
    stale = host.root / "partial" / ("0" * 64)
    stale.write_bytes(b"of nobody")
    (host.root / "partial/pack-0001.tar").write_bytes(b"pack")
    cleaned = host.clean()
    assert (host.root / "partial" / unfinished[7:]).exists() and not stale.exists()
    assert (host.root / "partial/pack-0001.tar").exists()
    assert [row.count for row in cleaned.rows if row.what == "unfinished"] == [1]
    again = keep(Store(host.root), wanted_of(bundle))
    assert set(again.missing) == set(answer.missing)


def test_whoever_ships_to_the_host_is_waited_for_and_named(host: Host) -> None:
    with (host.root / "state/receiving.lock").open("w") as session:
        json.dump({"controller": "ctl-7", "user": "ops", "pid": 4711, "since": "today", "token": "t"}, session)
        session.flush()
        fcntl.flock(session, fcntl.LOCK_SH)
        with pytest.raises(StoreError, match=r"ctl-7.*and clean up then"):
            host.clean()
        assert host.clean(dry_run=True).rows
    assert host.clean().rows


def test_the_store_and_the_releases_are_held_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    held: List[str] = []

    def look(*_anything: Any) -> Any:
        for name in ("store.lock", "service.lock", "receiving.lock"):
            with (host.root / "state" / name).open("r") as lock, pytest.raises(OSError, match="unavailable"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(name)
        raise RetentionError("enough")

    monkeypatch.setattr(cleanup, "inspect", look)
    with pytest.raises(RetentionError, match="enough"):
        host.clean()
    assert len(held) == 3


# --- lists that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state/artifacts.json", "state/arriving.json", "state/launched.json"])
@pytest.mark.parametrize(
    "content", ["{ not json", '{"models": 7}', '[{"kind": "models"}]', '{"a": {"b": {"digest": "x"}}}']
)
def test_a_list_that_makes_no_sense_is_no_reason_to_remove_anything(host: Host, name: str, content: str) -> None:
    if name == "state/launched.json" and content != "{ not json":
        content = "[" * 100000
    (host.root / name).write_text(content)
    before = host.everything()
    with pytest.raises(RetentionError, match=f"{name} cannot be read"):
        host.clean()
    assert host.everything() == before


def test_a_release_in_force_that_makes_no_sense_keeps_everything(host: Host) -> None:
    path = host.root / "releases" / host.releases[3] / "artifacts.json"
    path.chmod(0o600)
    path.write_text("[]")
    with pytest.raises(RetentionError, match="cannot be read"):
        host.clean()
    path.write_text('{"models": {"m": {"digest": "../../etc"}}}')
    with pytest.raises(RetentionError, match="is not a digest"):
        host.clean()


# --- killed in between ------------------------------------------------------------------------------------------------

CHANGES = ("os.remove", "os.rename", "os.rmdir")


def clean_and_die(root: Path, change: int) -> bool:
    """Clean up in a process of its own that dies right before its so-many-th change; whether it died."""
    child = os.fork()
    if child == 0:
        left = [change]

        def watch(event: str, arguments: Any) -> None:
            if event in CHANGES:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            clean(Store(root), 2)
        finally:
            os._exit(0)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_what_the_next_run_completes(made: Host, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    once = copied(made, tmp_path / "once")
    once.clean()
    expected = once.everything()
    moments = 0
    for change in range(0, 1000, 5):
        place = tmp_path / str(change)
        place.mkdir()
        host = copied(made, place)
        died = clean_and_die(host.root, change)
        assert host.is_right(), f"after {change} changes"
        host.clean()
        assert host.everything() == expected, f"after {change} changes"
        shutil.rmtree(str(place))
        moments += 1
        if not died:
            break
    assert moments > 10


# --- images -----------------------------------------------------------------------------------------------------------

DOCKER = """#!{python}
import json, pathlib, sys
place = pathlib.Path({place!r})
state = json.loads((place / "engine.json").read_text())
words = sys.argv[1:]
with (place / "asked").open("a") as asked:
    asked.write(" ".join(words) + "\\n")
if state.get("down"):
    sys.stderr.write("Cannot connect to the Docker daemon"); sys.exit(1)
if words[0] == "ps":
    print("\\n".join(one["Id"] for one in state["containers"]))
elif words[:2] == ["image", "ls"]:
    print("\\n".join(one["Id"] for one in state["images"]))
elif words[0] == "inspect":
    print(json.dumps([one for one in state["images"] + state["containers"] if one["Id"] in words]))
elif words[:2] == ["image", "rm"]:
    if words[2] in state.get("conflict", []):
        sys.stderr.write("conflict: image has dependent child images"); sys.exit(1)
    for one in state["images"]:
        one["RepoTags"] = [tag for tag in one["RepoTags"] if tag != words[2]]
    state["images"] = [one for one in state["images"] if one["RepoTags"] and one["Id"] != words[2]]
    (place / "engine.json").write_text(json.dumps(state))
"""


class Engine:
    """An engine as its client shows it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        (place / "docker").write_text(DOCKER.format(python=sys.executable, place=str(place)))
        (place / "docker").chmod(0o755)

    def has(self, *images: Dict[str, Any], **more: Any) -> None:
        (self.place / "engine.json").write_text(json.dumps({"images": images, "containers": [], **more}))

    def tags(self) -> List[str]:
        state = json.loads((self.place / "engine.json").read_text())
        return [tag for one in state["images"] for tag in one["RepoTags"]]

    def removed(self) -> List[str]:
        asked = (self.place / "asked").read_text().splitlines() if (self.place / "asked").exists() else []
        return [line.split()[-1] for line in asked if line.startswith("image rm")]


def loaded(version: int, **layers: int) -> LoadedImage:
    config = hash_bytes(f"config {version}".encode())
    return LoadedImage(f"x/server:{version}", config, config, hash_bytes(f"manifest {version}".encode()), layers)


def in_engine(image: LoadedImage, *tags: str) -> Dict[str, Any]:
    return {"Id": image.id, "RepoTags": list(tags or [image.reference]), "RootFS": {"Layers": sorted(image.layers)}}


@pytest.fixture
def engine(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Releases 3 and 4 name images 3 and 4; shipping loaded 1 to 4."""
    found = Engine(tmp_path / "engine")
    monkeypatch.setenv("PATH", f"{found.place}:{os.environ['PATH']}")
    for version in range(1, 5):
        image = loaded(version, base=1000, **{f"top{version}": version})
        note_loaded(host.root / "state", image)
        for listing in [host.root / "releases" / host.releases[version - 1] / "artifacts.json"]:
            content = json.loads(listing.read_text())
            entry = {"digest": image.digest, "image_id": image.image_id, "reference": image.reference}
            content["images"] = {f"server-{version}": entry}
            listing.chmod(0o644)
            listing.write_text(json.dumps(content))
    found.has(*(in_engine(image) for image in loaded_images(host.root / "state")))
    return found


def images_of(cleaned: Cleaned) -> Dict[str, int]:
    return {row.name: row.bytes for row in cleaned.rows if row.what == "image"}


def test_images_that_no_kept_release_names_go(host: Host, engine: Engine) -> None:
    assert images_of(host.clean(dry_run=True)) == {"x/server:1": 1, "x/server:2": 2}
    assert engine.removed() == []
    assert images_of(host.clean()) == {"x/server:1": 1, "x/server:2": 2}
    assert engine.removed() == ["x/server:1", "x/server:2"] and engine.tags() == ["x/server:3", "x/server:4"]
    assert [one.reference for one in loaded_images(host.root / "state")] == ["x/server:3", "x/server:4"]
    assert host.clean().rows == []


def test_foreign_images_and_names_stay(host: Host, engine: Engine) -> None:
    first, second = loaded_images(host.root / "state")[:2]
    foreign = {"Id": "sha256:f", "RepoTags": ["nginx:1"], "RootFS": {"Layers": ["base"]}}
    engine.has(foreign, in_engine(first, "somebody:else"), in_engine(second, second.reference, "mine:2"))
    cleaned = host.clean()
    # The second one only loses our name, and so nothing is free.
    assert images_of(cleaned) == {"x/server:2": 0}
    assert engine.tags() == ["nginx:1", "somebody:else", "mine:2"]


def test_an_image_without_a_name_goes_by_its_id(host: Host, engine: Engine) -> None:
    first = loaded_images(host.root / "state")[0]
    engine.has({**in_engine(first), "RepoTags": []})
    assert images_of(host.clean()) == {"x/server:1": 1001}
    assert engine.removed() == [first.id]


def test_an_image_of_a_container_stays(host: Host, engine: Engine) -> None:
    images = loaded_images(host.root / "state")
    container = {"Id": "c", "Name": "/old", "Image": images[0].id, "Mounts": [{"Source": f"{host.root}/models"}]}
    engine.has(*map(in_engine, images), containers=[container])
    cleaned = host.clean()
    assert images_of(cleaned) == {"x/server:2": 2} and "x/server:1 stays: a container uses it" in cleaned.notes[0]
    assert not host.tree(1).exists()


def test_what_a_container_has_mounted_stays(host: Host, engine: Engine) -> None:
    mount = {"Source": str(host.tree(1)), "Destination": "/wheels"}
    engine.has(containers=[{"Id": "c", "Name": "/old", "Image": "sha256:x", "Mounts": [mount]}])
    cleaned = host.clean()
    assert cleaned.notes == [f"models/m/{host.tree(1).name} stays: the container old uses it"]
    assert host.tree(1).is_dir()


def test_an_image_that_the_engine_does_not_give_up_is_told_and_the_rest_goes_on(host: Host, engine: Engine) -> None:
    engine.has(*map(in_engine, loaded_images(host.root / "state")), conflict=["x/server:1"])
    cleaned = host.clean()
    assert images_of(cleaned) == {"x/server:2": 2}
    assert cleaned.notes == ["the image x/server:1 stays: conflict: image has dependent child images"]
    assert [one.reference for one in loaded_images(host.root / "state")] == [f"x/server:{n}" for n in (1, 3, 4)]


def test_an_engine_that_cannot_be_asked_is_no_reason_to_remove_anything(host: Host, engine: Engine) -> None:
    engine.has(down=True)
    before = host.everything()
    with pytest.raises(DockerError, match="cannot be asked what it uses: Cannot connect"):
        host.clean()
    assert host.everything() == before


def test_where_no_container_was_ever_served_no_engine_is_asked(host: Host, tmp_path: Path, monkeypatch: Any) -> None:
    found = Engine(tmp_path / "engine")
    monkeypatch.setenv("PATH", f"{found.place}:{os.environ['PATH']}")
    host.clean()
    assert not (found.place / "asked").exists()


def test_the_record_of_images(tmp_path: Path) -> None:
    assert loaded_images(tmp_path) == []
    one, two = loaded(1, base=1), loaded(2)
    for image in (one, two, one):
        note_loaded(tmp_path, image)
    assert loaded_images(tmp_path) == [one, two]
    forget_loaded(tmp_path, [(one.reference, one.id), ("other", "id")])
    assert loaded_images(tmp_path) == [two]
    (tmp_path / "images.json").write_text('{"images": [{"strange": 1}]}')
    assert loaded_images(tmp_path) == []
