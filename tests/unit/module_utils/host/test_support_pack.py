# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is packed for support has no secret in it: planted everywhere, searched for by means of this test's own."""

from __future__ import annotations

import base64
import io
import json
import re
import sqlite3
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List
from urllib.parse import quote, unquote_plus

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.container import Container
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.definition import Gateway, Route
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import files
from ansible_collections.airgap.xinference.plugins.module_utils.host import support_pack
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Answer
from ansible_collections.airgap.xinference.plugins.module_utils.host.support_pack import Leak, end_of, pack
from ansible_collections.airgap.xinference.plugins.module_utils.host.yaml_text import yaml_text
from ansible_collections.airgap.xinference.plugins.module_utils.scrubbing import Scrubber

PLANTED: Dict[str, str] = {
    "server.env": "env-$ecret'One x",
    "second line": "env-second-line-77",
    "credentials": "Pa$$w/rd+of=admin",
    "administrator": "administrators-own-57",
    "client": "client without a shape 4",
    "tokens": "0f1e2d3c4b5a-tokens",
    "service": "service-secret-5521",
    "model": "model-envs-token-41",
    "registration": "registration-key-9",
    "older release": "older-release-secret-3",
    "container": "only-in-the-container-8",
    "jwt": "jwt-0123456789abcdef-key",
    "setup": "Vw3kPq-8_zz91kLmN0pQrStUvWxYz0123456789abcd",
    "site's file": "kept-by-the-site-66",
    "given": "told-by-the-inventory-2",
    "gateway": "key/of+a.client~of-the_gateway==",
    "gateway, older": "key-of-a-client-that-went",
    "gateway's": "MHcCAQEEIOfTheGatewayItself123456789",
}
GATEWAYS = "gateway's"
LOOKS = ("sk-72tkvudyGLPMi12345", "bearer-ONLY-in-a-log-1", "MIIEpAIBAAKCAQEA1234", "stranger-password-1")
NOT_LOGGED = ("hash-in-the-database",)
ALL = (*PLANTED.values(), *LOOKS, *NOT_LOGGED)


def views(content: bytes) -> Iterator[str]:
    """All that a text may be read as: itself, what is escaped in it, and what its base64 decodes to."""
    text = content.decode("utf-8", "replace")
    yield text
    yield text.replace("$$", "$")
    yield unquote_plus(text)
    yield text.replace("'\\''", "'")
    yield re.sub(r"\\(.)", r"\1", text)
    for run in re.findall(r"[A-Za-z0-9+/_-]{8,}", text):
        plain = run.replace("-", "+").replace("_", "/")
        for start in range(4):
            part = plain[start:]
            part = part[:-1] if len(part) % 4 == 1 else part
            yield base64.b64decode(part + "=" * (-len(part) % 4)).decode("utf-8", "replace")
        if re.fullmatch(r"(?:[0-9a-f]{2})+", run):
            yield bytes.fromhex(run).decode("utf-8", "replace")


def found_in(files: Dict[str, bytes]) -> List[str]:
    """Each planted secret that stands in some file, with the file."""
    return sorted(
        {
            f"{secret} in {name}"
            for name, content in files.items()
            for view in views(content)
            for secret in ALL
            if secret in view
        }
    )


def opened(archive: bytes) -> Dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        return {one.name: packed.extractfile(one).read() for one in packed.getmembers()}  # type: ignore[union-attr]


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def log_lines() -> str:
    lines = ["2026-11-20 10:08:48,054 uvicorn 1 INFO    Uvicorn running on http://127.0.0.1:9997"]
    for number, secret in enumerate(PLANTED.values()):
        lines += [
            f"plain {secret} end",
            f"Authorization: Basic {b64(f'admin:{secret}')}",
            f"odd base64 {b64('x' * (number % 3) + secret)}",
            f"GET /v1/models?what={quote(secret, safe='')} 200",
            json.dumps({"message": secret}),
            repr({"message": secret}),
            secret.encode().hex(),
        ]
    lines += [
        f"client used {LOOKS[0]}",
        f"Authorization: Bearer {LOOKS[1]}",
        f"-----BEGIN PRIVATE KEY-----\n{LOOKS[2]}\n-----END PRIVATE KEY-----",
        f"login with password={LOOKS[3]} failed",
        f"Setup token: {PLANTED['setup']}",
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host of the docker backend whose every file has secrets in it."""
    top = tmp_path / "site"
    release, old = top / "releases/aaaaaaaaaaaa", top / "releases/bbbbbbbbbbbb"
    variables = {"SITE_VALUE": PLANTED["server.env"], "OTHER_TOKEN": PLANTED["second line"]}
    write(release / "server.env", "".join(f"{name}={json.dumps(value)}\n" for name, value in sorted(variables.items())))
    write(old / "server.env", f"OLD_PASSWORD={PLANTED['older release']}\n")
    write(release / "credentials.json", {"username": "admin", "password": PLANTED["credentials"]})
    users = [{"username": "admin", "password": PLANTED["administrator"]}, {"api_keys": [PLANTED["client"]]}]
    write(release / "accounts.json", {"auth_config": {"secret_key": PLANTED["tokens"]}, "user_config": users})
    write(release / "models.json", [{"model_uid": "m", "envs": {"HF_TOKEN": PLANTED["model"]}}])
    write(release / "registrations.json", [{"definition": {"api_key": PLANTED["registration"]}}])
    write(release / "service.json", {"environment": {"API_SECRET": PLANTED["service"]}, "name": "x"})
    write(release / "keeper.json", {"endpoint": "http://server:9997", "password": PLANTED["credentials"]})
    view = {"backend": "docker", "project": "p", "service": "server", "image": "i", "endpoint": "http://127.0.0.1:9"}
    write(release / "server.json", {**view, "gpus": []})
    server = {
        "environment": {"SITE_VALUE": PLANTED["server.env"], "HF_HUB_OFFLINE": "1"},
        "command": ["xinference-local", "--api-key", PLANTED["service"]],
        "ports": [{"host_ip": "127.0.0.1", "published": "9", "target": 9997}],
        "volumes": [{"source": str(top / "home"), "target": "/root/.xinference"}],
    }
    write(release / "compose.yaml", "# ours\n" + yaml_text({"name": "p", "services": {"server": server}}))
    (top / "current").symlink_to("releases/aaaaaaaaaaaa")
    write(top / "state/keeper.json", {"problem": f"refused {PLANTED['credentials']}", "models": []})
    write(top / "state/launched.json", {"m": {"payload": {"envs": {"HF_TOKEN": PLANTED["model"]}}}})
    gateway = Gateway("0.0.0.0", 443, ["gpu"], [Route("", ("127.0.0.1:9997",))], keys={"rag": PLANTED["gateway"]})
    before = Gateway(**{**gateway.__dict__, "keys": {"chat": PLANTED["gateway, older"]}})
    private = f"-----BEGIN EC PRIVATE KEY-----\n{PLANTED[GATEWAYS]}\n-----END EC PRIVATE KEY-----\n"
    engine: Any = FakeDocker()
    for one, wanted in (("cccccccccccc", gateway), ("dddddddddddd", before)):
        for name, entry in files(wanted, Container(top / "gateway", "g", "", engine), "public", private).items():
            write(top / "gateway/releases" / one / name, entry.text)
    (top / "gateway/current").symlink_to("releases/cccccccccccc")
    write(top / "logs/gateway.log", log_lines())
    write(top / "secrets/key.txt", PLANTED["site's file"] + "\n")
    write(top / "home/auth/jwt_secret_key", PLANTED["jwt"])
    write(top / "logs/server.log", log_lines())
    write(top / "home/logs/local_1/xinference.log", log_lines())
    write(top / "home/logs/picture.log", "\0\1\2" + PLANTED["jwt"])
    with sqlite3.connect(str(top / "home/auth/auth.db")) as database:
        database.execute("CREATE TABLE system_config (key TEXT, value TEXT)")
        database.execute("INSERT INTO system_config VALUES ('setup_token', ?)", (PLANTED["setup"],))
        database.execute("CREATE TABLE users (password_hash TEXT)")
        database.execute("INSERT INTO users VALUES (?)", NOT_LOGGED)
    database.close()
    return top


GATEWAY = {"Name": "/xinference-gateway", "Config": {"Env": [f"X={PLANTED['gateway']}"]}}


class FakeDocker:
    """An engine with the one container, whose environment and log have secrets."""

    def __init__(self, _address: Any = None) -> None:
        pass

    def container(self, labels: Dict[str, str]) -> Any:
        if labels["com.docker.compose.service"] != "server":
            return None
        variables = [f"MINE_KEY={PLANTED['container']}", f"SITE_VALUE={PLANTED['server.env']}", "HF_HUB_OFFLINE=1"]
        return {"Id": "c0ffee", "Name": "/p-server-1", "Config": {"Env": variables}, "State": {"Running": True}}

    def ask(self, *words: str, **_options: Any) -> Answer:
        told = {"logs": f"first line is cut\n{log_lines()}", "ps": "beef\n", "inspect": json.dumps([GATEWAY])}
        return Answer(0, told.get(words[0], "Docker 20"), "")


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_pack, "Docker", FakeDocker)
    monkeypatch.setattr(support_pack, "COMMANDS", {"uname.txt": ["uname", "-a"]})


def packed(root: Path, **options: Any) -> Dict[str, bytes]:
    more = {"findings": [{"found": f"it said {PLANTED['credentials']}"}], "api_key": PLANTED["service"]}
    archive, names = pack(root, "gpu-1", options.get("limit", 10**7), None, [PLANTED["given"]], more)
    files = opened(archive)
    assert sorted(files) == [f"gpu-1/{name}" for name in names]
    return files


def test_no_secret_is_packed(root: Path) -> None:
    assert found_in(packed(root)) == []


def test_the_search_finds_every_secret_where_it_was_planted(root: Path) -> None:
    sources = {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    sources["container"] = json.dumps(FakeDocker().container({"com.docker.compose.service": "server"})).encode()
    told = found_in(sources)
    assert {secret for secret in ALL if any(line.startswith(f"{secret} in ") for line in told)} == set(ALL)


@pytest.mark.parametrize("disguise", [str, b64, lambda text: b64(f"a:{text}"), lambda text: quote(text, safe="")])
def test_the_search_finds_one_planted_in_the_archive(root: Path, disguise: Any) -> None:
    files = packed(root)
    files["gpu-1/logs/server.log"] += f"\n{disguise(PLANTED['credentials'])}\n".encode()
    assert found_in(files) == [f"{PLANTED['credentials']} in gpu-1/logs/server.log"]


def test_what_support_needs_is_there_and_readable(root: Path) -> None:
    files = packed(root)
    names = {name.partition("/")[2] for name in files}
    assert {
        "README.txt",
        "diagnosis.json",
        "docker/server.json",
        "docker/server.log",
        "gateway/keys.conf",
        "gateway/nginx.conf",
        "gateway/tls.crt",
        "gateway/xinference-gateway.json",
        "gateway/xinference-gateway.log",
        "home/logs/local_1/xinference.log",
        "logs/server.log",
        "release/compose.yaml",
        "release/in-force.txt",
        "release/keeper.json",
        "release/models.json",
        "release/server.env",
        "state/keeper.json",
        "state/launched.json",
        "system/uname.txt",
    } <= names
    assert not any(name.endswith(".db") or "credentials" in name or "auth/" in name for name in names)
    assert not any(content.startswith(b"SQLite format") for content in files.values())
    assert b"Uvicorn running on http://127.0.0.1:9997" in files["gpu-1/logs/server.log"]
    assert b'HF_HUB_OFFLINE: "1"' in files["gpu-1/release/compose.yaml"]
    assert files["gpu-1/release/server.env"] == b"OTHER_TOKEN=(hidden)\nSITE_VALUE=(hidden)\n"
    assert b"server 127.0.0.1:9997;" in files["gpu-1/gateway/nginx.conf"]
    assert "gateway/tls.key" not in names and b" rag;" in files["gpu-1/gateway/keys.conf"]
    shown = json.loads(files["gpu-1/docker/server.json"])
    assert shown["Config"]["environment"]["HF_HUB_OFFLINE"] == "1" and shown["Config"]["environment"]["MINE_KEY"]


def test_logs_are_cut_to_their_ends_at_a_line(root: Path, tmp_path: Path) -> None:
    (root / "logs/server.log").write_text("".join(f"line {number:06}\n" for number in range(1000)))
    content = packed(root, limit=120)["gpu-1/logs/server.log"].decode()
    assert content.endswith("line 000999\n") and content.startswith("line ") and len(content) <= 120
    (tmp_path / "long").write_text("a" * 200_000 + "\nnext\n")
    assert len(end_of(tmp_path / "long", 10**6)) < 70_000 and end_of(tmp_path / "long", 10**6).endswith("\nnext\n")


def test_nothing_is_given_away_where_a_secret_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scrubber, "clean", lambda _self, text: text)
    with pytest.raises(Leak) as caught:
        packed(root)
    assert not any(secret in str(caught.value) for secret in ALL)


@pytest.mark.parametrize("word", ["hidden", "logs", "release", "packed"])
def test_a_secret_that_is_a_plain_word_does_not_keep_the_rest_from_being_packed(root: Path, word: str) -> None:
    write(root / "secrets/word.txt", f"PIN={word}\n")
    assert any(b"Uvicorn running on" in content for content in packed(root).values())


@pytest.mark.parametrize("gone", ["current", "state", "home", "releases", "."])
def test_what_is_not_there_is_left_out(root: Path, gone: str) -> None:
    moved = root.with_name("moved")
    if gone == ".":
        root.rename(moved)
    elif gone == "current":
        (root / gone).unlink()
    else:
        (root / gone).rename(moved)
    files = packed(root)
    assert "gpu-1/README.txt" in files and "gpu-1/system/uname.txt" in files


def test_files_of_an_archive_are_for_their_owner(root: Path) -> None:
    archive, _names = pack(root, "gpu-1", 10**6, None, [], {})
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed_file:
        assert {member.mode for member in packed_file.getmembers()} == {0o600}
        assert all(member.isfile() and member.name.startswith("gpu-1/") for member in packed_file.getmembers())
