# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs a gateway: the nginx of the host, or a container of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.container import DEFINITION, Container
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.native import Native
from ansible_collections.airgap.xinference.plugins.module_utils.gateway.running import GatewayError
from ansible_collections.airgap.xinference.plugins.module_utils.host.docker_cli import Answer


def program(place: Path, says: str) -> str:
    """A stand-in for nginx that tells its version."""
    path = place / "nginx"
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    path.chmod(0o755)
    return str(path)


def test_a_host_without_nginx_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="the bundle carries no package of it"):
        Native(tmp_path, "gateway", str(tmp_path / "nowhere"))
    assert Native(tmp_path, "gateway", str(tmp_path / "nowhere"), needed=False).there() is False


@pytest.mark.parametrize("says", ["nginx version: nginx/1.18.0 (Ubuntu)", "something else"])
def test_an_nginx_that_does_not_fit_is_refused(tmp_path: Path, says: str) -> None:
    with pytest.raises(GatewayError, match=r"1\.19\.5 or newer is needed"):
        Native(tmp_path, "gateway", program(tmp_path, says))


@pytest.mark.parametrize(("below", "name"), [("a b", "g"), ("a;", "g"), ("a\n}", "g"), ("a", "../g"), ("a", "g h")])
def test_no_path_and_no_name_says_more_in_the_configuration(tmp_path: Path, below: str, name: str) -> None:
    with pytest.raises(GatewayError, match="nginx cannot be configured"):
        Native(tmp_path / below / "gateway", name, program(tmp_path, "nginx version: nginx/1.28.0"))


def test_the_unit_can_do_little(tmp_path: Path) -> None:
    found = program(tmp_path, "nginx version: nginx/1.28.0")
    unit = Native(tmp_path / "gateway", "gateway", found)._unit()
    for line in (
        "NoNewPrivileges=true",
        "ProtectSystem=strict",
        f"ReadWritePaths={tmp_path}/gateway/run {tmp_path}/logs",
    ):
        assert line in unit.splitlines()
    assert f"ExecStart={found} -e {tmp_path}/logs/gateway-error.log -c {tmp_path}/gateway/current/nginx.conf" in unit


def test_another_program_with_the_same_number_is_not_ours(tmp_path: Path) -> None:
    native = Native(tmp_path / "gateway", "gateway", program(tmp_path, "nginx version: nginx/1.28.0"), "none")
    Path(native.scratch).mkdir(parents=True)
    Path(native.scratch, "nginx.pid").write_text("1\n")
    assert not native.running()


class Engine:
    """A stand-in for the engine's client: it has at most one container, and writes down what it is told."""

    def __init__(self, labels: Any = None, running: bool = True) -> None:
        self.labels, self.state, self.calls = labels, running, []  # type: ignore

    def ask(self, *arguments: str) -> Answer:
        self.calls.append(arguments)
        if arguments[0] == "inspect" and self.labels is None:
            return Answer(1, "", "Error: No such container: gateway")
        seen = [{"Config": {"Labels": self.labels}, "State": {"Running": self.state}}]
        return Answer(0, json.dumps(seen), "")


def container(engine: Engine, image: str = "sha256:1") -> Container:
    return Container(Path("/opt/x/gateway"), "gateway", image, engine)  # type: ignore


def test_the_container_can_do_little() -> None:
    engine = Engine()
    container(engine).start()
    (made,) = [call for call in engine.calls if call[0] == "run"]
    wanted = {"--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--pull=never", "sha256:1"}
    assert wanted <= set(made)
    assert any(part.startswith("--volume=/opt/x/gateway:/etc/xinference-gateway:ro") for part in made)


def test_what_the_engine_would_not_take_is_seen_while_the_one_before_still_runs() -> None:
    engine = Engine({DEFINITION: "1"})
    gateway = Container(Path("/opt/x/gateway"), "gateway", "sha256:1", engine, "1 hundred", 0)  # type: ignore
    gateway.check("1234")
    gateway.start()
    (tried, *_others), (made,) = engine.calls, [call for call in engine.calls if "--name" in call]
    options = {part for part in made if part.startswith("--log")}
    assert len(options) == 3 and options <= set(tried) and "--rm" in tried


def test_one_that_was_made_otherwise_is_made_anew() -> None:
    label = {DEFINITION: container(Engine())._definition()}
    assert container(Engine(label)).running()
    assert not container(Engine(label), "sha256:2").running()
    assert not container(Engine(label, running=False)).running()
    assert not container(Engine()).running()


def test_a_container_of_somebody_else_is_left_alone() -> None:
    engine = Engine({"theirs": "yes"})
    with pytest.raises(GatewayError, match="is not of this collection"):
        container(engine).stop()
    assert {call[0] for call in engine.calls} == {"inspect"}


def test_a_reload_sends_no_signal_by_the_engine() -> None:
    """The engine would take the container for stopped by hand, and not start it after a reboot."""
    engine = Engine()
    container(engine).reload()
    ((verb, name, *command),) = engine.calls
    assert (verb, name, command[0], command[-2:]) == ("exec", "gateway", "nginx", ["-s", "reload"])
