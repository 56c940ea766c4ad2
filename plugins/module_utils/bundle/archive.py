# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading an image archive once, from front to back, and believing nothing in it.

What `docker save`, podman, skopeo and buildx write: a tar archive with a `manifest.json`, or an OCI layout, or both.
Every file is hashed while it goes into the receiving area of a bundle, compressed layers decompressed on the way. Only
at the end does the archive say what belongs together; then configuration, layers and digests have to agree.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tarfile
from dataclasses import dataclass
from itertools import chain
from typing import Any, Iterable, Iterator, NamedTuple

from .compression import CompressionError, plain
from .digest import CHUNK, is_digest
from .documents import DocumentError
from .manifest import Blob, config_layers, path_problem
from .reference import familiar
from .writer import BlobWriter, Received

MAX_JSON = 8 * 1024 * 1024
"""Bytes a document in an archive may have; configurations have some ten thousand."""
MAX_DOCUMENTS = 64 * 1024 * 1024
"""Bytes all documents of an archive together may have; they are held in memory."""
MAX_DEPTH = 3
"""Indexes in indexes that are followed."""

_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})\Z")
_CONFIG = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?\Z")


class ArchiveError(Exception):
    """An archive that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Image:
    """An image as it goes into a bundle: its configuration, and its uncompressed layers from the lowest up."""

    config: bytes
    layers: tuple[Blob, ...]


class Member(NamedTuple):
    """A file of an archive: digest and size as it lies there (`raw`) and uncompressed, and where the content is now."""

    raw: Blob
    blob: Blob
    content: bytes | None
    received: Received | None


def read_archive(chunks: Iterable[bytes], reference: str, writer: BlobWriter, architecture: str) -> Image:
    """Take the image `reference` out of an archive into the bundle that `writer` writes.

    `architecture` (in Go's words, amd64) decides where an archive has the image for several. Raises ArchiveError, and
    no blob has come into the bundle then.
    """
    members: dict[str, Member] = {}
    links: dict[str, str] = {}
    try:
        _read(plain(chunks), members, links, writer)
        found = _Archive(members, links)
        config, layers = found.image(familiar(reference), architecture)
        for member in layers:
            if member.received is not None:
                writer.keep(member.received)
            elif member.content is not None:
                writer.store_bytes(member.content)
        return Image(config, tuple(member.blob for member in layers))
    except (tarfile.TarError, EOFError, CompressionError) as error:
        raise ArchiveError(f"it is not a whole image archive: {error}") from error
    finally:
        for member in members.values():
            if member.received is not None:
                writer.discard(member.received)


def image_layers(config: bytes) -> list[str]:
    """The layers (diff ids) that a configuration names. Raises ArchiveError when it is no configuration of an image."""
    try:
        return config_layers(config)
    except DocumentError as error:
        raise ArchiveError(str(error)) from error


def _read(chunks: Iterator[bytes], members: dict[str, Member], links: dict[str, str], writer: BlobWriter) -> None:
    """Go through the archive: content into `members`, links into `links`, both by clean path."""
    documents = 0
    with tarfile.open(fileobj=_Reader(chunks), mode="r|", bufsize=1024 * 1024) as archive:  # type: ignore[call-overload]
        for entry in archive:
            name = entry.name[2:] if entry.name.startswith("./") else entry.name
            if entry.isdir():
                continue
            problem = path_problem(name)
            if problem:
                raise ArchiveError(f"it is refused: {problem}")
            if name in members or name in links:
                raise ArchiveError(f"it is refused: {name!r} occurs twice")
            if entry.issym() or entry.islnk():
                start = posixpath.dirname(name) if entry.issym() else ""
                target = posixpath.normpath(posixpath.join(start, entry.linkname))
                if path_problem(target):
                    raise ArchiveError(f"it is refused: {name!r} is a link that leaves it, to {entry.linkname!r}")
                links[name] = target
            elif entry.isreg() and not entry.issparse():
                members[name] = _take(name, entry.size, archive.extractfile(entry), writer)
                documents += len(members[name].content or b"")
                if documents > MAX_DOCUMENTS:
                    raise ArchiveError(f"it is refused: more than {MAX_DOCUMENTS} bytes of JSON are not an image's")
            else:
                raise ArchiveError(f"it is refused: {name!r} is neither a file nor a link")


def _take(name: str, size: int, file: Any, writer: BlobWriter) -> Member:
    """Hash one file while it is received; what looks like a document stays in memory."""
    first = file.read(min(size, CHUNK))
    sha = hashlib.sha256(first)
    if size <= MAX_JSON and first[:1] in (b"{", b"["):
        content = first + file.read()
        blob = Blob("sha256:" + hashlib.sha256(content).hexdigest(), len(content))
        raw, member = blob, Member(blob, blob, content, None)
    else:
        received = writer.receive(plain(chain([first], _hashing(file, sha))), size)
        raw = Blob("sha256:" + sha.hexdigest(), size)
        member = Member(raw, Blob(received.digest, received.size), None, received)
    named = _BLOB.match(name)
    if named and raw.digest != f"sha256:{named[1]}":
        if member.received is not None:
            writer.discard(member.received)
        raise ArchiveError(f"it is damaged or lies: the content of {name} is {raw.digest}")
    return member


def _hashing(file: Any, sha: Any) -> Iterator[bytes]:
    """The rest of a file, hashed as it passes."""
    while True:
        chunk = file.read(CHUNK)
        if not chunk:
            return
        sha.update(chunk)
        yield chunk


class _Archive:
    """The files of an archive after it was read, and what they say about each other."""

    def __init__(self, members: dict[str, Member], links: dict[str, str]) -> None:
        self.members = members
        self.links = links

    def image(self, reference: str, architecture: str) -> tuple[bytes, list[Member]]:
        """Configuration and layers of an image, after checking that they are what they say."""
        if "manifest.json" in self.members:
            config, layers = self._saved(reference)
        elif "index.json" in self.members:
            config, layers = self._layout(reference, architecture)
        else:
            raise ArchiveError("it has neither manifest.json nor index.json, so it is not an image archive")
        if config.content is None:
            raise ArchiveError("its configuration is too large to be one")
        wanted = image_layers(config.content)
        if len(wanted) != len(layers):
            raise ArchiveError(f"its configuration names {len(wanted)} layers, its manifest {len(layers)}")
        lies = [
            f"layer {number} is {member.blob.digest}, the configuration says {digest}"
            for number, (digest, member) in enumerate(zip(wanted, layers), 1)
            if member.blob.digest != digest
        ]
        if lies:
            raise ArchiveError("it is damaged or lies: " + "; ".join(lies))
        return config.content, layers

    def _saved(self, reference: str) -> tuple[Member, list[Member]]:
        """The image as manifest.json describes it."""
        entries = self._document("manifest.json")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
            raise ArchiveError("its manifest.json is not a list of images")
        tags = [[familiar(str(tag)) for tag in entry.get("RepoTags") or []] for entry in entries]
        fitting = [entry for entry, names in zip(entries, tags) if reference in names]
        if not fitting and len(entries) == 1 and not tags[0]:
            fitting = entries
        if not fitting:
            raise ArchiveError(f"it does not have {reference}; it has {_listed(chain(*tags))}")
        config, layers = fitting[0].get("Config"), fitting[0].get("Layers")
        if not isinstance(config, str) or not isinstance(layers, list):
            raise ArchiveError("its manifest.json names no Config and Layers")
        document = self._config(config)
        named = _CONFIG.match(config)
        if named and document.raw.digest != f"sha256:{named[1]}":
            raise ArchiveError(f"it is damaged or lies: the content of {config} is {document.raw.digest}")
        return document, self._all(layers)

    def _layout(self, reference: str, architecture: str) -> tuple[Member, list[Member]]:
        """The image as an OCI layout describes it."""
        entries = self._entries("index.json")
        names = [_names(entry) for entry in entries]
        fitting = [entry for entry, known in zip(entries, names) if _is_named(reference, known)]
        if not fitting and not any(names):
            fitting = entries
        if not fitting:
            raise ArchiveError(f"it does not have {reference}; it has {_listed(chain(*names))}")
        manifest = self._manifest(fitting, architecture)
        layers = manifest.get("layers")
        if not isinstance(layers, list):
            raise ArchiveError("its manifest has no layers")
        return self._config(self._path(manifest.get("config"))), self._all([self._path(layer) for layer in layers])

    def _manifest(self, entries: list[dict[str, Any]], architecture: str, depth: int = 0) -> dict[str, Any]:
        """The manifest for our architecture, through indexes; attestations are no images."""
        if depth > MAX_DEPTH:
            raise ArchiveError(f"its indexes are nested more than {MAX_DEPTH} deep")
        usable = [entry for entry in entries if _platform(entry).get("os", "linux") == "linux"]
        ours = [entry for entry in usable if _platform(entry).get("architecture", architecture) == architecture]
        if len(ours) != 1:
            has = _listed(str(_platform(entry).get("architecture")) for entry in usable)
            raise ArchiveError(f"it has {len(ours)} images for linux/{architecture} under that name (it has {has})")
        path = self._path(ours[0])
        content = self._document(path)
        if isinstance(content, dict) and isinstance(content.get("manifests"), list):
            return self._manifest(self._entries(path), architecture, depth + 1)
        if not isinstance(content, dict):
            raise ArchiveError(f"{path} is not a manifest")
        return content

    def _entries(self, path: str) -> list[dict[str, Any]]:
        """The descriptors of an index."""
        content = self._document(path)
        entries = content.get("manifests") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
            raise ArchiveError(f"its {path} is not an index of manifests")
        return entries

    def _path(self, descriptor: Any) -> str:
        """Where the blob of a descriptor is, after checking that it has the size the descriptor says."""
        digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
        if not is_digest(digest):
            raise ArchiveError(f"a descriptor of it has no digest but {digest!r}")
        path = f"blobs/sha256/{str(digest).partition(':')[2]}"
        member = self.members.get(path)
        if member is not None and descriptor.get("size") != member.raw.size:
            raise ArchiveError(f"{path} has {member.raw.size} bytes, its descriptor says {descriptor.get('size')}")
        return path

    def _config(self, path: str) -> Member:
        member = self._find(path)
        if member is None or member.content is None:
            raise ArchiveError(f"the image's configuration {path} is missing")
        return member

    def _all(self, paths: list[Any]) -> list[Member]:
        """The files of these paths, or what is missing of them."""
        found = [self._find(path) for path in paths]
        missing = [str(path) for path, member in zip(paths, found) if member is None]
        if missing:
            raise ArchiveError(f"it is not complete; missing: {_listed(missing)}")
        return [member for member in found if member is not None]

    def _find(self, path: object) -> Member | None:
        """A file by its path, through links (an archive has fewer links than this follows)."""
        for _step in range(16):
            if not isinstance(path, str):
                return None
            if path in self.members:
                return self.members[path]
            path = self.links.get(path)
        return None

    def _document(self, path: str) -> Any:
        member = self._find(path)
        if member is None or member.content is None:
            raise ArchiveError(f"its {path} is missing, or is not JSON")
        try:
            return json.loads(member.content)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"its {path} is not JSON ({error})") from error


class _Reader:
    """Chunks as a file to read from, for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only where the stream ends."""
        parts, held = [self._rest], len(self._rest)
        while held < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            parts.append(chunk)
            held += len(chunk)
        content = b"".join(parts)
        self._rest = content[size:]
        return content[:size]


def _names(entry: dict[str, Any]) -> list[str]:
    """What a descriptor of an index calls its image: a full name, or a tag only."""
    marks = entry.get("annotations") or {}
    keys = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
    return [str(marks[key]) for key in keys if isinstance(marks, dict) and marks.get(key)]


def _is_named(reference: str, names: list[str]) -> bool:
    """Whether names of a descriptor mean this image; a full name counts more than a tag."""
    full = [name for name in names if "/" in name or ":" in name]
    if full:
        return reference in (familiar(name) for name in full)
    return reference.rpartition(":")[2] in names


def _platform(entry: dict[str, Any]) -> dict[str, Any]:
    platform = entry.get("platform")
    return platform if isinstance(platform, dict) else {}


def _listed(names: Iterable[str]) -> str:
    shown = sorted(set(names))
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "no name"
