# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several hosts shipped to at once, for real: who gets what from whom, and what happens when hosts fail each other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Bundle
from fleets import Fleet
from sites import SshHost, make_bundle, make_model
from test_shipping import family, kill, ordinary_user

__all__ = ["ordinary_user"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an SSH server for several users needs root")

BIG = 8 * 1024 * 1024
SIZES = {"one.bin": BIG, "two.bin": BIG, "three.bin": BIG // 2, **{f"{number:02}.json": 900 for number in range(30)}}
ENTRIES = [{"model_uid": "m", "source": {"path": "/models/m"}}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("material")
    return make_bundle(place, {"m": make_model(place / "m", SIZES)})


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    host = SshHost(tmp_path_factory.mktemp("ssh") / "server").start()
    yield host
    host.stop()


Make = Callable[..., Fleet]


@pytest.fixture
def make(bundle: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes a fleet on this machine; whatever still passes blobs on afterwards is ended."""
    made: List[Fleet] = []

    def fleet(count: int, **more: Any) -> Fleet:
        variables = {"ansible_connection": "local", "ansible_host": "127.0.0.1", "xinference_models": ENTRIES}
        made.append(Fleet(tmp_path, bundle, count, {**variables, **more.pop("variables", {})}, **more))
        return made[-1]

    yield fleet
    for each in made:
        for path in each.listening():
            with Path(path).open() as file, contextlib.suppress(OSError, ValueError):
                os.kill(json.load(file)["pid"], signal.SIGKILL)


def total(results: Dict[str, Dict[str, Any]], key: str) -> int:
    return sum(result[key] for result in results.values())


def arriving(fleet: Fleet, name: str) -> int:
    """Bytes of what a host has not received to its end."""
    sizes = []
    for path in fleet.root(name).glob("partial/*"):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def largest(bundle: Path) -> str:
    blobs = Bundle.open(bundle).blobs
    return max(blobs, key=lambda digest: (blobs[digest], digest))


def test_over_ssh_the_controller_sends_about_one_bundle_and_the_second_run_nothing(
    make: Make, ssh_host: SshHost, bundle: Path
) -> None:
    fleet = make(4, variables={**ssh_host.variables(), "ansible_connection": "ssh"})
    results = fleet.ship("-vvvv")
    size = Bundle.open(bundle).size
    assert sorted(results) == fleet.names and all(fleet.complete(name) for name in fleet.names)
    assert size <= total(results, "sent_bytes") <= 1.1 * size
    assert total(results, "from_peers_bytes") + total(results, "sent_bytes") == 4 * size
    assert total(results, "skipped_bytes") == 0 and all(result["refused"] == [] for result in results.values())
    assert {name for result in results.values() for name in result["peers"]} <= set(fleet.names)
    assert all(result["changed"] and result["artifacts"]["models"]["m"] for result in results.values())
    assert "got from other hosts" in fleet.output
    # Nothing listens, and nothing secret was shown or is left.
    assert fleet.listening() == [] and not list((fleet.place / "cache").rglob("*.pem"))
    assert "PRIVATE KEY" not in fleet.output + json.dumps(results)

    again = fleet.ship()
    assert total(again, "sent_bytes") == total(again, "hashed_bytes") == total(again, "from_peers_bytes") == 0
    assert not any(result["changed"] for result in again.values()) and "End what passed" not in fleet.output
    assert not list((fleet.place / "cache/airgap.xinference/runs").glob("*-*"))


def test_without_pipelining_and_with_few_forks(make: Make, bundle: Path) -> None:
    fleet = make(5, forks=2, environment={"ANSIBLE_PIPELINING": "false"})
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert total(results, "sent_bytes") <= 1.1 * Bundle.open(bundle).size
    assert fleet.listening() == []


def test_one_after_another_takes_no_longer_for_those_whose_turn_comes_later(make: Make, bundle: Path) -> None:
    fleet = make(3, play={"throttle": 1})
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    # Nobody waited for a host that was not being shipped to yet.
    assert all(result["refused"] == [] for result in results.values())
    assert total(results, "sent_bytes") <= 1.1 * Bundle.open(bundle).size


def test_hosts_that_have_a_blob_pass_it_on_and_the_controller_sends_next_to_nothing(make: Make, bundle: Path) -> None:
    fleet = make(3)
    fleet.ship("--limit", "h3")
    assert "PLAY RECAP" in fleet.output and "got from other hosts" not in fleet.output
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert total(results, "sent_bytes") <= 0.1 * Bundle.open(bundle).size
    assert results["h1"]["peers"] == results["h2"]["peers"] == ["h3"] and not results["h3"]["changed"]


def test_one_host_that_lacks_something_is_shipped_to_alone(make: Make, bundle: Path) -> None:
    fleet = make(3)
    fleet.ship()
    fleet.blob("h2", largest(bundle)).unlink()
    results = fleet.ship()
    assert results["h2"]["sent_bytes"] == BIG and results["h2"]["from_peers_bytes"] == 0
    assert all(fleet.complete(name) for name in fleet.names)
    assert fleet.output.count("listening") == 0 and fleet.listening() == []


@pytest.mark.parametrize("place", ["inventory", "command line"])
def test_it_can_be_switched_off(make: Make, bundle: Path, place: str) -> None:
    fleet = make(2, variables={"xinference_ship_fanout": False} if place == "inventory" else {})
    # Extra variables of the form key=value are text.
    results = fleet.ship(*(["-e", "xinference_ship_fanout=false"] if place == "command line" else []))
    assert total(results, "sent_bytes") == 2 * Bundle.open(bundle).size
    assert total(results, "from_peers_bytes") == 0 and "listening" not in fleet.output


def test_a_deep_verification_that_is_not_wanted_changes_nothing(make: Make, bundle: Path) -> None:
    fleet = make(2)
    results = fleet.ship("-e", "xinference_ship_deep=false")
    assert total(results, "from_peers_bytes") > 0 and total(results, "sent_bytes") <= 1.1 * Bundle.open(bundle).size


def test_notes_that_cannot_be_written_are_no_trouble_of_the_host(make: Make) -> None:
    fleet = make(2, environment={"XDG_CACHE_HOME": "/proc/nowhere"})
    assert fleet.ship(check=False) == {}
    said = " ".join(fleet.output.split())
    assert "on the controller cannot be written" in said and "set XDG_CACHE_HOME" in said


def test_a_port_that_is_none_is_named(make: Make) -> None:
    fleet = make(2, variables={"xinference_ship_peer_port": 70000})
    fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert "70000 is not a port; choose one up to 65535" in fleet.output.replace("\n", " ")


def test_check_mode_starts_nothing(make: Make) -> None:
    fleet = make(2)
    results = fleet.ship("--check")
    assert all(result["changed"] for result in results.values())
    assert not any(fleet.root(name).exists() for name in fleet.names)


def test_hosts_that_cannot_listen_get_everything_from_the_controller_and_it_says_so(make: Make, bundle: Path) -> None:
    fleet = make(3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fleet.variables["xinference_ship_peer_port"] = taken.getsockname()[1]
        results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert total(results, "sent_bytes") == 3 * Bundle.open(bundle).size
    for name in fleet.names:
        assert fleet.output.replace("\n", " ").count(f"{name} does not pass blobs on: Cannot listen on 127.0.0.1") == 1


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "cannot be reached"), (signal.SIGSTOP, "in time")])
def test_hosts_that_do_not_reach_each_other_get_everything_from_the_controller_and_it_says_so_once(
    make: Make, bundle: Path, number: signal.Signals, why: str
) -> None:
    fleet = make(3)
    # What h1 is asked when it is about to be shipped to ends, or freezes, what passes blobs on.
    fault = fleet.place / "fault"
    fault.write_text(
        f"#!/bin/sh\nsed 's/.*\"pid\": *//; s/,.*//' {fleet.place}/h*/state/peer-*.json | xargs kill -{number}\n"
    )
    fault.chmod(0o755)
    late = "__xinference_ship_result is defined and inventory_hostname == 'h1'"
    fleet.variables["xinference_ship_rate_limit"] = f"{{{{ lookup('pipe', '{fault}') if {late} else '' }}}}"
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert total(results, "sent_bytes") == 3 * Bundle.open(bundle).size and total(results, "from_peers_bytes") == 0
    said = fleet.output.replace("\n", " ")
    for name in fleet.names:
        reasons = [row["why"] for row in results[name]["refused"]]
        assert reasons and all(why in reason for reason in reasons)
        assert said.count(f"{name}: 3 blobs came from the controller instead of other hosts") <= 1
    assert said.count("blobs came from the controller instead of other hosts") == 3
    assert fleet.listening() == []


def test_users_who_become_another_one_pass_on_what_they_may_not_read_themselves(
    make: Make, ssh_host: SshHost, bundle: Path, ordinary_user: str
) -> None:
    fleet = make(
        3, variables={**ssh_host.variables(ordinary_user), "ansible_connection": "ssh", "ansible_become": True}
    )
    for directory in (fleet.place, *fleet.place.parents, ssh_host.place, ssh_host.place.parent):
        if "pytest-of" in str(directory):
            directory.chmod(0o755)
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert total(results, "sent_bytes") <= 1.1 * Bundle.open(bundle).size
    assert {path.stat().st_uid for path in fleet.root("h3").rglob("*")} == {0} and fleet.listening() == []


def test_the_module_starts_one_server_for_a_run_and_ends_it(make: Make) -> None:
    fleet = make(2)
    fleet.command()
    module = "airgap.xinference.xinference_peer"
    root = {"root": "{{ xinference_root }}"}
    started = {**root, "address": "127.0.0.1"}
    steps: List[Tuple[str, Dict[str, Any]]] = [
        ("foreseen", {module: started, "check_mode": True}),
        ("nothing", {module: {**root, "state": "stopped"}}),
        ("first", {module: started}),
        ("second", {module: started}),
        ("still", {module: {**root, "state": "stopped"}, "check_mode": True}),
        ("third", {module: started}),
        ("end", {module: {**root, "state": "stopped"}}),
        ("ended", {module: {**root, "state": "stopped"}}),
        ("nowhere", {module: {**root, "address": "198.51.100.7", "others": []}}),
        ("bare", {module: {**root, "state": "rubbish"}, "ignore_errors": True}),
    ]
    names = [name for name, _step in steps]
    facts = "{" + ", ".join(f"'{name}': {name}" for name in names) + "}"
    keep = {
        "content": f"{{{{ {facts} | to_json }}}}",
        "dest": "{{ result_dir }}/{{ inventory_hostname }}.json",
        "mode": "0600",
    }
    tasks = [*({**step, "register": name} for name, step in steps), {"ansible.builtin.copy": keep}]
    play = {"hosts": "xinference", "gather_facts": False, "tasks": tasks}
    (fleet.place / "play.json").write_text(json.dumps([play]))
    command = fleet.command()
    (fleet.place / "play.json").write_text(json.dumps([play]))
    done = subprocess.run(command, env=fleet.surroundings(), stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for name in fleet.names:
        found = json.loads((fleet.place / "results" / f"{name}.json").read_text())
        changed = {step: found[step]["changed"] for step in names[:-1]}
        assert changed == {
            **{"foreseen": True, "nothing": False, "first": True, "second": False, "still": True},
            **{"third": False, "end": True, "ended": False, "nowhere": False},
        }
        assert found["first"]["port"] == found["second"]["port"] == found["third"]["port"] != 0
        assert (found["first"]["address"], found["end"]["port"], found["foreseen"]["port"]) == ("127.0.0.1", 0, 0)
        assert "No address of this host" in found["nowhere"]["msg"] and found["nowhere"]["port"] == 0
        assert found["bare"]["failed"] and "PRIVATE KEY" not in json.dumps(found)
    assert fleet.listening() == []


def test_a_host_that_lies_is_named_and_does_no_harm(make: Make, bundle: Path) -> None:
    fleet = make(3)
    fleet.ship("--limit", "h1")
    # A blob that changed while its stamp still holds: same size, time and inode.
    digest = largest(bundle)
    blob = fleet.blob("h1", digest)
    status = blob.stat()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(BIG // 2)
        file.write(b"a lie")
    blob.chmod(0o444)
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    results = fleet.ship()
    assert fleet.complete("h2") and fleet.complete("h3")
    for name in ("h2", "h3"):
        reasons = [row["why"] for row in results[name]["refused"]]
        assert len(reasons) == 1 and "h1 (127.0.0.1:" in reasons[0] and "gave wrong bytes" in reasons[0]
        assert results[name]["sent_bytes"] >= BIG
    assert fleet.output.replace("\n", " ").count("blobs came from the controller instead of other hosts") == 2


def test_nothing_listens_after_a_failure(make: Make) -> None:
    fleet = make(3)
    # It fails while it ships, not before.
    fleet.own["h2"] = {"xinference_ship_rate_limit": "{{ '' if __xinference_ship_result is undefined else 'rubbish' }}"}
    results = fleet.ship(check=False)
    assert sorted(results) == ["h1", "h3"] and "failed=1" in fleet.output
    assert fleet.complete("h1") and fleet.complete("h3") and not fleet.complete("h2")
    assert fleet.listening() == []


def test_what_a_killed_controller_left_listening_does_not_keep_the_port(make: Make, bundle: Path) -> None:
    fleet = make(3, variables={"xinference_ship_rate_limit": "2M", "xinference_ship_peer_port": free_port()})
    for number, name in enumerate(fleet.names, 11):
        fleet.own[name] = {"ansible_host": f"127.0.0.{number}"}
    process = subprocess.Popen(
        fleet.command(), env=fleet.surroundings(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    # What every host gets at first is small, and comes before anybody listens.
    while time.monotonic() < deadline and arriving(fleet, "h3") < BIG // 8:
        time.sleep(0.1)
    kill(family(process.pid))
    process.wait()
    assert len(fleet.listening()) == 3
    fleet.variables["xinference_ship_rate_limit"] = ""
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert "does not pass blobs on" not in fleet.output.replace("\n", " ")
    assert total(results, "sent_bytes") <= 1.1 * Bundle.open(bundle).size and fleet.listening() == []


def test_after_a_killed_controller_it_stops_listening_by_itself_and_the_next_run_completes(
    make: Make, bundle: Path
) -> None:
    fleet = make(3, variables={"xinference_ship_rate_limit": "2M", "xinference_ship_peer_idle": 8})
    process = subprocess.Popen(
        fleet.command(), env=fleet.surroundings(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and arriving(fleet, "h3") < BIG // 4:
        time.sleep(0.1)
    assert arriving(fleet, "h3") and len(fleet.listening()) == 3
    key = next((fleet.place / "cache").rglob("*.pem"))
    assert key.stat().st_mode & 0o777 == 0o600
    command_lines = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    assert b"PRIVATE KEY" not in command_lines
    kill(family(process.pid))
    process.wait()
    deadline = time.monotonic() + 120
    while fleet.listening() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert fleet.listening() == []
    fleet.variables["xinference_ship_rate_limit"] = ""
    results = fleet.ship()
    assert all(fleet.complete(name) for name in fleet.names)
    assert total(results, "sent_bytes") <= 1.1 * Bundle.open(bundle).size
    assert not list((fleet.place / "cache").rglob("*.pem")), "the key of the killed run is gone, too"
