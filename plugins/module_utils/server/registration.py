# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Custom models of a server: how a definition must look for its version, what differs, what to do about it.

A definition is compared field by field with what the server returns: only what the inventory names counts, because
the server fills in the rest. `plan` is pure but for its two reads; `apply` carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from .client import Client
from .features import Features
from .fields import suggestion

REGISTRABLE = ("LLM", "embedding", "rerank", "audio", "image", "video", "flexible")
# In schema 2 these stand in each of model_specs, in the flat form beside model_name.
SPEC_FIELDS = ("model_id", "model_uri", "model_revision", "model_hub", "model_format", "quantization")
DEFAULT_SPEC = {"model_format": "pytorch", "quantization": "none"}
Difference = Tuple[str, Any, Any]


class DefinitionError(Exception):
    """A definition that cannot be registered, or a name that cannot be removed; the text says what to do."""


@dataclass(frozen=True)
class RegistrationPlan:
    """`action` is `keep`, `register`, `replace` or `unregister`.

    `before` is the server's definition or None, `after` the one to register or None, `differences` are
    (path of the field, server's value, wanted value).
    """

    model_type: str
    name: str
    action: str
    before: Optional[Dict[str, Any]] = None
    after: Optional[Dict[str, Any]] = None
    differences: List[Difference] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether there is something to do."""
        return self.action != "keep"

    def diff(self) -> Dict[str, Any]:
        """`before` and `after` of Ansible's diff mode, without what the server filled in by itself."""
        header = f"{self.model_type}/{self.name}"
        before = _reduced(self.before, self.after) if self.before and self.after else self.before
        after = before if self.action == "keep" else self.after
        return {"before_header": header, "after_header": header, "before": before or {}, "after": after or {}}


def adapt(model_type: str, definition: Mapping[str, Any], features: Features) -> Dict[str, Any]:
    """The definition in the form that the server's version takes.

    Either form is understood: with `model_specs`, or flat. Raises DefinitionError when it cannot be put into the form
    wanted, e.g. several specs where the server takes one.
    """
    wanted = {name: value for name, value in definition.items() if name not in ("version", "is_builtin")}
    if features.definition_version >= 2:
        wanted["version"] = 2
    elif model_type == "LLM":
        wanted["version"] = 1
    if model_type in features.specs_types:
        specs = wanted.pop("model_specs", None)
        if specs is None:
            specs = [{name: wanted.pop(name) for name in SPEC_FIELDS if name in wanted}]
        fill = {} if model_type == "LLM" else DEFAULT_SPEC
        specs = [{**fill, **spec} for spec in _list_of_mappings(specs)]
        wanted["model_specs"] = _split(specs) if features.definition_version >= 2 else _join(specs)
    elif "model_specs" in wanted:
        specs = _list_of_mappings(wanted.pop("model_specs"))
        if len(specs) != 1:
            raise DefinitionError(
                f"Xinference {features.version} takes one source for a model of type {model_type}, and model_specs has "
                f"{len(specs)}."
            )
        flat = {name: value for name, value in specs[0].items() if name not in DEFAULT_SPEC}
        wanted = {**wanted, **flat}
    return wanted


def differences(wanted: Any, found: Any, path: str = "") -> List[Difference]:
    """Where `found` is not as `wanted`: (path, found, wanted). Fields that only `found` has do not count."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        result: List[Difference] = []
        for name, value in wanted.items():
            result += differences(value, found.get(name), f"{path}.{name}" if path else str(name))
        return result
    if isinstance(wanted, (list, tuple)) and isinstance(found, (list, tuple)) and len(wanted) == len(found):
        result = []
        for index, (value, other) in enumerate(zip(wanted, found)):
            result += differences(value, other, f"{path}[{index}]")
        return result
    same = wanted == found or (not isinstance(wanted, bool) and str(wanted) == str(found))
    return [] if same else [(path, found, wanted)]


def plan(
    client: Client,
    model_type: str,
    state: str,
    name: Optional[str] = None,
    definition: Optional[Mapping[str, Any]] = None,
) -> RegistrationPlan:
    """What to do so that the custom model is `present` (as `definition`) or `absent`.

    Two requests. Raises DefinitionError for a built-in name or a definition that cannot be, ServerError for the rest.
    """
    name = str(name or (definition or {}).get("model_name") or "")
    if not name:
        raise DefinitionError("A name is missing: give model_name, or a definition with model_name in it.")
    if model_type not in REGISTRABLE:
        hint = suggestion(model_type, REGISTRABLE)
        raise DefinitionError(f"Models of type {model_type} cannot be registered{hint}")
    listed = {str(one["model_name"]): one for one in client.registrations(model_type)}
    builtin = bool(listed.get(name, {}).get("is_builtin"))
    before = client.registration(model_type, name) if name in listed and not builtin else None
    if state == "absent":
        if builtin:
            raise DefinitionError(f"{name} is built into Xinference {client.version()} and cannot be removed.")
        return RegistrationPlan(model_type, name, "keep" if before is None else "unregister", before)
    if definition is None:
        raise DefinitionError(f"There is no definition to register {name} from.")
    if definition.get("model_name", name) != name:
        raise DefinitionError(f"The definition is of {definition['model_name']}, and model_name says {name}.")
    if builtin:
        raise DefinitionError(
            f"{name} names a built-in model of Xinference {client.version()} (type {model_type}). Use that one and "
            "drop the registration, or register yours under another name."
        )
    after = adapt(model_type, {**definition, "model_name": name}, client.features)
    if before is None:
        return RegistrationPlan(model_type, name, "register", None, after)
    differing = differences(after, before)
    return RegistrationPlan(model_type, name, "replace" if differing else "keep", before, after, differing)


def apply(client: Client, todo: RegistrationPlan, persist: bool = True) -> None:
    """Carry out a plan. A replacement that the server refuses puts the old definition back. Raises ServerError.

    With `persist` the server still knows the model after a restart.
    """
    if todo.action in ("unregister", "replace"):
        client.unregister(todo.model_type, todo.name)
    if todo.after is None or not todo.changed:
        return
    try:
        client.register(todo.model_type, todo.after, persist)
    except Exception:
        if todo.before is not None:
            client.register(todo.model_type, adapt(todo.model_type, todo.before, client.features), persist)
        raise


def _reduced(found: Any, wanted: Any) -> Any:
    """Of `found` only the fields that `wanted` has."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return {name: _reduced(found[name], wanted[name]) for name in wanted if name in found}
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        return [_reduced(one, other) for one, other in zip(found, wanted)]
    return found


def _list_of_mappings(specs: Any) -> List[Dict[str, Any]]:
    if not isinstance(specs, list) or not specs or not all(isinstance(spec, Mapping) for spec in specs):
        raise DefinitionError("model_specs must be a list of at least one dictionary.")
    return [dict(spec) for spec in specs]


def _split(specs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One spec for every quantization."""
    result = []
    for spec in specs:
        rest = {name: value for name, value in spec.items() if name != "quantizations"}
        for quantization in spec.get("quantizations") or [None]:
            result.append(rest if quantization is None else {**rest, "quantization": quantization})
    return result


def _join(specs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One spec for all quantizations of the same weights."""
    result: List[Dict[str, Any]] = []
    for spec in specs:
        rest = {name: value for name, value in spec.items() if name not in ("quantization", "quantizations")}
        listed = list(spec.get("quantizations") or [spec.get("quantization", "none")])
        twin = next((one for one in result if {**one, "quantizations": None} == {**rest, "quantizations": None}), None)
        if twin is None:
            result.append({**rest, "quantizations": listed})
        else:
            twin["quantizations"] += [one for one in listed if one not in twin["quantizations"]]
    return result
