# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a launch failed, in words that help: what the server says, what it knows, and the table of known failures."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

from .client import Client, ServerError
from .diagnose import Diagnosis, diagnose
from .fields import nearest
from .spec import ModelSpec

# The row of the table of known failures for an engine that is not there, whichever way that is found out.
NO_ENGINE = "engine-not-usable"
# Where a name that one type does not have may be found instead.
COMMON_TYPES = ("embedding", "rerank", "LLM", "audio", "image")


def explain(client: Client, spec: ModelSpec, text: str) -> Optional[Diagnosis]:
    """Cause and cure of a failed launch, None when nothing is known about it.

    `text` is what the server said. Asks the server which names and engines it has, where the text is about those.
    """
    lowered = text.lower()
    try:
        if "not found" in lowered or "not supported" in lowered:
            found = _unknown_name(client, spec)
            if found:
                return found
        if "cannot be run on engine" in lowered or "not found, name:" in lowered:
            found = _engine(client, spec)
            if found:
                return found
    except ServerError:
        pass  # The explanation is a courtesy; the failure itself is reported either way.
    return diagnose(text)


def _unknown_name(client: Client, spec: ModelSpec) -> Optional[Diagnosis]:
    """The name is none of the server's: the nearest, or the type that has it."""
    names = _names(client, spec.type)
    if not names or spec.name in names:
        return None
    cause = f"Xinference {client.version()} has no {spec.type} model named {spec.name}."
    near = nearest(spec.name, names)
    if near:
        offer = f"Set model_name to {_either(near)}"
    else:
        homes = [kind for kind in COMMON_TYPES if kind != spec.type and spec.name in _names(client, kind)]
        offer = f"Set model_type to {_either(homes)}" if homes else f"Set model_name to one of its {len(names)} names"
    cure = f"{offer}, or register a custom model of that name in xinference_registrations."
    return Diagnosis(cause=cause, cure=cure, name="unknown-name")


def _engine(client: Client, spec: ModelSpec) -> Optional[Diagnosis]:
    """The name is known, and the engine, format, size or quantization is not to be had."""
    engines = client.engines(spec.type, spec.name)
    usable = {name: offers for name, offers in engines.items() if isinstance(offers, list) and offers}
    offered = f"Usable here: {', '.join(sorted(usable))}." if usable else "No engine is usable here for this model."
    if not spec.engine or not engines:
        return None
    told = {name.lower(): name for name in engines}
    name = told.get(spec.engine.lower())
    if name is None:
        near = nearest(spec.engine, engines, 1)
        cause = f"Xinference {client.version()} has no engine {spec.engine} that can run {spec.name} here"
        cause += f" (nearest: {near[0]})." if near else ", or the packages of the engine are not installed."
        cure = f"{offered} Set model_engine, or add the engine's packages to the bundle."
        return Diagnosis(cause=cause, cure=cure, name=NO_ENGINE)
    if name not in usable:
        reason = str(engines[name]).rstrip(".")
        return Diagnosis(
            cause=f"The engine {name} cannot be used here: {reason}.",
            cure=f"{offered} Set model_engine, or add what is missing to the bundle.",
            name=NO_ENGINE,
        )
    choices = _choices(spec, usable[name])
    if not choices:
        return None
    return Diagnosis(f"{name} runs {spec.name}, but not with {choices[0]}.", choices[1], "engine-choices")


def still_impossible(client: Client, spec: ModelSpec) -> str:
    """Why the server says that the engine of a model cannot be used; empty when it can, or nothing is known of it."""
    if not spec.engine:
        return ""
    engines = client.engines(spec.type, spec.name)
    told = {name.lower(): offers for name, offers in engines.items()}
    offers = told.get(spec.engine.lower(), [] if engines else None)
    if offers is None or (isinstance(offers, list) and offers):
        return ""
    return str(offers).rstrip(".") if offers else f"the server offers no engine {spec.engine} for {spec.name}"


def _choices(spec: ModelSpec, offers: Sequence[Dict[str, Any]]) -> Optional[List[str]]:
    """What of the entry no offer has, and what the offers have instead."""
    asked = {
        name: spec.fields[name]
        for name in ("model_format", "model_size_in_billions")
        if spec.fields.get(name) is not None
    }
    wrong = {
        name: value for name, value in asked.items() if all(str(offer.get(name)) != str(value) for offer in offers)
    }
    quantization = spec.fields.get("quantization")
    if not wrong and quantization is not None:
        fitting = [offer for offer in offers if all(str(offer.get(name)) == str(asked[name]) for name in asked)]
        known = {q for offer in fitting for q in (offer.get("quantizations") or [offer.get("quantization")]) if q}
        if fitting and str(quantization) not in known:
            return [f"quantization {quantization}", f"Set quantization to {_either(sorted(known))}."]
        return None
    if not wrong:
        return None
    said = ", ".join(f"{name} {value}" for name, value in wrong.items())
    instead = [f"{name} to {_either(list(dict.fromkeys(str(offer.get(name)) for offer in offers)))}" for name in wrong]
    return [said, f"Set {'; '.join(instead)}."]


def _names(client: Client, model_type: str) -> List[str]:
    try:
        return [str(one.get("model_name")) for one in client.registrations(model_type)]
    except ServerError:
        return []


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
