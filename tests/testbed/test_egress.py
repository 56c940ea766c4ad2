# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Nothing leaves: no packet and no name query from a host and its containers, from the first task of `site.yml` on.

First what counts, then that the counter sees it in a real host and a real container, then the proof, and last the
control: the same host with the offline switches off, where the counter has to see traffic.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterator, List, Tuple

import pytest
import requests

from .conftest import IMAGES, Carried
from .egress import DOCKERS_NAME_SERVER, NAME_SERVER, Counter, Sent, connected, leading_nowhere, leaves, question, read
from .hosts import Host, Testbed
from .site import SERVER, Site

FOREIGN = "203.0.113.7"
INSIDE = [ipaddress.IPv4Network("10.213.7.0/24"), ipaddress.IPv4Network("172.18.0.0/16")]
LIMIT = 300.0
# Names that Docker itself answers: the services of our Compose project.
SERVICES = ["server", "keeper", "ingress"]
# A model that Xinference knows and this site does not have.
ELSEWHERE = {"model_uid": "far", "model_name": "bge-small-en-v1.5", "model_type": "embedding"}
ELSEWHERE["model_engine"] = "sentence_transformers"
HUBS = ["huggingface", "modelscope", "auto"]


# --- what counts ------------------------------------------------------------------------------------------------------


def ipv4(to: str, carrier: int, data: bytes) -> Tuple[int, bytes]:
    start = struct.pack("!BBHHHBBH4s4s", 0x46, 0, 0, 0, 0, 64, carrier, 0, bytes(4), ipaddress.ip_address(to).packed)
    return 0x0800, start + bytes(4) + data  # with four bytes of options


def udp(to: str, port: int, name: str = "") -> Tuple[int, bytes]:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    return ipv4(to, 17, struct.pack("!HHHH", 40000, port, 0, 0) + bytes(12) + labels + bytes([0, 1, 0, 1]))


def tcp(to: str, port: int) -> Tuple[int, bytes]:
    return ipv4(to, 6, struct.pack("!HH", 40000, port) + bytes(16))


def arp(to: str) -> Tuple[int, bytes]:
    return 0x0806, bytes(24) + ipaddress.ip_address(to).packed


def icmpv6(to: str) -> Tuple[int, bytes]:
    return 0x86DD, bytes(6) + bytes([58]) + bytes(17) + ipaddress.ip_address(to).packed + bytes([135])


@pytest.mark.parametrize(
    ("packet", "told"),
    [
        (tcp(FOREIGN, 443), f"TCP to {FOREIGN}:443"),
        (udp(FOREIGN, 123), f"UDP to {FOREIGN}:123"),
        (ipv4(FOREIGN, 1, b"\x08"), f"ICMP to {FOREIGN}"),
        (udp("8.8.8.8", 53, "Hub.Example"), "DNS to 8.8.8.8:53 hub.example"),
        # A name server inside would pass the question on.
        (udp("10.213.7.1", 53, "hub.example"), "DNS to 10.213.7.1:53 hub.example"),
        (tcp("10.213.7.1", 853), "DNS over TLS to 10.213.7.1:853"),
        (udp("127.0.0.11", 41234, "hub.example"), "DNS to 127.0.0.11 hub.example"),
        (tcp("127.0.0.11", 41234), "DNS to 127.0.0.11"),
        (udp("224.0.0.251", 5353, "x.local"), "mDNS to 224.0.0.251:5353 x.local"),
        (udp("224.0.0.252", 5355, "x"), "LLMNR to 224.0.0.252:5355 x"),
        (udp("239.255.255.250", 1900), "UDP to 239.255.255.250:1900"),
        (udp("255.255.255.255", 67), "UDP to 255.255.255.255:67"),
        (arp(FOREIGN), f"ARP to {FOREIGN}"),
        (icmpv6("2001:db8::1"), "ICMPv6 to 2001:db8::1"),
        ((0x88CC, b""), "link protocol 0x88cc to ?"),
    ],
)
def test_what_leaves_counts_and_is_told(packet: Tuple[int, bytes], told: str) -> None:
    sent = read("gpu-1", *packet)
    assert str(sent).replace("gpu-1: ", "") == told
    assert leaves(sent, INSIDE, ["keeper"])


@pytest.mark.parametrize(
    "packet",
    [
        tcp("10.213.7.11", 22),
        tcp("172.18.0.2", 9997),
        tcp("127.0.0.1", 9997),
        arp("10.213.7.1"),
        udp("127.0.0.11", 41234, "keeper"),
        ipv4("224.0.0.22", 2, b"\x22"),
        icmpv6("ff02::1:ff00:1"),
        (0x86DD, bytes(6) + bytes([6]) + bytes(17) + ipaddress.ip_address("::1").packed + bytes(20)),
    ],
)
def test_what_stays_inside_does_not_count(packet: Tuple[int, bytes]) -> None:
    assert not leaves(read("gpu-1", *packet), INSIDE, ["keeper"])


def test_networks_of_a_namespace_are_those_it_is_on_and_not_those_behind_a_router() -> None:
    table = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0107D50A 0003 0 0 0 00000000 0 0 0
eth0 0007D50A 00000000 0001 0 0 0 00FFFFFF 0 0 0
eth0 0000A8C0 0107D50A 0003 0 0 0 0000FFFF 0 0 0
docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0
"""
    assert [str(network) for network in connected(table)] == ["10.213.7.0/24", "172.17.0.0/16"]


def test_a_broken_question_has_no_name() -> None:
    assert question(b"") == question(bytes(12)) == question(bytes(12) + b"\xc0\x0c") == ""


# --- a host with all that is served -----------------------------------------------------------------------------------


class Served(Site):
    """One host with all that is served, and its clients."""

    def __init__(self, host: Host, place: Path, carried: Carried) -> None:
        embedding: Dict[str, Any] = {"model_name": "bce-embedding-base_v1", "model_type": "embedding"}
        embedding.update(probe={"expect": {"dimensions": 384}})
        rerank = {"model_name": "bce-reranker-base_v1", "model_type": "rerank", "probe": {"expect": {"best": None}}}
        chat = {"model_name": "qwen2.5-instruct", "model_type": "LLM", "probe": {"expect": {"words": None}}}
        chat.update(model_format="pytorch", model_size_in_billions="0_5", quantization="none")
        engines = {"minilm": "sentence_transformers", "rerank": "sentence_transformers", "chat": "transformers"}
        sources = {uid: {"name": uid, "path": path} for uid, path in carried.models.items()}
        models = [
            {**fields, "model_uid": uid, "model_engine": engines[uid], "source": sources[uid]}
            for uid, fields in (("minilm", embedding), ("rerank", rerank), ("chat", chat))
        ]
        variables: Dict[str, Any] = {
            **carried.variables,
            "xinference_backend": "docker",
            "xinference_image": "testbed/xinference:4.1.0-cpu",
            "xinference_gpus": [0, 1],
            "xinference_host": "0.0.0.0",
            "xinference_auth": False,
            "xinference_server_allow_open": True,
            "xinference_server_ulimits": {},
            "xinference_verify_report": "",
            "xinference_models": models,
        }
        super().__init__(host, place, variables)
        self.endpoint = f"http://{host.address}:9997"

    def ask(self, path: str, body: Any = None, *, expect: Collection[int] = (200,)) -> bytes:
        """One request, a POST if there is a body; what was answered, to the last byte of a stream."""
        given = {"data": body} if isinstance(body, str) else {"json": body}
        method = "GET" if body is None else "POST"
        # A connection of its own: the server ends one that was idle for 5 s, even as a request comes.
        answer = requests.request(method, self.endpoint + path, timeout=LIMIT, **given)
        assert answer.status_code in expect, (path, answer.status_code, answer.text[:300])
        content: bytes = answer.content
        return content

    def ready(self) -> bool:
        """Whether all three answer."""
        try:
            for path, body in GOOD:
                self.ask(path, body)
        except (AssertionError, OSError):
            return False
        return True


def talk(stream: bool) -> Dict[str, Any]:
    messages = [{"role": "user", "content": "one two three"}]
    return {"model": "chat", "messages": messages, "max_tokens": 4, "stream": stream}


GOOD: List[Tuple[str, Any]] = [
    ("/v1/embeddings", {"model": "minilm", "input": "A cat sleeps."}),
    ("/v1/rerank", {"model": "rerank", "query": "cat", "documents": ["a dog", "a cat"]}),
    ("/v1/chat/completions", talk(False)),
    ("/v1/chat/completions", talk(True)),
]
# Also those that ask for nothing or for what is not there.
OTHER: List[Tuple[str, Any]] = [
    ("/v1/models", None),
    ("/v1/models/minilm", None),
    ("/v1/models/instances", None),
    ("/v1/cluster/info", None),
    ("/status", None),
    ("/metrics", None),
    ("/docs", None),
    ("/ui/", None),
    ("/v1/engines/embedding/bge-m3", None),
    ("/v1/nowhere", None),
    ("/v1/models/nobody", None),
    ("/v1/embeddings", {"model": "nobody", "input": "x"}),
    # Arrays of tokens make Xinference load tiktoken.
    ("/v1/embeddings", {"model": "minilm", "input": [[791, 8415, 15028], [13]]}),
    ("/v1/embeddings", {"model": "minilm"}),
    ("/v1/embeddings", "no JSON"),
    ("/v1/rerank", {"model": "minilm", "query": "x", "documents": ["y"]}),
    ("/v1/chat/completions", {"model": "rerank", "messages": []}),
    ("/v1/images/generations", {"model": "nobody", "prompt": "x"}),
    ("/v1/models", {"model_uid": "x", "model_name": "no-such-model", "model_type": "embedding"}),
    ("/v1/models", {"model_uid": "x"}),
]
ANY = range(200, 600)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def site(bare: Testbed, carried: Carried, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    host = bare.hosts["gpu-1"]
    # That the engine loads its images belongs to what is counted.
    for reference in IMAGES:
        host.docker("image", "rm", "--force", reference, check=False)
    with leading_nowhere(host):
        yield Served(host, tmp_path_factory.mktemp("egress"), carried)


@pytest.fixture(scope="module")
def counter(site: Served) -> Iterator[Counter]:
    """Counts from before the first task until the last test."""
    with Counter([site.host]) as running:
        yield running


def test_nothing_leaves_while_the_site_is_deployed_and_models_are_launched(site: Served, counter: Counter) -> None:
    site.play("site")
    assert counter.left(SERVICES) == {}
    # The server's container was looked into; the keeper shares its network or has its own.
    assert "gpu-1" in counter.places and len(counter.places) > 1


def test_nothing_leaves_at_first_requests_and_after_a_restart(site: Served, counter: Counter) -> None:
    assert site.ready()
    before = set(counter.places)
    site.host.docker("restart", SERVER)
    until(site.ready)
    assert counter.places > before
    assert counter.left(SERVICES) == {}


def test_nothing_leaves_in_some_thousand_requests_of_every_type(site: Served, counter: Counter) -> None:
    work = [("good", *one) for one in itertools.islice(itertools.cycle(GOOD), 240)]
    work += [("other", *one) for one in itertools.islice(itertools.cycle(OTHER), 1800)]

    def do(kind: str, path: str, body: Any) -> None:
        site.ask(path, body, expect=(200,) if kind == "good" else ANY)

    with ThreadPoolExecutor(max_workers=8) as clients:
        for _done in clients.map(lambda one: do(*one), work):
            pass
    # A model that would have to be fetched is refused, from wherever.
    for hub in HUBS:
        site.ask("/v1/models", {**ELSEWHERE, "download_hub": hub}, expect=range(400, 600))
    assert counter.left(SERVICES) == {}


def attempts(site: Served, *inside: str) -> None:
    """What a program may try, from the host or from a container of it."""
    for script in (f"echo > /dev/tcp/{FOREIGN}/443", "getent hosts hub.example", "echo x > /dev/udp/224.0.0.251/5353"):
        site.host.exec(*inside, "timeout", "1", "bash", "-c", script, check=False)


def test_the_counter_sees_attempts_of_host_and_container(site: Served) -> None:
    address = json.loads(site.host.docker("inspect", SERVER))[0]["NetworkSettings"]["SandboxKey"]
    container = f"gpu-1/{address.rpartition('/')[2]}"
    with Counter([site.host]) as counter:
        attempts(site)
        attempts(site, "docker", "exec", SERVER)
        seen = [Sent(place, "TCP", FOREIGN, 443) for place in ("gpu-1", container)]
        seen += [Sent(place, "mDNS", "224.0.0.251", 5353) for place in ("gpu-1", container)]
        until(lambda: set(seen) <= set(counter.left()))
        asked = {sent.place: sent.to for sent in counter.left() if sent.name == "hub.example"}
    assert asked["gpu-1"] == NAME_SERVER and asked[container] in (NAME_SERVER, str(DOCKERS_NAME_SERVER))
    # And again where it would leave.
    assert {sent.to for sent in counter.left() if sent.place.startswith("network ")} >= {FOREIGN, NAME_SERVER}


def test_with_the_switches_off_the_counter_sees_the_servers_own_lookups(site: Served) -> None:
    """The control run: what this counter says of zero is worth something."""
    off = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "0"}
    off.update(GRADIO_ANALYTICS_ENABLED="True")
    site.play("serve", xinference_server_environment=off, xinference_keeper=False)

    def fetch() -> None:
        with contextlib.suppress(OSError):  # the server is killed while it still tries
            requests.post(f"{site.endpoint}/v1/models", json=ELSEWHERE, timeout=LIMIT)

    with Counter([site.host]) as counter:
        asking = threading.Thread(target=fetch)
        asking.start()
        until(lambda: any("huggingface.co" in sent.name for sent in counter.left()))
        counted = sum(counter.left().values())
        site.host.docker("kill", SERVER)
        asking.join()
    assert counted > 0
    print("\n" + "\n".join(f"{number} {sent}" for sent, number in counter.left().items()))
