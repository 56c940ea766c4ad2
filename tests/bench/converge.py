# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure convergence on a real Xinference 4.1.0 with four models, and write build/bench/converge.json.

`noop` is a run of the module with nothing to do: its requests, and the seconds of its whole process. `parallel` is the
launch of all four models at once beside the slowest of them launched alone, in this run and on this machine.

The chat model has the size of a real one (large_chat.py), and weights come from a disk as fast as a good hard disk
(slow_disk.py, root), so that they take the time they take on a site; the others are tiny. Xinference 4.1.0 imports the
libraries of one model after another, some seconds each, whoever asks, because the pool of a new process is announced to
all others and one that imports does not answer: four tiny models would take as long as their imports, and tell nothing
about a site. The ratio depends on that disk: read at 1.3 GB/s instead, the four together took 1.9 times the slowest.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "integration")]

import large_chat
import servers
import slow_disk
import tiny_models
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from doors import run_module

REPORT = HERE.parents[1] / "build" / "bench" / "converge.json"
NOOP_RUNS = 5
DISK_BYTES_A_SECOND = 250 * 1000**2
# kind of model: launch fields
MODELS: Dict[str, Dict[str, Any]] = {
    "minilm": {
        "model_name": "bce-embedding-base_v1",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
    },
    "rerank": {"model_name": "bce-reranker-base_v1", "model_type": "rerank", "model_engine": "sentence_transformers"},
    "whisper": {"model_name": "whisper-tiny", "model_type": "audio", "model_engine": "transformers"},
    "chat": {
        "model_name": "qwen2.5-instruct",
        "model_engine": "transformers",
        "model_format": "pytorch",
        "model_size_in_billions": "0_5",
    },
}


def entries() -> List[Dict[str, Any]]:
    """One entry a kind of model, as the inventory would have it."""
    python = servers.environment(servers.OLD) / "bin" / "python"
    paths = {kind: tiny_models.model_dir(kind, python) for kind in MODELS}
    paths["chat"] = large_chat.model_dir(paths["chat"], python)
    return [{"model_uid": kind, **fields, "model_path": str(paths[kind])} for kind, fields in MODELS.items()]


def seconds_to(server: servers.Server, wanted: List[Dict[str, Any]], root: Path) -> float:
    """Converge and return how long it took, weights read from the disk; every model must have become ready."""
    for entry in wanted:
        large_chat.forget(Path(entry["model_path"]))
    start = time.monotonic()
    applied = apply(server.client(), parse(wanted), root, limit=len(MODELS))
    taken = time.monotonic() - start
    if applied.failures:
        raise SystemExit(applied.message)
    return taken


def measure(server: servers.Server, root: Path) -> Dict[str, Dict[str, Any]]:
    """All figures, from one server."""
    wanted = entries()
    seconds_to(server, wanted, root)  # Once unmeasured, so that every library is read from memory from here on.
    seconds_to(server, [], root)
    alone = {}
    for entry in wanted:
        alone[entry["model_uid"]] = seconds_to(server, [entry], root)
        seconds_to(server, [], root)
    together = seconds_to(server, wanted, root)
    print(f"Alone: {', '.join(f'{uid} {taken:.1f} s' for uid, taken in alone.items())}; together: {together:.1f} s.")

    runs = [
        run_module("xinference_model_set", {"endpoint": server.endpoint, "root": str(root), "models": wanted})
        for _number in range(NOOP_RUNS)
    ]
    for result, _taken in runs:
        if result.get("failed") or result["changed"]:
            raise SystemExit(f"This was to be a run with nothing to do: {result}")
    return {
        "noop": {
            "requests": max(result["requests"] for result, _taken in runs),
            "seconds": round(statistics.median(taken for _result, taken in runs), 3),
        },
        "parallel": {
            "together_s": round(together, 2),
            "slowest_alone_s": round(max(alone.values()), 2),
            "alone_s": {uid: round(taken, 2) for uid, taken in alone.items()},
        },
    }


def main() -> None:
    models = Path(entries()[0]["model_path"])
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(slow_disk.reading_at(DISK_BYTES_A_SECOND, models))
        figures = measure(stack.enter_context(servers.running(servers.NEW)), Path(root))
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
