# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Key pairs for hosts that fetch from each other. The controller makes them with a library this Python may lack."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Callable

import pytest


@pytest.fixture(scope="session")
def key_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Makes a new private key and a certificate for it."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its keys with openssl")

    def make() -> str:
        place = tmp_path_factory.mktemp("keys")
        with (place / "certificate").open("wb") as certificate:
            subprocess.run(
                [
                    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                    *("-days", "1", "-subj", "/CN=test", "-addext", "basicConstraints=critical,CA:FALSE"),
                    *("-keyout", str(place / "key"), "-out", "-"),
                ],
                check=True,
                stdout=certificate,
                stderr=subprocess.DEVNULL,
            )
        return Path(place, "key").read_text() + Path(place, "certificate").read_text()

    return make


@pytest.fixture(scope="session")
def pem(key_pair: Callable[[], str]) -> str:
    """A key pair that all tests share."""
    return key_pair()
