# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who made a bundle: real keys, the real ssh-keygen, and every way not to be trusted."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle import trust
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.digest import Stamps
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Outcome, Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.join import join_volumes
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import Wanted
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import (
    Bundle,
    BundleError,
    verify,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.split import split_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import (
    NAMESPACE,
    SIGNATURE_FILE,
    TrustError,
    check_signature,
    packed,
    public_key,
    sign,
    signers_text,
    signing_key_of,
    vouch,
)

CI = os.environ.get("CI", "").lower() in ("1", "true")
pytestmark = pytest.mark.skipif(
    not CI and shutil.which("ssh-keygen") is None, reason="ssh-keygen makes and checks the signatures"
)

SEED = 20260604
CHANGES = 100


class Keys(NamedTuple):
    """Files of private keys: one of the site's, one of a stranger, one with a passphrase."""

    own: Path
    strange: Path
    locked: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    place = tmp_path_factory.mktemp("keys")
    for name, passphrase in (("own", ""), ("strange", ""), ("locked", "secret")):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", name, "-f", str(place / name)]
        subprocess.run(command, check=True)
    return Keys(place / "own", place / "strange", place / "locked")


def signers(key: Path, options: str = "", identity: str = "release@bank.example") -> str:
    """An allowed signers file that has one key."""
    return f"# who may\n{identity} {options} {public_key(key)}\n"


@pytest.fixture
def requests(tmp_path: Path) -> List[Request]:
    """Two models of some files each."""
    source = random.Random(1)
    made = []
    for name in ("alpha", "beta"):
        place = tmp_path / "source" / name
        place.mkdir(parents=True)
        (place / "config.json").write_text('{"hidden_size": 8}')
        (place / "model.safetensors").write_bytes(source.getrandbits(8 * 5000).to_bytes(5000, "big"))
        made.append(Request("models", name, str(place)))
    return made


@pytest.fixture
def signed(tmp_path: Path, keys: Keys, requests: List[Request]) -> Path:
    """A bundle signed with the site's key."""
    write_bundle(tmp_path / "bundle", requests, signing_key=str(keys.own))
    return tmp_path / "bundle"


def opened(path: Path, allowed: str) -> str:
    """Take in a bundle as a controller that never saw it; who signed it."""
    bundle = Bundle.open(path, allowed)
    with tempfile.TemporaryDirectory() as stamps:
        damaged = verify(bundle, Stamps(Path(stamps, "stamps.json")), threads=1)
    if damaged:
        raise BundleError("damaged", [str(blob) for blob in damaged])
    assert bundle.signer is not None
    return bundle.signer.identity


def refused(path: Path, allowed: str) -> TrustError:
    with pytest.raises(TrustError) as caught:
        Bundle.open(path, allowed)
    assert caught.value.details == {"trust": caught.value.kind} and str(path) in str(caught.value)
    return caught.value


def test_a_bundle_signed_by_one_who_may(signed: Path, keys: Keys) -> None:
    bundle = Bundle.open(signed, signers(keys.own))
    assert bundle.signer is not None and bundle.signer.identity == "release@bank.example"
    listed = subprocess.run(["ssh-keygen", "-l", "-f", f"{keys.own}.pub"], stdout=subprocess.PIPE, check=True)
    assert bundle.signer.key == signing_key_of(bundle.signature) == listed.stdout.decode().split()[1]
    assert bundle.index == (signed / "index.json").read_bytes()
    assert Bundle.open(signed).signer is None, "nobody asked"


def test_the_signature_is_one_that_ssh_keygen_reads_and_makes(signed: Path, keys: Keys, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text(signers(keys.own))
    command = ["ssh-keygen", "-Y", "verify", "-f", str(allowed), "-I", "release@bank.example", "-n", NAMESPACE]
    command += ["-s", str(signed / SIGNATURE_FILE)]
    with (signed / "index.json").open("rb") as index:
        subprocess.run(command, stdin=index, check=True, stdout=subprocess.DEVNULL)

    (signed / SIGNATURE_FILE).unlink()
    by_hand = ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(keys.own), str(signed / "index.json")]
    subprocess.run(by_hand, check=True, stderr=subprocess.DEVNULL)
    assert opened(signed, signers(keys.own)) == "release@bank.example"


def test_one_hundred_random_changes_are_one_hundred_refusals(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture
) -> None:
    """Acceptance: a changed byte anywhere. Each message names what was changed, as far as it can be known."""
    allowed = signers(keys.own)
    assert opened(signed, allowed) == "release@bank.example", "the control"
    bundle = Bundle.open(signed)
    manifests = {artifact.digest for artifact in bundle.artifacts}
    parts: Dict[str, List[Path]] = {
        "index": [signed / "index.json"],
        "signature": [signed / SIGNATURE_FILE],
        "manifest": [bundle.blob_path(digest) for digest in sorted(manifests)],
        "blob": [bundle.blob_path(digest) for digest in sorted(bundle.blobs) if digest not in manifests],
    }
    source = random.Random(SEED)
    counted: Counter = Counter()
    taken: List[Tuple[str, Path, int, int]] = []
    for number in range(CHANGES):
        part = list(parts)[number % len(parts)]
        path = source.choice(parts[part])
        sound = path.read_bytes()
        at, bit = source.randrange(len(sound)), source.randrange(1, 256)
        path.write_bytes(sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :])
        said = ""
        try:
            opened(signed, allowed)
            taken.append((part, path, at, bit))
        except TrustError as error:
            said = error.kind
            assert part in ("index", "signature"), str(error)
            assert f"{'index.json' if said == trust.INDEX else SIGNATURE_FILE}" in str(error)
        except BundleError as error:
            said = "manifest" if "manifest" in str(error) and "is damaged" in str(error) else "blob"
            assert path.name in str(error)
        counted[(part, said)] += 1
        path.write_bytes(sound)
    with capsys.disabled():
        told = ", ".join(f"{count} x {part}: {said}" for (part, said), count in sorted(counted.items()))
        print(f"\nseed {SEED}: {CHANGES - len(taken)} of {CHANGES} changes refused ({told})")
    assert taken == []
    assert opened(signed, allowed) == "release@bank.example", "the control again"
    for part in ("index", "manifest", "blob"):
        assert counted[(part, part)] == 25, counted
    # The name of the namespace is a part of the signature.
    assert counted[("signature", trust.SIGNATURE)] + counted[("signature", trust.PURPOSE)] == 25, counted


def test_every_byte_of_a_signature_counts(signed: Path, keys: Keys) -> None:
    """No byte of the file may differ, also not those that ssh-keygen overlooks; a coarser sieve, at every place."""
    raw, index = (signed / SIGNATURE_FILE).read_bytes(), (signed / "index.json").read_bytes()
    allowed = signers(keys.own)
    for change in (raw + b"\n", raw + b"junk", b" " + raw, raw[:-1], raw.replace(b"\n", b"\r\n"), raw[:-10], b""):
        with pytest.raises(TrustError) as caught:
            check_signature(index, change, allowed)
        assert caught.value.kind == trust.SIGNATURE


def test_each_reason_has_its_own_message(signed: Path, keys: Keys) -> None:
    own = signers(keys.own)
    said = {
        "strange": refused(signed, signers(keys.strange)),
        "expired": refused(signed, signers(keys.own, 'valid-before="20200101"')),
        "early": refused(signed, signers(keys.own, 'valid-after="20990101"')),
        "purpose": refused(signed, signers(keys.own, 'namespaces="git,file"')),
    }
    raw = (signed / SIGNATURE_FILE).read_bytes()
    (signed / SIGNATURE_FILE).unlink()
    said["missing"] = refused(signed, own)
    (signed / SIGNATURE_FILE).write_bytes(raw[:200])
    said["cut"] = refused(signed, own)
    (signed / SIGNATURE_FILE).write_bytes(raw)
    index = (signed / "index.json").read_bytes()
    (signed / "index.json").write_bytes(index + b" ")
    said["index"] = refused(signed, own)
    (signed / SIGNATURE_FILE).write_bytes(b"".join(raw.splitlines(True)[:-1]))
    said["either"] = refused(signed, own)
    (signed / "index.json").write_bytes(index)
    assert opened(signed, own), "without the line behind it, it is as good"

    assert {name: error.kind for name, error in said.items()} == {
        "strange": trust.UNKNOWN,
        "expired": trust.EXPIRED,
        "early": trust.NOT_YET,
        "purpose": trust.PURPOSE,
        "missing": trust.MISSING,
        "cut": trust.SIGNATURE,
        "index": trust.INDEX,
        "either": trust.MISMATCH,
    }
    assert "is not one of the allowed signers" in str(said["strange"]) and "SHA256:" in str(said["strange"])
    assert "whose time is over" in str(said["expired"]) and "2020-01-01" in str(said["expired"])
    assert "whose time has not come" in str(said["early"]) and "2099-01-01" in str(said["early"])
    assert f"add {NAMESPACE} to its namespaces" in str(said["purpose"])
    assert "is not signed" in str(said["missing"]) and "xinference_bundle_signing_key" in str(said["missing"])
    assert len({str(error) for error in said.values()}) == len(said)


def test_a_key_that_is_valid_now_and_for_this_is_taken(signed: Path, keys: Keys) -> None:
    options = f'namespaces="git,{NAMESPACE}",valid-after="20200101",valid-before="20990101"'
    assert opened(signed, signers(keys.strange) + signers(keys.own, options, "*@bank.example,!guest@bank.example"))


def test_a_signature_for_another_purpose_is_none(signed: Path, keys: Keys) -> None:
    """The same key signs commits, too; such a signature must not pass for one of a bundle."""
    (signed / SIGNATURE_FILE).unlink()
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", str(keys.own), str(signed / "index.json")]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert refused(signed, signers(keys.own)).kind == trust.PURPOSE


def test_a_forged_bundle_is_refused_although_it_is_sound(signed: Path, keys: Keys, requests: List[Request]) -> None:
    """Whoever changes a file has to change its manifest and the index, and cannot sign that."""
    (Path(requests[0].path) / "model.safetensors").write_bytes(b"evil")
    signature = (signed / SIGNATURE_FILE).read_bytes()
    write_bundle(signed, requests)
    assert not (signed / SIGNATURE_FILE).exists(), "a signature goes with the index it was for"
    assert refused(signed, signers(keys.own)).kind == trust.MISSING
    (signed / SIGNATURE_FILE).write_bytes(signature)
    assert refused(signed, signers(keys.own)).kind == trust.INDEX
    write_bundle(signed, requests, signing_key=str(keys.strange))
    assert refused(signed, signers(keys.own)).kind == trust.UNKNOWN


# --- building ---------------------------------------------------------------------------------------------------------


def test_the_same_bundle_built_again_keeps_its_signature(signed: Path, keys: Keys, requests: List[Request]) -> None:
    before = (signed / SIGNATURE_FILE).stat()

    def build(key: str = "", check: bool = False) -> Outcome:
        return write_bundle(signed, requests, signing_key=key, check=check)

    for outcome in (build(str(keys.own)), build(str(keys.own), True), build(), build("", True)):
        assert not outcome.changed and outcome.before == outcome.after
        assert outcome.signing_key == trust.fingerprint(public_key(keys.own))
    assert (signed / SIGNATURE_FILE).stat() == before

    planned = build(str(keys.strange), True)
    assert planned.changed and planned.before != planned.after and (signed / SIGNATURE_FILE).stat() == before
    done = build(str(keys.strange))
    assert done.changed and (done.before, done.after) == (planned.before, planned.after)
    assert opened(signed, signers(keys.strange))

    (signed / SIGNATURE_FILE).write_bytes(b"damaged")
    assert build(str(keys.own), True).changed and build(str(keys.own)).changed
    assert opened(signed, signers(keys.own))


def test_signed_elsewhere_gives_the_same_index(
    signed: Path, keys: Keys, requests: List[Request], tmp_path: Path
) -> None:
    """The signature is no part of what is signed, so it may come later, and from another machine."""
    write_bundle(tmp_path / "other", requests)
    shutil.copy(signed / SIGNATURE_FILE, tmp_path / "other" / SIGNATURE_FILE)
    assert opened(tmp_path / "other", signers(keys.own))


def test_keys_that_cannot_sign(
    keys: Keys, requests: List[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    public = shutil.copy(f"{keys.own}.pub", tmp_path / "alone.pub")
    text = tmp_path / "text"
    text.write_text("no key")
    for key, told in (
        (tmp_path / "none", "There is no key"),
        (keys.locked, "ssh-add"),
        (public, "ssh-agent does not hold"),
        (text, "cannot be used to sign"),
    ):
        with pytest.raises(TrustError, match=told) as caught:
            write_bundle(tmp_path / "bundle", requests, signing_key=str(key))
        assert caught.value.kind == trust.KEY
        assert not (tmp_path / "bundle" / "index.json").exists()


def test_a_key_with_a_passphrase_signs_through_an_agent(
    keys: Keys, requests: List[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = tmp_path / "ask"
    ask.write_text("#!/bin/sh\necho secret\n")
    ask.chmod(0o700)
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert agent.poll() is None
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        environment = {**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
        subprocess.run(["ssh-add", "-q", str(keys.locked)], check=True, env=environment, stdin=subprocess.DEVNULL)
        for key in (str(keys.locked), f"{keys.locked}.pub"):
            write_bundle(tmp_path / "bundle", requests, signing_key=key)
            assert opened(tmp_path / "bundle", signers(keys.locked))
    finally:
        agent.terminate()
        agent.wait()


def test_the_key_is_nowhere_in_the_bundle(signed: Path, keys: Keys) -> None:
    secret = b"".join(keys.own.read_bytes().splitlines()[1:3])
    for path in [*signed.rglob("*"), *signed.with_name("bundle.cache").rglob("*")]:
        assert not path.is_file() or secret not in path.read_bytes().replace(b"\n", b"")


# --- carrying ---------------------------------------------------------------------------------------------------------


def test_volumes_carry_the_signature_also_differential_ones(
    signed: Path, keys: Keys, requests: List[Request], tmp_path: Path
) -> None:
    allowed, site = signers(keys.own), tmp_path / "site"
    sticks = tmp_path / "sticks"
    split_bundle(signed, sticks, 20 * 1024**2)
    assert not split_bundle(signed, sticks, 20 * 1024**2).changed
    volume = next(sticks.iterdir())
    assert SIGNATURE_FILE in (volume / "SHA256SUMS").read_text()
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=str(volume), check=True)
    with pytest.raises(TrustError, match="not one of the allowed signers"):
        join_volumes(site, [sticks], signers=signers(keys.strange))
    assert not site.exists()
    assert join_volumes(site, [sticks], signers=allowed).complete and opened(site, allowed)
    assert not join_volumes(site, [sticks], signers=allowed).changed

    place = tmp_path / "source" / "gamma"
    place.mkdir()
    (place / "model.gguf").write_bytes(b"more" * 1000)
    write_bundle(signed, [*requests, Request("models", "gamma", str(place))], signing_key=str(keys.own))
    later = tmp_path / "later"
    split_bundle(signed, later, 20 * 1024**2, base=volume, name="later")
    assert join_volumes(site, [later], signers=allowed).complete and opened(site, allowed)

    (next(later.iterdir()) / SIGNATURE_FILE).unlink()
    with pytest.raises(TrustError, match="is not signed"):
        join_volumes(tmp_path / "fresh", [later], base=site, signers=allowed)
    assert split_bundle(signed, later, 20 * 1024**2, base=volume, name="later", check=True).changed
    assert split_bundle(signed, later, 20 * 1024**2, base=volume, name="later").changed
    assert join_volumes(tmp_path / "fresh", [later], base=site, signers=allowed).complete


def test_joining_what_is_not_signed_ends_an_earlier_signature(
    signed: Path, keys: Keys, requests: List[Request], tmp_path: Path
) -> None:
    write_bundle(tmp_path / "other", requests[:1])
    split_bundle(tmp_path / "other", tmp_path / "sticks", 20 * 1024**2)
    assert join_volumes(signed, [tmp_path / "sticks"]).complete
    assert refused(signed, signers(keys.own)).kind == trust.MISSING


# --- on a host --------------------------------------------------------------------------------------------------------


def test_a_host_takes_only_what_the_signed_index_names(signed: Path, keys: Keys, tmp_path: Path) -> None:
    bundle = Bundle.open(signed)
    wanted = [Wanted(part.kind, part.name, part.digest, part.blobs[0].size) for part in bundle.artifacts]
    assert bundle.signature is not None
    index, signature = packed(bundle.index), bundle.signature.decode()
    assert vouch(index, signature, signers(keys.own), wanted, tmp_path / "none").identity == "release@bank.example"
    assert not (tmp_path / "none").exists()
    vouch(index, signature, signers(keys.own), wanted, tmp_path)
    assert (tmp_path / "index.json").read_bytes() == bundle.index
    assert (tmp_path / SIGNATURE_FILE).read_bytes() == bundle.signature
    for strange in (
        wanted[0]._replace(digest=wanted[1].digest),
        wanted[0]._replace(size=wanted[0].size + 1),
        wanted[0]._replace(name="gamma"),
        wanted[0]._replace(kind="tools"),
    ):
        with pytest.raises(TrustError, match=r"is not in the signed index\. Nothing of it was taken"):
            vouch(index, signature, signers(keys.own), [strange, wanted[1]], None)
    with pytest.raises(TrustError, match="is not signed"):
        vouch(index, None, signers(keys.own), wanted, None)
    for nonsense in ("", "%%%", packed(b"[]")):
        with pytest.raises(TrustError):
            vouch(nonsense, signature, signers(keys.own), wanted, None)


# --- signers and tools ------------------------------------------------------------------------------------------------


def test_signers_are_a_text_or_a_file(keys: Keys, tmp_path: Path) -> None:
    text = signers(keys.own)
    path = tmp_path / "allowed"
    path.write_text(text)
    assert signers_text(str(path)) == text
    assert signers_text(text) == text.strip() + "\n"
    assert signers_text(" ") == ""
    path.write_text("# nobody\n")
    for value, told in (
        (str(path), "names nobody"),
        (str(tmp_path / "none"), "No such file"),
        ("# none yet", "nobody"),
    ):
        with pytest.raises(TrustError, match=told) as caught:
            signers_text(value)
        assert caught.value.kind == trust.SIGNERS


@pytest.mark.parametrize(
    "said",
    ["unknown option -- Y", "ssh-keygen: illegal option -- Y", 'Unsupported operation for -Y: "find-principals"'],
)
def test_an_ssh_keygen_that_is_too_old_says_so(
    said: str, signed: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = signers(keys.own)
    place = tmp_path / "bin"
    place.mkdir()
    (place / "ssh-keygen").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (place / "ssh").write_text("#!/bin/sh\necho 'OpenSSH_8.0p1, OpenSSL 1.1.1k' >&2\n")
    for program in place.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    error = refused(signed, allowed)
    assert error.kind == trust.TOOL
    assert "too old for signatures (OpenSSH_8.0p1). Install OpenSSH 8.2 or newer" in str(error)
    assert "too old" in trust.tool_problem()


def test_no_ssh_keygen_at_all(signed: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = signers(keys.own)
    assert trust.tool_problem() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(trust, "STANDARD_PATHS", ())
    error = refused(signed, allowed)
    assert error.kind == trust.TOOL and "has no ssh-keygen. Install OpenSSH 8.2" in str(error)
    assert "no ssh-keygen" in trust.tool_problem()


def test_other_sorts_of_keys(signed: Path, requests: List[Request], tmp_path: Path) -> None:
    for sort in (["rsa", "-b", "2048"], ["ecdsa"]):
        key = tmp_path / sort[0]
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", str(key), "-t", *sort], check=True)
        write_bundle(signed, requests, signing_key=str(key))
        assert opened(signed, signers(key))
        assert not write_bundle(signed, requests, signing_key=str(key)).changed
        index = (signed / "index.json").read_bytes()
        assert check_signature(index, sign(index, key), signers(key)).identity
