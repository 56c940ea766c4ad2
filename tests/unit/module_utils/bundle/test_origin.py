# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a model's files tell of its licence, and of code it brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import CODE, LICENSE, SOURCE
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.origin import code_of, code_text, facts_of
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.report import artifact_values, origin_table


def facts(**files: Any) -> Dict[str, str]:
    """What is told of files; underscores in names stand for dots, texts are contents, anything else is JSON."""
    contents = {
        name.replace("__", "/").replace("_dot_", "."): value if isinstance(value, bytes) else _bytes(value)
        for name, value in files.items()
    }
    return facts_of({name: len(content) for name, content in contents.items()}, contents.__getitem__)


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def test_a_model_without_code_and_licence_gets_no_annotation() -> None:
    assert facts(config_dot_json={"hidden_size": 8}, model_dot_safetensors=b"\x00", vocab_dot_json="[" * 10) == {}


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"modeling_own_dot_py": "import os"}, "modeling_own.py"),
        ({"sub__deep_dot_PY": "", "kernel_dot_so": b""}, "kernel.so sub/deep.PY"),
        ({"config_dot_json": {"auto_map": {"AutoModel": "own.Model"}}}, "config.json:own.Model"),
        ({"config_dot_json": {"auto_map": {"AutoModel": "org/repo--own.Model"}}}, "config.json:org/repo--own.Model"),
        (
            {"tokenizer_config_dot_json": {"auto_map": {"AutoTokenizer": ["own.Slow", None]}}},
            "tokenizer_config.json:own.Slow",
        ),
        ({"1_Own__config_dot_json": {"auto_map": {"AutoModel": "a b\x07"}}}, "1_Own/config.json:a_b?"),
        (
            {"modules_dot_json": [{"type": "sentence_transformers.models.Pooling"}, {"type": "custom_st.Transformer"}]},
            "modules.json:custom_st.Transformer",
        ),
        ({"modules_dot_json": [{"type": "sentence_transformers.models.Pooling"}, 7]}, None),
        ({"config_dot_json": b"\xff{"}, None),
        ({"config_dot_json": [1]}, None),
    ],
)
def test_code(files: Dict[str, Any], code: Any) -> None:
    assert facts(**files).get(CODE) == code


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model", "apache-2.0"),
        ("---\r\nlanguage: en\r\nlicense: 'mit'  # ours\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- cc-by-nc-4.0\n---\n", "cc-by-nc-4.0"),
        ("---\ntags: [x]\n---\nlicense: gpl", None),
        ("license: gpl", None),
        ("", None),
    ],
)
def test_the_licence_of_a_card(card: str, name: Any) -> None:
    assert facts(README_dot_md=card).get(LICENSE) == name
    assert facts(README_dot_md=card, LICENSE="Apache", LICENSE_dot_txt="")[LICENSE] == (name or "see LICENSE")


def test_it_is_recorded_in_the_manifest_and_listed(tmp_path: Path) -> None:
    for name, files in {
        "plain": {"a.bin": "x"},
        "own": {"own.py": "x", "README.md": "---\nlicense: mit\n---\n"},
    }.items():
        (tmp_path / name).mkdir()
        for path, content in files.items():
            (tmp_path / name / path).write_text(content)
    stated = {SOURCE: "modelscope:a/b", LICENSE: "proprietary", CODE: "none at all"}
    requests = [
        Request("models", "plain", str(tmp_path / "plain"), {SOURCE: "modelscope:a/b"}),
        Request("models", "own", str(tmp_path / "own")),
        Request("models", "stated", str(tmp_path / "own"), stated),
        Request("tools", "own", str(tmp_path / "own")),
    ]
    outcome = write_bundle(tmp_path / "bundle", requests)
    assert not write_bundle(tmp_path / "bundle", requests, check=True).changed
    bundle = Bundle.open(tmp_path / "bundle")
    found = {artifact.reference: artifact.annotations for artifact in bundle.artifacts}
    assert found["models/plain"] == {SOURCE: "modelscope:a/b"} and found["tools/own"] == {}
    assert found["models/own"] == {LICENSE: "mit", CODE: "own.py"}
    # Somebody may know the licence better, and not the code.
    assert found["models/stated"] == {**stated, CODE: "own.py"}
    assert {item.name: item.annotations for item in outcome.artifacts if item.kind == "models"} == {
        reference.partition("/")[2]: told for reference, told in found.items() if reference.startswith("models/")
    }
    rows = [artifact_values(one.kind, one.name, one.annotations, 1, 1, "", code_of(one)) for one in bundle.artifacts]
    assert [line.split() for line in origin_table(rows)] == [
        ["MODEL", "LICENSE", "OWN", "CODE", "SOURCE", "REVISION"],
        ["own", "mit", "yes", "-", "-"],
        ["plain", "-", "no", "modelscope:a/b", "-"],
        ["stated", "proprietary", "yes", "modelscope:a/b", "-"],
    ]


def test_code_in_a_message() -> None:
    assert code_text(["a.py"]) == "a.py"
    assert code_text([f"{number}.py" for number in range(9)]) == "0.py, 1.py, 2.py, 3.py, 4.py and 4 more"
