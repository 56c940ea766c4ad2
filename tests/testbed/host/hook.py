# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for NVIDIA's container hook on a testbed host.

runc calls it before a container starts, with the container's state on standard input. Like the real one it reads
which devices were asked for, refuses unknown ones and puts nvidia-smi into the container, which then lists those GPUs
and numbers them from 0. Unlike the real one it writes down every request, so that a test can read what was asked.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

SHARE = Path("/usr/local/share/simulated-gpus")
REQUESTS = Path("/var/log/simulated-gpus.jsonl")


def choose(visible: str, table: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Rows of the GPUs that were asked for, and the names that no GPU has."""
    if visible == "all":
        return table, []
    if visible in ("", "void", "none"):
        return [], []
    chosen, unknown = [], []
    for wanted in visible.split(","):
        rows = [row for row in table if wanted in row[:2]]
        chosen += rows
        unknown += [] if rows else [wanted]
    return chosen, unknown


def main() -> int:
    """Answer one call of runc; what is not `prestart` needs nothing."""
    if sys.argv[1:] != ["prestart"]:
        return 0
    state = json.load(sys.stdin)
    bundle = Path(state["bundle"])
    config = json.loads((bundle / "config.json").read_text())
    environment = dict(entry.partition("=")[::2] for entry in config["process"].get("env", []))
    visible = environment.get("NVIDIA_VISIBLE_DEVICES", "")
    table = [line.split("|") for line in (SHARE / "table").read_text().splitlines()] if SHARE.exists() else []
    chosen, unknown = choose(visible, table)

    request = {
        "time": time.time(),
        "container": state["id"],
        "visible_devices": visible,
        "capabilities": environment.get("NVIDIA_DRIVER_CAPABILITIES", ""),
        "gpus": [{"index": int(row[0]), "uuid": row[1]} for row in chosen],
        "refused": unknown,
    }
    with REQUESTS.open("a") as log:
        log.write(json.dumps(request) + "\n")
    if unknown:
        print(f"nvidia-container-cli: device error: {unknown[0]}: unknown device: unknown (simulated)", file=sys.stderr)
        return 1

    root = bundle / config["root"]["path"]
    inside = root / SHARE.relative_to("/")
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "lost").unlink(missing_ok=True)
    rows = ["|".join([str(number), *row[1:]]) for number, row in enumerate(chosen)]
    (inside / "table").write_text("".join(f"{row}\n" for row in rows))
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy2("/usr/local/lib/testbed/nvidia-smi", root / "usr/bin/nvidia-smi")
    return 0


if __name__ == "__main__":
    sys.exit(main())
