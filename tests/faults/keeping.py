# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Do to servers and their models what happens at sites, and write build/bench/faults.json.

The host is one of the testbed, made to serve by the collection's own playbooks with the keeper on: three models, and a
fourth that somebody else launched. A fault is survived when every model answers a real request again, no model was
launched twice, none is lost, the record agrees with the server, and nobody else's model was touched while the server
lived on. Every try has a seed, which is printed: `--fault NAME --seed N --tries 1` does the same again.

Rows of a part that was tried before are added to; remove the file to begin anew. Needs root.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "integration")]

from ansible_collections.airgap.xinference.plugins.module_utils.server.client import ServerError
from faults.kept_host import (
    BACKENDS,
    LIMIT_S,
    THEIRS,
    VERSIONS,
    WANTED,
    KeptHost,
    NotSurvived,
    kept_host,
    names,
)
from faults.model_faults import FAULTS, MINUTE_S, Fault, Try
from sites import REPOSITORY
from testbed.engine import TestbedError

REPORT = REPOSITORY / "build" / "bench" / "faults.json"
PAUSE_S = 0.3

Identity = Tuple[int, int]


class Watch:
    """Every process of a model that was seen since a try began."""

    def __init__(self, kept: KeptHost) -> None:
        self._kept = kept
        self.before = {uid: {one.identity for one in model} for uid, model in kept.models().items()}
        self.new: Dict[str, Set[Identity]] = {}

    def look(self) -> Dict[str, Set[Identity]]:
        """The processes that there are now, of which those that are new are remembered."""
        found = {uid: {one.identity for one in model} for uid, model in self._kept.models().items()}
        for uid, there in found.items():
            self.new.setdefault(uid, set()).update(there - self.before.get(uid, set()))
        return found

    def back(self, fallen: Set[str]) -> bool:
        """Whether each of the models has a process, and those that fell have another one."""
        found = self.look()
        return all(found.get(uid, set()) - (self.before[uid] if uid in fallen else set()) for uid in WANTED)


def recovery(attempt: Try, watch: Watch) -> float:
    """Wait until every model answers again; returns how many seconds after the fault that was."""
    left = list(WANTED)
    wrong = ""
    while True:
        if watch.back(attempt.fallen):
            left = [uid for uid in left if (wrong := attempt.kept.answers(uid))]
        if not left and not any(attempt.kept.answers(uid) for uid in WANTED):
            return time.monotonic() - attempt.began
        if time.monotonic() - attempt.began > LIMIT_S:
            raise NotSurvived(f"{', '.join(left or WANTED)} not back: {wrong}")
        time.sleep(PAUSE_S)


def judge(attempt: Try, watch: Watch) -> None:
    """When every model answers: is everything as it has to be? Raises NotSurvived."""
    others = {THEIRS} if attempt.lives else set()
    for look in attempt.afterwards:
        look()
    attempt.kept.until_right(others, attempt.besides)
    watch.look()
    for uid in (*WANTED, *others):
        launched, most = len(watch.new.get(uid, set())), int(uid in attempt.fallen)
        if launched != most:
            raise NotSurvived(f"{uid} was launched {launched} times and not {most}")
    wrong = [f"{uid}: {problem}" for uid in (*WANTED, *others) if (problem := attempt.kept.answers(uid))]
    if wrong:
        raise NotSurvived("; ".join(wrong))


def try_once(kept: KeptHost, fault: Fault, seed: int, minute: float = MINUTE_S) -> Tuple[Optional[float], str]:
    """Try a fault; seconds until every model answered, None with the reason when it was not survived."""
    attempt = Try(kept, random.Random(seed), minute)
    seconds: Optional[float] = None
    problem = ""
    try:
        kept.make_ready()
        watch = Watch(kept)
        fault.happen(attempt)
        seconds = recovery(attempt, watch)
        judge(attempt, watch)
    except (NotSurvived, TestbedError, ServerError, AssertionError) as error:
        problem = str(error) or repr(error)
    ended = time.monotonic()
    said = f", {attempt.told}" if attempt.told else ""
    what = f"{fault.name}, {kept.backend} {kept.version}, seed {seed}{said}"
    if problem:
        back = f" after all answered in {seconds:.1f} s" if seconds is not None else ""
        print(f"{what}: NOT SURVIVED{back}: {problem}\n{kept.log()}", flush=True)
    else:
        print(f"{what}: all answer after {seconds:.1f} s (seen to be right {ended - attempt.began:.0f} s)", flush=True)
    for undo in attempt.undo:
        try:
            undo()
        except (NotSurvived, TestbedError, ServerError) as error:
            print(f"{fault.name}: cannot be undone: {error}", flush=True)
    return (None, problem) if problem else (seconds, "")


def add(report: Path, fault: str, backend: str, version: str, seconds: Optional[float]) -> None:
    """Add a try to its row in the report."""
    rows: List[Dict[str, Any]] = json.loads(report.read_text()) if report.exists() else []
    key = {"fault": fault, "backend": backend, "server": version}
    mine = [row for row in rows if {name: row[name] for name in key} == key]
    if not mine:
        mine = [{**key, "tries": 0, "survived": 0, "recovery_s": []}]
        rows += mine
    (row,) = mine
    row["tries"] += 1
    if seconds is not None:
        row["survived"] += 1
        row["recovery_s"].append(round(seconds, 1))
    rows.sort(key=lambda one: (BACKENDS.index(one["backend"]), VERSIONS.index(one["server"])))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> int:
    """Run; the exit status says whether everything was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", help=f"these faults, by commas, instead of all: {', '.join(FAULTS)}")
    parser.add_argument("--backend", help="docker or native instead of both")
    parser.add_argument("--server", help=f"one of the versions {', '.join(VERSIONS)} instead of all")
    parser.add_argument("--tries", type=int, default=1, help="how often each fault is tried")
    parser.add_argument("--seed", type=int, help="the seed of the first try; those after it count up")
    parser.add_argument("--minute", type=float, default=MINUTE_S, help="for how long the API refuses connections, in s")
    parser.add_argument("--stay", action="store_true", help="leave the hosts standing, and use those that stand")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    # What was set up is taken away, too, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    problems: List[str] = []
    tries = 0
    for backend in names(BACKENDS, options.backend):
        chosen = [FAULTS[name] for name in names(list(FAULTS), options.fault) if backend in FAULTS[name].backends]
        for version in names(VERSIONS, options.server) if chosen else []:
            with kept_host(backend, version, options.stay) as kept:
                for number in range(options.tries):
                    for fault in chosen:
                        seconds, problem = try_once(kept, fault, seed + number, options.minute)
                        add(options.report, fault.name, backend, version, seconds)
                        tries += 1
                        if problem:
                            problems.append(f"{fault.name}, {backend} {version}, seed {seed + number}: {problem}")
    print(f"{tries - len(problems)} of {tries} survived; {options.report}")
    for problem in problems:
        print(f"NOT SURVIVED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
