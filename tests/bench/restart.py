# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure how long four models are gone when the server is killed and started again, and what the keeper costs idle.

Three ways on the same server, one after the other: with the keeper; with the autostart that 4.1.0 has of its own; and
with models that were launched once, as by hand or by a script, of which none comes back. Written to
build/bench/restart.json: for each try the seconds until all four answered a real request, and of the same restart the
server's own start and the slowest launch; `limit_s` is what is allowed for that, and `idle` is the keeper's cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "integration")]

import servers
import tiny_models
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.probe import probe
from doors import Recorder
from keepers import Kept, cpu_seconds, memory_mib
from servers import NEW, OLD, Server

REPORT = HERE.parents[1] / "build" / "bench" / "restart.json"
LIMIT_S = 400.0
IDLE_S = 120.0
Entry = Dict[str, Any]


def entries() -> List[Entry]:
    """Four tiny models of four types."""
    python = servers.environment(OLD) / "bin" / "python"
    weights = {kind: str(tiny_models.model_dir(kind, python)) for kind in tiny_models.KINDS}
    embedding = {"model_name": "bce-embedding-base_v1", "model_type": "embedding"}
    length = {"probe": {"expect": {"dimensions": 384}}}
    rerank = {"model_name": "bce-reranker-base_v1", "model_type": "rerank", "probe": {"expect": {"best": None}}}
    chat = {"model_name": "qwen2.5-instruct", "model_engine": "transformers", "model_format": "pytorch"}
    size = {"model_size_in_billions": "0_5", "quantization": "none", "probe": {"expect": {"words": None}}}
    ear = {"model_name": "whisper-tiny", "model_type": "audio"}
    engine = {"model_engine": "sentence_transformers"}
    return [
        {"model_uid": "minilm", **embedding, **engine, **length, "model_path": weights["minilm"]},
        {"model_uid": "rerank", **rerank, **engine, "model_path": weights["rerank"]},
        {"model_uid": "chat", "model_type": "LLM", **chat, **size, "model_path": weights["chat"]},
        {"model_uid": "ear", **ear, "model_path": weights["whisper"]},
    ]


def payload(entry: Entry) -> Entry:
    """What is sent to launch a model."""
    return {name: value for name, value in entry.items() if name != "probe"}


def restart(server: Server, wanted: List[Entry], patience: Optional[float] = None) -> Dict[str, Any]:
    """Kill the server, start it again, and see what comes back; ends when all answer, or after `patience` seconds."""
    server.kill()
    began = time.monotonic()
    server.run()
    client = server.client(timeout=30)
    started = 0.0
    created: Dict[str, float] = {}
    ready: Dict[str, float] = {}
    while True:
        now = time.monotonic() - began
        with contextlib.suppress(ServerError):
            if not started and client.status().get("workers"):
                started = now
            for instance in client.instances() if started else []:
                uid = instance["model_uid"]
                created.setdefault(uid, now)
                if instance["status"] == "READY":
                    ready.setdefault(uid, now)
        if len(ready) == len(wanted) and all(probe(client, entry).ok for entry in wanted):
            answered: Optional[float] = time.monotonic() - began
            break
        if now > (patience or LIMIT_S):
            answered = None
            break
        time.sleep(0.2)
    slowest = max((ready[uid] - created[uid] for uid in ready), default=0.0)
    return {
        "seconds": answered and round(answered, 1),
        "server_start_s": round(started, 1),
        "slowest_launch_s": round(slowest, 1),
        "limit_s": round(started + 1.3 * slowest + 10, 1),
        "answered": sorted(ready) if answered is None else [entry["model_uid"] for entry in wanted],
    }


def until_ready(server: Server, wanted: List[Entry]) -> None:
    """Wait until all models answer."""
    deadline = time.monotonic() + LIMIT_S
    while not all(probe(server.client(), entry).ok for entry in wanted):
        if time.monotonic() > deadline:
            raise SystemExit("the models do not come up")
        time.sleep(0.5)


def measured(way: str, tries: int, once: Callable[[], Dict[str, Any]]) -> Dict[str, Any]:
    """The row of one way."""
    rows = []
    for number in range(tries):
        rows.append(once())
        print(f"{way}, try {number + 1}: {rows[-1]}", flush=True)
    return {"way": way, **{name: [row[name] for row in rows] for name in rows[0]}}


def with_keeper(server: Server, wanted: List[Entry], tries: int, seconds: float) -> List[Dict[str, Any]]:
    """The keeper's row, and what it costs when there is nothing to do."""
    with tempfile.TemporaryDirectory() as place:
        kept = Kept(server, Path(place), interval=5)
        kept.release(wanted)
        try:
            kept.start()
            until_ready(server, wanted)
            row = measured("the keeper", tries, lambda: restart(server, wanted))
            settled(kept, wanted)
            kept.stop()
            with Recorder(server.endpoint) as door:
                kept.endpoint = door.endpoint
                kept.release(wanted)
                kept.start()
                settled(kept, wanted)
                return [row, cost(kept, door, seconds)]
        finally:
            kept.stop()


def settled(kept: Kept, wanted: List[Entry]) -> None:
    """Wait until the keeper has nothing left to do."""
    uids = [entry["model_uid"] for entry in wanted]
    kept.until(lambda: kept.ready(*uids) and not kept.told["doing"], LIMIT_S)
    kept.until(lambda: all(kept.model(uid)["verified"]["at"] >= kept.told["started"] for uid in uids), LIMIT_S)


def cost(kept: Kept, door: Recorder, seconds: float) -> Dict[str, Any]:
    """What an idle keeper costs in so many seconds."""
    assert kept.process
    pid, began, asked = kept.process.pid, time.monotonic(), len(door.lines)
    before = cpu_seconds(pid)
    time.sleep(seconds)
    took = time.monotonic() - began
    idle = {
        "way": "idle",
        "watched_s": round(took, 1),
        "cpu_percent_of_a_core": round(100 * (cpu_seconds(pid) - before) / took, 3),
        "rss_mib": round(memory_mib(pid), 1),
        "requests": len(door.lines) - asked,
    }
    print(f"idle: {idle}", flush=True)
    return idle


def with_autostart(server: Server, wanted: List[Entry], tries: int) -> Dict[str, Any]:
    """The row of the server's own autostart."""
    for entry in wanted:
        server.client().post("/v1/autostart/models", json={"launch": payload(entry)})
    until_ready(server, wanted)
    return measured("autostart of 4.1.0", tries, lambda: restart(server, wanted))


def main() -> int:
    """Run, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=3, help="how often the server is killed")
    parser.add_argument(
        "--idle", type=float, default=IDLE_S, help="for how long the idle keeper is watched, in seconds"
    )
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    # What was started is ended, too, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    wanted = entries()
    with servers.running(NEW) as server:
        rows = with_keeper(server, wanted, options.tries, options.idle)
        patience = max(one or LIMIT_S for one in rows[0]["seconds"]) + 30
        rows.append(measured("launched once", 1, lambda: restart(server, wanted, patience)))
        rows.append(with_autostart(server, wanted, options.tries))
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    report = {"server": NEW, "models": [entry["model_uid"] for entry in wanted], "machine": machine, "ways": rows}
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1) + "\n")
    print(options.report)
    kept = rows[0]
    late = [one for one, limit in zip(kept["seconds"], kept["limit_s"]) if one is None or one > limit]
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
