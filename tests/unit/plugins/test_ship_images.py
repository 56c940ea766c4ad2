# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The loop that brings images into an engine: asked again until it has them, or a message."""

from __future__ import annotations

from typing import Any, Dict, List, Set

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import Artifact, Blob
from ansible_collections.airgap.xinference.plugins.plugin_utils.images import ROUNDS, bare, load, with_layers
from ansible_collections.airgap.xinference.plugins.plugin_utils.shipping import Shipment, ShippingError, together

BLOBS = (Blob("m", 5), Blob("c", 5), Blob("one", 100), Blob("two", 200))
IMAGE = Artifact("images", "server-1", "m", 300, "", blobs=BLOBS)
MODEL = Artifact("models", "model", "m", 300, "", blobs=BLOBS)


def test_an_image_travels_bare_or_with_some_layers() -> None:
    assert [blob.digest for blob in bare(IMAGE).blobs] == ["m", "c"]
    assert [blob.digest for blob in with_layers(IMAGE, {"two": 200}).blobs] == ["m", "c", "two"]
    assert bare(MODEL) == MODEL and with_layers(MODEL, ()) == MODEL


class Host:
    """A host whose engine has the lower layer, or only says so."""

    def __init__(self, lies: bool = False, stubborn: bool = False) -> None:
        self.lies, self.stubborn = lies, stubborn
        self.store: Set[str] = set()
        self.loaded = False
        self.sent: List[List[str]] = []
        self.said: List[str] = []

    def ask(self, images: List[Artifact], complete: Set[str]) -> Dict[str, Any]:
        needed = {"one": 100, "two": 200} if "server-1" in complete else {"two": 200}
        missing = {} if self.loaded else {name: size for name, size in needed.items() if name not in self.store}
        row = {"name": "server-1", "reference": "server:1", "id": "", "action": "wait", "refused": "", "seconds": 0.5}
        if self.loaded:
            row.update(action="keep", id="sha256:1")
        elif not missing and (self.stubborn or (self.lies and "server-1" not in complete)):
            row.update(action="refused", refused="no such file")
        elif not missing:
            self.loaded = True
            row.update(action="load", id="sha256:1")
        changed = row["action"] != "keep"
        return {"images": [row], "missing": {"server-1": missing} if missing else {}, "changed": changed, "msg": ""}

    def send(self, missing: Dict[str, Dict[str, int]]) -> None:
        self.sent.append(sorted(missing["server-1"]))
        self.store |= set(missing["server-1"])

    def run(self, **more: Any) -> Any:
        return load([IMAGE], self.ask, self.send, self.said.append, **more)


def test_only_what_is_missing_is_sent() -> None:
    host = Host()
    result = host.run()
    assert host.sent == [["two"]] and result.changed and result.rows[0]["action"] == "load"
    again = host.run()
    assert host.sent == [["two"]] and not again.changed and again.rows[0]["action"] == "keep"


def test_after_a_refusal_the_rest_follows() -> None:
    host = Host(lies=True)
    assert host.run().rows[0]["action"] == "load"
    assert host.sent == [["two"], ["one"]]
    assert "server-1: the engine refused" in host.said[0] and "no such file" in host.said[0]


def test_a_rehearsal_sends_nothing() -> None:
    host = Host()
    result = host.run(rehearse=True)
    assert result.changed and result.missing == {"two": 200} and host.sent == [] and not host.loaded


def test_an_engine_that_refuses_everything_ends_with_a_message() -> None:
    host = Host(stubborn=True)
    with pytest.raises(ShippingError, match=f"still lacks server:1 after {ROUNDS} attempts"):
        host.run()


def test_shipments_add_up() -> None:
    first = Shipment(10, 20, 1, {"n": 1}, {"n": 2}, False, ["stream"])
    second = Shipment(1, 2, 3, {"n": 3}, {"n": 4}, True, ["stream", "put_file"])
    total = together([first, second])
    assert (total.first, total.answer, total.sent_bytes, total.hashed_bytes) == ({"n": 1}, {"n": 4}, 11, 22)
    assert (total.blobs, total.changed, total.transports) == (4, True, ["stream", "put_file"])
