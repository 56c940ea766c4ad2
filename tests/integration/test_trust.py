# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trust for real: playbooks sign a bundle and carry it, controller and hosts check it over SSH, and refuse the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
from ad_hoc import run_module
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.ingest import Request, write_bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import NAMESPACE, SIGNATURE_FILE, packed
from sites import Site, SshHost, make_model, make_wheel, path_without

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server for several users needs root")

IDENTITY = "release@bank.example"
ENTRY = {"model_uid": "a", "model_name": "x", "model_type": "embedding", "source": {"path": "/models/alpha"}}


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    host = SshHost(tmp_path_factory.mktemp("ssh") / "server").start()
    yield host
    host.stop()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two keys, `own` and `strange`, and an allowed signers file for the first."""
    place = tmp_path_factory.mktemp("keys")
    for name in ("own", "strange"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)], check=True)
    (place / "signers").write_text(f'{IDENTITY} namespaces="{NAMESPACE}" {(place / "own.pub").read_text()}')
    return place


@pytest.fixture
def requests(tmp_path: Path) -> list:
    """What a host needs with the model alpha, and a model that brings code."""
    alpha = make_model(tmp_path / "alpha", {"weights.bin": 100_000, "config.json": 700})
    own = make_model(tmp_path / "own-code", {"weights.bin": 5_000})
    (own / "modeling_own.py").write_text("print('not asked')\n")
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    wheels = make_wheel(tmp_path / "wheels-host", "kindly").parent, make_wheel(tmp_path / "wheels", "serving").parent
    return [
        Request("models", "alpha", str(alpha), {"org.opencontainers.image.source": "modelscope:some/alpha"}),
        Request("models", "own-code", str(own)),
        Request("wheels", "host", str(wheels[0])),
        Request("wheels", "server", str(wheels[1])),
    ]


@pytest.fixture
def signed(tmp_path: Path, keys: Path, requests: list) -> Path:
    write_bundle(tmp_path / "bundle", requests, signing_key=str(keys / "own"))
    return tmp_path / "bundle"


def ship(site: Site, bundle: Path, *arguments: str, **more: Any) -> Dict[str, Any]:
    options = {"bundle": str(bundle), "root": str(site.root), "models": [ENTRY], **more}
    return site.run("xinference_ship", options, *arguments)


def test_controller_and_host_take_what_was_signed(ssh_host: SshHost, signed: Path, keys: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, ssh_host.variables())
    foreseen = ship(site, signed, "--check", "--diff", signers=str(keys / "signers"))
    assert foreseen["changed"] and not site.root.exists()
    first = ship(site, signed, signers=str(keys / "signers"))
    assert not first.get("failed") and first["changed"], first.get("msg")
    for name in ("index.json", SIGNATURE_FILE):
        assert (site.root / "state" / name).read_bytes() == (signed / name).read_bytes()
    again = ship(site, signed, "-vvv", "--diff", signers=(keys / "signers").read_text())
    assert not again.get("failed") and not again["changed"]
    secret = (keys / "own").read_text().splitlines()[1]
    assert secret not in site.output and not any(
        secret.encode() in path.read_bytes() for path in site.root.rglob("*") if path.is_file()
    )


def test_nothing_is_sent_of_what_is_not_to_be_trusted(
    ssh_host: SshHost, signed: Path, keys: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, ssh_host.variables())
    allowed = str(keys / "signers")

    def refused(told: str, **more: Any) -> None:
        done = ship(site, signed, **{"signers": allowed, **more})
        said = " ".join(done["msg"].split())
        assert done["failed"] and told in said and "Traceback" not in said, said
        assert not site.root.exists()

    own, strange = (keys / "own.pub").read_text(), (keys / "strange.pub").read_text()
    refused("is not one of the allowed signers", signers=f"{IDENTITY} {strange}")
    refused("whose time is over", signers=f'{IDENTITY} valid-before="20200101" {own}')
    refused("add bundle@airgap.xinference to its namespaces", signers=f'{IDENTITY} namespaces="git" {own}')
    refused("cannot be read: No such file", signers=str(keys / "none"))
    for path, told in (
        (signed / "index.json", "index.json was changed after it was signed"),
        (signed / SIGNATURE_FILE, "index.json.sig"),
        (Bundle.open(signed).blob_path(Bundle.open(signed).artifacts[0].digest), "is damaged"),
        (Bundle.open(signed).blob_path(Bundle.open(signed).artifacts[0].files[1].digest), "content is sha256:"),
    ):
        sound = path.read_bytes()
        path.write_bytes(sound[:200] + bytes([sound[200] ^ 1]) + sound[201:])
        refused(told)
        path.write_bytes(sound)
    (signed / SIGNATURE_FILE).unlink()
    refused("is not signed")


def test_the_host_sees_for_itself(ssh_host: SshHost, signed: Path, keys: Path, tmp_path: Path) -> None:
    """What a controller tells that was deceived, or is not ours: the module on the host does its own check."""
    bundle = Bundle.open(signed)
    artifact = bundle.artifacts[0]
    wanted = {"kind": artifact.kind, "name": artifact.name, "digest": artifact.digest, "size": artifact.blobs[0].size}
    assert bundle.signature is not None
    trust = {
        "index": packed(bundle.index),
        "signature": bundle.signature.decode(),
        "signers": (keys / "signers").read_text(),
    }
    site = Site(tmp_path, ssh_host.variables())
    for change, told in (
        ({"trust": {**trust, "index": packed(bundle.index + b" ")}}, "index.json was changed after it was signed"),
        ({"trust": {**trust, "signers": f"{IDENTITY} {(keys / 'strange.pub').read_text()}"}}, "allowed signers"),
        ({"trust": {key: value for key, value in trust.items() if key != "signature"}}, "is not signed"),
        ({"artifacts": [{**wanted, "name": "other"}]}, "is not in the signed index"),
    ):
        options = {"root": str(site.root), "artifacts": [wanted], "trust": trust, **change}
        done = site.run("xinference_store", options)
        assert done["failed"] and told in " ".join(done["msg"].split()), done["msg"]
        assert not site.root.exists()
    taken = site.run("xinference_store", {"root": str(site.root), "artifacts": [wanted], "trust": trust})
    assert taken["signed_by"] == IDENTITY and taken["missing"]


def test_a_host_without_ssh_keygen_is_told_of_and_may_be_excused(signed: Path, keys: Path, tmp_path: Path) -> None:
    bare = SshHost(tmp_path / "bare", path_without(tmp_path / "programs", "ssh-keygen")).start()
    # What looks where programs always are finds one there all the same; so it is an old one that hides it.
    old = tmp_path / "programs" / "ssh-keygen"
    old.write_text("#!/bin/sh\necho 'unknown option -- Y' >&2\nexit 1\n")
    old.chmod(0o755)
    try:
        site = Site(tmp_path, bare.variables())
        options = {"bundle": str(signed), "root": str(site.root), "models": [ENTRY], "airgap_addresses": []}
        done = site.run("xinference_preflight", {**options, "signers": str(keys / "signers"), "report_only": True})
        row = next(row for row in done["findings"] if row["check"] == "signature")
        assert "too old for signatures" in row["found"] and "xinference_bundle_signers_on_host" in row["cure"]
        refused = ship(site, signed, signers=str(keys / "signers"))
        assert refused["failed"] and "too old for signatures" in " ".join(refused["msg"].split())
        assert not site.root.exists()
        excused = ship(site, signed, signers=str(keys / "signers"), signers_on_host=False)
        assert not excused.get("failed") and excused["changed"]
    finally:
        bare.stop()


def test_a_model_that_brings_code_needs_a_consent(ssh_host: SshHost, signed: Path, keys: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, ssh_host.variables())
    entry = {**ENTRY, "model_uid": "own", "source": {"path": "/models/own-code"}}
    refused = ship(site, signed, models=[ENTRY, entry], signers=str(keys / "signers"))
    said = " ".join(refused["msg"].split())
    assert refused["failed"] and "own: its model own-code brings code of its own (modeling_own.py)" in said
    assert "allow_code: true" in said and not site.root.exists()
    options = {"bundle": str(signed), "root": str(site.root), "models": [entry], "airgap_addresses": []}
    looked = site.run("xinference_preflight", {**options, "report_only": True})
    assert [row["check"] for row in looked["findings"] if row["check"] == "code"] == ["code"]
    taken = ship(site, signed, models=[ENTRY, {**entry, "allow_code": True}])
    assert not taken.get("failed") and taken["changed"]


def test_the_table_tells_licence_origin_and_code(signed: Path, keys: Path) -> None:
    info = run_module("xinference_bundle_info", {"path": str(signed), "signers": str(keys / "signers")})
    assert info["signed_by"] == IDENTITY and info["signing_key"].startswith("SHA256:")
    assert [line.split() for line in info["origins"][1:]] == [
        ["alpha", "-", "no", "modelscope:some/alpha", "-"],
        ["own-code", "mit", "yes", "-", "-"],
    ]
    assert next(one for one in info["artifacts"] if one["name"] == "own-code")["code"] == ["modeling_own.py"]
    strange = f"{IDENTITY} {(keys / 'strange.pub').read_text()}"
    refused = run_module("xinference_bundle_info", {"path": str(signed), "signers": strange})
    assert refused["failed"] and refused["trust"] == "unknown signer"


def test_the_module_signs_shows_it_and_changes_nothing_twice(requests: list, keys: Path, tmp_path: Path) -> None:
    models = [{"name": request.name, "path": request.path} for request in requests if request.kind == "models"]
    options = {"path": str(tmp_path / "made"), "models": models, "signing_key": str(keys / "own")}
    first = run_module("xinference_bundle", options)
    assert first["changed"] and first["signing_key"].startswith("SHA256:"), first
    assert not run_module("xinference_bundle", options)["changed"]
    foreseen = run_module("xinference_bundle", {**options, "signing_key": str(keys / "strange")}, check=True)
    assert foreseen["changed"] and foreseen["signing_key"] != first["signing_key"]
    volumes = {"bundle": options["path"], "directory": [str(tmp_path / "sticks")], "size": "100M", "state": "split"}
    assert run_module("xinference_bundle_volumes", volumes)["changed"]
    joining = {"bundle": str(tmp_path / "joined"), "directory": [str(tmp_path / "sticks")], "state": "joined"}
    strange = {**joining, "signers": f"{IDENTITY} {(keys / 'strange.pub').read_text()}"}
    assert run_module("xinference_bundle_volumes", strange)["trust"] == "unknown signer"
    assert run_module("xinference_bundle_volumes", {**joining, "signers": str(keys / "signers")})["complete"]
    assert (tmp_path / "joined" / SIGNATURE_FILE).exists()
    shutil.rmtree(tmp_path / "joined")
    assert json.dumps(first).find((keys / "own").read_text().splitlines()[1]) < 0
