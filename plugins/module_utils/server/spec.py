# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turn the entries of `xinference_models` into model specifications, or name everything that is wrong with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

from ..alternatives import FALLBACKS, OF_THE_ENTRY, merged
from ..companions import launch_extras
from ..masking import masked_field
from .fields import FIELDS, LAUNCH_ORDER, NOT_HERE, SOURCE_FIELDS, UID_LENGTH, boolean, mapping, suggestion, text

# Engines that take a share of the memory that is free when they start. Two of them starting on one GPU at the same
# time both count the same free memory.
MEASURING_ENGINES = ("vllm", "sglang")


class SpecError(ValueError):
    """Entries that cannot be launched. `problems` lists every one of them, each a sentence with its model's uid."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the list of models:\n" + "\n".join(f"- {problem}" for problem in self.problems))


@dataclass(frozen=True)
class ModelSpec:
    """One model as it shall run.

    `fields` are launch fields, checked and normalised; `gpu_idx` holds GPU indexes as the server sees them.
    `source` is the name of the model in the bundle, None where `model_path` was given or a registration carries it.
    `fallbacks` are the alternatives, in the order in which they are tried when this cannot run. `relaunch` is how a
    changed model takes the place of the one that runs, None where the entry leaves that open.
    """

    uid: str
    fields: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    gpu_idx: Tuple[int, ...] = ()
    source: Optional[str] = None
    probe: Any = None
    fallbacks: Tuple[ModelSpec, ...] = ()
    relaunch: Optional[str] = None

    @property
    def choices(self) -> Tuple[ModelSpec, ...]:
        """This first choice and its alternatives; the place of one is its number."""
        return (self, *self.fallbacks)

    @property
    def words(self) -> str:
        """Model and engine for a person: `bge-reranker-base on sentence_transformers`."""
        size = self.fields.get("model_size_in_billions")
        what = [self.name, f"{size}B".replace("_", ".") if size is not None else "", self.fields.get("quantization")]
        named = " ".join(str(one) for one in what if one and one != "none")
        return f"{named} on {self.engine}" if self.engine else named

    @property
    def name(self) -> str:
        return str(self.fields["model_name"])

    @property
    def type(self) -> str:
        return str(self.fields["model_type"])

    @property
    def engine(self) -> Optional[str]:
        return self.fields.get("model_engine")

    @property
    def measures_memory(self) -> bool:
        """Whether the engine sizes itself by the GPU memory that is free when it starts."""
        return (self.engine or "").lower() in MEASURING_ENGINES

    @property
    def rank(self) -> int:
        """Place in the launch order, by type."""
        return LAUNCH_ORDER.index(self.type)

    def payload(self, features: Any = None) -> Dict[str, Any]:
        """The body of the launch request. `features` of the server are accepted so that a version may differ here."""
        body = {"model_uid": self.uid, **self.fields, **self.options}
        if self.gpu_idx:
            body["gpu_idx"] = list(self.gpu_idx)
        return body

    def beside(self, turn: int = 1) -> ModelSpec:
        """The same under another uid, to be tried while this one serves: `m-beside`, then `m-beside-2`."""
        suffix = f"-beside-{turn}" if turn > 1 else "-beside"
        uid = self.uid
        if len(uid) + len(suffix) > UID_LENGTH:
            # Models whose uids begin alike must not share one.
            suffix = f"-{hashlib.sha256(uid.encode()).hexdigest()[:8]}{suffix}"
            uid = uid[: UID_LENGTH - len(suffix)]
        return replace(self, uid=uid + suffix)

    def fingerprint(self) -> str:
        """A hash of all that decides how the model runs. Two entries that ask for the same thing share it."""
        return fingerprint(self.payload())


def from_payload(payload: Mapping[str, Any]) -> ModelSpec:
    """The specification of a launch from its request, as the record keeps it."""
    fields = {name: value for name, value in payload.items() if name in FIELDS and name != "model_uid"}
    options = {name: value for name, value in payload.items() if name not in FIELDS and name != "gpu_idx"}
    return ModelSpec(str(payload["model_uid"]), fields, options, tuple(payload.get("gpu_idx") or ()))


def fingerprint(payload: Mapping[str, Any]) -> str:
    """Hash a launch payload, whatever the order of its keys."""
    text_form = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return "sha256:" + hashlib.sha256(text_form.encode()).hexdigest()


def source_name(entry: Mapping[str, Any]) -> Optional[str]:
    """The name in the bundle of an entry's model: the one it gives, or the last part of its path or repository."""
    source = entry.get("source")
    if not isinstance(source, Mapping):
        return None
    if source.get("name"):
        return str(source["name"])
    origin = source.get("path") or source.get("modelscope")
    return str(origin).rstrip("/").rsplit("/", 1)[-1] if origin else None


def parse(
    entries: Sequence[Mapping[str, Any]],
    server_gpus: Union[Sequence[Any], Mapping[str, int]] = (),
    artifacts_paths: Optional[Mapping[str, str]] = None,
    registrations: Iterable[str] = (),
) -> List[ModelSpec]:
    """Check all `entries` and return the enabled ones as specifications, in their order.

    `server_gpus` are the host GPUs given to the server, indexes or UUIDs; the place of a GPU in that list is the
    index the server sees, unless they are a mapping of names to such indexes. `artifacts_paths` maps the names of
    models of the bundle to the directories where the server finds them; None leaves out every check of sources and
    paths. `registrations` are names of custom models whose definition carries its own path.

    Raises SpecError with all the problems of all the entries, of disabled ones too.
    """
    problems: List[str] = []
    specs: List[ModelSpec] = []
    seen: Dict[str, int] = {}
    if not isinstance(server_gpus, Mapping):
        server_gpus = {str(gpu).strip(): place for place, gpu in enumerate(server_gpus)}
    if not isinstance(entries, (list, tuple)):
        raise SpecError(["The list of models is not a list; write one entry, beginning with `- model_uid:`, a model"])
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping):
            problems.append(f"Entry {number} is not a dictionary of launch fields")
            continue
        off = _is_off(entry)
        # What is switched off is checked like the rest, but neither bundle nor host need to have it.
        known = _Entry(f"Entry {number}", entry, server_gpus, None if off else artifacts_paths, set(registrations))
        spec = known.whole()
        problems.extend(known.problems)
        if off:
            continue
        uid = known.values.get("model_uid")
        if uid in seen:
            problems.append(f"{uid}: entries {seen[uid]} and {number} have the same model_uid")
        elif uid:
            seen[uid] = number
        if spec:
            specs.append(spec)
    if problems:
        raise SpecError(problems)
    return specs


class _Entry:
    """One entry while it is checked. Collects problems instead of stopping at the first."""

    def __init__(
        self,
        number: str,
        entry: Mapping[str, Any],
        server_gpus: Mapping[str, int],
        artifacts_paths: Optional[Mapping[str, str]],
        registrations: set,
    ) -> None:
        self.entry = entry
        self.server_gpus = server_gpus
        self.artifacts_paths = artifacts_paths
        self.registrations = registrations
        self.problems: List[str] = []
        self.values: Dict[str, Any] = {}
        self.label = str(entry.get("model_uid") or number)
        if len(self.label) > 60:
            self.label = self.label[:57] + "..."

    def problem(self, sentence: str) -> None:
        self.problems.append(f"{self.label}: {sentence}")

    def whole(self) -> Optional[ModelSpec]:
        """The specification with those of its alternatives, or None when a problem stands in the way of one of them."""
        first = self.spec()
        given = self.values.get(FALLBACKS) or []
        found = [self._fallback(number, override) for number, override in enumerate(given, 1)]
        specs = [first, *found]
        seen: Dict[str, int] = {}
        for number, spec in enumerate(specs):
            same = seen.setdefault(spec.fingerprint(), number) if spec else number
            if same != number:
                self.problem(f"fallback {number} launches the same as {f'fallback {same}' if same else 'the entry'}")
        if self.problems or first is None:
            return None
        return replace(first, fallbacks=tuple(spec for spec in found if spec))

    def _fallback(self, number: int, override: Any) -> Optional[ModelSpec]:
        """One alternative, or None when a problem stands in its way; the problems of the entry are told once."""
        label = f"{self.label}: fallback {number}"
        if not isinstance(override, Mapping):
            self.problem(f"fallback {number} is not a dictionary of launch fields")
            return None
        sound = {name: value for name, value in self.entry.items() if name in self.values or value is None}
        known = _Entry("", merged(sound, override), self.server_gpus, self.artifacts_paths, self.registrations)
        own = len(self.problems)
        told = {problem[len(self.label) :] for problem in self.problems}
        spec = known.spec()
        self.problems += [label + one for one in (two[len(known.label) :] for two in known.problems) if one not in told]
        for name in OF_THE_ENTRY:
            if name in override:
                self.problems.append(f"{label}: {name} is said once, for the entry; take it out of the fallback")
        for name in ("model_uid", "model_type"):
            if known.values.get(name, self.values.get(name)) != self.values.get(name):
                self.problems.append(
                    f"{label}: {name} must be that of the entry, which clients ask for (it is {known.values[name]!r})"
                )
        return spec if len(self.problems) == own else None

    def spec(self) -> Optional[ModelSpec]:
        """The specification, or None when a problem stands in its way."""
        self._check_fields()
        self._check_required()
        gpu_idx = self._gpu_idx()
        source = self._source()
        if self.problems:
            return None
        sent = {name: value for name, value in self.values.items() if FIELDS[name].sent and name != "model_uid"}
        if source and self.artifacts_paths is not None:
            sent["model_path"] = self.artifacts_paths[source]
        options, variables = launch_extras(self.values, self.artifacts_paths or {})
        if variables:
            sent["envs"] = {**variables, **sent.get("envs", {})}
        return ModelSpec(
            uid=self.values["model_uid"],
            fields=sent,
            options={**options, **self.values.get("options", {})},
            gpu_idx=gpu_idx,
            source=source,
            probe=self.values.get("probe"),
            relaunch=self.values.get("relaunch"),
        )

    def _check_fields(self) -> None:
        for name, value in self.entry.items():
            row = FIELDS.get(name)
            if name in NOT_HERE:
                self.problem(f"{name} is not used here; {NOT_HERE[name]}")
            elif row is None:
                hint = suggestion(name, FIELDS) or "; options of the engine stand under `options`"
                self.problem(f"unknown field {name}{hint}")
            elif value is None and not row.null:
                continue
            else:
                try:
                    self.values[name] = row.check(value)
                except ValueError as error:
                    self.problem(f"{name} {error} (it is {_shown(masked_field(name, value))})")
        if self.entry.get("model_type") is None:
            self.values["model_type"] = "LLM"
        for name in self.values.get("options", {}):
            if name in FIELDS or name in NOT_HERE:
                self.problem(f"options.{name} is a launch field; it stands beside `options`, not in it")

    def _check_required(self) -> None:
        for name in ("model_uid", "model_name"):
            if self.entry.get(name) is None:
                self.problem(f"{name} is missing")
        if self.values.get("model_type") == "LLM" and self.entry.get("model_engine") is None:
            self.problem("model_engine is missing; Xinference wants one for every LLM, such as vLLM or transformers")
        if "replica_config" in self.values:
            together = [name for name in ("worker_ip", "gpus", "n_gpu") if name in self.values]
            if together:
                self.problem(f"replica_config and {', '.join(together)} exclude each other")

    def _gpu_idx(self) -> Tuple[int, ...]:
        wanted = self.values.get("gpus", [])
        places = {gpu.lower(): place for gpu, place in self.server_gpus.items()}
        outside = [gpu for gpu in wanted if gpu.lower() not in places]
        if outside:
            has = f"has {', '.join(self.server_gpus)}" if self.server_gpus else "has none (xinference_gpus is empty)"
            self.problem(f"GPU {', '.join(outside)} is not one of the server's; it {has}")
            return ()
        if len({places[gpu.lower()] for gpu in wanted}) != len(wanted):
            self.problem(f"gpus names a GPU twice: {', '.join(wanted)}")
        if wanted and "n_gpu" in self.values and self.values["n_gpu"] not in ("auto", len(wanted)):
            self.problem(f"gpus names {len(wanted)} and n_gpu says {self.values['n_gpu']}; leave n_gpu out")
        replica = self.values.get("replica", 1)
        if len(wanted) % replica:
            self.problem(f"{len(wanted)} GPUs cannot be shared out equally to {replica} replicas")
        return tuple(places[gpu.lower()] for gpu in wanted)

    def _source(self) -> Optional[str]:
        """The name of the model in the bundle, None without one."""
        source = self.values.get("source")
        if source is None:
            can_load = "model_path" in self.values or self.values.get("model_name") in self.registrations
            if self.artifacts_paths is not None and not can_load and self.entry.get("source") is None:
                self.problem(
                    "model without source in the bundle; give it `source` and build the bundle again, or "
                    "`model_path` when the files are on the host already"
                )
            return None
        if "model_path" in self.values:
            self.problem("source and model_path exclude each other; the path of a source comes from the bundle")
        for name in source:
            if name not in SOURCE_FIELDS:
                self.problem(f"unknown field source.{name}{suggestion(name, SOURCE_FIELDS)}")
        given = [name for name in ("path", "modelscope") if source.get(name) is not None]
        empty = [name for name in ("path", "modelscope") if name in source and source[name] is None]
        if not given and empty:
            self.problem(f"source.{empty[0]} has no value; give it one")
            return None
        if len(given) != 1:
            self.problem("source wants exactly one of `path` and `modelscope`")
            return None
        for name in ("path", "modelscope", "name", "revision", "license", "origin"):
            try:
                if source.get(name) is not None:
                    text(source[name])
            except ValueError as error:
                self.problem(f"source.{name} {error} (it is {_shown(source[name])})")
                return None
        found = source_name({"source": mapping(source)})
        if self.artifacts_paths is not None and found not in self.artifacts_paths:
            has = ", ".join(sorted(self.artifacts_paths)) or "no model"
            self.problem(
                f"its model {found} is not in the bundle on this host{suggestion(found, self.artifacts_paths)} "
                f"(the bundle has {has}); build the bundle again with this entry and ship it"
            )
        return found


def _is_off(entry: Mapping[str, Any]) -> bool:
    """Whether an entry says `enabled: false`; nonsense there is a problem of its field, not an off."""
    try:
        return not boolean(entry.get("enabled", True))
    except ValueError:
        return False


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
