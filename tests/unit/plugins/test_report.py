# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table over all hosts: every model and every host has its line, and nothing bad passes for good."""

from __future__ import annotations

from typing import Any

from ansible_collections.airgap.xinference.plugins.plugin_utils import report

ENDPOINT = "http://127.0.0.1:9997"


def health(**probes: dict[str, Any]) -> dict[str, Any]:
    """A healthy server that runs a model of each name."""
    models = {uid: {"state": "ready", "model": {"model_type": "embedding"}} for uid in probes}
    return {"endpoint": ENDPOINT, "reachable": True, "required": list(probes), "models": models, "probes": probes}


PASSED = {"state": "passed", "latency_s": 0.012, "detail": "384 dimensions"}


def of(**hosts: dict[str, Any]) -> report.Report:
    return report.Report([row for host, result in hosts.items() for row in report.rows_of(host, result)])


def test_a_model_that_works_is_a_line_and_no_problem() -> None:
    found = of(gpu1=health(minilm=PASSED))
    assert report.table(found.rows) == [
        "HOST  MODEL   TYPE       STATE  LATENCY  ENDPOINT",
        "gpu1  minilm  embedding  ok     12 ms    http://127.0.0.1:9997",
    ]
    assert (found.verified, found.problems) == (1, [])


def test_models_of_a_server_that_does_not_tell_them_are_not_called_missing() -> None:
    problem = "429 Too many failed attempts"
    found = of(gpu1={**health(minilm=PASSED), "models": {}, "probes": {}, "listed": False, "problems": [problem]})
    assert report.table(found.rows)[1:] == [
        "gpu1  -      -     not verified  -        http://127.0.0.1:9997",
        f"  {problem}",
    ]


def test_a_failed_probe_is_told_under_its_line() -> None:
    found = of(gpu1=health(minilm={"state": "failed", "latency_s": 1.25, "error": "a related pair is no closer"}))
    assert report.table(found.rows)[1:] == [
        "gpu1  minilm  embedding  failed  1.2 s    http://127.0.0.1:9997",
        "  a related pair is no closer",
    ]
    assert found.problems == ["gpu1: minilm: a related pair is no closer"]


def test_an_alternative_is_told_under_its_line() -> None:
    result = health(reranker=PASSED, other=PASSED)
    told = {"choice": 1, "runs": "bge-reranker-base on sentence_transformers", "why": "It does not fit."}
    result["models"]["reranker"]["launched"] = told
    result["models"]["other"]["launched"] = {"choice": 0, "runs": "bge-m3 on vLLM", "why": ""}
    found = of(gpu1=result)
    assert report.table(found.rows)[1:] == [
        "gpu1  reranker  embedding  ok     12 ms    http://127.0.0.1:9997",
        "  alternative 1 serves: bge-reranker-base on sentence_transformers. The first choice failed: It does not fit",
        "gpu1  other     embedding  ok     12 ms    http://127.0.0.1:9997",
    ]
    assert found.problems == [] and found.as_dict()["models"][0]["note"].startswith("alternative 1 serves")
    result["models"]["reranker"].update(state="failed", error="died", launched={"choice": -1, "runs": "old", "why": ""})
    assert of(gpu1=result).rows[0].lines == ["died", "what ran before serves: old"]


def test_a_host_of_which_nothing_is_known_fails_the_report() -> None:
    found = of(gpu1=health(minilm=PASSED), gpu2={}, gpu3={"problems": ["Connection refused"], "endpoint": ENDPOINT})
    assert [row.state for row in found.rows] == ["ok", "not verified", "not verified"]
    assert found.problems == [
        "gpu2: it was not reached, or an earlier step failed there",
        "gpu3: Connection refused",
    ]


def test_missing_and_starting_models_are_problems() -> None:
    result = health(gone=PASSED, slow=PASSED)
    result["models"] = {"slow": {"state": "starting", "model": None}}
    assert [row.state for row in of(gpu1=result).rows] == ["missing", "starting"]
    assert len(of(gpu1=result).problems) == 2


def test_a_report_that_verified_nothing_fails() -> None:
    assert "Nothing was verified" in of(gpu1=health()).problems[0]
    skipped = health(minilm={"state": "skipped", "detail": "switched off by probe: false"})
    assert "Nothing was verified" in of(gpu1=skipped).problems[0]


def test_a_skipped_model_beside_one_that_works_is_fine() -> None:
    assert of(gpu1=health(minilm=PASSED, other={"state": "skipped", "detail": "off"})).problems == []


def test_clients_get_addresses_for_the_same_machine_and_for_docker() -> None:
    found = of(gpu1=health(minilm=PASSED))
    (settings,) = found.as_dict()["clients"]
    assert settings["openai"] == {"base_url": "http://127.0.0.1:9997/v1", "models": ["minilm"]}
    assert settings["ragflow"]["same_machine"] == "http://127.0.0.1:9997/v1"
    assert settings["ragflow"]["inside_docker"] == "http://host.docker.internal:9997/v1"
    assert settings["ragflow"]["models"] == [{"model_uid": "minilm", "model_type": "embedding"}]
    assert any("172.17.0.1" in line for line in report.client_lines(settings, auth=False))


def test_an_address_of_the_network_is_the_same_from_everywhere() -> None:
    result = {**health(minilm=PASSED), "endpoint": "https://gpu1.example"}
    (settings,) = of(gpu1=result).as_dict()["clients"]
    assert settings["ragflow"]["inside_docker"] == settings["ragflow"]["same_machine"] == "https://gpu1.example/v1"
    assert not any("172.17.0.1" in line for line in report.client_lines(settings, auth=True))


def test_models_that_do_not_work_are_not_offered_to_clients() -> None:
    found = of(gpu1=health(good=PASSED, bad={"state": "failed", "error": "no"}))
    assert found.as_dict()["clients"][0]["openai"]["models"] == ["good"]


def test_every_host_has_its_own_problems() -> None:
    failed = {"step": "preflight", "messages": ["disk: full. Cure: free some", ""]}
    rows = [*report.rows_of("gpu1", health(minilm=PASSED)), *report.rows_of("gpu2", {}, failed)]
    assert [row.state for row in rows] == ["ok", "failed: preflight"]
    found = report.Report(rows)
    assert found.problems_of("gpu1") == [] and found.problems_of("gpu2") == ["gpu2: disk: full. Cure: free some"]
    assert "Nothing was verified" in of(gpu1=health()).problems_of("gpu1")[0]
