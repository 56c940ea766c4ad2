# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A chat model as large as Qwen3-4B: 6.6 GB of random weights that take as long to load as real ones.

`model_dir(tiny, python)` gives its directory in the cache of the tests, made once beside the tiny model whose tokenizer
it has. It is made by this file run as a script with a Python that has torch and transformers 4.
`forget` lets the next launch read it from the disk, as after a start of the host.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# https://huggingface.co/Qwen/Qwen3-4B/blob/main/config.json, in the architecture of the tiny model
SHAPE = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def model_dir(tiny: Path, python: Path) -> Path:
    """Directory of the large model that shares the tokenizer of the model in `tiny`."""
    target = tiny.with_name(f"large-{tiny.name}")
    if not target.is_dir():
        print(f"Making a model of 6.6 GB in {target} ...", flush=True)
        work = target.with_name(f".{target.name}")
        shutil.rmtree(work, ignore_errors=True)
        subprocess.run([str(python), __file__, str(tiny), str(work)], check=True)
        work.rename(target)
    return target


def forget(model: Path) -> None:
    """Drop the weights of a model from the page cache."""
    for weights in model.glob("*.safetensors"):
        handle = os.open(weights, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def make(tiny: Path, target: Path) -> None:
    """Write the model: random numbers as small as trained ones, bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.modeling_utils import no_init_weights

    shutil.copytree(tiny, target, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = Qwen2Config.from_pretrained(tiny).to_dict()
    fields.pop("layer_types", None)  # one entry a layer, so it is that of the tiny one
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = Qwen2ForCausalLM(Qwen2Config(**{**fields, **SHAPE}))
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    model.save_pretrained(target)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
