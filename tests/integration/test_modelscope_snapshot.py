# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""ModelScope's real client, through the module, against a stand-in for the hub that cuts and corrupts on demand."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import pytest
from ad_hoc import run_module
from hub import Hub, Repo

COMMIT = "1" * 40
NEXT = "2" * 40
WEIGHTS = random.Random(1).randbytes(3_000_000)
FILES = {
    "config.json": b'{"hidden_size": 8}',
    "model.safetensors": WEIGHTS,
    "onnx/model.onnx": b"onnx" * 1000,
    "empty.txt": b"",
}
Fetch = Callable[..., Dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with one model."""
    with Hub() as found:
        found.repos["org/tiny"] = Repo({COMMIT: dict(FILES)}, {"master": COMMIT})
        yield found


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
    """A function that runs the module on that model, with a directory and a home of its own."""

    def run(check: bool = False, client: Optional[Dict[str, str]] = None, **arguments: Any) -> Dict[str, Any]:
        return run_module(
            "modelscope_snapshot",
            {"model": "org/tiny", "path": str(tmp_path / "tiny"), "endpoint": hub.endpoint, "attempts": 1, **arguments},
            check=check,
            environment={
                "MODELSCOPE_HOME": str(tmp_path / "home"),
                "MODELSCOPE_CACHE": str(tmp_path / "client-cache"),
                "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
                **(client or {}),
            },
        )

    return run


def content(directory: Path) -> Dict[str, bytes]:
    """All files below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_fetches_everything_and_pins_the_commit(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    result = fetch()
    assert not result["failed"], result
    assert result["changed"] and result["revision"] == COMMIT
    assert sorted(result["fetched"]) == sorted(FILES)
    assert content(tmp_path / "tiny") == FILES
    assert result["unchecked"] == [] and result["hashed_bytes"] == 0
    assert result["size"] == result["fetched_bytes"] == sum(map(len, FILES.values()))


def test_second_run_makes_no_file_request_and_hashes_nothing(hub: Hub, fetch: Fetch) -> None:
    fetch()
    hub.forget()
    again = fetch()
    assert not again["changed"] and again["fetched"] == [] and again["hashed_bytes"] == 0
    assert hub.served == [] and hub.listings == 1


def test_a_pinned_commit_that_is_complete_asks_the_hub_nothing(hub: Hub, fetch: Fetch) -> None:
    fetch(revision=COMMIT)
    hub.forget()
    again = fetch(revision=COMMIT)
    assert not again["changed"] and again["revision"] == COMMIT
    assert (hub.served, hub.listings) == ([], 0)


def test_a_cut_download_is_resumed_by_the_next_run(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = [1_000_000, 500_000]
    first = fetch()
    assert first["failed"] and "model.safetensors" in first["msg"] and "run again" in first["msg"]
    assert "config.json" in content(tmp_path / "tiny")
    got = hub.bytes_of("model.safetensors")
    assert got == 1_500_000
    hub.forget()
    second = fetch()
    assert not second["failed"] and second["fetched"] == ["model.safetensors"]
    assert hub.bytes_of("model.safetensors") < len(WEIGHTS) - 1_000_000
    assert [path for path, _first, _count in hub.served] == ["model.safetensors"]
    assert content(tmp_path / "tiny") == FILES


def test_a_cut_connection_is_resumed_within_one_run(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = [2_000_000]
    assert not fetch()["failed"]
    assert content(tmp_path / "tiny") == FILES
    assert hub.bytes_of("model.safetensors") <= len(WEIGHTS) + 100_000
    assert [first for path, first, _count in hub.served if path == "model.safetensors"][1] > 0


def test_a_large_file_in_parallel_parts_is_resumed_part_by_part(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    client = {
        "MODELSCOPE_DOWNLOAD_PARALLEL_WORKERS": "4",
        "MODELSCOPE_DOWNLOAD_PARALLEL_THRESHOLD_MB": "1",
        "MODELSCOPE_DOWNLOAD_PART_SIZE_MB": "4",
    }
    large = WEIGHTS * 4
    hub.repos["org/tiny"].revisions[COMMIT]["model.safetensors"] = large
    hub.cut["model.safetensors"] = [2_500_000, 2_500_000, 0, 0, 0, 0]
    assert fetch(client=client)["failed"]
    kept = sum(part.stat().st_size for part in (tmp_path / "tiny").glob("model.safetensors_*"))
    assert kept > 0
    hub.forget()
    hub.cut.clear()
    assert not fetch(client=client)["failed"]
    assert content(tmp_path / "tiny") == {**FILES, "model.safetensors": large}
    assert hub.bytes_of("model.safetensors") == len(large) - kept


def test_wrong_bytes_from_the_hub_are_noticed_and_fetched_again(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.corrupt["model.safetensors"] = 1
    assert not fetch()["failed"]
    assert content(tmp_path / "tiny") == FILES
    assert hub.bytes_of("model.safetensors") == 2 * len(WEIGHTS)


def test_bytes_that_stay_wrong_are_an_error_that_names_the_file(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.listed_hash["model.safetensors"] = hashlib.sha256(b"something else").hexdigest()
    result = fetch()
    assert result["failed"] and "model.safetensors" in result["msg"]
    assert "model.safetensors" not in content(tmp_path / "tiny")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_file_damaged_on_disk_is_found_and_fetched_again(hub: Hub, fetch: Fetch, tmp_path: Path, damage: str) -> None:
    fetch()
    hub.forget()
    weights = tmp_path / "tiny" / "model.safetensors"
    if damage == "flip":
        with weights.open("r+b") as handle:
            handle.seek(1_234_567)
            handle.write(bytes([WEIGHTS[1_234_567] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(WEIGHTS[:-1])
    else:
        weights.unlink()
    result = fetch()
    assert result["fetched"] == ["model.safetensors"] and not result["failed"]
    assert result["damaged"] == ([] if damage == "remove" else ["model.safetensors"])
    assert content(tmp_path / "tiny") == FILES
    assert {path for path, _first, _count in hub.served} == {"model.safetensors"}


def test_a_branch_that_moved_fetches_what_differs_and_removes_what_is_gone(
    hub: Hub, fetch: Fetch, tmp_path: Path
) -> None:
    fetch()
    hub.forget()
    newer = {"config.json": b'{"hidden_size": 16}', "model.safetensors": WEIGHTS}
    hub.repos["org/tiny"].revisions[NEXT] = newer
    hub.repos["org/tiny"].branches["master"] = NEXT
    result = fetch()
    assert result["revision"] == NEXT and result["fetched"] == ["config.json"]
    assert sorted(result["removed"]) == ["empty.txt", "onnx/model.onnx"]
    assert content(tmp_path / "tiny") == newer and not (tmp_path / "tiny" / "onnx").exists()


def test_patterns(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    result = fetch(ignore_patterns=["onnx/", "*.txt"])
    assert sorted(content(tmp_path / "tiny")) == ["config.json", "model.safetensors"] and result["files"] == 2
    result = fetch(allow_patterns=["*.json"])
    assert result["removed"] == ["model.safetensors"] and sorted(content(tmp_path / "tiny")) == ["config.json"]
    nothing = fetch(allow_patterns=["*.gguf"])
    assert nothing["failed"] and "config.json" in nothing["msg"]


def test_a_hub_without_commit_ids_is_pinned_by_its_list_of_files(hub: Hub, fetch: Fetch) -> None:
    hub.hide_commits = True
    first = fetch()
    assert first["revision"].startswith("master+tree.")
    assert fetch()["revision"] == first["revision"]
    hub.repos["org/tiny"].revisions[COMMIT]["config.json"] = b"{}"
    assert fetch()["revision"] != first["revision"]


def test_check_mode_fetches_nothing_and_tells(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    result = fetch(check=True)
    assert result["changed"] and sorted(result["fetched"]) == sorted(FILES)
    assert result["fetched_bytes"] == sum(map(len, FILES.values()))
    assert hub.served == [] and not (tmp_path / "tiny").exists() and not (tmp_path / "tiny.cache").exists()


def test_unknown_revision_model_and_token_are_clear_errors(hub: Hub, fetch: Fetch) -> None:
    assert "it has: master" in fetch(revision="main")["msg"]
    assert "org/none" in fetch(model="org/none")["msg"]
    hub.token = "secret-of-the-hub"
    refused = fetch()
    assert refused["failed"] and "permission" in refused["msg"]
    accepted = fetch(token=hub.token)
    assert not accepted["failed"] and hub.token not in str(accepted)


def test_a_directory_of_other_origin_is_refused(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes.txt").write_text("mine")
    result = fetch()
    assert result["failed"] and "notes.txt" in result["msg"] and hub.served == []


def test_a_hub_that_lists_paths_outside_is_refused(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    hub.repos["org/tiny"].revisions[COMMIT]["../outside"] = b"x"
    result = fetch()
    assert result["failed"] and "../outside" in result["msg"]
    assert hub.served == [] and not (tmp_path / "outside").exists()


def test_fetched_files_are_not_hashed_again_by_the_bundle(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    cache = tmp_path / "bundle.cache"
    fetched = fetch(cache_dir=str(cache))
    wanted = {"name": "tiny", "path": fetched["directory"], "source": "modelscope:org/tiny", "revision": COMMIT}
    written = run_module("xinference_bundle", {"path": str(bundle), "cache_dir": str(cache), "models": [wanted]})
    assert written["hashed_bytes"] == 0 and written["linked_bytes"] >= len(WEIGHTS)
    info = run_module("xinference_bundle_info", {"path": str(bundle), "verify": True})
    assert info["artifacts"][0]["revision"] == COMMIT and info["hashed_bytes"] == 0
