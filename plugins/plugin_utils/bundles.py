# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bundle as the controller sees it: opened, what one host needs of it, and verified once however many hosts ask."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple

from ansible_collections.airgap.xinference.plugins.module_utils.alternatives import choices
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.deep import leave_cache
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import (
    Artifact,
    Bundle,
    Damaged,
    cache_dir,
    verify,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.origin import code_of, code_text
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.reference import image_name, reference_problem
from ansible_collections.airgap.xinference.plugins.module_utils.companions import companions_of
from ansible_collections.airgap.xinference.plugins.module_utils.server.spec import source_name

from .progress import Progress

LIBRARIES = ("wheels", "host")
WHEELHOUSE = ("wheels", "server")
ENGINES = ("wheels", "engines")
ALWAYS = {"native": (LIBRARIES, WHEELHOUSE), "docker": (LIBRARIES,)}
"""What a host needs beside its models, by backend."""
OFF = ("false", "no", "off", "n", "f", "0")


class Selection(NamedTuple):
    """The artifacts one host needs, and the references of those the bundle does not have."""

    artifacts: list[Artifact]
    absent: list[str]


def bundle_path(value: str) -> Path:
    """The bundle's directory as an absolute path; a relative one counts from where ansible was started."""
    return Path(os.path.abspath(os.path.expanduser(value)))  # noqa: PTH100, PTH111


def wanted_models(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names in the bundle of the models of an inventory and their alternatives, each once.

    None for entries switched off or without source.
    """
    names = [source_name(entry) for entry in _launchable(entries)]
    return list(dict.fromkeys(name for name in names if name))


def wanted_companions(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names in the bundle of what enabled models and their alternatives need beside themselves, each once."""
    return list(dict.fromkeys(row.name for entry in _launchable(entries) for row in companions_of(entry)))


def _launchable(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All that may be launched: the enabled entries, each followed by its alternatives."""
    rows = [entry for entry in entries if isinstance(entry, Mapping)]
    on = [entry for entry in rows if str(entry.get("enabled", True)).lower() not in OFF]
    return [choice for entry in on for choice in choices(entry)]


def code_refusals(artifacts: Iterable[Artifact], entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Models among `artifacts` that bring code of their own although an entry that wants them does not allow it.

    One sentence each, with the entry and the code.
    """
    refused = []
    named = {artifact.name: code_of(artifact) for artifact in artifacts if artifact.kind == "models"}
    for entry in entries:
        if not isinstance(entry, Mapping) or _is(entry.get("allow_code", False)):
            continue
        for name in [*wanted_models([entry]), *wanted_companions([entry])]:
            if named.get(name):
                uid = entry.get("model_uid") or entry.get("model_name")
                refused.append(f"{uid}: its model {name} brings code of its own ({code_text(named[name])})")
    return list(dict.fromkeys(refused))


def _is(value: Any) -> bool:
    """Whether an entry says so in a field; nonsense is no consent."""
    return str(value).strip().lower() in ("true", "yes", "on")


ALLOW_CODE = (
    "have somebody read that code and then set `allow_code: true` in the entry, or serve a model without; it would run "
    "with all rights of the server"
)


def select(
    bundle: Bundle,
    entries: Iterable[Mapping[str, Any]],
    backend: str,
    images: Iterable[str] = (),
    tools: Iterable[str] = (),
    engines: str = "image",
) -> Selection:
    """What a host with these model entries, images (by their names in the engine) and tools needs of a bundle.

    Companions of models go along where the bundle has them. Images, tools and wheels of engines are for the backend
    `docker` only; the wheels have to be there where `engines` is `wheels`, and go along where it is `bundle`.
    """
    entries = list(entries)
    references = [*ALWAYS[backend], *(("models", name) for name in wanted_models(entries))]
    references += [("models", name) for name in wanted_companions(entries) if bundle.find("models", name)]
    references = list(dict.fromkeys(references))
    if backend == "docker":
        if engines == "wheels" or (engines == "bundle" and bundle.find(*ENGINES)):
            references.append(ENGINES)
        references += [("tools", name) for name in dict.fromkeys(tools)]
        references += [("images", name) for name in dict.fromkeys(map(_image, images))]
    artifacts, absent = [], []
    for kind, name in references:
        artifact = bundle.find(kind, name)
        if artifact is None:
            absent.append(f"{kind}/{name}")
        else:
            artifacts.append(artifact)
    return Selection(artifacts, absent)


def _image(reference: str) -> str:
    """The name of an image in the bundle; one that cannot be right is looked up as it is, and not found."""
    return reference if reference_problem(reference) else image_name(reference)


def verified(
    bundle: Bundle,
    artifacts: list[Artifact],
    cache: str | None,
    say: Callable[[str], None],
    again: Iterable[str] = (),
    run: Path | None = None,
) -> tuple[list[Damaged], int]:
    """Hash those blobs of `artifacts` that no stamp vouches for; what is damaged, and the bytes that were read.

    Ansible asks for every host in a process of its own. The first one holds a lock while it reads, the others wait and
    find its stamps. Blobs in `again` are read whatever their stamps say, but once for all hosts: `run` is a file of
    this run that keeps which were.
    """
    place = _stamps_place(bundle, cache)
    part = Bundle(bundle.root, artifacts)
    with (place / "verify.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamps = Stamps(place / "stamps.json")
        read = set(run.read_text().split()) if run is not None and run.exists() else set()
        doubted = {digest for digest in again if digest in part.blobs and digest not in read}
        for digest in doubted:
            stamps.forget(bundle.blob_path(digest))
            leave_cache(bundle.blob_path(digest))
        unknown = list(part.unvouched(stamps).values())
        if not unknown:
            return [], 0
        progress = Progress(f"verifying {bundle.root}", sum(unknown), say)
        damaged = verify(part, stamps, progress.add)
        if run is not None and doubted:
            run.write_text("\n".join(sorted(read | doubted)))
        return damaged, stamps.hashed_bytes


def _stamps_place(bundle: Bundle, cache: str | None) -> Path:
    """A directory for the stamps that can be written: beside the bundle, or the user's cache for read-only media."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "airgap.xinference"
    name = hashlib.sha256(os.fsencode(bundle.root)).hexdigest()[:16]
    for place in (Path(cache).expanduser() if cache else cache_dir(bundle.root), own / name):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OSError(f"no directory for the stamps of {bundle.root} can be written; set cache_dir")
