# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check everything before anything is changed (documentation: plugins/modules/xinference_preflight.py)."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible.plugins.action import ActionBase
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.layout import Artifact, Bundle, BundleError
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.manifest import WHEELS_PYTHON
from ansible_collections.airgap.xinference.plugins.module_utils.bundle.trust import TrustError, signers_text
from ansible_collections.airgap.xinference.plugins.plugin_utils.bundles import (
    ALLOW_CODE,
    ALWAYS,
    WHEELHOUSE,
    bundle_path,
    code_refusals,
    select,
    verified,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.findings import (
    PROBLEM,
    Finding,
    Needs,
    message,
    report,
    unusable,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness import (
    judge_access,
    judge_host,
    judge_models,
    wanted_gpus,
    with_files,
)
from ansible_collections.airgap.xinference.plugins.plugin_utils.readiness_system import skew
from ansible_collections.airgap.xinference.plugins.plugin_utils.screen import Screen, screen
from ansible_collections.airgap.xinference.plugins.plugin_utils.variables import judge_variables

ARGUMENTS = {
    "bundle": {"type": "str", "required": True},
    "cache_dir": {"type": "str"},
    "signers": {"type": "str", "default": ""},
    "signers_on_host": {"type": "bool", "default": True},
    "root": {"type": "str", "required": True},
    "models": {"type": "list", "elements": "raw", "default": []},
    "registrations": {"type": "list", "elements": "dict", "default": []},
    "backend": {"type": "str", "choices": sorted(ALWAYS), "default": "native"},
    "gpus": {"type": "list", "elements": "str", "default": []},
    "address": {"type": "str", "default": "127.0.0.1"},
    "open_allowed": {"type": "bool", "default": False},
    "login": {"type": "str", "choices": ["", "missing", "short"], "default": ""},
    "port": {"type": "int", "default": 9997},
    "python": {"type": "str"},
    "image": {"type": "str", "default": ""},
    "images": {"type": "list", "elements": "str", "default": []},
    "tools": {"type": "list", "elements": "str", "default": []},
    "engines": {"type": "str", "choices": ["image", "bundle", "wheels", "index"], "default": "image"},
    "docker_host": {"type": "str"},
    "min_memory": {"type": "str", "default": "0"},
    "max_clock_skew": {"type": "float", "default": 300},
    "airgap_addresses": {"type": "list", "elements": "str", "default": []},
    "airgap_timeout": {"type": "float", "default": 2},
    "require_airgap": {"type": "bool", "default": False},
    "report_only": {"type": "bool", "default": False},
}


class ActionModule(ActionBase):
    """Judges on the controller what the module xinference_host_info tells of the host."""

    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return all findings, and fail with them in one message unless only a report is wanted."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        _validation, options = self.validate_argument_spec(argument_spec=ARGUMENTS)
        host = task_vars.get("inventory_hostname", "host")
        fields = ("root", "address", "port", "gpus", "models", "backend", "image", "tools")
        limits = ("max_clock_skew", "require_airgap", "open_allowed", "login")
        needs = Needs(
            **{field: options[field] for field in (*fields, *limits)},
            registrations=with_files(options["registrations"]),
            min_memory=human_to_bytes(options["min_memory"]),
        )
        with screen(host, self._task._uuid, task_vars) as say:
            bundle, artifacts, findings = self._look_at_bundle(options, say)
        findings += _controller(needs) + judge_variables(task_vars) + judge_access(needs) + judge_models(needs, bundle)
        facts = self._look_at_host(options, needs, artifacts, task_vars)
        findings += judge_host(needs, facts, bundle, artifacts) if "place" in facts else [unusable(facts)]
        problems = [finding for finding in findings if finding.severity == PROBLEM]
        rows = [finding.row() for finding in findings]
        if problems and not options["report_only"]:
            raise AnsibleActionFail(report(host, problems))
        result.update(changed=False, findings=rows, ready=not problems, msg=message(rows) or f"{host} is ready")
        return result

    def _look_at_bundle(
        self, options: dict[str, Any], say: Screen
    ) -> tuple[Bundle | None, list[Artifact], list[Finding]]:
        """Open and verify the part of the bundle this host needs."""
        cure = "build the bundle again with this inventory (playbooks/bundle.yml)"
        try:
            bundle = Bundle.open(bundle_path(options["bundle"]), signers_text(options["signers"]))
            entries = [entry for entry in options["models"] if isinstance(entry, dict)]
            images = ([options["image"]] if options["image"] else []) + options["images"]
            chosen = select(bundle, entries, options["backend"], images, options["tools"], options["engines"])
            damaged, _read = verified(bundle, chosen.artifacts, options["cache_dir"], say)
        except TrustError as error:
            return None, [], [Finding("signature", "", str(error), "")]
        except BundleError as error:
            problems = error.problems or [error.summary]
            path = bundle_path(options["bundle"])
            return None, [], [Finding("bundle", "", f"{path}: {problem}", "") for problem in problems]
        except OSError as error:
            return None, [], [Finding("bundle", "", str(error), "")]
        # Absent models are named by the check of the model entries, which knows whose they are.
        absent = [reference for reference in chosen.absent if not reference.startswith("models/")]
        findings = [Finding("bundle", f"{reference} in {bundle.root}", "not there", cure) for reference in absent]
        wanted = f"undamaged blobs in {bundle.root}"
        findings += [
            Finding("bundle", wanted, str(blob), "copy the bundle to this controller again") for blob in damaged
        ]
        refused = code_refusals(chosen.artifacts, entries)
        findings += [Finding("code", "models without code of their own", text, ALLOW_CODE) for text in refused]
        return bundle, chosen.artifacts, findings

    def _look_at_host(
        self, options: dict[str, Any], needs: Needs, artifacts: list[Artifact], task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        wheelhouse = next((entry for entry in artifacts if (entry.kind, entry.name) == WHEELHOUSE), None)
        arguments = {
            "root": needs.root,
            "address": needs.address,
            "port": needs.port,
            "python": options["python"] or None,
            "python_tag": wheelhouse.annotations.get(WHEELS_PYTHON) if wheelhouse else None,
            "gpus": bool(wanted_gpus(needs)),
            "engine": needs.backend == "docker",
            "signatures": bool(options["signers"].strip()) and options["signers_on_host"],
            "docker_host": options["docker_host"],
            "addresses": options["airgap_addresses"],
            "timeout": options["airgap_timeout"],
        }
        before = time.time()
        try:
            facts = self._execute_module("airgap.xinference.xinference_host_info", arguments, task_vars=task_vars)
        except AnsibleError as error:
            return {"unreachable": isinstance(error, AnsibleConnectionFailure), "msg": str(error)}
        if "clock" in facts:
            facts["clock_skew"] = skew(float(facts["clock"]), before, time.time())
        return facts


def _controller(needs: Needs) -> list[Finding]:
    """What a backend needs where Ansible runs; nothing but the import tells whether it is there."""
    if needs.backend != "docker" or find_spec("ansible_collections.community.docker") is not None:
        return []
    cure = "pip install -r requirements/docker.txt there, or ansible-galaxy collection install community.docker"
    return [Finding("controller", "the collection community.docker on the controller", "it is not there", cure)]
