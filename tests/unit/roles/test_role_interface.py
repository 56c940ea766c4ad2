# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a role promises (argument_specs) is what it has (defaults), and no knob is read behind its back."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
import yaml
from ansible_collections.airgap.xinference.plugins.modules import xinference_release

ROOT = Path(__file__).parents[3]
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
ROLE_NAMES = sorted((role.name for role in ROLES), key=len, reverse=True)

# Facts about the inventory that several roles share; only a role's defaults may read them (DESIGN, "Variables").
KNOB = re.compile(r"\bxinference_[a-z_]+")


def options(role: Path) -> dict:
    return yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"].get("options", {})


def defaults(role: Path) -> dict:
    path = role / "defaults/main.yml"
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_argument_specs_and_defaults_name_the_same_variables(role: Path) -> None:
    assert set(options(role)) == set(defaults(role))


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_option_is_described(role: Path) -> None:
    assert [name for name, option in options(role).items() if not option.get("description")] == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_no_specification_repeats_what_may_be_secret(role: Path) -> None:
    """Where an argument is wrong, Ansible prints the specification with every default in it, templates resolved."""
    secret = re.compile(r"\bxinference_(?:password|api_keys?|models|registrations|server_secrets|gateway_keys)\b")
    shown = [name for name, option in options(role).items() if secret.search(str(option.get("default")))]
    assert shown == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_carry_the_name_of_their_role(role: Path) -> None:
    assert [name for name in defaults(role) if not name.startswith(role.name + "_")] == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_tasks_read_only_variables_of_their_own_role(role: Path) -> None:
    """A task that read a collection knob or another role's variable would make the role useless on its own."""
    modules = {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}
    strangers = set()
    for path in sorted(role.rglob("*")):
        if path.suffix not in {".yml", ".j2"} or path.parent.name in {"defaults", "meta"}:
            continue
        # Comments and messages (names in backticks) may speak of anything.
        for word in KNOB.findall(re.sub(r"(?m)^\s*#.*$|`[a-z_]+`", "", path.read_text())):
            if word not in modules and word not in ROLE_NAMES and not word.startswith(role.name + "_"):
                strangers.add(f"{path.relative_to(ROOT)}: {word}")
    assert sorted(strangers) == []


def test_shipping_from_host_to_host_asks_for_the_same_as_shipping() -> None:
    """An option that is given to the first task only would be lost where several hosts are shipped to."""
    tasks = ROOT / "roles/xinference_ship/tasks"
    alone = yaml.safe_load((tasks / "main.yml").read_text())[0]["airgap.xinference.xinference_ship"]
    block = yaml.safe_load((tasks / "together.yml").read_text())[0]["block"]
    together = next(task for task in block if "airgap.xinference.xinference_ship" in task)
    own = {"deep", "defer", "together"}
    assert {key: value for key, value in together["airgap.xinference.xinference_ship"].items() if key not in own} == {
        key: value for key, value in alone.items() if key not in own
    }


def test_every_step_on_a_host_asks_the_same_engine() -> None:
    """The engine that serves has to be the one that was looked at, loaded and torn down."""
    asked = {name: value for role in ROLES for name, value in defaults(role).items() if name.endswith("_docker_host")}
    del asked["xinference_bundle_docker_host"]  # of the connected machine
    assert asked.pop("xinference_server_docker_host") == ""
    assert set(asked.values()) == {"{{ xinference_server_docker_host | default('') }}"} and len(asked) == 8
    status = yaml.safe_load((ROOT / "playbooks/status.yml").read_text())[1]["tasks"][0]
    assert "xinference_server_docker_host" in status["airgap.xinference.xinference_status"]["docker_host"]


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("Error response from daemon: removal of container 0fa7258f is already in progress", True),
        ('Conflict. The container name "/8d80_xinference-server-1" is already in use by container "10c9".', True),
        ("Error response from daemon: No such container: 0fa7258f", True),
        ("listen tcp4 127.0.0.1:9997: bind: address already in use", False),
        ("No such image: xinference", False),
    ],
)
def test_what_another_run_did_meanwhile_is_tried_again_and_nothing_else(said: str, again: bool) -> None:
    role = ROOT / "roles/xinference_server"
    pattern = yaml.safe_load((role / "vars/main.yml").read_text())["__xinference_server_meanwhile"]
    assert bool(re.search(pattern, said)) is again
    assert "is search(__xinference_server_meanwhile)" in (role / "tasks/docker.yml").read_text()


def test_nothing_goes_by_what_may_have_been_censored() -> None:
    """With a secret such as `1` a digest or a path in the result of the release is no longer itself."""
    release = yaml.safe_load(xinference_release.RETURN)
    texts = [path.read_text() for path in (ROOT / "roles/xinference_server/tasks").glob("*.yml")]
    used = set(re.findall(r"__xinference_server_release\.(\w+)", "".join(texts)))
    assert used and {release[name]["type"] for name in used} == {"bool"}


@pytest.mark.parametrize(("check_mode", "redefined"), [(True, True), (True, False), (False, True)])
def test_only_check_mode_goes_by_the_release_that_is_not_in_force(check_mode: bool, redefined: bool) -> None:
    tasks = yaml.safe_load((ROOT / "roles/xinference_server/tasks/native.yml").read_text())
    (service,) = [task[name] for task in tasks for name in task if name == "airgap.xinference.xinference_service"]
    known = {"ansible_check_mode": check_mode, "__xinference_server_release": {"redefined": redefined}}
    assert jinja2.Environment().from_string(service["redefined"]).render(known) == str(check_mode and redefined)
