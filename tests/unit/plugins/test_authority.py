# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The site's authority: what it makes, when it makes it again, and what it refuses."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.plugin_utils.authority import (
    AuthorityError,
    Certificate,
    ensure,
    given,
)
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store

NOW = datetime.datetime(2026, 11, 20, 12, tzinfo=datetime.timezone.utc)
NAMES = ["models.bank.example", "10.0.0.5"]
DAY = datetime.timedelta(days=1)


def made(
    place: Path, names: Any = None, now: datetime.datetime = NOW, renew: int = 30, dry: bool = False
) -> Certificate:
    return ensure(place / "authority", "gpu-1", names or NAMES, 397, renew, now, dry)


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_client_that_trusts_the_authority_trusts_the_gateway(tmp_path):
    found = made(tmp_path)
    trust = Store([read(tmp_path / "authority/authority.crt")])
    certificate = read(found.certificate)
    PolicyBuilder().store(trust).time(NOW).build_server_verifier(x509.DNSName(NAMES[0])).verify(certificate, [])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH] and found.expires == NOW + 397 * DAY


def test_keys_are_for_their_owner_only(tmp_path):
    made(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "authority").iterdir()}
    assert modes["authority.key"] == modes["gpu-1.key"] == 0o600
    assert stat.S_IMODE((tmp_path / "authority").stat().st_mode) == 0o700


def test_keys_that_were_copied_here_are_closed_again(tmp_path):
    keys = [tmp_path / "authority" / name for name in ("authority.key", made(tmp_path).key.name)]
    for key in keys:
        key.chmod(0o644)
    assert not made(tmp_path, dry=True).reason and stat.S_IMODE(keys[0].stat().st_mode) == 0o644
    assert not made(tmp_path).reason
    assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600, 0o600]


@pytest.mark.parametrize("name", ["authority", "Authority", "../up", "a/b", ".."])
def test_no_name_of_a_host_leads_to_the_authority_or_out_of_its_directory(tmp_path, name):
    made(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "authority").glob("authority.*")}
    found = ensure(tmp_path / "authority", name, NAMES, 397, 30, NOW)
    assert found.certificate.parent == tmp_path / "authority" and found.key.exists()
    assert {path: path.read_bytes() for path in before} == before and len(before) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["authority"]


@pytest.mark.parametrize("lost", ["authority.crt", "authority.key"])
def test_half_an_authority_is_told_with_what_to_do(tmp_path, lost):
    made(tmp_path)
    (tmp_path / "authority" / lost).unlink()
    with pytest.raises(AuthorityError, match="Bring both back from a backup"):
        made(tmp_path)


def test_a_second_time_makes_nothing(tmp_path):
    first = made(tmp_path)
    content = first.certificate.read_bytes()
    second = made(tmp_path, now=NOW + 366 * DAY)
    assert first.reason and not second.reason and second.certificate.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda place: {"now": NOW + 368 * DAY}, "it ends on 2027-12-22"),
        (lambda place: {"names": [*NAMES, "new.bank.example"]}, "its names are others"),
        (lambda place: (place / "gpu-1.crt").write_text("x") and {}, "it is not from this authority"),
        (lambda place: (place / "gpu-1.key").write_text("x") and {}, "its key is another"),
        (lambda place: (place / "gpu-1.crt").unlink() or {}, "there is none yet"),
    ],
)
def test_it_is_made_again_when(tmp_path, change, reason):
    made(tmp_path)
    arguments = change(tmp_path / "authority")
    before = read(tmp_path / "authority/authority.crt")
    assert made(tmp_path, **arguments, dry=True).reason == reason
    assert made(tmp_path, **arguments).reason == reason
    assert not made(tmp_path, **arguments).reason and read(tmp_path / "authority/authority.crt") == before


def test_one_of_another_authority_is_replaced(tmp_path):
    made(tmp_path)
    for name in ("authority.crt", "authority.key"):
        (tmp_path / "authority" / name).unlink()
    assert made(tmp_path).reason == "it is not from this authority"


def test_the_authority_is_never_replaced(tmp_path):
    made(tmp_path)
    (tmp_path / "authority/authority.key").unlink()
    with pytest.raises(AuthorityError, match="Bring both back from a backup"):
        made(tmp_path)
    with pytest.raises(AuthorityError, match="one of them is missing"):
        (tmp_path / "authority/authority.crt").unlink()
        (tmp_path / "authority/authority.key").write_text("x")
        made(tmp_path)


def test_near_its_end_it_gives_what_it_can_and_then_says_so(tmp_path):
    made(tmp_path)
    late = NOW + 3600 * DAY
    found = made(tmp_path, now=late)
    assert found.expires == NOW + 3650 * DAY and not made(tmp_path, now=late + DAY).reason
    with pytest.raises(AuthorityError, match="counted until 2036-11-17"):
        made(tmp_path, now=NOW + 3651 * DAY)


def test_a_rehearsal_writes_nothing(tmp_path):
    assert made(tmp_path, dry=True).reason == "there is no authority yet" and not list(tmp_path.iterdir())


def test_a_certificate_of_the_site_is_looked_at(tmp_path):
    found = made(tmp_path, names=["*.bank.example", "10.0.0.5"])
    assert given(found.certificate, found.key, NAMES, NOW).expires == found.expires
    other = made(tmp_path / "other")
    with pytest.raises(AuthorityError) as caught:
        given(found.certificate, other.key, [*NAMES, "deep.models.bank.example"], NOW + 400 * DAY)
    said = str(caught.value)
    assert "is not for deep.models.bank.example" in said and "today is 2027-12-25" in said
    assert "does not belong to the key" in said
    with pytest.raises(AuthorityError, match="is no certificate in the form PEM"):
        given(found.key, found.key, NAMES, NOW)
