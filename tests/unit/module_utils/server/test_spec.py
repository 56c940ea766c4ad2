# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Model entries: what is taken, what is sent, and every kind of mistake named, all at once."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.fields import FIELDS, nearest
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import (
    SpecError,
    from_payload,
    parse,
    source_name,
)

EMBEDDING = {
    "model_uid": "minilm",
    "model_name": "bce-embedding-base_v1",
    "model_type": "embedding",
    "model_engine": "sentence_transformers",
}


def problems(entry, **arguments):
    """The problems of one entry, which must have some."""
    with pytest.raises(SpecError) as caught:
        parse([{**EMBEDDING, **entry}], **arguments)
    return caught.value.problems


def test_an_entry_becomes_the_launch_payload():
    (spec,) = parse(
        [{**EMBEDDING, "source": {"path": "/data/MiniLM"}, "gpus": [3], "options": {"batch_size": 8}, "probe": {}}],
        server_gpus=[2, 3],
        artifacts_paths={"MiniLM": "/opt/x/models/MiniLM/abc"},
    )
    assert spec.payload() == {
        "model_uid": "minilm",
        "model_name": "bce-embedding-base_v1",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
        "model_path": "/opt/x/models/MiniLM/abc",
        "gpu_idx": [1],
        "batch_size": 8,
    }
    assert (spec.uid, spec.type, spec.source, spec.probe) == ("minilm", "embedding", "MiniLM", {})


def test_own_fields_never_reach_the_server():
    (spec,) = parse([{**EMBEDDING, "enabled": True, "probe": False, "options": {}}])
    assert not {name for name, row in FIELDS.items() if not row.sent} & set(spec.payload())


@pytest.mark.parametrize(
    ("value", "sent"),
    [(7, 7), ("7", 7), (0.5, "0_5"), ("0.5", "0_5"), ("0_5", "0_5"), (7.0, 7), ("1_8", "1_8")],
)
def test_sizes_take_the_spelling_of_the_server(value, sent):
    (spec,) = parse([{**EMBEDDING, "model_size_in_billions": value}])
    assert spec.payload()["model_size_in_billions"] == sent


@pytest.mark.parametrize(("value", "sent"), [("auto", "auto"), (2, 2), ("2", 2), (None, None), ("none", None)])
def test_no_gpu_is_a_value_of_its_own(value, sent):
    (spec,) = parse([{**EMBEDDING, "n_gpu": value}])
    assert spec.payload()["n_gpu"] == sent


def test_fields_without_value_are_left_out():
    (spec,) = parse([{**EMBEDDING, "quantization": None, "replica": None}])
    assert "quantization" not in spec.payload() and "replica" not in spec.payload()


def test_texts_that_yaml_made_numbers_and_words_for_truth():
    (spec,) = parse([{**EMBEDDING, "model_uid": 12, "enable_thinking": "no", "envs": {"OMP_NUM_THREADS": 4}}])
    assert spec.uid == "12"
    assert spec.payload()["enable_thinking"] is False
    assert spec.payload()["envs"] == {"OMP_NUM_THREADS": "4"}


def test_the_fingerprint_sees_what_matters_and_only_that():
    def fingerprint(path="/models/a", **entry):
        (spec,) = parse([{**EMBEDDING, "source": {"path": "/x/m"}, **entry}], artifacts_paths={"m": path})
        return spec.fingerprint()

    base = fingerprint()
    assert base == fingerprint(probe={"input": "other"}) == fingerprint(enabled=True)
    assert len({base, fingerprint(path="/models/b"), fingerprint(replica=2), fingerprint(options={"a": 1})}) == 4
    assert fingerprint(options={"a": 1, "b": 2}) == fingerprint(options={"b": 2, "a": 1})


def test_the_fingerprint_sees_gpus_and_every_field_that_is_sent():
    entries: Any = [
        {},
        {"gpus": [0]},
        {"gpus": [1]},
        {"gpus": [0, 1]},
        {"gpus": [1, 0]},
        {"envs": {"A": "1"}},
        {"envs": {"A": "2"}},
        {"envs": {"B": "1"}},
        {"n_gpu": 1},
        {"n_gpu": None},
        {"model_format": "pytorch"},
        {"quantization": "none"},
        {"request_limits": 3},
        {"download_hub": "x"},
        {"model_name": "other"},
        {"model_uid": "other"},
    ]
    specs = [parse([{**EMBEDDING, **entry}], server_gpus=[0, 1])[0] for entry in entries]
    assert len({spec.fingerprint() for spec in specs}) == len(entries)


def test_the_fingerprint_is_stable_over_releases():
    """A change here relaunches every model of every site at the next run."""
    (spec,) = parse([{**EMBEDDING, "model_path": "/m"}])
    assert spec.fingerprint() == "sha256:3752006c02c6e20e4655d47d176b8d94f4b260b7b32bc2c9c1ad92dbe0b618f1"


@pytest.mark.parametrize(
    ("uid", "words"),
    [
        ("org/model", '"/"'),
        (".", "never terminate"),
        ("..", "never terminate"),
        ("minilm-rep0", '"-rep" and a number'),
        ("m" * 101, "101 characters"),
        ("", "is empty"),
        (" ", "is empty"),
        ("a\nb", "unprintable"),
        (" a", "blank"),
        (["a"], "must be a text"),
    ],
)
def test_illegal_uids(uid, words):
    (problem,) = problems({"model_uid": uid})
    assert "model_uid" in problem and words in problem


@pytest.mark.parametrize("uid", ["qwen2.5-instruct", "llama-2", "rep-1", "m" * 100, "模型", "x-repo1", "a b"])
def test_legal_uids(uid):
    assert parse([{**EMBEDDING, "model_uid": uid}])[0].uid == uid


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"model_enginee": "x"}, "unknown field model_enginee; did you mean model_engine?"),
        ({"gpu_memory_utilization": 0.5}, "`options`"),
        ({"gpu_idx": [0]}, "`gpus`"),
        ({"model_type": "embeding"}, "did you mean embedding?"),
        ({"replica": 0}, "1 or more"),
        ({"replica": "two"}, "1 or more"),
        ({"replica": True}, "1 or more"),
        ({"n_gpu": "all"}, '"auto"'),
        ({"n_gpu": 0}, '"auto"'),
        ({"envs": ["A=1"]}, "must be a dictionary"),
        ({"envs": {"A": None}}, "A has none"),
        ({"options": {"model_path": "/x"}}, "options.model_path is a launch field"),
        ({"options": {"gpu_idx": [1]}}, "options.gpu_idx is a launch field"),
        ({"model_size_in_billions": "big"}, "number of billions"),
        ({"enabled": "perhaps"}, "true or false"),
        ({"virtual_env_packages": "torch"}, "list of texts"),
        ({"model_name": None}, "model_name is missing"),
        ({"model_name": ""}, "not empty"),
        ({"model_type": None, "model_engine": None}, "model_engine is missing"),
        ({"source": {"path": "/m", "modelscope": "a/b"}}, "exactly one"),
        ({"source": {"name": "m"}}, "exactly one"),
        ({"source": {"path": "/m", "revison": "v1"}}, "did you mean revision?"),
        ({"source": {"path": None}}, "source.path has no value"),
        ({"source": {"modelscope": None, "name": "m"}}, "source.modelscope has no value"),
        ({"source": {}}, "exactly one"),
        ({"options": {"a": float("nan")}}, "a is or holds NaN"),
        ({"options": {"deep": [{"a": float("-inf")}]}}, "deep is or holds NaN or an infinite number"),
        ({"peft_model_config": {"a": float("inf")}}, "a is or holds NaN or an infinite number"),
        ({"source": {"path": ["/m"]}}, "source.path must be a text"),
        ({"source": "MiniLM"}, "must be a dictionary"),
        ({"source": {"path": "/m"}, "model_path": "/m"}, "exclude each other"),
        ({"replica_config": [{}], "n_gpu": 1}, "exclude each other"),
        ({"probe": "yes please"}, "must be a dictionary"),
        ({"probe": {"expects": {}}}, "unknown field expects; did you mean expect?"),
        ({"probe": {"expect": ["x"]}}, "a dictionary in `expect`"),
        ({"probe": {"expect": {"norme": 1}}}, "unknown field expect.norme; did you mean norm?"),
        ({"probe": {"expect": {"dimensions": "many"}}}, "expect.dimensions that must be a whole number"),
        ({"probe": {"expect": {"best": -1}}}, "expect.best that must be a whole number"),
        ({"probe": {"expect": {"norm": [1]}}}, "expect.norm that must be a number"),
        ({"probe": {"expect": {"seconds": "nan"}}}, "expect.seconds that must be a number"),
        ({"probe": {"kind": "chatt"}}, "did you mean chat?"),
        ({"probe": {"kind": ["chat"]}}, "must be one of"),
        ({"probe": {"timeout": True}}, "timeout that must be a number"),
        ({"probe": {"request": "voice"}}, "request that must be a dictionary"),
        ({"probe": {"input": 5}}, "input that must be a text, a list"),
        ({"probe": {"input": {"query": "x"}}}, "`documents`"),
    ],
)
def test_mistakes_are_named(entry, words):
    (problem,) = problems(entry)
    assert problem.startswith("minilm: ") and words in problem


@pytest.mark.parametrize(
    ("gpus", "server", "idx"),
    [
        ([2, 3], [2, 3], (0, 1)),
        ([3], ["2", "3"], (1,)),
        (3, [2, 3], (1,)),
        ("GPU-ab-1", ["GPU-AB-0", "GPU-AB-1"], (1,)),
        (["3", 2], [2, 3], (1, 0)),
    ],
)
def test_host_gpus_become_the_indexes_the_server_sees(gpus, server, idx):
    (spec,) = parse([{**EMBEDDING, "gpus": gpus}], server_gpus=server)
    assert spec.gpu_idx == idx and spec.payload()["gpu_idx"] == list(idx)


@pytest.mark.parametrize(
    ("entry", "server", "words"),
    [
        ({"gpus": [0]}, [2, 3], "GPU 0 is not one of the server's; it has 2, 3"),
        ({"gpus": [0]}, [], "it has none"),
        ({"gpus": [2, 2]}, [2, 3], "twice"),
        ({"gpus": []}, [2], "list of GPU"),
        ({"gpus": [2, 3, 4], "replica": 2}, [2, 3, 4], "shared out equally"),
        ({"gpus": [2, 3], "n_gpu": 1}, [2, 3], "leave n_gpu out"),
    ],
)
def test_gpus_that_do_not_fit(entry, server, words):
    (problem,) = problems(entry, server_gpus=server)
    assert words in problem


def test_sources_must_be_in_the_bundle():
    (problem,) = problems({"source": {"modelscope": "org/MiniLM-L6"}}, artifacts_paths={"MiniLM-L12": "/m"})
    assert "MiniLM-L6 is not in the bundle" in problem and "did you mean MiniLM-L12?" in problem
    (problem,) = problems({}, artifacts_paths={})
    assert "model without source in the bundle" in problem
    assert parse([{**EMBEDDING, "model_path": "/m"}], artifacts_paths={})[0].source is None
    assert parse([EMBEDDING])[0].payload().get("model_path") is None
    registered = parse([EMBEDDING], artifacts_paths={}, registrations=["bce-embedding-base_v1"])
    assert registered[0].source is None


@pytest.mark.parametrize(
    "wish",
    [
        {"kind": "rerank", "input": {"query": "q", "documents": ["a"]}, "expect": {"best": None}, "timeout": "5"},
        {"input": ["a", "b"], "expect": {"dimensions": 384, "norm": 1, "related": False}, "request": {"x": 1}},
        {"sample": "/v.wav", "input": "text", "expect": {"seconds": 0.5, "contains": "a", "words": True}},
    ],
)
def test_probes_are_taken_as_they_are(wish):
    assert parse([{**EMBEDDING, "probe": wish}])[0].probe == wish


def test_a_problem_tells_no_secret():
    (problem,) = problems({"envs": {"HF_TOKEN": "s3cret", "DSN": "s3cret", "A": None}})
    assert "A has none" in problem and "s3cret" not in problem


def test_all_problems_of_all_entries_come_in_one_message():
    entries: Any = [
        {**EMBEDDING, "gpus": [9], "replicas": 2},
        EMBEDDING,
        "text",
        {"model_uid": "off", "enabled": False, "model_tipe": "embedding"},
        {**EMBEDDING, "model_uid": "a/b"},
    ]
    with pytest.raises(SpecError) as caught:
        parse(entries, server_gpus=[0])
    text = str(caught.value)
    for words in ("GPU 9", "did you mean replica?", "entries 1 and 2", "Entry 3", "off: unknown", "a/b: model_uid"):
        assert words in text
    assert text.startswith("8 problems") and len(caught.value.problems) == 8


def test_disabled_entries_are_checked_and_left_out():
    off = {**EMBEDDING, "enabled": False}
    assert [spec.uid for spec in parse([off, {**EMBEDDING, "replica": 2}])] == ["minilm"]
    assert parse([off]) == []
    assert "1 or more" in problems({"enabled": False, "replica": 0})[0]


def test_not_a_list():
    entries: Any = {"model_uid": "x"}
    with pytest.raises(SpecError, match="not a list"):
        parse(entries)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"path": "/data/MiniLM/"}, "MiniLM"),
        ({"modelscope": "Qwen/Qwen2.5-7B"}, "Qwen2.5-7B"),
        ({"modelscope": "Qwen/Qwen2.5-7B", "name": "qwen"}, "qwen"),
        ({}, None),
        (None, None),
    ],
)
def test_names_in_the_bundle(source, name):
    assert source_name({"source": source}) == name


def test_nearest_ignores_case_and_gives_the_true_spelling():
    assert nearest("BGE-M3", ["bge-m3", "bge-base"])[0] == "bge-m3"
    assert nearest("zzz", ["bge-m3"]) == []


def test_small_models_come_before_llms():
    specs = parse([{**EMBEDDING, "model_type": kind, "model_uid": kind} for kind in ("LLM", "audio", "rerank")])
    assert [spec.uid for spec in sorted(specs, key=lambda spec: spec.rank)] == ["rerank", "audio", "LLM"]
    assert not specs[0].measures_memory
    assert parse([{**EMBEDDING, "model_engine": "vLLM"}])[0].measures_memory


@pytest.mark.parametrize("off", [False, "no", "false"])
def test_what_is_switched_off_need_not_be_in_the_bundle(off):
    entries = [
        {**EMBEDDING, "model_uid": "on", "source": {"path": "/srv/models/bge-m3"}},
        {**EMBEDDING, "model_uid": "off", "source": {"path": "/srv/models/other"}, "enabled": off},
    ]
    assert [one.uid for one in parse(entries, artifacts_paths={"bge-m3": "/models/bge-m3/1"})] == ["on"]


# -- alternatives

RERANKER: Any = {
    "model_uid": "reranker",
    "model_name": "bge-reranker-v2-m3",
    "model_type": "rerank",
    "model_engine": "vLLM",
    "gpus": [1],
    "options": {"gpu_memory_utilization": 0.3},
    "source": {"modelscope": "BAAI/bge-reranker-v2-m3"},
}
SMALLER: Any = {
    "model_name": "bge-reranker-base",
    "model_engine": "sentence_transformers",
    "source": {"modelscope": "BAAI/bge-reranker-base"},
}
PATHS = {"bge-reranker-v2-m3": "/models/v2", "bge-reranker-base": "/models/base"}


def test_alternatives_are_specifications_of_their_own_under_the_same_uid():
    (spec,) = parse([{**RERANKER, "fallbacks": [SMALLER, {"n_gpu": None}], "relaunch": "beside"}], [1], PATHS)
    smaller, slower = spec.fallbacks
    assert smaller.payload() == {
        "model_uid": "reranker",
        "model_name": "bge-reranker-base",
        "model_type": "rerank",
        "model_engine": "sentence_transformers",
        "model_path": "/models/base",
        "gpu_idx": [0],
    }
    assert slower.payload()["n_gpu"] is None and "gpu_idx" not in slower.payload()
    assert (spec.relaunch, smaller.relaunch, smaller.fallbacks) == ("beside", None, ())
    assert spec.choices == (spec, smaller, slower)
    assert [one.words for one in spec.choices[:2]] == [
        "bge-reranker-v2-m3 on vLLM",
        "bge-reranker-base on sentence_transformers",
    ]
    assert [one.source for one in spec.choices] == ["bge-reranker-v2-m3", "bge-reranker-base", "bge-reranker-v2-m3"]


def test_alternatives_do_not_change_the_fingerprint():
    (spec,) = parse([{**RERANKER, "fallbacks": [SMALLER], "relaunch": "replace"}], [1], PATHS)
    (alone,) = parse([RERANKER], [1], PATHS)
    assert spec.fingerprint() == alone.fingerprint() != spec.fallbacks[0].fingerprint()


def test_sizes_and_quantizations_are_part_of_the_words():
    entry = {"model_uid": "q", "model_name": "qwen", "model_engine": "vLLM", "model_size_in_billions": 0.5}
    assert parse([{**entry, "quantization": "Int4"}])[0].words == "qwen 0.5B Int4 on vLLM"
    assert parse([{**EMBEDDING, "model_engine": None, "quantization": "none"}])[0].words == "bce-embedding-base_v1"


@pytest.mark.parametrize(
    ("fallbacks", "words"),
    [
        ("x", "fallbacks must be a list of dictionaries (it is 'x')"),
        ({"model_name": "x"}, "fallbacks must be a list of dictionaries"),
        (["x"], "fallback 1 is not a dictionary of launch fields"),
        ([None], "fallback 1 is not a dictionary of launch fields"),
        ([{**SMALLER, "model_nam": "x"}], "fallback 1: unknown field model_nam; did you mean model_name?"),
        ([{**SMALLER, "gpu_idx": [0]}], "fallback 1: gpu_idx is not used here"),
        ([{**SMALLER, "replica": 0}], "fallback 1: replica must be a whole number"),
        ([SMALLER, {**SMALLER, "gpus": [7]}], "fallback 2: GPU 7 is not one of the server's"),
        ([{**SMALLER, "model_uid": "other"}], "fallback 1: model_uid must be that of the entry"),
        ([{**SMALLER, "model_type": "LLM"}], "fallback 1: model_type must be that of the entry"),
        ([{**SMALLER, "fallbacks": [SMALLER]}], "fallback 1: fallbacks is said once"),
        ([{**SMALLER, "enabled": False}], "fallback 1: enabled is said once"),
        ([{**SMALLER, "relaunch": "beside"}], "fallback 1: relaunch is said once"),
        ([{}], "fallback 1 launches the same as the entry"),
        ([SMALLER, SMALLER], "fallback 2 launches the same as fallback 1"),
        ([{"model_name": "bge-reranker-base"}], "fallback 1: model without source in the bundle"),
        ([{**SMALLER, "source": {"path": "/x/m"}}], "fallback 1: its model m is not in the bundle on this host"),
        ([{**SMALLER, "options": {"model_path": "/m"}}], "fallback 1: options.model_path is a launch field"),
        ([{**SMALLER, "envs": {"TOKEN": "s3cret", "A": None}}], "fallback 1: envs must map names to texts"),
    ],
)
def test_mistakes_in_alternatives_are_named(fallbacks, words):
    with pytest.raises(SpecError) as caught:
        parse([{**RERANKER, "fallbacks": fallbacks}], [1], PATHS)
    (problem,) = caught.value.problems
    assert problem.startswith("reranker: ") and words in problem and "s3cret" not in problem


def test_all_mistakes_come_at_once_and_those_of_the_entry_only_once():
    fallbacks = [5, {"model_uid": "z"}, {"fallbacks": []}, {"typo": 1}, {"model_type": "LLM", "gpus": [8]}]
    entries: Any = [{**RERANKER, "typpo": 1, "replica": 0, "relaunch": "besides", "fallbacks": fallbacks}]
    entries.append({**RERANKER, "model_uid": "off", "enabled": False, "fallbacks": [{"typo": 1}]})
    with pytest.raises(SpecError) as caught:
        parse(entries, [1], PATHS)
    assert [problem.partition(" (")[0] for problem in caught.value.problems] == [
        "reranker: unknown field typpo; options of the engine stand under `options`",
        "reranker: replica must be a whole number, 1 or more",
        "reranker: relaunch must be one of replace, beside; did you mean beside?",
        "reranker: fallback 1 is not a dictionary of launch fields",
        "reranker: fallback 2: model_uid must be that of the entry, which clients ask for",
        "reranker: fallback 3: fallbacks is said once, for the entry; take it out of the fallback",
        "reranker: fallback 4: unknown field typo; options of the engine stand under `options`",
        "reranker: fallback 5: GPU 8 is not one of the server's; it has 1",
        "reranker: fallback 5: model_type must be that of the entry, which clients ask for",
        "off: fallback 1: unknown field typo; options of the engine stand under `options`",
    ]


def test_the_same_uid_and_type_may_be_said_again():
    again = {**SMALLER, "model_uid": "reranker", "model_type": "Rerank"}
    assert parse([{**RERANKER, "fallbacks": [again]}], [1], PATHS)[0].fallbacks[0].type == "rerank"


def test_a_specification_comes_back_from_its_payload():
    (spec,) = parse([{**RERANKER, "replica": 1, "envs": {"A": "1"}}], [1], PATHS)
    back = from_payload(spec.payload())
    assert (back.payload(), back.fingerprint()) == (spec.payload(), spec.fingerprint())
    assert (back.uid, back.type, back.engine, back.gpu_idx) == ("reranker", "rerank", "vLLM", (0,))


def test_the_uid_of_a_trial_is_short_and_of_one_model_only():
    def beside(uid, *turn):
        (spec,) = parse([{**RERANKER, "model_uid": uid}], [1], PATHS)
        return spec.beside(*turn).uid

    assert (beside("m"), beside("m", 2)) == ("m-beside", "m-beside-2")
    assert beside("m" * 93) == "m" * 93 + "-beside"
    long = [beside("m" * 94 + end, turn) for end in ("", "1", "2") for turn in (1, 2)]
    assert len(set(long)) == 6 and {len(uid) for uid in long} == {100}
    assert long[0] == beside("m" * 94) and parse([{**RERANKER, "model_uid": long[0]}], [1], PATHS)
