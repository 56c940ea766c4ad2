# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a site wants to know of a model before it runs it: its licence, and whether it brings code of its own.

Code of its own is what a library would import from the model's directory: Python files and compiled modules, and
classes that its configuration names. It runs with all rights of the server as soon as somebody lets it
(`trust_remote_code`, which Xinference before 2.12 always says).
"""

from __future__ import annotations

import re
from typing import Any, Callable, Iterable, Mapping

from .documents import DocumentError, parse
from .manifest import CODE, LICENSE, Artifact

CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so")
SHOWN_CODE = 5
MAX_READ = 4 * 1024 * 1024
"""Bytes; a larger JSON file of a model is no configuration but a vocabulary."""

_CONFIGURATIONS = re.compile(r"(?:\A|/)(?:[^/]*config|modules)\.json\Z")
_README = re.compile(r"(?:\A|/)readme(?:\.md|\.rst|\.txt)?\Z", re.IGNORECASE)
_LICENSE_FILE = re.compile(r"\A(?:licen[cs]e|copying)[^/]*\Z", re.IGNORECASE)
_FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_FIELD = r"(?m)^{name}:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([^\s\"'#][^\"'#\n]*?)[\"']?[ \t]*(?:#.*)?$"
_SENTENCE_TRANSFORMERS = "sentence_transformers."

Reader = Callable[[str], bytes]


def facts_of(sizes: Mapping[str, int], read: Reader) -> dict[str, str]:
    """Annotations about the files of a model: its licence and its code, as far as there is something to tell.

    `sizes` are bytes by path, `read` gives the content of one; only small files are read.
    """
    code = sorted({*code_files(sizes), *_named_classes(sizes, read)})
    facts = {LICENSE: _license(sizes, read), CODE: " ".join(code)}
    return {key: value for key, value in facts.items() if value}


def code_files(paths: Iterable[str]) -> list[str]:
    """Those of some paths that can be imported."""
    return sorted(path for path in paths if path.lower().endswith(CODE_SUFFIXES))


def code_of(artifact: Artifact) -> list[str]:
    """The code that a model of a bundle brings: files, and classes that were found when the bundle was built.

    Files are looked for again, because who built an older bundle did not note any.
    """
    noted = artifact.annotations.get(CODE, "").split()
    return sorted({*noted, *code_files(file.path for file in artifact.files)})


def code_text(code: list[str]) -> str:
    """Code in a message, not more than fits."""
    return ", ".join(code[:SHOWN_CODE]) + (f" and {len(code) - SHOWN_CODE} more" if len(code) > SHOWN_CODE else "")


def _named_classes(sizes: Mapping[str, int], read: Reader) -> Iterable[str]:
    """Classes that configurations name to be imported: `auto_map` of transformers, modules of sentence-transformers."""
    for path, size in sizes.items():
        if not _CONFIGURATIONS.search(path) or size > MAX_READ:
            continue
        try:
            content = parse(read(path))
        except DocumentError:
            continue
        mapped = content.get("auto_map") if isinstance(content, dict) else None
        if mapped:
            yield from (f"{path}:{name}" for name in _texts(mapped))
        if path.endswith("modules.json") and isinstance(content, list):
            types = [str(module.get("type", "")) for module in content if isinstance(module, dict)]
            yield from (f"{path}:{name}" for name in types if name and not name.startswith(_SENTENCE_TRANSFORMERS))


def _texts(value: Any) -> Iterable[str]:
    """All words in a JSON value; keys are none."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and value.split():
        yield "_".join(re.sub(r"[^\x21-\x7e]", "?", word) for word in value.split())


def _license(sizes: Mapping[str, int], read: Reader) -> str:
    """What the model's card says, else the file there is to be read, else nothing."""
    for path in sorted(sizes, key=lambda path: (path.count("/"), path)):
        if _README.search(path) and "/" not in path and sizes[path] <= MAX_READ:
            front = _FRONT.match(read(path).decode("utf-8", "replace").replace("\r\n", "\n"))
            found = front and license_in(front[1])
            if found:
                return found
    files = sorted(path for path in sizes if _LICENSE_FILE.match(path))
    return f"see {files[0]}" if files else ""


def license_in(front: str) -> str:
    """The licence that the head of a model's card names; the licence's own name where its sort is only `other`."""
    values = [re.search(_FIELD.format(name=name), front) for name in ("license", "license_name")]
    found = [re.sub(r"[^\x20-\x7e]", "?", value[1].strip())[:80] if value else "" for value in values]
    sort, name = found
    sort = sort.strip("[]").strip()
    return name if name and sort.lower() in ("", "other") else sort
