# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of whole sites share: one bundle with all that they ship, and one host that has loaded its images.

To save an image, to send it and to load it takes a minute each, and images are what no test here changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List

import plays
import pytest

from . import images
from .engine import cache
from .hosts import Testbed
from .spec import HostSpec

NAME = f"sites-{os.getpid()}"
IMAGES = [images.xinference("4.1.0"), images.xinference("1.8.1"), f"{images.REPOSITORY}:{images.VARIANT}"]
MODELS = ("minilm", "rerank", "chat")
# Pure Python, small, and not in the images.
PACKAGE = "emoji"


@dataclass
class Carried:
    """The bundle, and where the models in it came from, by their names."""

    bundle: Path
    models: Dict[str, str]

    @property
    def variables(self) -> Dict[str, Any]:
        """The variable of an inventory that says where the bundle is."""
        return {"xinference_bundle_dir": str(self.bundle)}


@pytest.fixture(scope="session")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """A bundle with every image and every model of the tests, made by the playbook from the engine of this machine."""
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    images.build()
    script = [sys.executable, str(plays.REPOSITORY / "molecule/shared/models.py"), *MODELS]
    made = subprocess.run(script, capture_output=True, text=True, check=True)
    # Kept between runs, so that only what changed is built.
    found = Carried(cache() / "bundle", json.loads(made.stdout.splitlines()[-1]))
    place = tmp_path_factory.mktemp("carried")
    known = {"model_name": "any", "model_type": "embedding"}
    models = [{"model_uid": name, **known, "source": {"name": name, "path": found.models[name]}} for name in MODELS]
    wanted: Dict[str, Any] = {
        **found.variables,
        "xinference_backend": "docker",
        "xinference_images": [{"name": reference} for reference in IMAGES],
        "xinference_bundle_engine_requirements": [PACKAGE],
        "xinference_models": models,
    }
    hosts = place / "hosts.json"
    hosts.write_text(json.dumps({"xinference": {"hosts": {"gpu-1": {}}}}))
    plays.play(["bundle"], [hosts], wanted, place)
    return found


@pytest.fixture(scope="session")
def standing() -> Iterator[Testbed]:
    """A testbed of one host, `gpu-1`, which stands until the last test."""
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    bed = Testbed(NAME)
    try:
        bed.up([HostSpec("gpu-1")])
        yield bed
    finally:
        bed.down()


@pytest.fixture(scope="module")
def bare(standing: Testbed) -> Iterator[Testbed]:
    """The same for one file, to which the host comes as a new one that may have loaded images."""
    yield standing
    host = standing.hosts["gpu-1"]
    containers: List[str] = host.docker("ps", "--all", "--quiet").split()
    if containers:
        host.docker("rm", "--force", "--volumes", *containers)
    host.docker("network", "prune", "--force")
    host.exec("nft", "delete", "table", "inet", "airgap_xinference", check=False)
    host.exec("rm", "-rf", "/opt/xinference", "/etc/airgap-xinference")
