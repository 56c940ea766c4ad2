# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make demo` from a clean clone, as an ordinary user: real wheels, a real server, a real model.

The clone takes minutes and 4 GB, and nothing but pip reaches a network. A host that serves without any, from the same
weights, is molecule's scenario `native`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.host import native_run

REPOSITORY = Path(__file__).resolve().parents[2]
COLD_LIMIT = 900
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Demo:
    """A clean clone whose demo runs on a port of its own, perhaps as another user.

    `prefix` stands before every command, to run it as somebody else; `owner` is that user's number. `text` is what the
    last one printed.
    """

    place: Path
    site: Path
    port: int = field(default_factory=free_port)
    prefix: list[str] = field(default_factory=list)
    home: str = str(Path.home())
    owner: int = os.geteuid()
    text: str = ""
    seconds: float = 0.0

    def make(self, target: str, arguments: str = "") -> Demo:
        """Run make and keep its output; fails the test when make does."""
        return self.run("make", target, f"DEMO_ARGS=-e xinference_port={self.port} {arguments}")

    def play(self, *arguments: str) -> Demo:
        """Run a playbook of the clone with the demo's inventory."""
        settings = ["-e", f"xinference_port={self.port}", "-e", f"xinference_root={self.site}"]
        return self.run(".venv/bin/ansible-playbook", "-i", "inventories/quickstart", *settings, *arguments)

    def run(self, *command: str) -> Demo:
        """Run a command in the clone, with nothing of our environment but what pip was told."""
        environment = {
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            "PIP_NO_CACHE_DIR": "1",
            "PATH": SYSTEM_PATH,
            "HOME": self.home,
            "LANG": "C.UTF-8",
            "ANSIBLE_CONFIG": str(self.place / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "build/collections"),
        }
        began = time.monotonic()
        done = subprocess.run(
            [*self.prefix, *command],
            cwd=self.place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        self.seconds = time.monotonic() - began
        self.text = done.stdout.decode(errors="replace")
        assert done.returncode == 0, self.text
        return self

    @property
    def changes(self) -> list[int]:
        """How many tasks changed something, play by play."""
        return [int(number) for number in re.findall(r"changed=(\d+)", self.text)]

    def pid(self) -> int:
        """The server's process."""
        return int(json.loads((self.site / native_run.STATE).read_text())["pid"])

    def answers(self) -> bool:
        return (
            subprocess.run([*self.prefix, *CURL, f"http://127.0.0.1:{self.port}/status"], check=False).returncode == 0
        )

    def embedding(self, text: str) -> list[float]:
        """What the model makes of a text, asked for as a client does."""
        body = json.dumps({"model": "minilm", "input": text})
        address = f"http://127.0.0.1:{self.port}/v1/embeddings"
        request = [*CURL, "--header", "Content-Type: application/json", "--data", body, address]
        answer = subprocess.run([*self.prefix, *request], stdout=subprocess.PIPE, check=True)
        return list(json.loads(answer.stdout)["data"][0]["embedding"])

    def processes(self) -> set[int]:
        """All processes that belong to the site: the server's, and those with its directory on their command line."""
        found = set(native_run.family(self.site))
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.fsencode(self.site) in (entry / "cmdline").read_bytes():
                        found.add(int(entry.name))
        return found


CURL = ["curl", "--silent", "--show-error", "--fail", "--max-time", "30"]


def clone(place: Path, **more: Any) -> Demo:
    """Clone what is committed, without anything that lies in the working tree."""
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(place)], check=True)
    return Demo(place, place / "build/demo/site", **more)


@contextlib.contextmanager
def stranger() -> Iterator[pwd.struct_passwd]:
    """A new ordinary user with an empty home."""
    name = f"demo{os.getpid()}"
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True)
    entry = pwd.getpwnam(name)
    try:
        yield entry
    finally:
        subprocess.run(["userdel", "--remove", "--force", name], check=True, stderr=subprocess.DEVNULL)
        shutil.rmtree(entry.pw_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The demo, run once from a clean clone and stopped at the end; where we are root, by a user who is not."""
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            user = stack.enter_context(stranger())
            prefix = ["runuser", "-u", user.pw_name, "--"]
            made = clone(Path(user.pw_dir) / "clone", prefix=prefix, home=user.pw_dir, owner=user.pw_uid)
            subprocess.run(["chown", "--recursive", f"{user.pw_name}:", user.pw_dir], check=True)
        else:
            made = clone(tmp_path_factory.mktemp("demo") / "clone")
        try:
            yield made.make("demo")
        finally:
            if made.processes():
                made.make("demo-stop")
            shutil.rmtree(made.place)


def check_table(demo: Demo) -> None:
    row = r"localhost +minilm +embedding +ok +\d+(\.\d)? m?s +http://127\.0\.0\.1:"
    assert re.search(row + str(demo.port), demo.text), demo.text
    report = json.loads((demo.place / "build/demo/report.json").read_text())
    assert (report["verified"], report["failed"]) == (1, 0)


def test_a_clean_clone_ends_with_a_real_model_that_answers(demo: Demo) -> None:
    assert demo.seconds < COLD_LIMIT
    check_table(demo)
    assert len(demo.embedding("a real text")) == 384
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in demo.processes()} == {demo.owner}


def test_a_second_run_changes_hashes_and_copies_nothing(demo: Demo) -> None:
    server = demo.pid()
    files = {path: path.stat() for path in demo.site.glob("models/*/*/*")}
    demo.make("demo", arguments="-v")
    assert demo.changes and not any(demo.changes)
    counted = re.findall(r"\b(?:hashed|copied|sent|linked)_bytes: (\d+)", demo.text)
    assert counted and set(counted) == {"0"}
    assert demo.pid() == server
    assert files and {path: path.stat().st_mtime_ns for path in files} == {p: s.st_mtime_ns for p, s in files.items()}


def test_status_tells_what_runs(demo: Demo) -> None:
    demo.play("playbooks/status.yml")
    assert re.search(r"localhost .*\(server\) +- +running", demo.text) and "1 of 1 servers run" in demo.text, demo.text
    assert re.search(r"localhost .*minilm +yes +ready", demo.text)


def test_every_variable_reaches_the_process(demo: Demo) -> None:
    service = json.loads((demo.site / native_run.SERVICE).read_text())
    text = Path(f"/proc/{demo.pid()}/environ").read_bytes().decode()
    reached = dict(line.split("=", 1) for line in text.split("\0") if line)
    sockets = reached.pop(native_run.SOCKETS)
    assert reached == {**service["environment"], native_run.MARK: str(demo.site)}
    assert Path(sockets, ".xoscar").is_dir()
    assert reached["HF_HUB_OFFLINE"] == reached["TRANSFORMERS_OFFLINE"] == "1"
    assert reached["XINFERENCE_ENABLE_VIRTUAL_ENV"] == "0"


def test_a_killed_server_comes_back_without_leftovers(demo: Demo) -> None:
    before = set(native_run.family(demo.site))
    os.kill(demo.pid(), signal.SIGKILL)
    deadline = time.monotonic() + 300
    while not demo.answers():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not before & set(native_run.family(demo.site))
    server = demo.pid()
    demo.make("demo")
    check_table(demo)
    assert demo.pid() == server, "what came back by itself is as it should be"
    assert len(demo.embedding("a real text")) == 384


def test_other_models_do_not_restart_the_server_and_a_variable_does(demo: Demo) -> None:
    server = demo.pid()
    no_models: dict[str, Any] = {"xinference_models": []}
    demo.play("playbooks/serve.yml", "-e", json.dumps(no_models))
    assert demo.changes == [1] and demo.pid() == server
    changed = {**no_models, "xinference_server_environment": {"XINFERENCE_LOG_FORMAT": "json"}}
    demo.play("playbooks/serve.yml", "-v", "-e", json.dumps(changed))
    assert "environment XINFERENCE_LOG_FORMAT changed" in demo.text
    assert demo.pid() != server
    assert b"XINFERENCE_LOG_FORMAT=json" in Path(f"/proc/{demo.pid()}/environ").read_bytes()


def test_check_mode_tells_of_a_restart_and_does_not_do_it(demo: Demo) -> None:
    """It would take the variable away again that the step before gave."""
    server = demo.pid()
    demo.play("playbooks/serve.yml", "--check", "--diff", "-e", json.dumps({"xinference_models": []}))
    assert demo.changes == [2] and '-    "XINFERENCE_LOG_FORMAT": "json"' in demo.text
    assert demo.pid() == server


def test_stopping_leaves_no_process(demo: Demo) -> None:
    assert demo.processes()
    demo.make("demo-stop")
    assert demo.processes() == set()
    demo.make("demo-stop")
    assert demo.changes == [0]
