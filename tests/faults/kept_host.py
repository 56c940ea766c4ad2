# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An air-gapped host that the collection's own playbooks made serve three models with a keeper, and what is seen of it.

Its processes are looked at from this machine, where they all descend from the first process of the host's container:
that costs next to nothing, so it can be done all the time, and a model that is launched twice does not stay unseen.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "integration")]

import servers
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import Client, ServerError
from ansible_collections.airgap.xinference.plugins.module_utils.server.probe import probe
from plays import REPOSITORY, run
from testbed import images
from testbed.engine import TestbedError, cache, docker
from testbed.hosts import Host, Testbed
from testbed.spec import HostSpec

BACKENDS = ("docker", "native")
VERSIONS = (servers.NEW, servers.OLD)
CONTAINER = "xinference-server-1"
PORT = 9997
WANTED = ("minilm", "rerank", "chat")
THEIRS = "theirs"
"""The model that somebody else launched by hand."""
NEVER, HANGS = "never", "hangs"
"""Models of which one can never be launched, and one hangs while it is."""
ODD = "/srv/odd"
"""Where the one lies that can never be launched, on the host as well as in the container."""
LIMIT_S = 420.0
"""Seconds that anything may take. Nothing takes a third of it, but machines may be busy."""
STEADY_S = 4.0
"""What is as it should be has to stay so for so long; a server shows some things three seconds late."""
TITLE = re.compile(r"Model: (.+?)-(?:rep)?\d+\s*\Z")
"""What a server calls the process of a model."""
REGISTRATION = {
    "model_type": "embedding",
    "definition": {
        "version": 2,
        "model_name": "all-MiniLM-L6-v2",
        "dimensions": 384,
        "max_tokens": 256,
        "language": ["en"],
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_hub": "huggingface",
                "model_id": "sentence-transformers/all-MiniLM-L6-v2",
                "quantization": "none",
            }
        ],
    },
}

Entry = Dict[str, Any]


class NotSurvived(Exception):
    """What was not as it has to be."""


@dataclass(frozen=True)
class Process:
    """A process on the host. Its number may come again; together with its start it does not."""

    pid: int
    started: int
    parent: int
    words: Tuple[str, ...]

    @property
    def model(self) -> str:
        """The uid of the model that it serves; empty for another process."""
        match = TITLE.match(" ".join(self.words))
        return match.group(1) if match else ""

    @property
    def identity(self) -> Tuple[int, int]:
        """What tells it from all others."""
        return self.pid, self.started

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def descendants(first: int) -> List[Process]:
    """Every living process that descends from `first`."""
    found: Dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(entry.name)
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            words = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            if fields[0] != "Z":
                found[pid] = Process(pid, int(fields[19]), int(fields[1]), tuple(words))
    children: Dict[int, List[int]] = {}
    for process in found.values():
        children.setdefault(process.parent, []).append(process.pid)
    below, left = [], list(children.get(first, []))
    while left:
        pid = left.pop()
        below.append(found[pid])
        left += children.get(pid, [])
    return below


def weights(*kinds: str) -> Dict[str, str]:
    """Directories of the tests' models."""
    script = str(REPOSITORY / "molecule/shared/models.py")
    made = subprocess.run([sys.executable, script, *kinds], stdout=subprocess.PIPE, text=True, check=True)
    found: Dict[str, str] = json.loads(made.stdout.splitlines()[-1])
    return found


def entries_of(version: str, directories: Mapping[str, str]) -> List[Entry]:
    """The models of the inventory. Weights of two are random: they answer, and what they say is noise."""
    rerank: Entry = {
        "model_uid": "rerank",
        "model_name": "bce-reranker-base_v1",
        "model_type": "rerank",
        "probe": {"expect": {"best": None}},
        "source": {"name": "rerank", "path": directories["rerank"]},
    }
    if version != servers.OLD:
        rerank["model_engine"] = "sentence_transformers"
    minilm = {
        "model_uid": "minilm",
        "model_name": "all-MiniLM-L6-v2",
        "model_type": "embedding",
        "model_engine": "sentence_transformers",
        "model_format": "pytorch",
        "probe": {"expect": {"dimensions": 384}},
        "source": {"name": "minilm", "path": directories["minilm"]},
    }
    chat = {
        "model_uid": "chat",
        "model_name": "qwen2.5-instruct",
        "model_type": "LLM",
        "model_engine": "transformers",
        "model_format": "pytorch",
        "model_size_in_billions": "0_5",
        "quantization": "none",
        "probe": {"expect": {"words": None}},
        "source": {"name": "chat", "path": directories["chat"]},
    }
    return [minilm, rerank, chat]


class KeptHost:
    """One host of the testbed with one backend and one version of the server."""

    def __init__(self, backend: str, version: str, bed: Testbed, place: Path) -> None:
        self.backend, self.version, self.bed, self.place = backend, version, bed, place
        native = backend == "native"
        self.root = "/home/plain/xinference" if native else "/opt/xinference"
        self.spec = (
            HostSpec("host-1", login="plain", gpus=0, nvidia=False, engine=False, compose="none")
            if native
            else HostSpec("host-1")
        )
        directories = weights("minilm", "rerank", "chat")
        self.entries = entries_of(version, directories)
        self.variables: Dict[str, Any] = {
            "xinference_bundle_dir": str(cache().parent / "faults" / f"{backend}-{version}"),
            "xinference_root": self.root,
            "xinference_backend": backend,
            "xinference_host": "0.0.0.0",
            "xinference_server_allow_open": True,
            "xinference_verify_report": "",
            "xinference_preflight_require_airgap": True,
            "xinference_registrations": [REGISTRATION],
            "xinference_models": self.entries,
            # What is new in a release is left to Ansible for a minute; there is no need to wait for it here.
            "xinference_server_keeper_grace": 5,
        }
        if native:
            lines = (HERE.parent / "integration" / f"xinference-{version}.txt").read_text().splitlines()
            wanted = [line for line in lines if line and not line.startswith(("#", *images.LEFT_OUT))]
            self.variables["xinference_bundle_native_requirements"] = wanted
        else:
            self.variables["xinference_image"] = images.xinference(version)
            # Containers may not raise limits.
            self.variables["xinference_server_ulimits"] = {}
            self.variables["xinference_gpus"] = [0, 1]
            self.variables["xinference_server_mounts"] = [{"source": ODD, "target": ODD}]
            for entry in self.entries:
                entry["gpus"] = [0 if entry["model_uid"] == "minilm" else 1]
        self.host: Host = None  # type: ignore[assignment]
        self._first = 0
        self._payload: Dict[str, Any] = {}

    # -- made with playbooks

    def play(self, *playbooks: str, expect: Optional[int] = 0, **variables: Any) -> str:
        """Run playbooks; returns what they printed. Raises NotSurvived when they fail."""
        settings = self.place / f"variables-{time.monotonic_ns()}.json"
        settings.write_text(json.dumps({**self.variables, **variables}))
        paths = [f"playbooks/{name}.yml" for name in playbooks]
        done = run("-i", str(self.bed.inventory), "-e", f"@{settings}", *paths)
        if expect is not None and done.returncode != expect:
            raise NotSurvived(f"{', '.join(playbooks)} ended with {done.returncode}: {done.stdout[-4000:]}")
        return done.stdout

    def deploy(self) -> None:
        """Bring the host up and make it serve, from nothing."""
        self.host = self.bed.up([self.spec])[self.spec.name]
        self.play("bundle")
        self.begin()

    def begin(self) -> None:
        """Make the host serve from the bundle that is there."""
        self.host.exec("sh", "-c", f"mkdir -p {ODD}/{NEVER} && echo '{{}}' > {ODD}/{NEVER}/config.json")
        self.play("site")

    def find(self) -> bool:
        """Use a host that an earlier run left standing; returns whether there is one."""
        with contextlib.suppress(TestbedError):
            self.host = self.bed.load()[self.spec.name]
            self.host.start()
            return True
        return False

    def another(self, uid: str) -> Entry:
        """An entry of the inventory with the weights of one that is there."""
        (entry,) = [one for one in self.entries if one["model_uid"] == "rerank"]
        return {**entry, "model_uid": uid}

    def never(self) -> Entry:
        """An entry of a model that cannot be launched: there are no weights in its directory."""
        entry = {**self.another(NEVER), "model_path": f"{ODD}/{NEVER}"}
        del entry["source"]
        return entry

    def serve(self, *more: Entry) -> None:
        """Put a release with these models beside the three in force."""
        self.play("serve", xinference_models=[*self.entries, *more])

    # -- looked at

    @property
    def client(self) -> Client:
        """A client on the site's network."""
        return Client(f"http://{self.host.address}:{PORT}", timeout=30.0)

    def processes(self) -> List[Process]:
        """Every process on the host."""
        if not self._first or not Path(f"/proc/{self._first}").exists():
            self._first = int(docker("inspect", "--format", "{{.State.Pid}}", self.host.container))
        return descendants(self._first) if self._first else []

    def models(self) -> Dict[str, List[Process]]:
        """The processes of each model."""
        found: Dict[str, List[Process]] = {}
        for process in self.processes():
            if process.model:
                found.setdefault(process.model, []).append(process)
        return found

    def server(self) -> Process:
        """The first process of the server. Raises NotSurvived when there is none."""
        ours = [one for one in self.processes() if any(word.endswith("/xinference-local") for word in one.words)]
        pids = {one.pid for one in ours}
        first = [one for one in ours if one.parent not in pids]
        if not first:
            raise NotSurvived("no server runs")
        return first[0]

    def worker(self) -> Process:
        """The process that launches the models."""
        parents = {one.parent for model in self.models().values() for one in model}
        return next(one for one in self.processes() if one.pid in parents)

    def keepers(self) -> List[Process]:
        """The keeper, and what it started."""
        return [
            one
            for one in self.processes()
            if one.words[-1] in ("run", "work") and any(word.endswith("/keeper.pyz") for word in one.words)
        ]

    def read(self, name: str) -> Dict[str, Any]:
        """A file of the host's state; empty while it is not there."""
        text = self.host.exec("cat", f"{self.root}/state/{name}", check=False)
        try:
            found: Dict[str, Any] = json.loads(text)
        except ValueError:
            return {}
        return found

    def told(self) -> Dict[str, Any]:
        """What the keeper tells, its models by uid."""
        found = self.read("keeper.json")
        return {**found, "models": {one["uid"]: one for one in found.get("models", [])}}

    def log(self, lines: int = 40) -> str:
        """The last that the keeper said."""
        if self.backend == "docker":
            command = f"docker logs --timestamps --tail {lines} xinference-keeper-1 2>&1"
        else:
            command = f"tail -n {lines} {self.root}/logs/keeper.log"
        return self.host.exec("sh", "-c", command, check=False)

    def answers(self, uid: str) -> str:
        """Put a real request to a model; returns what is wrong with it, empty for nothing."""
        (entry,) = [one for one in [*self.entries, self.another(THEIRS)] if one["model_uid"] == uid]
        return probe(self.client, entry).error

    def wrongs(self, others: Set[str], besides: Set[str]) -> List[str]:
        """What of server, record and keeper is not as it has to be. `others` are there, too; `besides` may be."""
        found: List[str] = []
        client = self.client
        try:
            listed, instances = client.models(), client.instances()
        except ServerError as error:
            return [f"the server: {error.message}"]
        there = set(WANTED) | others
        record, told, running = self.read("launched.json").get("models", {}), self.told(), self.models()
        for uid in sorted(there):
            mine = [one for one in instances if one["model_uid"] == uid]
            if uid not in listed or [one["status"] for one in mine] != ["READY"]:
                found.append(f"{uid} is listed as {[one['status'] for one in mine]}")
                continue
            if len(running.get(uid, [])) != 1:
                found.append(f"{uid} has {len(running.get(uid, []))} processes")
            if uid in WANTED:
                since = mine[0].get("instance_created_ts")
                if not record.get(uid, {}).get("ready") or record[uid].get("since") != since:
                    found.append(f"the record of {uid} is {record.get(uid)}, the server created it at {since}")
                model = told["models"].get(uid, {})
                if (model.get("state"), model.get("kind")) != ("ready", "running"):
                    found.append(f"the keeper tells that {uid} is {model.get('state')}, {model.get('kind')}")
        unknown = (set(listed) | {str(one["model_uid"]) for one in instances} | set(running)) - there - besides
        if unknown:
            found.append(f"there is {sorted(unknown)}")
        if set(record) - set(WANTED) - besides:
            found.append(f"in the record there is {sorted(set(record) - set(WANTED) - besides)}")
        if told.get("problem") or (told.get("doing") and not besides):
            found.append(f"the keeper is at {told.get('doing')!r}, with {told.get('problem')!r} in its way")
        return found

    def until_right(self, others: Set[str], besides: Set[str], limit: float = LIMIT_S) -> None:
        """Wait until everything is as it has to be, and stays so for a while. Raises NotSurvived."""
        deadline, steady = time.monotonic() + limit, 0.0
        while True:
            wrongs = self.wrongs(others, besides)
            now = time.monotonic()
            if wrongs:
                steady = 0.0
            elif not steady:
                steady = now
            elif now - steady >= STEADY_S:
                return
            if now > deadline:
                raise NotSurvived("; ".join(wrongs))
            time.sleep(0.5)

    def make_ready(self) -> None:
        """Before a try: three models serve, somebody else's beside them, and nothing is going on."""
        try:
            self.until_right(set(), {THEIRS}, 180.0)
        except NotSurvived:
            self.play("serve", "models")
            self.until_right(set(), {THEIRS})
        client = self.client
        if not self._payload:
            self._payload = dict(self.read("launched.json")["models"]["rerank"]["payload"])
        if THEIRS not in client.models():
            with contextlib.suppress(ServerError):
                client.terminate(THEIRS)
            servers.launch(client, {**self._payload, "model_uid": THEIRS})
        deadline = time.monotonic() + LIMIT_S
        while self.told().get("foreign") != [THEIRS]:
            if time.monotonic() > deadline:
                raise NotSurvived(f"the keeper does not see {THEIRS}")
            time.sleep(0.5)
        self.until_right({THEIRS}, set())

    # -- what is done to it

    def restart_server(self) -> None:
        """As an operator would restart the container; natively the server is asked to end, and comes back."""
        if self.backend == "docker":
            self.host.docker("restart", CONTAINER)
        else:
            self.server().kill(signal.SIGTERM)

    def down(self) -> None:
        """As an operator would take it down."""
        if self.backend == "docker":
            self.host.exec("sh", "-c", f"cd {self.root}/current && docker compose down")
        else:
            self.host.ssh(f"{self.root}/current/bin/xinferencectl stop")

    def up(self) -> None:
        """As an operator would bring it up again."""
        if self.backend == "docker":
            self.host.exec("sh", "-c", f"cd {self.root}/current && docker compose up --detach")
        else:
            self.host.ssh(f"{self.root}/current/bin/xinferencectl start")

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse every connection to the API until the end of the block; the server itself runs on."""
        inside = ["nsenter", "--target", str(self.server().pid), "--net", "iptables"]
        rule = ["INPUT", "-p", "tcp", "--dport", str(PORT), "-j", "REJECT", "--reject-with", "tcp-reset"]
        subprocess.run([*inside, "-I", *rule], check=True)
        try:
            yield
        finally:
            subprocess.run([*inside, "-D", *rule], check=True)


def wait_until(what: str, truth: Any, limit: float = LIMIT_S) -> None:
    """Wait for something. Raises NotSurvived."""
    deadline = time.monotonic() + limit
    while not truth():
        if time.monotonic() > deadline:
            raise NotSurvived(f"not in {limit:.0f} s: {what}")
        time.sleep(0.3)


@contextlib.contextmanager
def kept_host(backend: str, version: str, stay: bool = False) -> Iterator[KeptHost]:
    """A host that serves, taken down at the end of the block unless it shall `stay` for the next run."""
    images.build()
    short = version.replace(".", "")
    bed = Testbed(f"faults-{backend}-{short}" if stay else f"faults-{backend}-{short}-{os.getpid()}")
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    kept = KeptHost(backend, version, bed, place)
    try:
        if not (stay and kept.find()):
            kept.deploy()
        yield kept
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if not stay:
            bed.down()


def names(known: Sequence[str], given: Optional[str]) -> List[str]:
    """What a comma-separated text names; all where it names nothing. Raises SystemExit for what is not known."""
    wanted = [name.strip() for name in (given or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)} is not one of: {', '.join(known)}")
    return wanted or list(known)
