# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ship what a host needs from the bundle on the controller (documentation: plugins/modules/xinference_ship.py)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ansible import constants as C
from ansible import context
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.keep import packed
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle, BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import IMAGES
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.sizes import bytes_of
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import (
    TrustError,
    signers_text,
)
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import packed as packed_index
from ansible_collections.airgap.xinference.plugins.module_utils.host.system_facts import aes
from ansible_collections.airgap.xinference.plugins.plugin_utils.bundles import (
    ALLOW_CODE,
    ALWAYS,
    LIBRARIES,
    bundle_path,
    code_refusals,
    select,
    verified,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.fanout import Source
from ansible_collections.airgap.xinference.plugins.plugin_utils.fleet import Fleet, refusal_text, refusals
from ansible_collections.airgap.xinference.plugins.plugin_utils.host_process import Launcher
from ansible_collections.airgap.xinference.plugins.plugin_utils.images import Images, bare, load, with_layers
from ansible_collections.airgap.xinference.plugins.plugin_utils.rereading import Reread, read_again, rows, told
from ansible_collections.airgap.xinference.plugins.plugin_utils.screen import Screen, screen
from ansible_collections.airgap.xinference.plugins.plugin_utils.shipping import (
    Answer,
    Shipment,
    ShippingError,
    describe,
    missing_blobs,
    ship,
    summary,
    together,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.transport import (
    PutFile,
    Session,
    Stream,
    Transport,
    launchers,
)

ARGUMENTS = {
    "bundle": {"type": "str", "required": True},
    "root": {"type": "str", "required": True},
    "models": {"type": "list", "elements": "dict", "default": []},
    "backend": {"type": "str", "choices": sorted(ALWAYS), "default": "native"},
    "images": {"type": "list", "elements": "str", "default": []},
    "tools": {"type": "list", "elements": "str", "default": []},
    "engines": {"type": "str", "choices": ["image", "bundle", "wheels", "index"], "default": "image"},
    "docker_host": {"type": "str"},
    "signers": {"type": "str", "default": ""},
    "signers_on_host": {"type": "bool", "default": True},
    "cache_dir": {"type": "str"},
    "wait": {"type": "int", "default": 120},
    "streams": {"type": "int", "default": 1},
    "rate_limit": {"type": "str"},
    "defer": {"type": "bool", "default": False},
    "together": {"type": "list", "elements": "str", "default": []},
    "deep": {"type": "bool", "default": False},
    "deep_bundle": {"type": "bool", "default": False},
}

SLOWEST = 16 * 1024
"""Bytes a second below which a host would take the silence between two pieces for the end of its controller."""
SMALL_MANIFEST = 64 * 1024
"""Bytes; a larger manifest, of some hundred files, is sent as a blob when the host turns out to lack it."""


class ActionModule(ActionBase):
    """Runs on the controller; the host is asked through the module xinference_store."""

    _supports_check_mode = True
    _supports_diff = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ship, and return what was sent."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, options = self.validate_argument_spec(argument_spec=ARGUMENTS)
        host = task_vars.get("inventory_hostname", "host")

        try:
            options["rate_limit"] = rate_of(options["rate_limit"])
            options["signers"] = signers_text(options["signers"])
            bundle = Bundle.open(bundle_path(options["bundle"]), options["signers"])
            wishes = (options[name] for name in ("models", "backend", "images", "tools", "engines"))
            chosen = select(bundle, *wishes)
            if chosen.absent:
                raise ShippingError(
                    f"The bundle {bundle.root} does not have what {host} needs: {', '.join(chosen.absent)}. "
                    "Build it with the same inventory (playbooks/bundle.yml)."
                )
            refused = code_refusals(chosen.artifacts, options["models"])
            if refused:
                raise ShippingError(f"Nothing was sent. {'; '.join(refused)}. What to do: {ALLOW_CODE}.")
            with screen(host, self._task._uuid, task_vars) as say:
                job = _Job(self, bundle, chosen.artifacts, options, host, task_vars, say)
                result.update(job.rehearse() if self._task.check_mode else job.do_or_wait())
                say.count({"sent_bytes": 0} if result.get("waiting") else result)
        except (BundleError, ShippingError, TrustError, OSError) as error:
            raise AnsibleActionFail(f"{host}: {error}", result=getattr(error, "details", {})) from error
        return result

    def ask(self, module: str, arguments: dict[str, Any], task_vars: dict[str, Any]) -> Answer:
        """Run one of our modules on the host. Raises ShippingError with its message when it fails."""
        answer = self._execute_module(f"airgap.xinference.{module}", arguments, task_vars=task_vars)
        if answer.get("failed") or "missing" not in answer:
            raise ShippingError(str(answer.get("msg") or answer.get("module_stdout") or answer))
        return answer

    def launchers(self, aes_there: bool) -> list[Launcher]:
        """The ways to run a process on the host as the user who owns the store, best first."""
        become = self._connection.become
        users = self.get_become_option("become_user"), self._get_remote_user()
        if become is not None and users[0] == users[1] and any(users) and not C.BECOME_ALLOW_SAME_USER:
            become = None
        return launchers(self._connection, become, aes_there and aes())

    def interpreter(self, task_vars: dict[str, Any]) -> str:
        """The Python that modules run with on the host; known once one of them ran."""
        facts = task_vars.get("ansible_facts", {})
        return (self._used_interpreter or "").lstrip("#!") or facts.get("discovered_interpreter_python", "python3")

    def uploader(self) -> int | None:
        """The numeric user that uploads when the store belongs to another one (become), else None."""
        if not self._connection.become:
            return None
        answer = self._low_level_execute_command("id -u", sudoable=False)
        lines = answer.get("stdout", "").split()
        if answer.get("rc") or not lines or not lines[-1].isdigit():
            raise ShippingError(f"cannot tell who uploads: `id -u` said {answer.get('stdout', '')!r}")
        return int(lines[-1])

    def refuse_closed_area(self, path: str) -> None:
        """The uploading user must be able to reach the receiving area inside a root directory that is not its own."""
        quoted = self._connection._shell.quote(path)
        if self._low_level_execute_command(f"test -w {quoted}", sudoable=False).get("rc"):
            raise ShippingError(
                f"The user who logs in cannot write to {path}, which was made for it: a directory above is closed. "
                "Allow passing through (chmod o+x) on each directory above, or log in as the user you become."
            )


class _Waiting(Exception):
    """Something has to be sent, and is not to be sent yet; `answer` is what the host said."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class _Job:
    """What is to be shipped to one host, in two steps: everything but the layers of images, then what the engine lacks.

    The first step brings the library by which the engine can be asked.
    """

    def __init__(
        self,
        action: ActionModule,
        bundle: Bundle,
        artifacts: list[Artifact],
        options: dict[str, Any],
        host: str,
        task_vars: dict[str, Any],
        say: Screen,
    ) -> None:
        self.action, self.bundle, self.artifacts, self.options = action, bundle, artifacts, options
        self.host, self.task_vars, self.say = host, task_vars, say
        self.began = time.monotonic()
        self.read = 0
        self.owner: int | None = None
        self.parts: list[Artifact] = []
        self.told: set[str] = set()
        self.transports: list[Transport] = []
        self.images = [artifact for artifact in artifacts if artifact.kind == IMAGES]
        forks = int(context.CLIARGS.get("forks") or C.DEFAULT_FORKS)
        self.fleet = Fleet(host, options["together"], min(forks, int(action._task.throttle or forks)))
        say.expect(self.fleet.waiting)
        self.reread: Reread | None = None

    def rehearse(self) -> dict[str, Any]:
        """Ask what is missing. An image the host cannot ask its engine for yet counts with all its layers."""
        parts = [bare(artifact) for artifact in self.artifacts]
        self._verify(self.artifacts)
        self._read_again(parts)
        answer = self._ask_store(parts)
        if self.reread:
            made = [*answer["made"], *self.reread.made]
            answer = {**answer, "missing": {**answer["missing"], **self.reread.missing}, "made": made}
            answer["changed"] = answer["changed"] or bool(answer["missing"] or made)
        images = self._ask_for_layers(parts, answer)
        parts = [with_layers(artifact, images.missing) for artifact in self.artifacts]
        answer = {**answer, "missing": {**answer["missing"], **images.missing}}
        found = {"msg": told(self.reread, self.artifacts, False)} if self.reread else {}
        if found:
            self.say(found["msg"])
        return {
            **found,
            **self._numbers(answer["changed"] or images.changed, 0, answer["hashed_bytes"], 0),
            "diff": describe(self.bundle, parts, answer, self.options["root"]),
            "artifacts": answer["artifacts"],
            "images": images.rows,
            **self._deep(answer["made"]),
        }

    def do_or_wait(self) -> dict[str, Any]:
        """Ship, or say what is missing when that is not to be sent yet."""
        try:
            result = self.do()
        except _Waiting as waiting:
            return self._wait(waiting.answer)
        if self.options["defer"]:
            self.fleet.complete()
        return {**result, "waiting": False}

    def _wait(self, answer: Answer) -> dict[str, Any]:
        """Note down what is missing for those who ship to several hosts at once."""
        missing = missing_blobs(self.parts, answer)
        if not any(part.layers for part in self.parts if part.kind == IMAGES):
            missing.update(self._ask_for_layers(self.parts, answer).missing)
        # What was done for it so far belongs to the result of the task that goes on.
        counted = {"sent_bytes": answer["given_bytes"], "hashed_bytes": answer["hashed_bytes"] + self.read}
        counted["blobs"] = answer["blobs"]
        layers = {layer.digest for image in self.images for layer in image.layers}
        try:
            self.fleet.wait(missing, layers, counted)
        except OSError as error:
            raise ShippingError(
                f"{self.fleet.place} on the controller cannot be written: {error.strerror or error}. Free some there, "
                "set XDG_CACHE_HOME to another directory, or ship without fan-out (xinference_ship_fanout: false)."
            ) from error
        numbers = self._numbers(False, answer["given_bytes"], answer["hashed_bytes"], answer["blobs"])
        numbers["skipped_bytes"] = max(0, numbers["skipped_bytes"] - sum(missing.values()))
        return {**numbers, "waiting": True, "artifacts": {}}

    def do(self) -> dict[str, Any]:
        """Ship, and return what was sent."""
        parts = [bare(artifact) for artifact in self.artifacts]
        damaged = self._read_again(parts)
        shipments = [self._ship(parts)]
        for name, count in self.fleet.counted().items():
            setattr(shipments[0], name, getattr(shipments[0], name) + count)
        if damaged & {artifact.digest for artifact in self.artifacts}:
            # What an artifact consists of was not known while its manifest was damaged.
            self._read_again(parts)
            shipments.append(self._ship(parts))
        images = Images()

        def send(missing: dict[str, dict[str, int]]) -> None:
            shipments.append(self._ship([with_layers(each, missing.get(each.name, ())) for each in self.artifacts]))

        if self.images:
            images = load(self.images, self._ask_engine, send, self.say)
        total = together(shipments)
        result = {
            **self._numbers(total.changed or images.changed, total.sent_bytes, total.hashed_bytes, total.blobs),
            "transports": total.transports,
            "from_peers_bytes": total.from_peers_bytes,
            "peers": total.peers,
            "refused": refusals(total.refused),
            "artifacts": total.answer["artifacts"],
            "images": images.rows,
            "msg": summary(total, self._size(), time.monotonic() - self.began - images.seconds),
            **self._deep([path for shipment in shipments for path in shipment.answer["made"]]),
        }
        if self.reread:
            result["changed"] = result["changed"] or bool(self.reread.made)
            reread = told(self.reread, self.artifacts, True)
            result["msg"] = "; ".join([reread, *([result["msg"]] * total.changed)])
        if total.changed or self.reread:
            self.say(result["msg"])
        result["skipped_bytes"] = max(0, result["skipped_bytes"] - total.from_peers_bytes)
        if total.refused:
            self._tell(refusal_text(total.refused))
        if self.action._task.diff:
            result["diff"] = describe(self.bundle, self.artifacts, total.first, self.options["root"])
        return result

    def _ship(self, parts: list[Artifact]) -> Shipment:
        """Bring these parts of the artifacts into the store of the host."""
        self.parts = parts
        self._verify(parts)
        return ship(
            parts,
            lambda: self._ask_store(parts),
            self._connect,
            self.host,
            self.say,
        )

    def _read_again(self, parts: list[Artifact]) -> set[str]:
        """Have the host read all it has of these parts again, if that was asked for; what was damaged."""
        if not self.options["deep"]:
            return set()
        self.say.doing("verifying what is there")
        found = read_again(
            lambda after, seconds: self._ask_store(parts, deep=True, deep_after=after, deep_seconds=seconds),
            self.host,
            self.say,
        )
        self.reread = self.reread or Reread()
        self.reread.add(found)
        return set(found.damaged)

    def _deep(self, made: list[str]) -> dict[str, Any]:
        """What is told about the deep verification; nothing without one."""
        if self.reread is None:
            return {}
        return {
            "deep": {
                "files": self.reread.files,
                "read_bytes": self.reread.read_bytes,
                "seconds": round(self.reread.seconds, 2),
                "damaged": rows(self.reread, self.artifacts),
                "faults": self.reread.faults,
                "made": list(dict.fromkeys([*self.reread.made, *made])),
            }
        }

    def _ask_for_layers(self, parts: list[Artifact], answer: Answer) -> Images:
        """What the engine lacks. An image the host cannot ask its engine for yet counts with all its layers.

        It asks with a library that is shipped, too: after a teardown its wheels may be there, and not unpacked.
        """
        libraries = [part for part in parts if (part.kind, part.name) == LIBRARIES]
        unpacked = not any(Path(path).parent == Path(self.options["root"], "lib") for path in answer["made"])
        known = [image for image in self.images if unpacked and not missing_blobs([*libraries, bare(image)], answer)]
        images = load(known, self._ask_engine, lambda _missing: None, self.say, True) if known else Images()
        for image in self.images:
            if image not in known:
                images.changed = True
                images.missing.update({layer.digest: layer.size for layer in image.layers})
        return images

    def _connect(self, answer: Answer) -> list[Transport]:
        """The transports to this host; one that was found to be of no use stays away."""
        if self.options["defer"]:
            raise _Waiting(answer)
        if not self.transports:
            sources: dict[str, list[Source]] = self.fleet.sources()
            connection, receive = self.action._connection, answer["receive"]
            ways = self.action.launchers(receive["aes"])
            if ways:
                session = Session(
                    str(Path(receive["path"]).parent),  # without `~`, which means nothing to a receiver
                    max(0, self.options["wait"]),
                    self.options["streams"],
                    self.options["rate_limit"],
                    self.fleet.credential() if sources else None,
                )
                interpreter = self.action.interpreter(self.task_vars)
                stream = Stream(ways, interpreter, self.bundle, session, self._tell, self._names(), sources)
                self.transports.append(stream)
            elif connection.become is not None and connection.become.require_tty:
                self._tell(f"the become method {connection.become.name} needs a terminal; sending with put_file")
            path, temporary = receive["path"], C.DEFAULT_LOCAL_TMP
            self.transports.append(PutFile(connection, self.bundle, path, temporary, lambda: self._hand_over(path)))
        return self.transports

    def _hand_over(self, path: str) -> None:
        """Give the receiving area to the user who logs in, when that is another one than the owner of the store."""
        self.owner = self.action.uploader()
        if self.owner is not None:
            self._ask_store(self.parts)
            self.action.refuse_closed_area(path)

    def _tell(self, line: str) -> None:
        self.say(f"{self.host}: {line}")

    def _names(self) -> dict[str, str]:
        """What people call the blobs of files."""
        return {file.digest: f"{artifact.name}/{file.path}" for artifact in self.artifacts for file in artifact.files}

    def _verify(self, parts: list[Artifact]) -> None:
        """Refuse to send what is damaged in the bundle."""
        # What repairs a host is read again here first, and everything where that was asked for.
        doubted = set(self.reread.damaged) if self.reread else set()
        if self.options["deep_bundle"]:
            doubted |= {blob.digest for part in parts for blob in part.blobs}
        run = Path(C.DEFAULT_LOCAL_TMP, "xinference-read-again")
        damaged, read = verified(self.bundle, parts, self.options["cache_dir"], self.say, doubted, run)
        self.read += read
        if damaged:
            raise BundleError(
                f"The bundle {self.bundle.root} is damaged; nothing was sent to {self.host}. Copy it again:",
                [str(blob) for blob in damaged],
            )

    def _ask_store(self, parts: list[Artifact], **more: Any) -> Answer:
        wanted = [
            {
                **_named(part),
                "kind": part.kind,
                "layers": [layer.digest for layer in part.layers],
                "manifest": self._manifest(part),
            }
            for part in parts
        ]
        self.told |= {part.digest for part in parts}
        arguments = {"root": self.options["root"], "artifacts": wanted, "owner": self.owner, **self._trust(), **more}
        return self.action.ask("xinference_store", arguments, self.task_vars)

    def _trust(self) -> dict[str, Any]:
        """What the host needs to see for itself who signed the bundle."""
        if not self.options["signers"] or not self.options["signers_on_host"]:
            return {}
        signature = (self.bundle.signature or b"").decode("ascii", "replace")
        index = packed_index(self.bundle.index)
        return {"trust": {"index": index, "signature": signature, "signers": self.options["signers"]}}

    def _manifest(self, part: Artifact) -> str | None:
        """A manifest that goes with the first question about it, because it is small."""
        if part.digest in self.told or _named(part)["size"] > SMALL_MANIFEST:
            return None
        return packed(self.bundle.blob_path(part.digest).read_bytes())

    def _ask_engine(self, images: list[Artifact], complete: set[str]) -> Answer:
        self.say.doing("images to the engine")
        wanted = [{**_named(image), "complete": image.name in complete} for image in images]
        arguments = {"root": self.options["root"], "images": wanted, "docker_host": self.options["docker_host"]}
        return self.action.ask("xinference_image", arguments, self.task_vars)

    def _size(self) -> int:
        return sum(Bundle(self.bundle.root, self.artifacts).blobs.values())

    def _numbers(self, changed: bool, sent: int, hashed: int, blobs: int) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {
            "changed": changed,
            "sent_bytes": sent,
            "hashed_bytes": hashed + self.read + (self.reread.hashed_bytes if self.reread else 0),
            "skipped_bytes": max(0, self._size() - sent),
            "deduplicated_bytes": deduplicated(self.artifacts),
            "blobs": blobs,
            "seconds": round(seconds, 2),
            "rate": round(sent / seconds) if seconds > 0 else 0,
        }


def rate_of(text: str | None) -> int | None:
    """Bytes a second that a limit lets pass, None for no limit.

    Raises ShippingError for what is no number of bytes, and for what lets nothing pass, most likely without its unit.
    """
    if not text:
        return None
    how = "Say 50M for 50 MiB a second, or leave it empty for no limit (xinference_ship_rate_limit)."
    try:
        rate = bytes_of(text)
    except ValueError as error:
        raise ShippingError(f"The rate limit {error}. {how}") from error
    if rate < SLOWEST:
        raise ShippingError(f"A rate limit of {rate} bytes a second is too low to ship anything. {how}")
    return rate


def deduplicated(artifacts: list[Artifact]) -> int:
    """Bytes of files and layers that occur more than once, be it in one artifact or in several, and travel once."""
    once = {file.digest: file.size for artifact in artifacts for file in artifact.files}
    once |= {layer.digest: layer.size for artifact in artifacts for layer in artifact.layers}
    return sum(artifact.size for artifact in artifacts) - sum(once.values())


def _named(artifact: Artifact) -> dict[str, Any]:
    """An artifact as the modules on the host want it named; the size is its manifest's, in bytes."""
    size = next(blob.size for blob in artifact.blobs if blob.digest == artifact.digest)
    return {"name": artifact.name, "digest": artifact.digest, "size": size}
