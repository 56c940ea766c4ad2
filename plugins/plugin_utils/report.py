# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What verification found, over all hosts: as rows, as a table, and as settings for clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .table import draw

COLUMNS = ("host", "model", "type", "state", "latency", "endpoint")
ONLY_LOOPBACK = (
    "(containers do not reach a server that listens on loopback: set xinference_host to the address of",
    "Docker's bridge, often 172.17.0.1, and RAGFlow's extra_hosts to host.docker.internal:host-gateway)",
)
GOOD = "ok"
SKIPPED = "not probed"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NOTHING = "Nothing was verified: no model of the inventory was probed. Is xinference_models empty, or every model off?"
RAGFLOW_TYPES = {"LLM": "chat", "embedding": "embedding", "rerank": "rerank", "audio": "speech2text or tts"}
"""What RAGFlow calls the types of models it can use."""


@dataclass(frozen=True)
class Row:
    """One model on one host, or a host of which nothing is known.

    `state` is `ok` (its probe passed), `not probed`, `failed`, `missing`, `not verified`, or what the server says of a
    model that is not ready; `latency_s` is how long the probe's request took; `detail` says what the probe saw, or what
    is wrong. `note` says that it is not the first choice of its entry that serves, and why.
    """

    host: str
    model: str
    type: str
    state: str
    latency_s: float | None
    endpoint: str
    detail: str = ""
    note: str = ""

    @property
    def lines(self) -> list[str]:
        """What stands below the row: what is wrong, and that another choice serves than the first."""
        return [*(self.detail.splitlines() if self.bad else ()), *([self.note] if self.note else ())]

    @property
    def bad(self) -> bool:
        return self.state not in (GOOD, SKIPPED)

    def cells(self) -> tuple[str, ...]:
        """The row's texts, column by column."""
        return (self.host, self.model, self.type, self.state, latency(self.latency_s), self.endpoint)


@dataclass(frozen=True)
class Report:
    """All rows, and what is wrong with the whole."""

    rows: Sequence[Row] = field(default_factory=tuple)

    @property
    def verified(self) -> int:
        """How many models proved that they work."""
        return sum(row.state == GOOD for row in self.rows)

    @property
    def problems(self) -> list[str]:
        """A sentence for every row that is bad, and one when nothing at all was verified."""
        found = [
            f"{row.host}: {row.model}: {row.detail or row.state}".replace(": -: ", ": ") for row in self.rows if row.bad
        ]
        return found or ([] if self.verified else [NOTHING])

    def problems_of(self, host: str) -> list[str]:
        """The same for one host; that nothing was verified is a problem of every host."""
        if self.problems == [NOTHING]:
            return [NOTHING]
        bad = [row for row in self.rows if row.host == host and row.bad]
        return Report(bad).problems if bad else []

    def as_dict(self) -> dict[str, Any]:
        """The report as the JSON file has it."""
        return {
            "verified": self.verified,
            "failed": sum(row.bad for row in self.rows),
            "models": [asdict(row) for row in self.rows],
            "clients": [client_settings(*where, rows) for where, rows in self.by_server().items()],
        }

    def by_server(self) -> dict[tuple[str, str], list[Row]]:
        """Rows of models that work, by host and address of the server."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if not row.bad:
                groups.setdefault((row.host, row.endpoint), []).append(row)
        return groups


def rows_of(host: str, health: Mapping[str, Any], failure: Mapping[str, Any] | None = None) -> list[Row]:
    """The rows of one host: one for each model that has to serve there.

    `health` is the result of the module `xinference_health` there; empty when the host was not reached. `failure` says
    at which `step` it was left out, and why (`messages`).
    """
    endpoint = str(health.get("endpoint") or "-")
    if failure:
        told = [str(text).strip() for text in failure.get("messages") or []]
        why = "\n".join(dict.fromkeys(text for text in told if text)) or "no reason was given"
        return [Row(host, "-", "-", f"failed: {failure.get('step') or 'a step'}", None, endpoint, why)]
    if health.get("skipped"):
        return [Row(host, "-", "-", "not verified", None, endpoint, "check mode: no server runs there yet")]
    if not health.get("reachable") or (health.get("required") and health.get("listed") is False):
        why = " ".join(health.get("problems") or ["it was not reached, or an earlier step failed there"])
        return [Row(host, "-", "-", "not verified", None, endpoint, why)]
    shown, probes = health.get("models") or {}, health.get("probes") or {}
    return [
        _row(host, endpoint, uid, shown.get(uid) or {}, probes.get(uid) or {}) for uid in health.get("required") or []
    ]


def _row(host: str, endpoint: str, uid: str, shown: Mapping[str, Any], probe: Mapping[str, Any]) -> Row:
    """One model: as the server shows it, and what its probe found."""
    known = (host, uid, str((shown.get("model") or {}).get("model_type") or "-"))
    note = choice_note(shown.get("launched") or {})
    if not shown:
        return Row(*known, "missing", None, endpoint, "the server does not run it")
    if shown.get("state") != "ready":
        return Row(*known, str(shown.get("state")), None, endpoint, str(shown.get("error") or ""), note)
    state = {"passed": GOOD, "skipped": SKIPPED}.get(str(probe.get("state")), "failed")
    found = str(probe.get("error") or probe.get("detail") or "")
    return Row(*known, state, probe.get("latency_s"), endpoint, found, note)


def choice_note(launched: Mapping[str, Any]) -> str:
    """That something else than the first choice of an entry was launched, and why; empty where it was the first."""
    choice = launched.get("choice") or 0
    if not choice:
        return ""
    which = f"alternative {choice}" if choice > 0 else "what ran before"
    why = str(launched.get("why") or "").rstrip(".")
    return f"{which} serves: {launched.get('runs')}" + (f". The first choice failed: {why}" if why else "")


def latency(seconds: float | None) -> str:
    """A latency for people: `12 ms`, `1.8 s`, `-` when there is none."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines; what is wrong or seen stands under its row."""
    return draw(COLUMNS, [(row.cells(), row.lines) for row in rows])


def client_settings(host: str, endpoint: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What clients of one server need: for an OpenAI-compatible one, and for RAGFlow beside it or in Docker."""
    base = endpoint.rstrip("/") + "/v1"
    parts = urlsplit(endpoint)
    local = parts.hostname in LOOPBACK
    port = f":{parts.port}" if parts.port else ""
    inside = f"{parts.scheme}://host.docker.internal{port}/v1" if local else base
    return {
        "host": host,
        "endpoint": endpoint,
        "openai": {"base_url": base, "models": [row.model for row in rows]},
        "ragflow": {
            "provider": "Xinference",
            "same_machine": base,
            "inside_docker": inside,
            "only_loopback": local,
            "models": [
                {"model_uid": row.model, "model_type": RAGFLOW_TYPES[row.type]}
                for row in rows
                if row.type in RAGFLOW_TYPES
            ],
        },
    }


def client_lines(settings: Mapping[str, Any], auth: bool) -> list[str]:
    """The settings of one server's clients for people."""
    ragflow = settings["ragflow"]
    key = "a key of this server" if auth else "any text; the server does not ask for one"
    lines = [
        f"Clients of {settings['host']}, {settings['endpoint']}",
        f"  OpenAI-compatible   base_url={settings['openai']['base_url']}  api_key={key}",
        f"                      model={' or '.join(settings['openai']['models'])}",
        "  RAGFlow             Model providers > Xinference; the model name is the model_uid",
        f"    same machine      {ragflow['same_machine']}",
        f"    inside Docker     {ragflow['inside_docker']}",
    ]
    if any(model["model_type"] == "rerank" for model in ragflow["models"]):
        lines.append("    rerank models     the same with /rerank at the end")
    if ragflow["only_loopback"]:
        lines += ["                      " + line for line in ONLY_LOOPBACK]
    return lines
