# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Archives of backups on the controller: their names and places, and their encryption, which openssl does.

::

    <directory>/<host>/<host>-20261120T201500Z.tar        or .tar.cms when encrypted

An archive that is to be encrypted never lies on the controller's disk in any other form.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ansible_collections.airgap.xinference.plugins.module_utils.host.backup import BackupError
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_names import file_name

PLAIN = ".tar"
ENCRYPTED = ".tar.cms"


def directory_of(place: Path, host: str) -> Path:
    """The directory of the archives of a host."""
    return place / file_name(host)


def name_of(host: str, when: str, encrypted: bool) -> str:
    """The name of an archive; `when` is UTC like 2026-11-20T20:15:00Z."""
    return f"{file_name(host)}-{re.sub('[-:]', '', when)}{ENCRYPTED if encrypted else PLAIN}"


def all_of(directory: Path, host: str) -> list[Path]:
    """The archives of a host in a directory, the oldest first; nothing else that lies there."""
    wanted = re.compile(rf"{re.escape(file_name(host))}-\d{{8}}T\d{{6}}Z\.tar(\.cms)?\Z")
    found = [path for path in directory.iterdir() if wanted.match(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: path.name.partition(".tar")[0])


def chosen(place: Path, host: str) -> Path:
    """The archive that is meant by a path: itself, or the newest of the host in a directory. Raises BackupError."""
    if place.is_file():
        return place
    for directory in (directory_of(place, host), place):
        found = all_of(directory, host)
        if found:
            return found[-1]
    if not place.exists():
        raise BackupError(
            f"{place} is not there. Name an archive, or the directory that playbooks/backup.yml wrote to."
        )
    raise BackupError(
        f"There is no archive of {host} in {place}. Name the file itself to restore that of another host "
        "(xinference_restore_from)."
    )


def faults(directory: Path, recipient: Path | None, keep: int) -> Iterator[str]:
    """Why no archive could be written or removed, before anything is done.

    `directory` is that of the host, `recipient` a certificate, `keep` a number of archives or 0 for all.
    """
    there = directory
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        yield f"xinference_backup_directory: {there} is not a directory. Name one, or one to be made."
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"xinference_backup_directory: {there} is not writable for you. Name another."
    if keep < 0:
        yield f"xinference_backup_keep is {keep}. Say how many archives of a host to keep, or 0 for all."
    if recipient and not recipient.is_file():
        yield f"xinference_backup_recipient: {recipient} is not there. Name a certificate in PEM form."
    elif recipient:
        try:
            _encrypted(b"", recipient)
        except BackupError as error:
            yield f"xinference_backup_recipient: {error}"


def write(path: Path, content: bytes, recipient: Path | None) -> int:
    """Write an archive that only this user can read, encrypted for a recipient if there is one; returns its bytes."""
    for directory in (path.parent.parent, path.parent):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    _remove_unfinished(path)
    data = _encrypted(content, recipient) if recipient else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise
    return len(data)


def read(path: Path, key: Path | None) -> bytes:
    """What is in an archive, decrypted if it is encrypted. Raises BackupError."""
    if not path.name.endswith(ENCRYPTED):
        return path.read_bytes()
    if key is None:
        raise BackupError(f"{path} is encrypted. Name the private key of its recipient (xinference_restore_key).")
    if not key.is_file():
        raise BackupError(f"xinference_restore_key: {key} is not there. Name a private key in PEM form.")
    done = _openssl(["cms", "-decrypt", "-binary", "-inform", "DER", "-in", str(path), "-inkey", str(key)], b"")
    if done.returncode:
        raise BackupError(
            f"{path} cannot be decrypted with {key}: it is encrypted for somebody else, the key has a passphrase, or "
            f"the archive is damaged. openssl says: {_said(done)}"
        )
    return done.stdout


def remove_old(directory: Path, host: str, keep: int) -> list[Path]:
    """Remove all but the newest archives of a host; returns those that went. 0 keeps all."""
    old = all_of(directory, host)[:-keep] if keep > 0 else []
    for path in old:
        path.unlink()
    return old


def _remove_unfinished(archive: Path) -> None:
    """Remove what killed runs began to write; what is younger than an hour may be somebody's who is at work."""
    host = archive.name.rpartition("-")[0]
    unfinished = re.compile(rf"\.{re.escape(host)}-\d{{8}}T\d{{6}}Z\.tar(\.cms)?\.\w{{8}}\Z")
    for path in archive.parent.iterdir():
        with suppress(FileNotFoundError):
            if unfinished.match(path.name) and path.lstat().st_mtime < time.time() - 3600:
                path.unlink()


def _encrypted(content: bytes, certificate: Path) -> bytes:
    command = ["cms", "-encrypt", "-aes-256-cbc", "-binary", "-stream", "-outform", "DER", str(certificate)]
    done = _openssl(command, content)
    if done.returncode:
        raise BackupError(f"Nothing can be encrypted for {certificate}. openssl says: {_said(done)}")
    return done.stdout


def _openssl(arguments: list[str], content: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        # In a session of its own it has no terminal on which to ask for a passphrase.
        return subprocess.run(
            ["openssl", *arguments], input=content, capture_output=True, check=False, start_new_session=True
        )
    except FileNotFoundError as error:
        raise BackupError("openssl, which encrypts archives, is not on this controller. Install it.") from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join(done.stderr.decode("utf-8", "replace").split())[:400] or f"nothing (status {done.returncode})"
