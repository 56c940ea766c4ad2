# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where models, images and tools of all hosts come from, each once. Pure: inventories in, lists and problems out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping

from ..alternatives import FALLBACKS, choices, merged
from ..companions import Companion, companions_of, not_carried
from .manifest import name_problem
from .reference import familiar, reference_problem

PATTERNS = ("allow_patterns", "ignore_patterns")
FIELDS = ("path", "modelscope", "revision", "license", "origin", *PATTERNS, "name")
DEFAULT_REVISION = "master"


@dataclass
class Source:
    """Where one model of the bundle comes from, and which models of which hosts want it (``host: uid``)."""

    name: str
    content: dict[str, Any]
    wanted_by: list[str] = field(default_factory=list)


def gather(models: Mapping[str, Any], companions: bool = True) -> tuple[list[Source], list[str]]:
    """Sources of the enabled models by host, in order of name, and everything that is wrong with them.

    Two models may share a source; two different sources under one name are a problem, because the name becomes a
    directory on the hosts. Models without a source are left out: they name a path of their own. The alternatives of a
    model (`fallbacks`) are models like it. With `companions`, what the models would download beside themselves is there
    too; a source somebody gave under its name comes first.
    """
    found: dict[str, Source] = {}
    problems: list[str] = []
    for host, entries in models.items():
        for number, entry in enumerate(_entries(host, entries, problems), 1):
            uid = entry.get("model_uid") or entry.get("model_name") or f"entry {number}"
            if entry.get("enabled", True) is False:
                continue
            fallbacks = entry.get(FALLBACKS) or []
            if not isinstance(fallbacks, (list, tuple)) or not all(isinstance(one, Mapping) for one in fallbacks):
                problems.append(f"{host}: {uid}: fallbacks is not a list of dictionaries")
                fallbacks = []
            _add(found, entry, f"{host}: {uid}", problems)
            for place, choice in enumerate((merged(entry, one) for one in fallbacks), 1):
                if choice.get("source") is not entry.get("source"):
                    _add(found, choice, f"{host}: {uid}: fallback {place}", problems)
    if companions:
        for where, row in _companions(models):
            found.setdefault(row.name, _companion_source(row)).wanted_by.append(where)
    return [found[name] for name in sorted(found)], problems


def _add(found: dict[str, Source], entry: Mapping[str, Any], where: str, problems: list[str]) -> None:
    """Add the source of one entry, where it has one, to those found."""
    if entry.get("source") is None:
        return
    wrong: list[str] = []
    source = _source(entry["source"], wrong)
    problems.extend(f"{where}: {problem}" for problem in wrong)
    if source is None:
        return
    known = found.setdefault(source.name, source)
    if known.content != source.content:
        problems.append(
            f"{where}: the name {source.name!r} means {_text(source)} here and {_text(known)} for "
            f"{known.wanted_by[0]}; give one of them another `source.name`"
        )
    known.wanted_by.append(where)


def notices(models: Mapping[str, Any]) -> list[str]:
    """What enabled models will want from the internet although they come from the bundle, one sentence each."""
    return [
        f"{host}: {entry['model_name']} downloads {wants}; the bundle does not carry that."
        for host, entry in _carried(models)
        if (wants := not_carried(entry))
    ]


def _carried(models: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The enabled entries and alternatives with a source, with their hosts."""
    for host, entries in models.items():
        for entry in _entries(host, entries, []):
            if entry.get("enabled", True) is not False:
                yield from ((host, one) for one in choices(entry) if one.get("source") is not None)


def _companions(models: Mapping[str, Any]) -> Iterator[tuple[str, Companion]]:
    """What the models need beside themselves, with who needs it."""
    for host, entry in _carried(models):
        for row in companions_of(entry):
            yield f"{host}: {entry.get('model_uid')}", row


def _companion_source(row: Companion) -> Source:
    """A companion as a source like any other."""
    if row.modelscope:
        patterns = {"allow_patterns": list(row.allow_patterns), "ignore_patterns": []}
        return Source(row.name, {"modelscope": row.modelscope, "revision": DEFAULT_REVISION, **patterns})
    return Source(row.name, {"url": row.url, "file": row.file, "sha256": row.sha256})


def gather_images(
    images: Mapping[str, Any], servers: Mapping[str, Any], gateways: Mapping[str, Any]
) -> tuple[list[dict[str, str]], list[str]]:
    """The images of all hosts by name, with their archive where they have one, and everything that is wrong with them.

    `images` are lists of entries by host, `servers` and `gateways` the names of the images that each host's server
    and gateway run, empty for none. An entry without an archive agrees with one that has it.
    """
    named = {
        host: [
            *_list(images.get(host)),
            *({"name": runs[host]} for runs in (servers, gateways) if runs.get(host)),
        ]
        for host in {**images, **gateways}
    }
    found, problems = _named(named, "xinference_images", "archive", reference_problem, familiar)
    return [{key: value for key, value in entry.items() if value} for entry in found], problems


def gather_tools(tools: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    """The tools of all hosts, name and path of each, and everything that is wrong with them."""
    found, problems = _named(tools, "xinference_tools", "path", name_problem, str)
    problems += [f"xinference_tools: {entry['name']} has no `path`" for entry in found if not entry["path"]]
    return found, problems


def _named(
    by_host: Mapping[str, Any], knob: str, key: str, problem_of: Callable[[Any], str | None], full: Callable[[str], str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Entries with a name and one more field, each name once, in order of name."""
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for host, entries in by_host.items():
        for entry in _list(entries):
            where = f"{host}: {knob}"
            if not isinstance(entry, Mapping) or set(entry) - {"name", key}:
                problems.append(f"{where}: {entry!r} is not an entry with `name` and `{key}`")
                continue
            problem = problem_of(entry.get("name"))
            if problem:
                problems.append(f"{where}: {problem}")
                continue
            name, value = full(entry["name"]), str(entry.get(key) or "")
            known = found.setdefault(name, {"name": name, key: value})
            if value and known[key] not in ("", value):
                problems.append(f"{where}: {name} has the {key} {value} here and {known[key]} for another host")
            known[key] = known[key] or value
    return [found[name] for name in sorted(found)], problems


def _list(entries: Any) -> list[Any]:
    """Entries as a list; what is none becomes one, and is refused as an entry."""
    if entries is None:
        return []
    return list(entries) if isinstance(entries, (list, tuple)) else [entries]


def _entries(host: str, entries: Any, problems: list[str]) -> list[Mapping[str, Any]]:
    """The model entries of a host that are mappings."""
    if entries is None:
        return []
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        problems.append(f"{host}: xinference_models is not a list of models")
        return []
    return list(entries)


def _source(value: Any, wrong: list[str]) -> Source | None:
    """A source in full, or None and what is wrong with it."""
    if not isinstance(value, Mapping):
        wrong.append("source is not a mapping with `path` or `modelscope`")
        return None
    unknown = sorted(set(value) - set(FIELDS))
    if unknown:
        wrong.append(f"source has unknown fields {', '.join(unknown)}; it can have {', '.join(FIELDS)}")
    origins = [key for key in ("path", "modelscope") if value.get(key)]
    if len(origins) != 1:
        wrong.append("source needs either `path` or `modelscope`")
        return None
    origin = str(value[origins[0]]).rstrip("/")
    name = value.get("name") or origin.rpartition("/")[2]
    problem = name_problem(name)
    if problem:
        wrong.append(f"source: {problem}; set `source.name`")
    if origins == ["path"]:
        content: dict[str, Any] = {"path": origin}
        if unused := sorted(set(value) & {"revision", *PATTERNS}):
            wrong.append(f"source has {', '.join(unused)}, which a `path` cannot have")
    else:
        content = {"modelscope": origin, "revision": str(value.get("revision") or DEFAULT_REVISION)}
        if origin.count("/") != 1:
            wrong.append(f"source.modelscope {origin!r} is not organisation/name")
        for key in PATTERNS:
            patterns = value.get(key) or []
            content[key] = [patterns] if isinstance(patterns, str) else list(patterns)
    if value.get("origin") and "path" not in content:
        wrong.append("source has origin, which only a `path` needs; of modelscope it is known")
    content.update({key: str(value[key]) for key in ("license", "origin") if value.get(key)})
    return None if wrong else Source(str(name), content)


def _text(source: Source) -> str:
    """A source in a message."""
    return " ".join(f"{key} {value}" for key, value in source.content.items() if value)
