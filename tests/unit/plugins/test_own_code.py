# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models that bring code of their own go only to hosts whose entries allow it."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import CODE, Artifact, File
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse
from ansible_collections.airgap.xinference.plugins.plugin_utils.bundles import code_refusals
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness import judge_signatures


def artifact(name: str, *files: str, code: str = "") -> Artifact:
    digest = "sha256:" + "0" * 64
    annotations = {CODE: code} if code else {}
    return Artifact("models", name, digest, 1, "", annotations, tuple(File(path, digest, 1) for path in files))


MODELS = [artifact("own", "own.py"), artifact("noted", "x.bin", code="config.json:a.B"), artifact("plain", "x.bin")]


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {"model_uid": f"uid-{name}", "model_name": "x", "source": {"path": f"/data/{name}"}, **more}


def test_code_is_refused_where_an_entry_does_not_allow_it() -> None:
    said = code_refusals(MODELS, [entry("own"), entry("noted"), entry("plain"), "nonsense"])  # type: ignore[list-item]
    assert said == [
        "uid-own: its model own brings code of its own (own.py)",
        "uid-noted: its model noted brings code of its own (config.json:a.B)",
    ]
    allowed = [entry("own", allow_code=True), entry("noted", allow_code="yes")]
    assert code_refusals(MODELS, allowed) == []
    # Each entry speaks for itself.
    assert len(code_refusals(MODELS, [*allowed, entry("own", model_uid="second")])) == 1
    assert code_refusals(MODELS, [entry("own", enabled=False)]) == []


@pytest.mark.parametrize("value", [False, "false", "no", None, 1, "maybe", {}])
def test_nonsense_is_no_consent(value: Any) -> None:
    assert len(code_refusals(MODELS, [entry("own", allow_code=value)])) == 1


def test_companions_are_judged_with_the_entry_that_wants_them() -> None:
    wants = entry("plain", model_name="SenseVoiceSmall", model_type="audio")
    companion = artifact("speech_fsmn_vad_zh-cn-16k-common-pytorch", "own.py")
    names = [artifact(one.name, "own.py") for one in _companions(wants)] or [companion]
    assert len(code_refusals(names, [wants])) == len(names)
    assert code_refusals(names, [{**wants, "allow_code": True}]) == []


def _companions(wants: dict[str, Any]) -> list[Any]:
    from ansible_collections.airgap.xinference.plugins.module_utils.companions import companions_of

    return list(companions_of(wants))


def test_the_consent_is_not_sent_to_the_server() -> None:
    spec = parse([entry("own", model_type="embedding", allow_code=True)], (), {"own": "/models/own"})[0]
    assert "allow_code" not in spec.payload()
    assert (
        spec.fingerprint() == parse([entry("own", model_type="embedding")], (), {"own": "/models/own"})[0].fingerprint()
    )


def test_a_host_that_cannot_check_signatures_is_not_ready() -> None:
    assert judge_signatures({"signatures": ""}) == judge_signatures({}) == []
    found = judge_signatures({"signatures": "this machine has no ssh-keygen."})[0]
    assert found.check == "signature" and "xinference_bundle_signers_on_host" in found.cure
