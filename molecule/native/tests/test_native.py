# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server without Docker that an ordinary user runs, with everything its own; clients outside are served."""

from __future__ import annotations

from typing import Any

from conftest import Run, Site

ROOT = "/home/plain/xinference"


def test_the_user_is_an_ordinary_one(host: Any) -> None:
    assert host.user().name == "plain" and host.run("sudo -n true").rc != 0


def test_the_server_and_everything_below_the_root_belong_to_the_user(host: Any) -> None:
    servers = [process for process in host.process.filter(user="plain") if "xinference-local" in process.args]
    assert servers and host.process.filter(user="root", comm="xinference-local") == []
    assert host.check_output(f"find {ROOT} ! -user plain") == ""


def test_the_port_is_the_one_that_was_asked_for(host: Any) -> None:
    assert host.socket("tcp://0.0.0.0:9997").is_listening


def test_the_model_is_ready_and_a_client_outside_gets_embeddings(site: Site) -> None:
    assert site.get("/v1/cluster/version")["version"].startswith("4.1.0")
    assert [(entry["model_uid"], entry["status"]) for entry in site.get("/v1/models/instances")] == [
        ("minilm", "READY")
    ]
    (entry,) = site.post("/v1/embeddings", model="minilm", input="a client outside")["data"]
    assert len(entry["embedding"]) == 384


def test_there_is_no_way_out(host: Any) -> None:
    assert host.check_output("ip route show default") == ""
    outside = "import socket; socket.create_connection(('192.0.2.1', 443), 3)"
    assert "unreachable" in host.run(f'python3 -c "{outside}"').stderr


def test_running_site_again_changes_nothing(playbook: Any, site: Site) -> None:
    run: Run = playbook("site")
    assert run.status == 0 and run.recap(site.name)["changed"] == 0, run.output[-4000:]
    print(f"\nsite.yml again: 1 host, {run.tasks} tasks, {run.seconds:.1f} s, changed=0")
