# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Container images on their way into a bundle: where they come from, and when they need not be read again.

In a bundle an image is its configuration and its uncompressed layers. So the digest of the configuration is the image
id, the digest of a layer is its diff id, and both can be compared with what an engine says it has.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Protocol

from .archive import ArchiveError, Image, image_layers, read_archive
from .digest import CHUNK, Stamps, write_atomically
from .engine import Engine, EngineError
from .layout import BundleError, blob_path
from .manifest import Blob
from .reference import familiar, image_name
from .writer import BlobWriter

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Origin(Protocol):
    """Where an image comes from; its text is used in messages."""

    def problem(self) -> str | None:
        """Why nothing can come from there, as far as can be seen without reading, or None."""

    def identity(self) -> list[Any] | None:
        """Facts that are the same as long as the content is; None when it is not there yet."""

    def fetch(self) -> None:
        """Bring the image to this machine, if it is not there."""

    def chunks(self) -> Iterator[bytes]:
        """The archive."""


class ArchiveFile:
    """An archive somebody saved, compressed or not."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def problem(self) -> str | None:
        """There must be such a file, and one that can be read."""
        if not self.path.exists():
            return f"the archive {self.path} does not exist on this machine"
        if not self.path.is_file() or not os.access(str(self.path), os.R_OK):
            return f"the archive {self.path} is not a file that can be read"
        return None

    def identity(self) -> list[Any]:
        """The stamp of the file."""
        status = self.path.stat()
        return ["archive", str(self.path.absolute()), status.st_size, status.st_mtime_ns, status.st_ino]

    def fetch(self) -> None:
        """It is here."""

    def chunks(self) -> Iterator[bytes]:
        """The file's content."""
        with self.path.open("rb", buffering=0) as file:
            while True:
                chunk = file.read(CHUNK)
                if not chunk:
                    return
                yield chunk

    def __str__(self) -> str:
        return f"the archive {self.path}"


class EngineImage:
    """An image of the Docker Engine of this machine, which pulls it when it does not have it."""

    def __init__(self, engine: Engine, reference: str) -> None:
        self.engine = engine
        self.reference = reference

    def problem(self) -> str | None:
        """Only trying tells."""
        return None

    def identity(self) -> list[Any] | None:
        """The engine's id of the image."""
        known = self.engine.find(self.reference)
        return ["engine", known.id] if known else None

    def fetch(self) -> None:
        """Pull what is not there. What is there stays as it is: whoever wants a newer one pulls it."""
        if self.engine.find(self.reference) is None:
            self.engine.pull(self.reference)

    def chunks(self) -> Iterator[bytes]:
        """What the engine saves."""
        return self.engine.save(self.reference)

    def __str__(self) -> str:
        return f"the Docker Engine at {self.engine.address}"


@dataclass(frozen=True)
class ImageRequest:
    """An image to be in the bundle, by the name the hosts use for it."""

    wanted: str
    origin: Origin

    @property
    def image(self) -> str:
        """The image's full name."""
        return familiar(self.wanted)

    @property
    def reference(self) -> str:
        """The artifact's name in the index."""
        return f"images/{image_name(self.wanted)}"


class Memory:
    """Which configuration came from which origin, so that an unchanged one is not read again; beside the stamps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text())
            self._known: dict[str, Any] = content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            self._known = {}

    def recall(self, request: ImageRequest, root: Path, stamps: Stamps) -> Image | None:
        """The image of a request as it is in the bundle already; None when it has to be read."""
        entry = self._known.get(request.reference)
        identity = request.origin.identity()
        if not isinstance(entry, dict) or identity is None or entry.get("identity") != identity:
            return None
        try:
            config = blob_path(root, str(entry.get("config")))
            if stamps.vouches(config) != entry["config"]:
                return None
            content = config.read_bytes()
            layers = [blob_path(root, digest) for digest in image_layers(content)]
            if any(stamps.vouches(layer) != f"sha256:{layer.name}" for layer in layers):
                return None
            return Image(content, tuple(Blob(f"sha256:{layer.name}", layer.stat().st_size) for layer in layers))
        except (OSError, ArchiveError):
            return None

    def remember(self, request: ImageRequest, identity: list[Any] | None, config: str) -> None:
        """Keep where an image came from."""
        self._known[request.reference] = {"identity": identity, "config": config}

    def save(self, references: list[str]) -> None:
        """Write what is known of these artifacts, and forget the others."""
        known = {reference: entry for reference, entry in self._known.items() if reference in references}
        if known or self.path.exists():
            write_atomically(self.path, json.dumps(known, indent=1, sort_keys=True).encode() + b"\n")


def store_image(writer: BlobWriter, memory: Memory, request: ImageRequest) -> Image:
    """Bring an image into the bundle that `writer` writes. Raises BundleError."""
    try:
        image = memory.recall(request, writer.root, writer.stamps)
        if image is not None:
            writer.used.update(layer.digest for layer in image.layers)
            return image
        request.origin.fetch()
        identity = request.origin.identity()
        architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
        image = read_archive(request.origin.chunks(), request.image, writer, architecture)
        memory.remember(request, identity, writer.store_bytes(image.config))
        return image
    except (ArchiveError, EngineError) as error:
        raise BundleError(f"{request.image} from {request.origin}: {error}") from error
    except OSError as error:
        raise BundleError(f"{request.image} from {request.origin}: {error.strerror or error}") from error
