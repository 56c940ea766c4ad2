# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a server in a container gets the packages of engines that its image lacks, without any index of the internet.

From 2.0 on a launch may build a virtual environment for its engine. `uv` builds it, and asks whatever Xinference passes
on from pip's configuration; what it is not told there, it takes from its own variables. Both are given, always.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Optional

from .features import Features

IMAGE, WHEELS, INDEX, BUNDLE = "image", "wheels", "index", "bundle"
SOURCES = (IMAGE, BUNDLE, WHEELS, INDEX)
"""What an inventory may ask for; `bundle` is whichever of `wheels` and `index` suits the server's version."""

WHEELS_DIRECTORY = "/wheels"
INDEX_SERVICE = "engines-index"
INDEX_PORT = 8080


class EnginesError(ValueError):
    """A source of packages that the server cannot use."""


@dataclass(frozen=True)
class Engines:
    """How a server is told about a source of packages.

    `environment` goes over the switches that keep a server from installing anything; None takes a variable away.
    `pip_conf` is the text of /etc/pip.conf, empty when the image's own stays.
    """

    source: str
    environment: Dict[str, Optional[str]] = field(default_factory=dict)
    pip_conf: str = ""


def engines(wanted: str, features: Features) -> Engines:
    """What a server with these features needs for a source of packages. Raises EnginesError when it can use none."""
    if wanted == IMAGE:
        return Engines(IMAGE)
    if features.engine_source == IMAGE:
        raise EnginesError(
            f"Xinference {features.version} installs nothing at a launch, so packages of engines ({wanted}) are of no "
            "use to it: take an image that has the engines, or 2.0 and later."
        )
    source = features.engine_source if wanted == BUNDLE else wanted
    common: Dict[str, Optional[str]] = {
        "XINFERENCE_ENABLE_VIRTUAL_ENV": "1",
        "XINFERENCE_VIRTUAL_ENV_SKIP_INSTALLED": "1",
        "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "1",
    }
    if source == WHEELS:
        place = f"file://{WHEELS_DIRECTORY}"
        return Engines(
            WHEELS,
            {
                **common,
                "XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS": WHEELS_DIRECTORY,
                # Whatever index Xinference names on the command line, this keeps uv from asking it.
                "UV_NO_INDEX": "1",
                "UV_FIND_LINKS": WHEELS_DIRECTORY,
                "PIP_FIND_LINKS": WHEELS_DIRECTORY,
            },
            # An offline installation wants an index by name. A second one keeps Xinference from adding its own.
            _pip_conf({"index-url": place, "extra-index-url": place, "find-links": WHEELS_DIRECTORY}),
        )
    place = f"http://{INDEX_SERVICE}:{INDEX_PORT}/simple"
    return Engines(
        INDEX,
        {
            **common,
            "UV_OFFLINE": None,
            "PIP_NO_INDEX": None,
            "UV_DEFAULT_INDEX": place,
            "UV_INDEX_URL": place,
            "UV_INSECURE_HOST": f"{INDEX_SERVICE}:{INDEX_PORT}",
            "PIP_INDEX_URL": place,
            "PIP_TRUSTED_HOST": INDEX_SERVICE,
        },
        _pip_conf({"index-url": place, "extra-index-url": place, "trusted-host": INDEX_SERVICE}),
    )


def _pip_conf(settings: Dict[str, str]) -> str:
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
