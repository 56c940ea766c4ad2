# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every row of the table of failures against a real text: recorded here, or from a public report."""

from __future__ import annotations

import json

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.diagnose import Diagnosis, diagnose
from ansible_collections.airgap.xinference.plugins.module_utils.server.failures import ROWS
from fakes import FIXTURES, VERSIONS, recorded

RECORDED = {
    "duplicate": "already-serving",
    "unknown-embedding": "unknown-name",
    "unknown-rerank": "unknown-name",
    "unknown-audio": "unknown-name",
    "unknown-llm": "unknown-llm",
    "unknown-size": "unknown-llm",
    "unknown-type": "unknown-type",
    "engine-missing-llm": "engine-not-usable",
    "engine-missing-embedding": "engine-not-usable",
    "engine-not-given": "engine-missing",
    "gpu-not-visible": "gpu-not-visible",
    "gpu-count": "gpu-count",
    "path-missing": "path-missing",
    "not-this-model": "not-this-model",
    "bad-uid": "bad-uid",
    "download": "download-failed",
    "terminate-unknown": "not-serving",
    "embed-tokens": "tiktoken",
}
RECORDED_ACCESS = {
    "no-credentials": "wrong-credentials",
    "wrong-password": "wrong-credentials",
    "wrong-key": "wrong-credentials",
    "bad-setup-token": "setup-token",
    "key-may-not-launch": "key-may-not",
}
# What needs a GPU, another engine, or a fault: the texts are those of the programs, from their code or public reports.
REPORTED = json.loads((FIXTURES / "reported-failures.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", sorted(RECORDED))
def test_recorded_failures(version, case):
    found = diagnose(recorded(version, "failures")[case]["detail"])
    assert found is not None
    assert found.name == RECORDED[case]


@pytest.mark.parametrize("case", sorted(RECORDED_ACCESS))
def test_recorded_refusals(case):
    found = diagnose(recorded("4.1.0", "access")[case]["detail"])
    assert found is not None
    assert found.name == RECORDED_ACCESS[case]


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_reported_failures(name):
    found = diagnose(REPORTED[name])
    assert found is not None
    assert found.name == name
    assert found.cause.endswith(".") and found.cure.endswith(".")
    assert "{" not in found.cause + found.cure


def test_every_row_is_tested():
    assert {row.name for row in ROWS} == set(REPORTED) | set(RECORDED.values()) | set(RECORDED_ACCESS.values())


def test_nothing_is_known():
    assert diagnose("") is None
    assert diagnose("a quite new failure") is None


def known(text: str) -> Diagnosis:
    """The diagnosis of a text that has one."""
    found = diagnose(text)
    assert found is not None
    return found


def test_kv_cache_advice_has_numbers():
    found = known(REPORTED["kv-cache-tokens"])
    assert "131000" in found.cause and "66512" in found.cause
    assert "max_model_len to 66304" in found.cure
    found = known(REPORTED["kv-cache-memory"])
    assert "max_model_len to at most 114432" in found.cure
    assert "0.19 GiB more" in found.cure and "0.01 on a 24 GiB card" in found.cure


def test_the_seed_s_table_of_a_48_gib_card():
    """With room for 8122 tokens at 0.6 and a wish for 66523, the advice stays below what was measured."""
    found = known(REPORTED["kv-cache-tokens"].replace("131000", "66523").replace("66512", "8122"))
    assert "max_model_len to 7936" in found.cure
    assert "8.2 times too little" in found.cause


def test_memory_taken_by_others():
    found = known(REPORTED["gpu-memory-taken"])
    assert "3.27 of 15.98 GiB" in found.cause
    assert "gpu_memory_utilization to 0.20" in found.cure


@pytest.mark.parametrize("version", VERSIONS)
def test_near_names_are_offered(version):
    found = known(recorded(version, "failures")["unknown-embedding"]["detail"])
    assert "bce-embeding-base" in found.cause
    assert "bce-embedding-base_v1" in found.cure


def test_a_server_that_sees_some_gpus():
    found = known("Worker a:1 cannot use the GPUs with these indexes: [3]. Worker a:1 can only see these GPUs: [0, 1].")
    assert "numbers them 0, 1" in found.cure
