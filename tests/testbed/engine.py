# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The machine's own Docker Engine: installed and started when missing, called through its client.

Nothing keeps an engine running between test runs, so everything that needs one calls `ensure()` first. What was
started here is stopped by `stop()`; an engine that ran before is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

SOCKET = "/var/run/docker.sock"
# Beside the engine's own files; the pid file tells an engine of ours from one that was there before.
RUN = Path("/run/airgap-xinference-testbed")
PID_FILE = RUN / "dockerd.pid"
LOG = RUN / "dockerd.log"
START_LIMIT = 60.0
STOP_LIMIT = 60.0

# Program -> Debian package.
PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "iptables": "iptables",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "debootstrap": "debootstrap",
}

# Debian 12 has no Compose v2; the binary of Debian 13 runs on it (it needs libc 2.34 and nothing else).
COMPOSE_VERSION = "2.26.1"
COMPOSE_PACKAGE = "pool/main/d/docker-compose/docker-compose_2.26.1-4_amd64.deb"
COMPOSE_SHA256 = "47681197cb2b1ab88206b42a1a92fc75f50d9530a6322d03494a473eed0408ea"
COMPOSE_IN_PACKAGE = "usr/libexec/docker/cli-plugins/docker-compose"
PLUGINS = Path("/usr/local/lib/docker/cli-plugins")


class TestbedError(Exception):
    """The testbed cannot do what was asked; the text says why and what to do."""

    __test__ = False  # or pytest takes it for a test


def cache() -> Path:
    """Directory of what is kept between runs: wheels, archives of images, the Compose plugin."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "airgap-xinference" / "testbed"


def say(text: str) -> None:
    """Tell the person who waits what goes on; standard output stays free for results."""
    print(text, file=sys.stderr, flush=True)


def run(
    command: Sequence[str],
    *,
    check: bool = True,
    timeout: float = 900,
    env: Optional[dict] = None,
    text: Optional[str] = None,
) -> str:
    """Run a command and return what it wrote to standard output; `text` is its standard input.

    Raises TestbedError with the command's last words when it fails and `check` is set, and when it cannot be run.
    """
    given: Dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=timeout, env=env, check=False, **given
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TestbedError(f"{command[0]} could not be run: {error}") from error
    if check and done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise TestbedError(f"`{' '.join(command)[:300]}` ended with {done.returncode}: {words}")
    return done.stdout


def docker(
    *arguments: str,
    check: bool = True,
    timeout: float = 900,
    env: Optional[dict] = None,
    text: Optional[str] = None,
) -> str:
    """Call the client of the machine's engine, whatever DOCKER_HOST or a context say; otherwise like run()."""
    command = ["docker", "--host", f"unix://{SOCKET}", *arguments]
    return run(command, check=check, timeout=timeout, env=env, text=text)


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time do the work called `name`; the others wait."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f".{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- packages ---------------------------------------------------------------------------------------------------------


def _missing() -> List[str]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=path)})


def install() -> None:
    """Install the Debian packages that are missing. Raises TestbedError when that takes another user or system."""
    packages = _missing()
    if not packages:
        return
    wanted = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise TestbedError(f"Missing on this machine: {wanted}. As root: apt-get install {wanted}")
    say(f"Installing {wanted} ...")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "--quiet=2"], env=quiet)
    run(["apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", *packages], env=quiet)


def mirror() -> str:
    """Base URL of the Debian mirror that apt uses on this machine, with a slash at its end."""
    targets = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL) $(COMPONENT)"])
    return mirror_in(targets)


def mirror_in(targets: str) -> str:
    """The first mirror of Debian's component main in lines `URI ORIGIN LABEL COMPONENT`. Raises TestbedError."""
    for line in targets.splitlines():
        uri, rest = line.split(" ", 1)
        if rest == "Debian Debian main" and urllib.parse.urlparse(uri).scheme in ("http", "https"):
            return uri.rstrip("/") + "/"
    raise TestbedError("apt on this machine has no source of Debian's component main (see /etc/apt/sources.list.d)")


def compose_plugin() -> Path:
    """Compose v2 as a file, fetched from Debian's pool when it is not in the cache."""
    target = cache() / f"docker-compose-{COMPOSE_VERSION}"
    with lock("compose"):
        if not target.exists():
            say(f"Fetching Compose {COMPOSE_VERSION} ...")
            work = cache() / ".compose"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            package = work / "compose.deb"
            # apt's own downloader: it knows this machine's proxies and checks the digest.
            url = mirror() + COMPOSE_PACKAGE
            run(["/usr/lib/apt/apt-helper", "download-file", url, str(package), f"SHA256:{COMPOSE_SHA256}"])
            run(["dpkg", "-x", str(package), str(work)])
            (work / COMPOSE_IN_PACKAGE).rename(target)
            shutil.rmtree(work)
    return target


def _install_compose() -> None:
    """Give the machine's client the Compose plugin if it has none."""
    try:
        docker("compose", "version")
        return
    except TestbedError:
        say("Giving this machine's Docker client the Compose plugin ...")
    PLUGINS.mkdir(parents=True, exist_ok=True)
    shutil.copy2(compose_plugin(), PLUGINS / "docker-compose")


# --- engine -----------------------------------------------------------------------------------------------------------


def _own_pid() -> Optional[int]:
    """Process id of the engine that was started here, or None when it does not run."""
    try:
        pid = int(PID_FILE.read_text())
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if name == "dockerd" else None


def answers() -> bool:
    """Whether an engine answers on this machine."""
    return Path(SOCKET).exists() and bool(docker("version", "--format", "{{.Server.Version}}", check=False).strip())


def start() -> None:
    """Start the engine when it does not answer and wait until it does."""
    with lock("engine"):
        if answers():
            return
        if os.geteuid() != 0:
            raise TestbedError("The Docker Engine of this machine is down and only root may start it.")
        RUN.mkdir(parents=True, exist_ok=True)
        dockerd = shutil.which("dockerd") or "/usr/sbin/dockerd"
        if _own_pid() is None:
            say("Starting the Docker Engine of this machine ...")
            # A pid file left by an engine that died keeps a new one from starting.
            PID_FILE.unlink(missing_ok=True)
            with LOG.open("ab") as log:
                subprocess.Popen(
                    [dockerd, "--pidfile", str(PID_FILE)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd="/",
                )
        deadline = time.monotonic() + START_LIMIT
        while not answers():
            if time.monotonic() > deadline:
                tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-15:])
                raise TestbedError(
                    f"The Docker Engine did not come up in {START_LIMIT:.0f} s; {LOG} ends with:\n{tail}"
                )
            time.sleep(0.2)


def stop() -> bool:
    """Stop the engine if it was started here; returns whether it was."""
    with lock("engine"):
        pid = _own_pid()
        if pid is None:
            return False
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_LIMIT
        while _own_pid() is not None:
            if time.monotonic() > deadline:
                raise TestbedError(f"The Docker Engine (process {pid}) did not stop in {STOP_LIMIT:.0f} s; see {LOG}")
            time.sleep(0.2)
        PID_FILE.unlink(missing_ok=True)
        return True


def ensure() -> None:
    """Packages, engine and Compose are there and the engine answers."""
    install()
    start()
    _install_compose()
