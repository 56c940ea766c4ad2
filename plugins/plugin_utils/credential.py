# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the processes of one ansible-playbook share on the controller: a directory, and the key pair of its hosts.

Ansible runs every task of every host in a process of its own. Those of one run meet in a directory that only this user
can enter, named after the process they come from. It goes with the end of the shipping, or when a later run finds that
nobody uses it any more.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import multiprocessing
import os
import re
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

_NAME = re.compile(r"([0-9]+)-([0-9]*)")
_KEY = "credential.pem"


class Run:
    """One run of ansible-playbook, as all of its processes see it.

    `place` is its directory, which need not exist yet; `name` tells the run from others, on whatever controller.
    """

    def __init__(self, cache: Path | None = None, pid: int | None = None) -> None:
        self._runs = (cache or _cache()) / "runs"
        self.pid = pid or _playbook()
        title = f"{self.pid}-{_started(self.pid) or ''}"
        self.place = self._runs / title
        self.name = hashlib.sha256(f"{socket.gethostname()} {_boot()} {title}".encode()).hexdigest()[:16]

    def credential(self) -> str:
        """The key pair of this run as PEM, made when it is first asked for. Raises OSError."""
        with self._alone():
            path = self.open() / _KEY
            try:
                return path.read_text()
            except FileNotFoundError:
                pem = new_credential()
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(handle, "w") as file:
                    file.write(pem)
                return pem

    def open(self) -> Path:
        """The directory of the run, made if need be."""
        self._make_runs()
        self.place.mkdir(mode=0o700, exist_ok=True)
        return self.place

    def close(self) -> None:
        """Remove what this run shared, and what runs left that are over."""
        if not self._runs.is_dir():
            return
        with self._alone():
            shutil.rmtree(self.place, ignore_errors=True)
            for path in self._runs.iterdir():
                if (found := _NAME.fullmatch(path.name)) and _started(int(found[1])) != (found[2] or None):
                    shutil.rmtree(path, ignore_errors=True)

    def _make_runs(self) -> None:
        self._runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._runs.is_symlink() or self._runs.stat().st_uid != os.geteuid():
            raise OSError(f"{self._runs} belongs to somebody else; remove it")
        self._runs.chmod(0o700)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._make_runs()
        with (self._runs / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def new_credential() -> str:
    """A new private key and a certificate of its own for it, as PEM.

    The certificate names nobody and vouches for nobody: both sides compare it as a whole. It is valid at all times,
    because the clocks of hosts without a network differ, and it is thrown away anyway.
    """
    # ansible-core brings this library; it is large, and all but one of the processes do without.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "xinference-peer")])
    usage = {
        "digital_signature": True,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return (private + certificate.public_bytes(serialization.Encoding.PEM)).decode("ascii")


def _playbook() -> int:
    """The process that is ansible-playbook, asked in itself or in one of its workers."""
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def _started(pid: int) -> str | None:
    """When a process began, in a unit of the kernel's; None when there is no such process (or nowhere to read it)."""
    try:
        # The name of the program comes before, in parentheses, and may have any character.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "airgap.xinference"
