# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure convergence on a real Xinference 4.1.0 with four models, and write build/bench/converge.json.

`noop` is a run of the module with nothing to do: its requests, and the seconds of its whole process. `parallel` is the
launch of all four models at once beside the slowest of them launched alone, in this run and on this machine.

The models are real, and small. Xinference 4.1.0 starts the process of a model only when the one before it has imported
its libraries, so four small ones take nearly four times as long as one, whoever asks for them. A large model adds a
long time in which its weights arrive: `--weights-wait 25` lets the process of the chat model wait that long before it
reads its files. That is simulated, and the report says so in `simulated_weights_wait_s`; without the option it is 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "integration"))

import servers
import tiny_models
from ansible_collections.airgap.xinference.plugins.module_utils.server.apply import apply
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from doors import run_module

REPORT = HERE.parents[1] / "build" / "bench" / "converge.json"
NOOP_RUNS = 5
# What 25 GB take from a disk that gives 1 GB/s.
# Read by Python when the process of the model starts. The wait is in the thread that loads, as reading is.
SLOW_WEIGHTS = """
import sys
import time

wait = [{seconds}]


def read_slowly(event, arguments):
    if wait and event == "open" and str(arguments[0]).endswith("tokenizer_config.json"):
        time.sleep(wait.pop())


sys.addaudithook(read_slowly)
"""
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
    return [
        {"model_uid": kind, **fields, "model_path": str(tiny_models.model_dir(kind, python))}
        for kind, fields in MODELS.items()
    ]


def seconds_to(server: servers.Server, wanted: List[Dict[str, Any]], root: Path) -> float:
    """Converge and return how long it took; every model must have become ready."""
    start = time.monotonic()
    applied = apply(server.client(), parse(wanted), root, limit=len(MODELS))
    taken = time.monotonic() - start
    if applied.failures:
        raise SystemExit(applied.message)
    return taken


def slowed(wanted: List[Dict[str, Any]], seconds: float, where: Path) -> List[Dict[str, Any]]:
    """The same entries, the chat model's weights arriving after `seconds`."""
    where.mkdir()
    (where / "sitecustomize.py").write_text(SLOW_WEIGHTS.format(seconds=seconds))
    return [
        {**entry, "envs": {"PYTHONPATH": str(where)}} if entry["model_uid"] == "chat" else entry for entry in wanted
    ]


def measure(server: servers.Server, root: Path, weights_wait: float) -> Dict[str, Dict[str, float]]:
    """All figures, from one server."""
    wanted = entries()
    seconds_to(server, wanted, root)  # Once unmeasured, so that every file is read from memory from here on.
    seconds_to(server, [], root)
    if weights_wait:
        wanted = slowed(wanted, weights_wait, root / "slow")
    alone = {}
    for entry in wanted:
        alone[entry["model_uid"]] = seconds_to(server, [entry], root)
        seconds_to(server, [], root)
    together = seconds_to(server, wanted, root)
    print(f"The chat model's weights arrive after {weights_wait:.0f} s.")
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
            "simulated_weights_wait_s": weights_wait,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure convergence on a real Xinference 4.1.0.")
    parser.add_argument("--weights-wait", type=float, default=0.0, metavar="SECONDS")
    weights_wait = parser.parse_args().weights_wait
    with servers.running(servers.NEW) as server, tempfile.TemporaryDirectory() as root:
        figures = measure(server, Path(root), weights_wait)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
