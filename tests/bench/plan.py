# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure what a bundle of 300 GB in 40,000 files costs before a byte moves, and write build/bench/plan.json.

Everything is real but the content: the files are sparse, their digests invented, and stamps, which are what a run
without anything to do goes by, are written by hand for bundle and store. Measured are, for one host and each in a
process of its own, as Ansible does it:

`open_s`     open the bundle: index, manifests, every blob's size
`select_s`   choose what the host needs
`verify_s`   find that stamps vouch for all of it
`plan_s`     what would have to travel to an empty host
`volumes_s`  which part of which file goes on which of ten sticks
`keep_s`     the host's part of a run with nothing to do: stamps, blobs, trees, catalogue
`missing_s`  the host's answer when it has the manifests and nothing else
`task_s`     the task xinference_ship with nothing to do, `playbook_s` the whole playbook with it (local connection)

`bookkeeping_s` is what a host costs when nothing is to be done (open, select, verify, keep), `planning_s` what it costs
until the first byte can be sent (open, select, verify, missing, plan).
`..._cpu_s` are the processor seconds of the two processes with everything they import, `..._rss_mib` the most memory
they had. On a busy machine the processor seconds are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "integration"))

from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps, hash_bytes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted, keep
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle, blob_path, cache_dir
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import (
    TYPE_MODEL,
    Artifact,
    Blob,
    File,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.pack import (
    index,
    index_entry,
    model_config,
    model_manifest,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.store import Store
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.transfer import transfer_plan, travelling
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.volumes import FAT32_FILE, plan_volumes
from ansible_collections.airgap.xinference.plugins.plugin_utils.bundles import select, verified
from sites import Site, make_wheel

REPORT = HERE.parents[1] / "build" / "bench" / "plan.json"
LIMIT_S = 5.0
FILES, MODELS, TOTAL = 40_000, 40, 300 * 10**9
LISTS = (Blob(hash_bytes(b"index"), 10_000), Blob(hash_bytes(b"manifests"), 12_000_000))
LARGE = 100
"""Files that have nearly all of the bytes, as weights do."""


def sizes() -> List[int]:
    """The sizes of the files: a hundred shards of weights, and a great many small ones."""
    small = [1000 + number % 60_000 for number in range(FILES - LARGE)]
    shard = (TOTAL - sum(small)) // LARGE
    return [shard + number for number in range(LARGE)] + small


def model_files() -> List[List[File]]:
    """The files of every model, with invented digests."""
    models: List[List[File]] = [[] for _model in range(MODELS)]
    for number, size in enumerate(sizes()):
        name = f"shards/model-{number:05}.safetensors" if number < LARGE else f"data/{number % 97:02}/{number:05}.json"
        models[number % MODELS].append(File(name, hash_bytes(b"%d" % number), size))
    return models


def make_bundle(place: Path) -> None:
    """A bundle of real lists and wheels, and of sparse files that stamps vouch for."""
    requests = [
        Request("wheels", name, str(make_wheel(place / f"wheels-{name}", f"{name}lib").parent))
        for name in ("host", "server")
    ]
    write_bundle(place / "bundle", requests)
    bundle = place / "bundle"
    stamps = Stamps(cache_dir(bundle) / "stamps.json")
    entries = json.loads((bundle / "index.json").read_text())["manifests"]
    for number, files in enumerate(model_files()):
        config = model_config(f"m{number}", files, {})
        manifest = model_manifest(files, config, {})
        for content in (config, manifest):
            path = blob_path(bundle, hash_bytes(content))
            path.write_bytes(content)
            stamps.record(path, hash_bytes(content))
        for file in files:
            path = blob_path(bundle, file.digest)
            with path.open("wb") as blob:
                blob.truncate(file.size)
            stamps.record(path, file.digest)
        entries.append(index_entry(f"models/m{number}", TYPE_MODEL, manifest))
    (bundle / "index.json").write_bytes(index(entries))
    stamps.save()


def make_store(place: Path) -> None:
    """The store of a host that has everything, as shipping leaves it."""
    bundle = Bundle.open(place / "bundle")
    store = Store(place / "site")
    store.receive()
    for digest, size in bundle.blobs.items():
        source, target = bundle.blob_path(digest), store.blob_path(digest)
        if source.stat().st_blocks:
            shutil.copyfile(source, target)
        else:
            with target.open("wb") as blob:
                blob.truncate(size)
        target.chmod(0o444)
        store.stamps.record(target, digest)
    store.make_directory(store.state)
    store.stamps.save()
    answer = keep(Store(place / "site"), wishes(chosen(bundle)))
    assert not answer.missing, answer.missing
    fresh = Store(place / "fresh")
    fresh.receive()
    for artifact in bundle.artifacts:
        shutil.copyfile(bundle.blob_path(artifact.digest), fresh.partial_path(artifact.digest))
    assert len(keep(fresh, wishes(chosen(bundle))).missing) > FILES


def entries() -> List[Dict[str, Any]]:
    """The models of the host, as its inventory would have them."""
    return [{"model_uid": f"m{number}", "source": {"path": f"/models/m{number}"}} for number in range(MODELS)]


def chosen(bundle: Bundle) -> List[Artifact]:
    """What the host needs of the bundle."""
    return select(bundle, entries(), "native").artifacts


def wishes(artifacts: List[Artifact]) -> List[Wanted]:
    """The same as the host is asked for it."""
    return [
        Wanted(artifact.kind, artifact.name, artifact.digest, dict(artifact.blobs)[artifact.digest])
        for artifact in artifacts
    ]


def controller(place: Path) -> Dict[str, float]:
    """What the process on the controller does for one host."""
    measured: Dict[str, float] = {}
    bundle = timed(measured, "open_s", lambda: Bundle.open(place / "bundle"))
    artifacts = timed(measured, "select_s", lambda: chosen(bundle))
    damaged, read = timed(measured, "verify_s", lambda: verified(bundle, artifacts, None, print))
    assert (damaged, read) == ([], 0)
    wanted = {blob.digest: blob.size for artifact in artifacts for blob in artifact.blobs}
    steps = timed(measured, "plan_s", lambda: travelling(transfer_plan(wanted, (), {})))
    assert len(steps) == len(wanted) > FILES and sum(step.travels for step in steps) >= TOTAL
    volumes = timed(measured, "volumes_s", lambda: plan_volumes("b", *LISTS, wanted, 29 * 1024**3, FAT32_FILE))
    assert len(volumes.volumes) == 10
    (place / "wishes.json").write_text(json.dumps(wishes(artifacts)))
    return measured


def host(place: Path) -> Dict[str, float]:
    """What the process on the host does when there is nothing to do."""
    measured: Dict[str, float] = {}
    wanted = [Wanted(*wish[:4]) for wish in json.loads((place / "wishes.json").read_text())]
    answer = timed(measured, "keep_s", lambda: keep(Store(place / "site"), wanted))
    assert not answer.changed and not answer.missing and answer.artifacts["models"], answer
    answer = timed(measured, "missing_s", lambda: keep(Store(place / "fresh"), wanted))
    assert len(answer.missing) > FILES and sum(answer.missing.values()) > 0.99 * TOTAL
    return measured


def timed(measured: Dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """Do something and note how many seconds it took."""
    began = time.perf_counter()
    result = work()
    measured[name] = time.perf_counter() - began
    return result


def in_a_process(place: Path, part: str) -> Dict[str, float]:
    """What one part takes in a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--part", part, "--directory", str(place)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: Dict[str, float] = json.loads(answer.stdout)
    return measured


def most_memory() -> float:
    """The most memory this process had, in MiB; of its own, not of the process it was made from."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def ship(place: Path) -> Dict[str, float]:
    """A playbook of the one task, over the local connection, with nothing to do."""
    site = Site(place, {"ansible_connection": "local", "ansible_python_interpreter": sys.executable})
    began = time.perf_counter()
    options = {"bundle": str(place / "bundle"), "root": str(place / "site"), "models": entries()}
    result = site.run("xinference_ship", options)
    assert not result.get("failed"), result["msg"]
    assert (result["changed"], result["sent_bytes"], result["hashed_bytes"]) == (False, 0, 0), result
    return {"task_s": result["seconds"], "playbook_s": time.perf_counter() - began}


def median(rows: List[Dict[str, float]]) -> Dict[str, float]:
    """The median of every measurement."""
    return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


def main() -> int:
    """Run; the exit status says whether the limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to make bundle and store (default: a temporary place)")
    parser.add_argument("--part", choices=["controller", "host"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        measured = (controller if options.part == "controller" else host)(options.directory)
        measured[f"{options.part}_cpu_s"] = time.process_time()
        measured[f"{options.part}_rss_mib"] = most_memory()
        print(json.dumps(measured))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-plan-", dir=options.directory) as directory:
        place = Path(directory)
        print(f"Making a bundle of {FILES} files and {TOTAL // 10**9} GB (sparse), and the store of a host ...")
        make_bundle(place)
        make_store(place)
        rows = []
        for number in range(options.runs):
            rows.append({**in_a_process(place, "controller"), **in_a_process(place, "host"), **ship(place)})
            print(f"run {number + 1}: " + ", ".join(f"{name} {value:.2f}" for name, value in rows[-1].items()))
    measured = median(rows)
    report = {
        "files": FILES,
        "bytes": TOTAL,
        "processors": os.cpu_count(),
        "runs": options.runs,
        **measured,
        "bookkeeping_s": round(sum(measured[f"{name}_s"] for name in ("open", "select", "verify", "keep")), 3),
        "limit_s": LIMIT_S,
    }
    planning = sum(measured[f"{name}_s"] for name in ("open", "select", "verify", "missing", "plan"))
    report["planning_s"] = round(planning, 3)
    report["kept"] = max(report["planning_s"], report["bookkeeping_s"], report["task_s"]) < LIMIT_S
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0 if report["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
