# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of what each version can do."""

from __future__ import annotations

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import (
    CHANGES,
    features,
    parse_version,
    supported,
)
from fakes import VERSIONS, recorded


@pytest.mark.parametrize(
    ("text", "number"), [("4.1.0", (4, 1)), ("1.11.0.post1", (1, 11)), ("v2.0.0rc1", (2, 0)), ("10.2", (10, 2))]
)
def test_versions(text, number):
    assert parse_version(text) == number


@pytest.mark.parametrize("text", ["", "latest", "0+unknown", "4"])
def test_no_version(text):
    with pytest.raises(ValueError, match="is not a version"):
        parse_version(text)


def test_rows_stand_in_order():
    numbers = [since for since, _row in CHANGES]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("version", "auth", "early", "engines", "autostart"),
    [
        ("1.3.0", "config-file", False, {"LLM"}, False),
        ("1.8.1", "config-file", False, {"LLM", "embedding"}, False),
        ("1.13.0", "config-file", False, {"LLM", "embedding", "rerank"}, False),
        ("1.14.0", "config-file", True, {"LLM", "embedding", "rerank"}, False),
        ("2.0.0", "config-file", True, {"LLM", "embedding", "rerank", "image"}, False),
        ("2.12.0", "opt-in", True, {"LLM", "embedding", "rerank", "image"}, True),
        ("3.2.1", "first-caller", True, {"LLM", "embedding", "rerank", "image", "audio"}, True),
        ("4.1.0", "setup-token", True, {"LLM", "embedding", "rerank", "image", "audio", "video", "world"}, True),
        ("9.9.9", "setup-token", True, {"LLM", "embedding", "rerank", "image", "audio", "video", "world"}, True),
        ("0+unknown", "setup-token", True, {"LLM", "embedding", "rerank", "image", "audio", "video", "world"}, True),
    ],
)
def test_what_changed_when(version, auth, early, engines, autostart):
    found = features(version)
    assert found.version == version
    assert (found.auth, found.launch_returns_early, found.engine_types, found.autostart) == (
        auth,
        early,
        engines,
        autostart,
    )
    assert found.engine_required == {"LLM"}


def test_supported():
    assert [one for one in ("1.2.2", "1.3.0", "4.1.0", "5.0", "?") if supported(one)] == ["1.3.0", "4.1.0", "5.0"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_agrees_with_what_was_recorded(version):
    found = features(recorded(version, "cluster_version")["version"])
    models = {one["id"]: one for one in recorded(version, "models")["data"]}
    assert ("model_engine" in models["embedding"]) == found.model_shows_engine
    instances = {one["model_uid"]: one for one in recorded(version, "instances")}
    assert ("replica_statuses" in instances["embedding"]) == found.launch_returns_early
    for kind in ("embedding", "rerank", "audio"):
        assert ("model_specs" in recorded(version, f"registration_{kind}")) == (kind in found.specs_types)
