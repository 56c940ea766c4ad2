# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure what a gateway costs, before a real Xinference 4.1.0 with tiny models, and write build/bench/gateway.json.

`first_token_extra_ms` is how much later the first word of a streamed chat comes through the gateway,
`embedding_throughput_ratio` what is left of the embeddings a second. Both ways are asked in turn, in one run, by
clients that keep their connections as OpenAI's does. The models are tiny, so that little hides what the gateway takes.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import os
import ssl
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "integration")]

import servers
import tiny_models
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import Gateway, routes
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.native import Native
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import converge, files
from ansible_collections.airgap.xinference.plugins.plugin_utils.authority import AUTHORITY, ensure

REPORT = HERE.parents[1] / "build" / "bench" / "gateway.json"
KEY = "sk-bench-0123456789abcdef"
CHATS = 100
ROUNDS = 12
EMBEDDINGS = 100
CLIENTS = 4
MODELS: List[Dict[str, Any]] = [
    {
        "model_uid": "minilm",
        "model_name": "bce-embedding-base_v1",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
    },
    {
        "model_uid": "chat",
        "model_name": "qwen2.5-instruct",
        "model_engine": "transformers",
        "model_format": "pytorch",
        "model_size_in_billions": "0_5",
    },
]
CHAT = json.dumps(
    {"model": "chat", "messages": [{"role": "user", "content": "the cat"}], "stream": True, "max_tokens": 8}
)
EMBEDDING = json.dumps({"model": "minilm", "input": "How long does the launch take?"})


class Way:
    """One way to the server: makes connections, and sends what a client sends."""

    def __init__(self, name: str, port: int, trust: str = "") -> None:
        self.name, self.port = name, port
        self.tls = ssl.create_default_context(cafile=trust) if trust else None

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is kept."""
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def post(self, connection: http.client.HTTPConnection, path: str, body: str) -> http.client.HTTPResponse:
        """Send a request; anything but 200 ends the measurement."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{self.name}: {path} was answered with {answer.status}: {answer.read()[:500]!r}")
        return answer


def first_token(way: Way, connection: http.client.HTTPConnection) -> float:
    """Milliseconds from the request to the first word of the answer, which is read to its end."""
    began = time.perf_counter()
    try:
        answer = way.post(connection, "/v1/chat/completions", CHAT)
    except ConnectionError:  # It was idle for longer than the server keeps it; asked anew, and timed anew.
        connection.close()
        began = time.perf_counter()
        answer = way.post(connection, "/v1/chat/completions", CHAT)
    taken = 0.0
    for line in answer:
        if not taken and line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            taken = (time.perf_counter() - began) * 1000
    if not taken:
        raise SystemExit(f"{way.name}: the model said nothing")
    return taken


def throughput(way: Way) -> float:
    """Embeddings a second by a few clients at once, connected already, as those are that keep connections."""
    failed: List[BaseException] = []

    def client(connection: http.client.HTTPConnection) -> None:
        try:
            with contextlib.closing(connection):
                for _number in range(EMBEDDINGS // CLIENTS):
                    way.post(connection, "/v1/embeddings", EMBEDDING).read()
        except BaseException as error:
            failed.append(error)

    connections = [way.connect() for _number in range(CLIENTS)]
    for connection in connections:
        connection.connect()
    threads = [threading.Thread(target=client, args=(connection,)) for connection in connections]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return EMBEDDINGS / (time.perf_counter() - began)


def in_turn(ways: List[Way], count: int) -> Iterator[List[Way]]:
    """The ways, `count` times, each time the other one first."""
    for number in range(count):
        yield ways if number % 2 else ways[::-1]


@contextlib.contextmanager
def gateway(server: servers.Server) -> Iterator[List[Way]]:
    """A gateway with its defaults before a server, and both ways to that."""
    address = server.endpoint.partition("//")[2]
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        place = Path(top, "gateway")
        made = Gateway(
            "127.0.0.1", servers.free_port(), ["127.0.0.1"], routes({"one": address}, {}), keys={"bench": KEY}
        )
        runner = Native(place, "xinference-gateway", manager="none")
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = ensure(Path(top, "authority"), "bench", made.names, 2, 1, now)
        wanted = files(made, runner, certificate.certificate.read_text(), certificate.key.read_text())
        converge(place, runner, made, wanted, 60, False)
        try:
            trust = str(Path(top, "authority", f"{AUTHORITY}.crt"))
            yield [Way("direct", int(address.rpartition(":")[2])), Way("gateway", made.port, trust)]
        finally:
            runner.stop()


def measure(ways: List[Way]) -> Dict[str, Any]:
    """All figures."""
    connections = {way.name: way.connect() for way in ways}
    for way in ways:  # Once unmeasured, so that everything is loaded and connected.
        throughput(way)
    for way in ways:
        first_token(way, connections[way.name])
    tokens: Dict[str, List[float]] = {way.name: [] for way in ways}
    for order in in_turn(ways, CHATS):
        for way in order:
            tokens[way.name].append(first_token(way, connections[way.name]))
    rates: Dict[str, List[float]] = {way.name: [] for way in ways}
    for order in in_turn(ways, ROUNDS):
        for way in order:
            rates[way.name].append(throughput(way))
    chat = {name: statistics.median(found) for name, found in tokens.items()}
    ratios = [through / direct for through, direct in zip(rates["gateway"], rates["direct"])]
    return {
        "first_token_extra_ms": round(chat["gateway"] - chat["direct"], 2),
        "embedding_throughput_ratio": round(statistics.median(ratios), 3),
        "first_token_ms": {name: round(value, 2) for name, value in chat.items()},
        "embeddings_a_second": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "chats": CHATS,
        "embeddings": ROUNDS * EMBEDDINGS,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    python = servers.environment(servers.OLD) / "bin" / "python"
    with servers.running(servers.NEW) as server:
        for entry in MODELS:
            path = tiny_models.model_dir(entry["model_uid"], python)
            servers.launch(server.client(), {**entry, "model_path": str(path)})
        with gateway(server) as ways:
            figures = measure(ways)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
