# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Docker Engine of this machine, through the docker library: what it has, taking an image out, putting one in.

Every error becomes an EngineError in words, also those that the engine reports inside a stream after it has answered
"200 OK".
"""

from __future__ import annotations

import os
import traceback
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional

from .reference import familiar, repository_and_tag

try:
    import docker
    import requests
    from docker.errors import APIError, DockerException, NotFound

    DOCKER_ERROR: Optional[str] = None
except ImportError:
    DOCKER_ERROR = traceback.format_exc()

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"
TIMEOUT = 3600
"""Seconds the engine may be silent; unpacking one large layer takes minutes on a slow disk."""
CONTAINERD = "io.containerd.snapshotter.v1"


class EngineError(Exception):
    """What the engine could not do; `said` are its own words, empty when it went away."""

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(message)
        self.said = said


class Known(NamedTuple):
    """An image the engine has: its id there, its names, layers (diff ids) from the lowest up, size in bytes."""

    id: str
    tags: List[str]
    layers: List[str]
    size: int


class Engine:
    """A connection to the engine. Raises EngineError when nobody answers."""

    def __init__(self, address: Optional[str] = None) -> None:
        self.address = address or os.environ.get("DOCKER_HOST") or DEFAULT_ADDRESS
        settings: Dict[str, Any] = docker.utils.kwargs_from_env()
        settings["base_url"] = self.address
        try:
            self._api = docker.APIClient(version="auto", timeout=TIMEOUT, **settings)
        except (DockerException, requests.RequestException) as error:
            raise EngineError(
                f"No answer from a Docker Engine at {self.address}: {_words(error)}. Start it (systemctl start "
                "docker), and run as root or as a member of the group docker."
            ) from error

    def find(self, reference: str) -> Optional[Known]:
        """The image of a name or an id, or None."""
        try:
            return _known(self._ask("inspect the image", self._api.inspect_image, reference))
        except EngineError as error:
            if isinstance(error.__cause__, NotFound):
                return None
            raise

    def layers(self) -> List[List[str]]:
        """The layers of every image there is, intermediate and untagged ones too."""
        rows = self._ask("list images", self._api.images, all=True, quiet=True)
        found = [self.find(identity) for identity in dict.fromkeys(rows)]
        return [known.layers for known in found if known is not None]

    @property
    def takes_deltas(self) -> bool:
        """Whether an archive may leave out layers the engine has. Its own image store does, that of containerd not."""
        status = self._ask("ask for facts", self._api.info).get("DriverStatus") or []
        return not any(len(row) > 1 and row[1] == CONTAINERD for row in status)

    def pull(self, reference: str) -> None:
        """Fetch an image from its registry."""
        repository, tag = repository_and_tag(reference)
        doing = f"pull {reference}"
        try:
            for event in self._api.pull(repository, tag=tag, stream=True, decode=True):
                _refuse_error(event, doing)
        except (DockerException, requests.RequestException) as error:
            raise _failed(doing, error) from error

    def save(self, reference: str) -> Iterator[bytes]:
        """An image as an archive."""
        try:
            yield from self._api.get_image(familiar(reference))
        except (DockerException, requests.RequestException) as error:
            raise _failed(f"save {reference}", error) from error

    def load(self, archive: Iterable[bytes]) -> None:
        """Put an archive in. Raises EngineError with what the engine said, in its answer or in the stream."""
        try:
            for event in self._api.load_image(archive):
                _refuse_error(event, "load the image")
        except (DockerException, requests.RequestException) as error:
            raise _failed("load the image", error) from error

    def tag(self, identity: str, reference: str) -> None:
        """Give an image a name."""
        repository, tag = repository_and_tag(reference)
        self._ask(f"name an image {reference}", self._api.tag, identity, repository, tag=tag)

    def _ask(self, doing: str, method: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(*arguments, **options)
        except (DockerException, requests.RequestException) as error:
            raise _failed(doing, error) from error


def _known(entry: Dict[str, Any]) -> Known:
    tags = [familiar(tag) for tag in entry.get("RepoTags") or []]
    return Known(entry["Id"], tags, (entry.get("RootFS") or {}).get("Layers") or [], entry.get("Size") or 0)


def _refuse_error(event: Any, doing: str) -> None:
    """Raise what a line of a stream reports as an error."""
    if not isinstance(event, dict) or not (event.get("error") or event.get("errorDetail")):
        return
    detail = event.get("errorDetail")
    said = (detail.get("message") if isinstance(detail, dict) else "") or event.get("error") or str(detail)
    raise EngineError(f"The Docker Engine could not {doing}: {said}{_cure(str(said))}", str(said))


def _failed(doing: str, error: Exception) -> EngineError:
    words = _words(error)
    if isinstance(error, requests.ConnectionError):
        told = f"The Docker Engine went away while it was to {doing} ({words}). "
        return EngineError(f"{told}Look at its log (journalctl -u docker), start it, then run again.")
    return EngineError(f"The Docker Engine could not {doing}: {words}{_cure(words)}", words)


def _cure(words: str) -> str:
    """What to do about what the engine said, where that is known."""
    if "no space left" not in words.lower() and "disk quota" not in words.lower():
        return ""
    return ". Free space where it keeps its data (docker image prune), then run again; nothing is sent twice"


def _words(error: Exception) -> str:
    """What is worth reading of an error of the docker library."""
    if isinstance(error, APIError) and error.explanation:
        return str(error.explanation)
    return str(error)
