# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an engine says, and one that ends while it is asked; on the controller, where the docker library is."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.engine import Engine, EngineError


def test_an_engine_that_ends_in_the_middle_is_told_with_a_cure(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()

    def serve() -> None:
        version = json.dumps({"ApiVersion": "1.41"}).encode()
        connection, _address = listener.accept()
        connection.recv(65536)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(version) + version
        )
        connection.close()
        connection, _address = listener.accept()
        connection.recv(10)
        connection.close()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    try:
        engine = Engine(f"unix://{tmp_path / 'sock'}")
        with pytest.raises(
            EngineError, match=r"went away while it was to load the image .*start it, then run again"
        ) as caught:
            engine.load(iter([b"x" * 4096]))
        assert caught.value.said == ""
    finally:
        listener.close()
        server.join(10)


def test_an_engine_whose_disk_is_full_is_told_with_a_cure() -> None:
    class Api:
        def load_image(self, content: object) -> list:
            return [{"status": "Loading"}, {"errorDetail": {"message": "write /x: no space left on device"}}]

    engine = Engine.__new__(Engine)
    engine._api = Api()
    with pytest.raises(EngineError, match=r"no space left on device\. Free space where .*docker image prune") as caught:
        engine.load([])
    assert caught.value.said == "write /x: no space left on device"


@pytest.mark.parametrize(
    ("status", "takes"),
    [
        ([["Backing Filesystem", "extfs"]], True),
        ([["driver-type", "io.containerd.snapshotter.v1"]], False),
        (None, True),
        ([["odd"]], True),
    ],
)
def test_the_store_of_containerd_is_known_by_what_the_engine_says(status: object, takes: bool) -> None:
    class Api:
        def info(self) -> dict:
            return {"DriverStatus": status}

    engine = Engine.__new__(Engine)
    engine._api = Api()
    assert engine.takes_deltas is takes
