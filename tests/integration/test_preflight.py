# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Preflight for real: everything that is wrong with a bundle, an inventory and a host in one message."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import (
    WHEELS_GLIBC,
    WHEELS_PLATFORM,
    WHEELS_PYTHON,
)
from sites import Site, make_bundle, make_model

TAG = f"cp3{sys.version_info.minor}"
MODEL = {
    "model_uid": "minilm",
    "model_name": "bce-embedding-base_v1",
    "model_type": "embedding",
    "model_engine": "sentence_transformers",
    "source": {"path": "/data/alpha"},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, and a bundle for this very machine."""
    place = tmp_path_factory.mktemp("material")
    make_model(place / "alpha", {"weights.bin": 300_000, "config.json": 50})
    marks = {WHEELS_PYTHON: TAG, WHEELS_PLATFORM: f"linux_{os.uname().machine}", WHEELS_GLIBC: "2.17"}
    make_bundle(place, {"alpha": place / "alpha"}, marks)
    return place


@pytest.fixture
def bundle(material: Path, tmp_path: Path) -> Path:
    shutil.copytree(material / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, {"ansible_connection": "local", "ansible_python_interpreter": sys.executable})


@pytest.fixture
def other_program() -> Iterator[int]:
    """A port on which somebody else's program listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None and time.monotonic() < deadline, "the other program does not listen"
                time.sleep(0.05)
            yield port
        finally:
            process.kill()


def preflight(site: Site, bundle: Path, *arguments: str, **options: Any) -> Dict[str, Any]:
    defaults = {"bundle": str(bundle), "root": str(site.root), "models": [MODEL], "port": 1}
    return site.run("xinference_preflight", {**defaults, **options}, *arguments)


def weights(bundle: Path) -> Path:
    """The largest blob."""
    return max((bundle / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=["run", "check"])
def test_a_host_that_is_ready_passes_and_stays_as_it_was(site: Site, bundle: Path, arguments: List[str]) -> None:
    result = preflight(site, bundle, *arguments)
    assert not result.get("failed"), result["msg"]
    assert (result["changed"], result["findings"]) == (False, []) and not site.root.exists()


@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=["run", "check"])
def test_everything_that_is_wrong_is_in_one_message(
    site: Site, bundle: Path, other_program: int, tmp_path: Path, arguments: List[str]
) -> None:
    blob = weights(bundle)
    with blob.open("r+b") as file:
        file.write(b"!")
    (tmp_path / "site").write_text("in the way")
    result = preflight(
        site,
        bundle,
        *arguments,
        port=other_program,
        python="python-not-here",
        gpus=[0],
        models=[
            MODEL,
            {**MODEL, "source": {"path": "/data/absent"}},
            {**MODEL, "model_uid": "a/b", "modle_name": "x", "gpus": [5]},
            {**MODEL, "model_uid": "chat-rep2"},
            {**MODEL, "model_uid": "x" * 101},
        ],
    )
    message = result["msg"].partition("msg:")[0]
    expected = [
        blob.name,
        "models/alpha: weights.bin",
        "same model_uid",
        "absent",
        "a/b",
        "modle_name; did you mean model_name",
        "GPU 5",
        "chat-rep2",
        "101 characters",
        "is not a directory",
        f"127.0.0.1:{other_program}",
        "http.server",
        "python-not-here",
        "nvidia-smi",
        "Nothing was changed",
    ]
    assert result["failed"] and [text for text in expected if text not in message] == []
    assert (tmp_path / "site").read_text() == "in the way"


@pytest.mark.parametrize("harm", ["truncated", "missing", "manifest"])
def test_a_bundle_that_is_not_whole_is_refused_with_the_file_named(site: Site, bundle: Path, harm: str) -> None:
    blob = weights(bundle)
    if harm == "truncated":
        os.truncate(blob, 1000)
    elif harm == "missing":
        blob.unlink()
    else:
        blob = next(path for path in (bundle / "blobs/sha256").iterdir() if b'"layers"' in path.read_bytes()[:5000])
        blob.write_bytes(blob.read_bytes() + b" ")
    result = preflight(site, bundle)
    assert result["failed"] and blob.name in result["msg"]


def test_a_bundle_that_is_not_there(site: Site, tmp_path: Path) -> None:
    result = preflight(site, tmp_path / "nowhere", models=[{**MODEL, "model_uid": "a/b"}])
    assert result["failed"] and "no such directory" in result["msg"] and "a/b" in result["msg"]


def test_wheels_for_another_python_and_machine(site: Site, material: Path, tmp_path: Path) -> None:
    marks = {WHEELS_PYTHON: "cp399", WHEELS_PLATFORM: "linux_s390x", WHEELS_GLIBC: "2.99"}
    bundle = make_bundle(tmp_path, {"alpha": material / "alpha"}, marks)
    result = preflight(site, bundle)
    assert result["failed"] and "4 problems" not in result["msg"] and "3 problems" in result["msg"]
    for text in ("Python 3.99", "linux_s390x", "glibc 2.99"):
        assert text in result["msg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root")
def test_too_little_disk_is_told_with_what_is_needed_and_free(site: Site, material: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "alpha", {"weights.bin": 8 * 1024 * 1024})
    bundle = make_bundle(tmp_path, {"alpha": model})
    site.root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(site.root)], check=False)
    if mounted.returncode:
        pytest.skip("this machine cannot mount a small disk")
    try:
        result = preflight(site, bundle)
        assert result["failed"] and "72.0 MiB for" in result["msg"] and "4.0 MiB free" in result["msg"]
        shipped = site.run("xinference_ship", {"bundle": str(bundle), "root": str(site.root), "models": [MODEL]})
        assert shipped["failed"] and "Not enough disk" in shipped["msg"] and "nothing was sent" in shipped["msg"]
    finally:
        subprocess.run(["umount", str(site.root)], check=True)


def test_a_simulated_gpu_is_found_by_number_and_uuid(site: Site, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-0f, 580.65.06, Simulated GPU'\n")
    program.chmod(0o755)
    site.environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert preflight(site, bundle, gpus=["0", "GPU-0f"], models=[{**MODEL, "gpus": [0]}])["findings"] == []
    result = preflight(site, bundle, gpus=["1"])
    assert result["failed"] and "0 (Simulated GPU)" in result["msg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try to be somebody else")
def test_a_root_directory_of_somebody_else(site: Site, bundle: Path, tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents):
        if "pytest-of" in str(directory):
            directory.chmod(0o755)
    site.variables["ansible_python_interpreter"] = "/usr/bin/python3"
    site.variables.update(ansible_become=True, ansible_become_method="su", ansible_become_user="nobody")
    site.variables["ansible_become_flags"] = "-s /bin/sh"
    result = preflight(site, bundle, root=str(tmp_path / "site"))
    assert result["failed"] and "belongs to root" in result["msg"] and "ansible_become" in result["msg"]
