# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Blobs from another host of the site: what both sides of the connection agree on, and the side that fetches.

One key pair is made for every run of a playbook and thrown away after it. Client and server show the same certificate
and accept no other, so whoever was not given it by the controller can neither fetch nor answer. Inside, it is HTTP/1.1
with ranges: ``GET /<64 hex digits>`` and ``Range: bytes=<offset>-<last>``, where `last` is that of the blob. The answer
is 206 and those bytes, as they arrive at the other host, or 404. As long as there is nothing to send but something may
come, the server says ``102 Processing`` every few seconds. What a peer sends is worth nothing until it was hashed.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from .digest import is_digest

CONNECT = 3.0
"""Seconds to wait for a connection, and as many for its TLS handshake: peers are near or not reachable at all."""
STALL = 30.0
"""Seconds without a byte after which a peer is given up."""
HEAD = 4096
"""Bytes a request or the head of an answer may have."""
RECORD = 64 * 1024

_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


class PeerError(Exception):
    """A peer that does not give what was asked for; with `gone` it is no use asking it for anything else."""

    def __init__(self, text: str, gone: bool = False) -> None:
        self.gone = gone
        super().__init__(text)


class Credential:
    """The key pair of one run: `pem` is a private key and the certificate that belongs to it.

    The text is not kept. Raises ValueError when it is no such pair.
    """

    def __init__(self, pem: str) -> None:
        found = _CERTIFICATE.search(pem)
        if found is None:
            raise ValueError("The credential has no certificate.")
        self.certificate = ssl.PEM_cert_to_DER_cert(found.group())
        try:
            with _readable(pem.encode("ascii")) as path:
                self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, found.group(), path)
                self.server = self._context(ssl.PROTOCOL_TLS_SERVER, found.group(), path)
        except (ssl.SSLError, UnicodeEncodeError) as error:
            raise ValueError(f"The credential cannot be used: {error}") from error

    @property
    def fingerprint(self) -> str:
        """What tells this pair from that of another run, and is no secret."""
        return hashlib.sha256(self.certificate).hexdigest()[:32]

    def knows(self, connection: ssl.SSLSocket) -> bool:
        """Whether the other side showed exactly our certificate (not just one that it vouches for)."""
        return connection.getpeercert(binary_form=True) == self.certificate

    @staticmethod
    def _context(protocol: int, certificate: str, path: str) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # The certificate has no name: it is compared as a whole.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=certificate)
        context.load_cert_chain(path)
        return context


@contextmanager
def _readable(content: bytes) -> Iterator[str]:
    """A path under which OpenSSL can read a secret: in memory, or where that is not to be had in a file of ours."""
    try:
        handle = os.memfd_create("credential", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        handle, name = tempfile.mkstemp(prefix=".credential.")
        try:
            os.write(handle, content)
            yield name
        finally:
            os.close(handle)
            Path(name).unlink()
        return
    try:
        os.write(handle, content)
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def read_head(connection: ssl.SSLSocket, before: bytes = b"") -> tuple[bytes, bytes]:
    """A request or the head of an answer, and what came after it; `before` came already. Empty: the other hung up."""
    came = before
    while b"\r\n\r\n" not in came:
        if len(came) >= HEAD:
            raise PeerError("said too much", gone=True)
        chunk = connection.recv(HEAD)
        if not chunk:
            return b"", b""
        came += chunk
    head, _mark, rest = came.partition(b"\r\n\r\n")
    return head, rest


def fetch(
    address: str, port: int, credential: Credential, digest: str, offset: int, size: int, stall: float = STALL
) -> Iterator[bytes]:
    """The bytes of one blob from `offset` to its end, `size`, as a peer has or gets them. Raises PeerError."""
    peer = Peer(address, port, credential, stall)
    try:
        yield from peer.fetch(digest, offset, size)
    finally:
        peer.close()


class Peer:
    """A host to fetch blobs from. The connection is kept between them; it serves one thread at a time."""

    def __init__(self, address: str, port: int, credential: Credential, stall: float = STALL) -> None:
        self._address = address
        self._port = port
        self._credential = credential
        self._stall = stall
        self._connection: ssl.SSLSocket | None = None

    def fetch(self, digest: str, offset: int, size: int) -> Iterator[bytes]:
        """The bytes of a blob from `offset` to its end, `size`.

        Raises PeerError when the peer cannot be reached, has no such blob, falls silent or breaks off. What was
        yielded before that is as good as anything else from a peer.
        """
        if not is_digest(digest):
            raise PeerError(f"{digest!r} is not a digest")
        if offset >= size:
            return
        usable = False
        try:
            status, rest = self._ask(digest.partition(":")[2], offset, size)
            if status == 404:
                usable = True
                raise PeerError("has no such blob")
            if status != 206:
                raise PeerError(f"answered {status}", gone=True)
            left = size - offset
            while left:
                chunk = rest or self._receive()
                if not chunk or len(chunk) > left:
                    raise PeerError("broke off" if not chunk else "sent too much", gone=bool(chunk))
                rest = b""
                left -= len(chunk)
                yield chunk
            usable = True
        finally:
            # Also when nobody wants the rest: what is still on its way belongs to no other blob.
            if not usable:
                self.close()

    def close(self) -> None:
        """Hang up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ask(self, encoded: str, offset: int, size: int) -> tuple[int, bytes]:
        """Send the request and read the head of the answer; returns the status and what came of the body with it."""
        request = f"GET /{encoded} HTTP/1.1\r\nHost: peer\r\nRange: bytes={offset}-{size - 1}\r\n\r\n".encode("ascii")
        if self._connection is not None:
            try:
                return self._exchange(request)
            except PeerError:
                # A connection that was kept may have ended in the meantime, and another one be fine.
                self.close()
        return self._exchange(request)

    def _exchange(self, request: bytes) -> tuple[int, bytes]:
        connection = self._connection = self._connection or self._connect()
        try:
            connection.sendall(request)
            rest = b""
            while True:
                head, rest = read_head(connection, rest)
                found = _STATUS.match(head)
                if not found:
                    raise PeerError("does not speak our language" if head else "hung up", gone=True)
                if found.group(1) != b"102":
                    return int(found.group(1)), rest
        except OSError as error:
            raise PeerError(_reason(error), gone=True) from error

    def _connect(self) -> ssl.SSLSocket:
        try:
            plain = socket.create_connection((self._address, self._port), CONNECT)
        except OSError as error:
            raise PeerError(f"cannot be reached: {_reason(error)}", gone=True) from error
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self._credential.client.wrap_socket(plain)
        except OSError as error:
            plain.close()
            raise PeerError(f"is not who it should be: {_reason(error)}", gone=True) from error
        connection.settimeout(self._stall)
        if not self._credential.knows(connection):
            connection.close()
            raise PeerError("is not who it should be", gone=True)
        return connection

    def _receive(self) -> bytes:
        if self._connection is None:
            return b""
        try:
            return self._connection.recv(RECORD)
        except OSError as error:
            raise PeerError(_reason(error)) from error


def _reason(error: OSError) -> str:
    if isinstance(error, socket.timeout):
        return "no answer in time"
    return error.strerror or str(error)
