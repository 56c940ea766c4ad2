# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server that can be told to fail, hang, answer late or not at all, and short ways to converge it."""

from __future__ import annotations

import threading
import time
from typing import Any

from ansible_collections.airgap.xinference.plugins.module_utils.server import execute, running
from ansible_collections.airgap.xinference.plugins.module_utils.server import launch as launching
from ansible_collections.airgap.xinference.plugins.module_utils.server.client import (
    AccessRefused,
    ServerError,
    Unreachable,
)
from ansible_collections.airgap.xinference.plugins.module_utils.server.converge import converge
from ansible_collections.airgap.xinference.plugins.module_utils.server.features import features
from ansible_collections.airgap.xinference.plugins.module_utils.server.plan import plan
from ansible_collections.airgap.xinference.plugins.module_utils.server.record import Record
from ansible_collections.airgap.xinference.plugins.module_utils.server.running import look
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import parse


class Scripted:
    """A Xinference that does as it is told: `behaviour` of a uid or model name is a word or a text to fail with.

    A list has one for each launch, in their order.
    """

    endpoint = "http://127.0.0.1:9997"

    def __init__(self, version="4.1.0", polls=2, **behaviour):
        self.features = features(version)
        self.polls = polls
        self.behaviour = behaviour
        self.live = {}
        self.log = []
        self.payloads = []
        self.named = {}
        self.turns = {}
        self.requests_made = 0
        self.at_once = self.most_at_once = 0
        self.clock = 1000
        self.gpus = 2
        self.guard = threading.RLock()

    def said(self, uid):
        """How the model that is or was launched last under a uid behaves."""
        name = self.named.get(uid, "")
        told = self.behaviour.get(uid) or self.behaviour.get(name) or ""
        if isinstance(told, list):
            turn = min(self.turns.get(uid, 1), len(told)) - 1
            return told[turn]
        return told

    def version(self):
        return self.features.version

    def _note(self, what, uid=""):
        self.requests_made += 1
        self.log.append(f"{what} {uid}".strip())

    def put(self, uid, status="READY", listed=True, since=1, error="", **shown):
        model = {"id": uid, "model_name": "bce", "model_type": "embedding", "replica": 1, **shown}
        self.live[uid] = {"model": model, "listed": listed, "status": status, "since": since, "error": error, "left": 0}

    def models(self):
        with self.guard:
            self._note("models")
            return {uid: one["model"] for uid, one in self.live.items() if one["listed"]}

    def instances(self, uid=None):
        with self.guard:
            self._note("instances", uid or "")
            rows = []
            for name, one in list(self.live.items()):
                if uid not in (None, name):
                    continue
                if one["status"] == "CREATING" and self.said(name) != "hang":
                    one["left"] -= 1
                    if one["left"] <= 0:
                        self._finish(name, one)
                row = {"model_uid": name, "status": one["status"], "instance_created_ts": one["since"]}
                if self.features.launch_returns_early:
                    row["replica_statuses"] = [{"status": one["status"], "error_message": one["error"] or None}]
                rows.append(row)
            return rows

    def _finish(self, uid, one):
        self.at_once -= 1
        said = self.said(uid)
        if said in ("", "taken", "forgets", "dumb"):
            one.update(status="READY", listed=True)
        else:
            one.update(status="ERROR", error=f"[address=127.0.0.1:1, pid=2] {said}")

    def launch(self, payload, timeout=None):
        uid = payload["model_uid"]
        with self.guard:
            self._note("launch", uid)
            if uid in self.live and self.live[uid]["status"] not in ("ERROR",):
                raise ServerError(
                    "refused", 400, f"Model is already in the model list, uid: {uid}", "POST", "/v1/models"
                )
            self.payloads.append(dict(payload))
            self.named[uid] = payload.get("model_name")
            self.turns[uid] = self.turns.get(uid, 0) + 1
            if self.said(uid) == "key":
                raise AccessRefused("wrong key", 401, "no", "POST", "/v1/models")
            self.clock += 1
            self.put(uid, "CREATING", False, self.clock)
            shown = {name: payload.get(name) for name in ("model_name", "model_type", "model_engine")}
            self.live[uid]["model"].update(shown, replica=payload.get("replica", 1))
            self.live[uid]["left"] = self.polls
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            if self.said(uid) == "forgets":
                del self.live[uid]
                return uid
        if self.features.launch_returns_early:
            return uid
        if self.said(uid) == "hang":
            time.sleep(timeout)
            raise Unreachable("no answer", None, "", "POST", "/v1/models")
        with self.guard:
            self._finish(uid, self.live[uid])
            if self.live[uid]["status"] == "ERROR":
                raise ServerError("it says: " + self.said(uid), 400, self.said(uid), "POST", "/v1/models")
        return uid

    def progress(self, uid):
        self._note("progress", uid)
        return 0.8

    def cancel(self, uid):
        with self.guard:
            self._note("cancel", uid)
            if self.live.get(uid, {}).get("status") != "CREATING":
                raise ServerError("not launching", 500, "not launching")
            self.live[uid].update(status="ERROR", error="Launch cancelled")

    def terminate(self, uid, timeout=None):
        with self.guard:
            self._note("terminate", uid)
            if uid not in self.live or (self.live[uid]["status"] == "ERROR" and not self.live[uid]["listed"]):
                raise ServerError("gone", 400, f"Model not found in the model list, uid: {uid}", "DELETE", uid)
            if self.said(uid) == "stays":
                raise ServerError("it cannot stop", 500, "actor is stuck", "DELETE", uid)
            del self.live[uid]

    def post(self, path, json=None, timeout=None):
        """An embedding that is what it should be, unless the model is dumb."""
        with self.guard:
            uid = json["model"]
            self._note("ask", uid)
            near, far = [0.9, 0.1], [0.0, 1.0]
            if self.said(uid) == "dumb":
                near, far = far, near
            return {"data": [{"index": place, "embedding": one} for place, one in enumerate(([1.0, 0.0], near, far))]}

    def cluster_info(self):
        self._note("cluster")
        return [{"node_type": "Worker", "gpu_count": self.gpus}]

    def registrations(self, model_type):
        self._note("registrations", model_type)
        return [{"model_name": "bce", "is_builtin": True}, {"model_name": "ours", "is_builtin": False}]

    def engines(self, model_type, name):
        self._note("engines", name)
        return {"st": [{"model_format": "pytorch"}], "vllm": "Failed to import vLLM: No module named 'vllm'"}


def failing_with(error: Exception) -> Any:
    """A function that raises `error` whatever it is given."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise error

    return fail


def scripted(*arguments: Any, **options: Any) -> Any:
    """A server that does as it is told, where a Client is wanted."""
    return Scripted(*arguments, **options)


def spec(uid="m", **fields):
    return parse([{"model_uid": uid, "model_name": "bce", "model_type": "embedding", "model_engine": "st", **fields}])[
        0
    ]


def no_pauses(monkeypatch):
    """No pause worth speaking of, so that hundreds of polls take no time."""
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE", "SELF_RECOVERY", "UNWIND_PAUSE"):
        monkeypatch.setattr(launching, name, 0.002)
    monkeypatch.setattr(execute, "RETRY_PAUSES", (0.002, 0.002))
    monkeypatch.setattr(running, "LIST_AGE", 0.002)


def do(server, *desired, record=None, prune="managed", relaunch=(), first_choice=True, how="replace", **options):
    record = record if record is not None else Record(None)
    steps = plan(desired, look(server), record.entries, prune, relaunch, first_choice, how=how)
    server.log.clear()
    return {outcome.uid: outcome for outcome in converge(server, steps, record, **options)}


def writes(server):
    return [line for line in server.log if line.split()[0] in ("launch", "terminate", "cancel")]
