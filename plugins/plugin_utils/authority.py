# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A site's own authority, and the certificates it gives to gateways. Works on the controller.

::

    <directory>/authority.crt    what clients have to trust
    <directory>/authority.key    for its owner only; whoever has it can pose as any server of the site
    <directory>/<name>.crt, .key of each gateway

A certificate is made again when it ends soon, when its names or the authority are others, or when it is damaged. The
authority itself is never replaced: every client would have to learn of it first.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.airgap.xinference.plugins.plugin_utils.host_names import file_name

# ansible-core brings it, and one that was packed without it can still read this file.
try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    CRYPTOGRAPHY_ERROR = str(error)
else:
    CRYPTOGRAPHY_ERROR = ""

AUTHORITY = "authority"
AUTHORITY_DAYS = 3650
SKEW = datetime.timedelta(hours=1)
"""A certificate counts from so much earlier, for clocks that are late."""


class AuthorityError(Exception):
    """A certificate that cannot be had; the text says what to do."""


@dataclass(frozen=True)
class Certificate:
    """Where a certificate and its key are, until when it counts, and why it was made now (empty: it was not)."""

    certificate: Path
    key: Path
    expires: datetime.datetime
    reason: str = ""


def given(certificate: Path, key: Path, names: Sequence[str], now: datetime.datetime) -> Certificate:
    """A certificate of the site's own. Raises AuthorityError unless it is for these names, in time, and of this key."""
    found = _read(certificate)
    wrong = []
    lacking = [name for name in names if name.lower() not in _names(found) and not _by_wildcard(name, found)]
    if lacking:
        wrong.append(f"is not for {', '.join(lacking)}; have it made for them, or correct xinference_gateway_names")
    if not found.not_valid_before_utc <= now < found.not_valid_after_utc:
        wrong.append(
            f"counts from {found.not_valid_before_utc:%Y-%m-%d} to {found.not_valid_after_utc:%Y-%m-%d}, and today is "
            f"{now:%Y-%m-%d}"
        )
    if not _belongs(found, key):
        wrong.append(f"does not belong to the key {key}, or that has a passphrase, which nobody could type at a start")
    if wrong:
        raise AuthorityError("\n".join(f"The certificate {certificate} {problem}." for problem in wrong))
    return Certificate(certificate, key, found.not_valid_after_utc)


def ensure(
    directory: Path, name: str, names: Sequence[str], days: int, renew: int, now: datetime.datetime, dry: bool = False
) -> Certificate:
    """A certificate for `names` from the authority in `directory`, made for `days` where there is none to go on with.

    One that ends within `renew` days is made again. With `dry` nothing is written. Raises AuthorityError.
    """
    name = _file_name(name)
    made = Certificate(directory / f"{name}.crt", directory / f"{name}.key", now + datetime.timedelta(days=days))
    if dry and not (directory / f"{AUTHORITY}.crt").exists():
        return Certificate(made.certificate, made.key, made.expires, "there is no authority yet")
    with _locked(directory, dry):
        for key in () if dry else (directory / f"{AUTHORITY}.key", made.key):
            with suppress(PermissionError):
                if key.exists() and key.stat().st_mode & 0o077:  # It was copied here.
                    key.chmod(0o600)
        issuer = _authority(directory, now)
        reason = _reason(made, issuer, names, now + datetime.timedelta(days=renew))
        if not reason:
            return Certificate(made.certificate, made.key, _read(made.certificate).not_valid_after_utc)
        if not dry:
            _issue(directory, made, issuer, names, now)
        return Certificate(made.certificate, made.key, min(made.expires, issuer.not_valid_after_utc), reason)


def _file_name(name: str) -> str:
    """The name of a gateway's files; no name leads out of the directory, or to the files of the authority."""
    plain = file_name(name)
    return f"{plain}_" if plain.lower() == AUTHORITY else plain


def _authority(directory: Path, now: datetime.datetime) -> x509.Certificate:
    """The authority's certificate; it is made when there is none."""
    certificate, key = directory / f"{AUTHORITY}.crt", directory / f"{AUTHORITY}.key"
    if not certificate.exists() and not key.exists():
        private = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Xinference gateways {now:%Y-%m-%d}")])
        usage = {**dict.fromkeys(_USAGES, False), "key_cert_sign": True, "crl_sign": True}
        built = (
            _builder(subject, subject, private.public_key(), now, now + datetime.timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .sign(private, hashes.SHA256())
        )
        _write(key, _pem(private), 0o600)
        _write(certificate, built.public_bytes(serialization.Encoding.PEM), 0o644)
    if not certificate.exists() or not _belongs(found := _read(certificate), key):
        raise AuthorityError(
            f"{certificate} does not belong to {key}, or one of them is missing. Bring both back from a backup. "
            f"Without one, move {directory} away; a new authority is made then, which every client has to learn of."
        )
    if found.not_valid_after_utc <= now:
        raise AuthorityError(
            f"The authority {certificate} counted until {found.not_valid_after_utc:%Y-%m-%d}. Move {directory} away; a "
            "new one is made then, which every client has to learn of."
        )
    return found


def _reason(made: Certificate, issuer: x509.Certificate, names: Sequence[str], soon: datetime.datetime) -> str:
    """Why a certificate has to be made, empty when the one that is there does."""
    if not made.certificate.exists():
        return "there is none yet"
    try:
        found = _read(made.certificate)
        found.verify_directly_issued_by(issuer)
    except (AuthorityError, InvalidSignature, ValueError, TypeError):
        return "it is not from this authority"
    if not _belongs(found, made.key):
        return "its key is another"
    if _names(found) != {name.lower() for name in names}:
        return "its names are others"
    # One that counts as long as the authority does cannot be prolonged.
    if found.not_valid_after_utc <= min(soon, issuer.not_valid_after_utc - SKEW):
        return f"it ends on {found.not_valid_after_utc:%Y-%m-%d}"
    return ""


def _issue(
    directory: Path, made: Certificate, issuer: x509.Certificate, names: Sequence[str], now: datetime.datetime
) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    signer = serialization.load_pem_private_key((directory / f"{AUTHORITY}.key").read_bytes(), None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise AuthorityError(f"{directory / AUTHORITY}.key is not a key that was made here, of an elliptic curve.")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    usage = {**dict.fromkeys(_USAGES, False), "digital_signature": True}
    until = min(made.expires, issuer.not_valid_after_utc)
    built = (
        _builder(subject, issuer.subject, private.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write(made.key, _pem(private), 0o600)
    _write(made.certificate, built.public_bytes(serialization.Encoding.PEM), 0o644)


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names(certificate: x509.Certificate) -> set[str]:
    """The names and addresses that a certificate is for."""
    try:
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(one.value).lower() for one in listed if isinstance(one, (x509.DNSName, x509.IPAddress))}


def _by_wildcard(name: str, certificate: x509.Certificate) -> bool:
    return "*." + name.lower().partition(".")[2] in _names(certificate)


def _belongs(certificate: x509.Certificate, key: Path) -> bool:
    """Whether a private key is that of a certificate."""
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        return False
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.public_key().public_bytes(*form) == certificate.public_key().public_bytes(*form)


def _read(path: Path) -> x509.Certificate:
    """The first certificate in a file. Raises AuthorityError."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as error:
        raise AuthorityError(f"The certificate {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise AuthorityError(f"{path} is no certificate in the form PEM.") from error


def _pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.private_bytes(*form)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file at once; it never has more rights than it shall have."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
    new.replace(path)


@contextmanager
def _locked(directory: Path, dry: bool) -> Iterator[None]:
    """One run at a time: Ansible looks after several gateways at once, and they shall have one authority."""
    if dry:
        yield
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
