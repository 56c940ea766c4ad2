# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The door to the testbed on the command line; `testbed --help` tells what it opens."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Callable

from . import engine, hosts, images
from .spec import SpecError, parse_hosts

Action = Callable[[argparse.Namespace], None]

EXAMPLES = """\
examples:
  testbed images                             build what is missing and name the images
  testbed up demo                            two hosts, gpu-1 and gpu-2, with two simulated GPUs each
  testbed up demo gpu-1:gpus=4 old:compose=v1,login=deploy
  testbed ssh demo gpu-1 nvidia-smi -- -L
  testbed reboot demo gpu-1
  testbed down demo                          nothing stays
keys of a host: login=root|deploy|plain gpus= gpu_memory=MIB gpu_used=MIB driver= cuda= nvidia=yes|no
  compose=v2|v1|none engine=yes|no internet=yes|no disk=300m engine_disk=1g
"""


def bed(options: argparse.Namespace) -> hosts.Testbed:
    """The testbed that the options name."""
    return hosts.Testbed(options.name, options.directory)


def up(options: argparse.Namespace) -> None:
    """Bring up, and say where the inventory is."""
    began = time.monotonic()
    made = bed(options)
    made.up(parse_hosts(options.hosts or ["gpu-1", "gpu-2"]))
    engine.say(f"Ready after {time.monotonic() - began:.1f} s. Inventory:")
    print(made.inventory)


def down(options: argparse.Namespace) -> None:
    """Remove."""
    bed(options).down()


def status(options: argparse.Namespace) -> None:
    """List engine and hosts."""
    print(f"engine: {'answers' if engine.answers() else 'is down'}")
    for name, entries in sorted(hosts.standing().items()):
        for entry in sorted(entries, key=lambda entry: entry["host"]):
            print(f"{name:<20} {entry['host']:<20} {entry['status']}")


def build(options: argparse.Namespace) -> None:
    """Build, and name what there is."""
    if options.only == "host":
        engine.ensure()
        print(images.host())
    else:
        print("\n".join(images.build()))


def reboot(options: argparse.Namespace) -> None:
    """Reboot the hosts named, or all."""
    found = bed(options).load()
    for name in options.hosts or found:
        found[name].reboot()


def ssh(options: argparse.Namespace) -> None:
    """Become an ssh client."""
    command = bed(options).load()[options.host].ssh_command(options.user)
    os.execvp(command[0], [*command, *options.command])


def power(options: argparse.Namespace) -> None:
    """Start or stop the machine's engine."""
    if options.state == "start":
        engine.ensure()
    elif not engine.stop():
        engine.say("The engine was not started by the testbed and is left alone.")


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = argparse.ArgumentParser(
        prog="testbed",
        description="Air-gapped GPU hosts (simulated GPUs) and real Xinference images for tests.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doors = top.add_subparsers(required=True, metavar="COMMAND")

    def door(name: str, action: Action, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        made = doors.add_parser(name, help=text, description=text)
        made.set_defaults(action=action)
        if named:
            made.add_argument("--directory", type=Path, help="where key, known_hosts and inventory/hosts.yml lie")
            made.add_argument("name", help="name of the testbed")
        return made

    made = door("up", up, "bring hosts up; an earlier testbed of that name is replaced")
    made.add_argument("hosts", nargs="*", metavar="HOST[:KEY=VALUE,...]")
    door("down", down, "remove a testbed completely")
    door("reboot", reboot, "stop and start hosts, all when none is named").add_argument("hosts", nargs="*")
    made = door("ssh", ssh, "log in to a host, or run a command there")
    made.add_argument("--user", help="root, deploy or plain")
    made.add_argument("host")
    made.add_argument("command", nargs="*")
    door("status", status, "list the testbeds of this machine", named=False)
    made = door("images", build, "build the images that are missing", named=False)
    made.add_argument("only", nargs="?", choices=["host", "all"], default="all")
    made = door("engine", power, "start the machine's engine, or stop the one started here", named=False)
    made.add_argument("state", choices=["start", "stop"])
    return top


def main() -> int:
    """Do what the command line asks."""
    options = parser().parse_args()
    try:
        options.action(options)
    except (engine.TestbedError, SpecError) as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
