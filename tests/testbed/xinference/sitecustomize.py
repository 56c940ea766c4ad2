# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let Xinference count simulated GPUs: XINFERENCE_SIMULATED_GPUS, or else what the nvidia stub gave this container.

Only the number is simulated. The placement of models on GPUs runs through the worker's own code, and a model process
that was given none or one of them counts what CUDA_VISIBLE_DEVICES leaves it, as with a real device.
"""

# Read at every start of Python, so pathlib stays out.
# ruff: noqa: PTH110, PTH123
import importlib.util
import os
import sys

TARGET = "xinference.device_utils"
SHARE = "/usr/local/share/simulated-gpus"


def simulated_gpus():
    """Number of simulated GPUs that this process may use."""
    told = os.environ.get("XINFERENCE_SIMULATED_GPUS")
    if told is not None:
        count = int(told)
    elif os.path.exists(SHARE + "/lost"):
        count = 0
    else:
        try:
            with open(SHARE + "/table") as table:
                count = sum(1 for line in table if line.strip())
        except OSError:
            count = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([part for part in visible.split(",") if part]))


class Finder:
    """Replaces gpu_count() in the module that defines it, right after it was loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec else None
        if loader is None:
            return spec
        load = loader.exec_module

        def exec_module(module):
            load(module)
            module.gpu_count = simulated_gpus

        setattr(loader, "exec_module", exec_module)  # noqa: B010
        return spec


sys.meta_path.insert(0, Finder())
