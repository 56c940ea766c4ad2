# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who made a bundle: a signature of its index by an OpenSSH key, made and checked with ssh-keygen.

::

    index.json      names every manifest by its digest, a manifest every file by its digest
    index.json.sig  an SSH signature of exactly these bytes, then one line `sha256:<digest of the index>`

So one signature covers all of a bundle. The line behind it proves nothing, and ssh-keygen does not read it; it tells
which of the two files was changed. A signature without it, as ssh-keygen writes one by hand, is as good.

Who may sign is the text of an allowed signers file (ssh-keygen(1), ALLOWED SIGNERS): identities, their keys, for which
namespaces, and from when until when.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Any, Iterable, NamedTuple

from .digest import PRIVATE, hash_bytes, write_atomically
from .documents import MAX_DOCUMENT, DocumentError, parse, read_small
from .manifest import REF_NAME

INDEX_FILE = "index.json"
SIGNATURE_FILE = "index.json.sig"
NAMESPACE = "bundle@airgap.xinference"
"""What a signature is good for: one that the same key made for something else (a login, a commit) says nothing here."""
MAX_SIGNATURE = 64 * 1024
MAX_SIGNERS = 1024 * 1024
TIMEOUT = 60
"""Seconds for ssh-keygen; a key on a token waits for a touch."""
STANDARD_PATHS = ("/usr/bin", "/usr/local/bin", "/bin")

MISSING, INDEX, SIGNATURE, MISMATCH = "missing", "index", "signature", "mismatch"
UNKNOWN, EXPIRED, NOT_YET, PURPOSE = "unknown signer", "expired", "not yet valid", "namespace"
TOOL, SIGNERS, KEY = "ssh-keygen", "signers", "key"

_BEGIN, _END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
_FILE = re.compile(rf"{_BEGIN}\n((?:[A-Za-z0-9+/]+={{0,2}}\n)+){_END}\n(?:(sha256:[0-9a-f]{{64}})\n)?")
_OLD = re.compile("unknown option|illegal option|invalid option|unrecognized option|Unsupported operation", re.I)


class TrustError(Exception):
    """A bundle that is not to be trusted, or that cannot be signed or judged; `kind` says why in one word of ours."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        self.details = {"trust": kind}
        super().__init__(message)


class Signer(NamedTuple):
    """Who signed: the identity from the list of allowed signers, and the fingerprint of the key."""

    identity: str
    key: str


class _Signature(NamedTuple):
    """The content of a signature file: what ssh-keygen reads, the signing key, the digest it says the index has."""

    armored: str
    key: str
    digest: str


# --- reading ----------------------------------------------------------------------------------------------------------


def read_signature(root: str | os.PathLike[str]) -> bytes | None:
    """The signature beside an index, None when there is none. Raises TrustError for what is no small file."""
    path = Path(root) / SIGNATURE_FILE
    if not os.path.lexists(path):
        return None
    try:
        return read_small(path, MAX_SIGNATURE)
    except DocumentError as error:
        raise TrustError(SIGNATURE, f"{path}: {error}.") from error


def signers_text(value: str) -> str:
    """The text of an allowed signers file; `value` is that text, or the path of the file (one line without a blank).

    Empty for an empty value. A file that names nobody is refused: it would let everything through.
    """
    value = value.strip()
    if not value:
        return ""
    text = value
    if not re.search(r"\s", value):
        path = Path(value).expanduser()
        try:
            text = read_small(path, MAX_SIGNERS).decode()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise TrustError(SIGNERS, f"The list of allowed signers {path} cannot be read: {why}.") from error
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        raise TrustError(SIGNERS, "The list of allowed signers names nobody, so no bundle could be taken.")
    return text if text.endswith("\n") else text + "\n"


def signing_key_of(signature: bytes | None) -> str:
    """The fingerprint of the key that a signature says made it, as `ssh-keygen -l` prints it; empty when it has none.

    Nothing is verified here; this is for showing.
    """
    try:
        return _read(signature).key if signature else ""
    except TrustError:
        return ""


def _read(raw: bytes, where: str = "The bundle") -> _Signature:
    """What a signature file holds. There is one way to write it, so that no byte differs unnoticed."""
    damaged = TrustError(
        SIGNATURE,
        f"{where}: {SIGNATURE_FILE} is damaged, it is not an SSH signature. Copy it again from where it was made.",
    )
    found = _FILE.fullmatch(raw.decode("ascii", "replace"))
    if not found:
        raise damaged
    encoded = found[1].replace("\n", "")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        raise damaged from None
    # Magic, version, and the key with its length in front.
    if base64.b64encode(blob).decode() != encoded or blob[:10] != b"SSHSIG\x00\x00\x00\x01":
        raise damaged
    key = _fingerprint(blob[14 : 14 + int.from_bytes(blob[10:14], "big")])
    return _Signature(f"{_BEGIN}\n{found[1]}{_END}\n", key, found[2] or "")


def fingerprint(public: str) -> str:
    """The fingerprint of a public key in one line, as `ssh-keygen -l` prints it; empty for what is none."""
    try:
        return _fingerprint(base64.b64decode(public.split()[1], validate=True))
    except (IndexError, ValueError):
        return ""


def _fingerprint(key: bytes) -> str:
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")


# --- checking ---------------------------------------------------------------------------------------------------------


def check_signature(index: bytes, signature: bytes | None, signers: str, where: str = "The bundle") -> Signer:
    """Who signed an index, when one of the allowed `signers` (a text) did. Raises TrustError, with a reason of its own
    for everything else.
    """
    if signature is None:
        raise TrustError(
            MISSING,
            f"{where} is not signed (it has no {SIGNATURE_FILE}), and signed ones only are taken here "
            "(xinference_bundle_signers). Build it with xinference_bundle_signing_key, or copy all of it.",
        )
    read = _read(signature, where)
    keygen = _Keygen(where)
    with tempfile.TemporaryDirectory(prefix="xinference-trust-") as place:
        file, allowed = Path(place, "signature"), Path(place, "signers")
        file.write_text(read.armored)
        allowed.write_text(signers)
        keygen.signature = str(file)
        _refuse_changed(keygen, index, read, where)
        said = keygen("find-principals", "-f", str(allowed))
        found = [name for name in re.split(r"[,\s]+", said.stdout) if name and not name.startswith("!")]
        if said.returncode or not found:
            raise _refusal(said.stderr, read.key, where)
        for identity in found:
            said = keygen("verify", "-f", str(allowed), "-I", identity, "-n", NAMESPACE, given=index)
            if said.returncode == 0:
                return Signer(identity, read.key)
    raise _refusal(said.stderr, read.key, where)


def _refuse_changed(keygen: _Keygen, index: bytes, read: _Signature, where: str) -> None:
    """Refuse a signature that is not one of this index for a bundle, whoever made it."""
    said = keygen("check-novalidate", "-n", NAMESPACE, given=index)
    intact = read.digest == hash_bytes(index)
    if said.returncode == 0 and (intact or not read.digest):
        return
    again = "Copy the bundle again from where it was made."
    if said.returncode and "namespace" in said.stderr:
        raise TrustError(
            PURPOSE,
            f"{where}: {SIGNATURE_FILE} was made for another purpose than to sign a bundle (namespace {NAMESPACE}), "
            f"or was changed. Sign the index with `ssh-keygen -Y sign -n {NAMESPACE}`, or copy the bundle again.",
        )
    if said.returncode and "incorrect signature" not in said.stderr:
        raise TrustError(SIGNATURE, f"{where}: {SIGNATURE_FILE} is damaged ({_last(said.stderr)}). {again}")
    if said.returncode == 0 or intact:
        raise TrustError(SIGNATURE, f"{where}: {SIGNATURE_FILE} was changed after it was made. {again}")
    if read.digest:
        raise TrustError(INDEX, f"{where}: index.json was changed after it was signed with the key {read.key}. {again}")
    raise TrustError(
        MISMATCH,
        f"{where}: index.json or {SIGNATURE_FILE} was changed after it was signed with the key {read.key}. {again}",
    )


def _refusal(said: str, key: str, where: str) -> TrustError:
    """Why a good signature is not one of an allowed signer."""
    lines = [line.split(": ", 1)[-1] for line in said.splitlines() if "expired" in line or "not yet valid" in line]
    if "not permitted for use in signature namespace" in said:
        return TrustError(
            PURPOSE,
            f"{where} is signed with the key {key}, which the list of allowed signers does not let sign bundles: add "
            f"{NAMESPACE} to its namespaces, if it may.",
        )
    if lines and "expired" in lines[0]:
        return TrustError(
            EXPIRED,
            f"{where} is signed with the key {key}, whose time is over ({lines[0]}). Have it signed with a key that is "
            "valid now; if that one should be, look at the clock of this machine.",
        )
    if lines:
        return TrustError(
            NOT_YET,
            f"{where} is signed with the key {key}, whose time has not come ({lines[0]}). Look at the clock of this "
            "machine, or have the bundle signed with a key that is valid now.",
        )
    told = f" ssh-keygen says: {_last(said)}." if said.strip() and "No principal matched" not in said else ""
    return TrustError(
        UNKNOWN,
        f"{where} is signed with the key {key}, which is not one of the allowed signers (xinference_bundle_signers). "
        f"Do not use it unless you know whose key that is.{told}",
    )


def vouch(index: str, signature: str | None, signers: str, wanted: Iterable[Any], proof: Path | None) -> Signer:
    """Who signed what is wanted on a host; `index` is packed. Raises TrustError, before anything else is done.

    Where all is right, index and signature are kept in the directory `proof`, once it is there.
    """
    where = "The bundle this comes from"
    try:
        raw = unpacked(index)
    except (ValueError, zlib.error) as error:
        raise TrustError(INDEX, f"{where}: its index did not arrive ({error}).") from error
    signed = None if signature is None else signature.encode("utf-8", "replace")
    signer = check_signature(raw, signed, signers, where)
    strangers = unsigned(raw, wanted)
    if strangers:
        raise TrustError(INDEX, f"{where}: {'; '.join(strangers)}. Nothing of it was taken.")
    for path, content in ((INDEX_FILE, raw), (SIGNATURE_FILE, signed or b"")):
        if proof is not None and proof.is_dir() and _content(proof / path) != content:
            write_atomically(proof / path, content, PRIVATE)
    return signer


def packed(index: bytes) -> str:
    """An index as it travels to a host."""
    return base64.b64encode(zlib.compress(index)).decode("ascii")


def unpacked(index: str) -> bytes:
    """The bytes of an index that travelled; not more than one can have, whatever it would unfold to."""
    return zlib.decompressobj().decompress(base64.b64decode(index), MAX_DOCUMENT + 1)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def unsigned(index: bytes, wanted: Iterable[Any]) -> list[str]:
    """Those of some artifacts (with kind, name, digest, size) that an index does not name just so. Pure."""
    try:
        named = {
            entry["annotations"][REF_NAME]: (entry["digest"], entry["size"]) for entry in parse(index)["manifests"]
        }
    except (DocumentError, TypeError, KeyError):
        return ["the index makes no sense"]
    return [
        f"{entry.kind}/{entry.name} {entry.digest} is not in the signed index"
        for entry in wanted
        if named.get(f"{entry.kind}/{entry.name}") != (entry.digest, entry.size)
    ]


# --- signing ----------------------------------------------------------------------------------------------------------


def sign(index: bytes, key: str | os.PathLike[str]) -> bytes:
    """A signature of an index with the key in a file; a `.pub` one means a key that ssh-agent holds."""
    # Without a file to sign, ssh-keygen reads from its input and writes the signature to its output.
    said = _Keygen("The index").run("sign", "-n", NAMESPACE, "-f", os.fspath(key), given=index)
    if said.returncode:
        raise _no_key(key, said.stderr)
    return f"{said.stdout}{hash_bytes(index)}\n".encode("ascii")


def is_signed_with(index: bytes, signature: bytes | None, public: str) -> bool:
    """Whether a signature is that of an index by a public key."""
    try:
        check_signature(index, signature, f"builder {public}\n")
    except TrustError as error:
        if error.kind == TOOL:
            raise
        return False
    return True


def public_key(key: str | os.PathLike[str]) -> str:
    """The public part of a key: what its `.pub` file has, else what ssh-keygen says of one without a passphrase."""
    name = os.fspath(key)
    path = Path(name if name.endswith(".pub") else name + ".pub")
    if path.is_file():
        return path.read_text(errors="replace").strip()
    if not Path(name).is_file():
        raise TrustError(KEY, f"There is no key {name} to sign with; name the file of an OpenSSH key.")
    said = _Keygen("The index").run(None, "-y", "-P", "", "-f", name)
    if said.returncode:
        raise _no_key(name, said.stderr)
    return said.stdout.strip()


def _no_key(key: str | os.PathLike[str], said: str) -> TrustError:
    name = os.fspath(key)
    if "passphrase" in said:
        private = name[: -len(".pub")] if name.endswith(".pub") else name
        return TrustError(
            KEY,
            f"The key {name} has a passphrase, and nobody is asked for it here. Give the key to an agent first: "
            f'eval "$(ssh-agent)" && ssh-add {private}',
        )
    if "agent" in said or "No private key" in said:
        return TrustError(KEY, f"ssh-agent does not hold the key {name}. Start one and give it the key with ssh-add.")
    return TrustError(KEY, f"The key {name} cannot be used to sign: {_last(said)}.")


# --- ssh-keygen -------------------------------------------------------------------------------------------------------


class _Keygen:
    """ssh-keygen, which has to know signatures."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.signature = ""
        self._program = shutil.which("ssh-keygen") or shutil.which("ssh-keygen", path=os.pathsep.join(STANDARD_PATHS))
        if self._program is None:
            raise TrustError(
                TOOL,
                f"{where} cannot be judged: this machine has no ssh-keygen. Install OpenSSH 8.2 or newer "
                "(openssh-client, openssh-clients, or openssh), 8.8 or newer where keys have dates.",
            )

    def __call__(self, operation: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Do something with the signature."""
        return self.run(operation, "-s", self.signature, *arguments, given=given)

    def run(self, operation: str | None, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Run it. Whatever it wants to ask somebody, nobody is asked."""
        environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "SSH_ASKPASS")}
        environment.update({"LC_ALL": "C", "SSH_ASKPASS_REQUIRE": "never"})
        command = [str(self._program), *(("-Y", operation) if operation else ()), *arguments]
        try:
            ended = subprocess.run(
                command,
                input=given,
                capture_output=True,
                env=environment,
                start_new_session=True,
                timeout=TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TrustError(TOOL, f"{self._where} cannot be judged: {error}.") from error
        said = ended.stderr.decode("utf-8", "replace")
        if ended.returncode and _OLD.search(said):
            raise TrustError(
                TOOL,
                f"{self._where} cannot be judged: {self._program} is too old for signatures{_version()}. Install "
                "OpenSSH 8.2 or newer, 8.8 or newer where keys have dates.",
            )
        return subprocess.CompletedProcess(command, ended.returncode, ended.stdout.decode("utf-8", "replace"), said)


def tool_problem() -> str:
    """Why signatures cannot be checked on this machine; empty when they can."""
    try:
        _Keygen("A bundle").run("find-principals", "-s", os.devnull, "-f", os.devnull)
    except TrustError as error:
        return str(error)
    return ""


def _version() -> str:
    """What OpenSSH calls itself, for a message."""
    program = shutil.which("ssh") or shutil.which("ssh", path=os.pathsep.join(STANDARD_PATHS))
    try:
        ended = subprocess.run([str(program), "-V"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError:
        return ""
    return f" ({ended.stdout.decode('utf-8', 'replace').partition(',')[0].strip()})"


def _last(said: str) -> str:
    """The last line of what a program said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"
