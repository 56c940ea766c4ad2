# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The alternatives of a model entry: what is launched under its uid when the entry itself cannot run.

`fallbacks` of an entry are overrides, tried in their order. Bundles carry what the alternatives need and servers launch
them, so this knows neither wing. An alternative has every field of its entry that it does not name itself, except

* `model_size_in_billions`, `model_format`, `quantization` and `peft_model_config`, when it names another model;
* `source` and `model_path`, when it names another model, size or format, which are other weights;
* `options`, when it names another engine, because they are the engine's;
* what excludes what it names: `source` or `model_path`, and `gpus`, `n_gpu`, `worker_ip` or `replica_config`.

A field without value (null) takes the entry's away; only `n_gpu` has null among its values, for no GPU at all.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Mapping

FALLBACKS = "fallbacks"
# What is said once, for the entry and its alternatives together.
OF_THE_ENTRY = (FALLBACKS, "relaunch", "enabled")
WEIGHTS = ("model_name", "model_size_in_billions", "model_format")
OF_THE_MODEL = ("model_size_in_billions", "model_format", "quantization", "peft_model_config")
OF_THE_WEIGHTS = ("source", "model_path")
EXCLUDED = {
    "source": ("model_path",),
    "model_path": ("source",),
    "gpus": ("n_gpu", "replica_config"),
    "n_gpu": ("gpus", "replica_config"),
    "worker_ip": ("replica_config",),
    "replica_config": ("gpus", "n_gpu", "worker_ip"),
}


def merged(entry: Mapping[str, Any], override: Mapping[str, Any]) -> Dict[str, Any]:
    """The entry of one alternative, complete and without alternatives of its own."""
    left_out = set(OF_THE_ENTRY)
    if _names_another(entry, override, ("model_name",)):
        left_out.update(OF_THE_MODEL)
    if _names_another(entry, override, WEIGHTS):
        left_out.update(OF_THE_WEIGHTS)
    if _names_another(entry, override, ("model_engine",)):
        left_out.add("options")
    for name in override:
        if override[name] is not None or name == "n_gpu":
            left_out.update(EXCLUDED.get(str(name), ()))
    taken_over = {name: value for name, value in entry.items() if name not in left_out}
    return {**taken_over, **{name: value for name, value in override.items() if name not in OF_THE_ENTRY}}


def alternatives(entry: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """The alternatives of an entry in their order; what is no dictionary is left to whoever checks entries."""
    given = entry.get(FALLBACKS)
    return [merged(entry, one) for one in given if isinstance(one, Mapping)] if isinstance(given, (list, tuple)) else []


def choices(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The entry itself, which is its first choice, and its alternatives."""
    yield entry
    yield from alternatives(entry)


def _names_another(entry: Mapping[str, Any], override: Mapping[str, Any], names: Any) -> bool:
    return any(override.get(name) is not None and _word(override[name]) != _word(entry.get(name)) for name in names)


def _word(value: Any) -> str:
    """A value for comparison, whatever the spelling: engines have several cases, sizes are numbers or texts."""
    return str(value).strip().lower().replace(".", "_")
