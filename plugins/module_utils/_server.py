# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules that talk to a server share with Ansible. Private to this collection."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Dict, Iterator, Type

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib

from ._ansible import failing
from .server.apply import Applied
from .server.client import REQUESTS_ERROR, Client, ServerError
from .server.diagnose import diagnose


@contextmanager
def talking(module: AnsibleModule, *errors: Type[Exception]) -> Iterator[None]:
    """`failing` for a block that talks to a server: a known failure gets its cause and cure from the table."""
    with failing(module, *errors):
        try:
            yield
        except ServerError as error:
            known = diagnose(error.detail or str(error))
            if known:
                details = {**getattr(error, "details", {}), "diagnosis": asdict(known)}
                module.fail_json(msg=f"{error} Cause: {known.cause} Cure: {known.cure}", **details)
            raise


SERVER_OPTIONS: Dict[str, Dict[str, Any]] = {
    "endpoint": {
        "type": "str",
        "default": "http://127.0.0.1:9997",
        "fallback": (env_fallback, ["XINFERENCE_ENDPOINT"]),
    },
    "api_key": {"type": "str", "no_log": True, "fallback": (env_fallback, ["XINFERENCE_API_KEY"])},
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "ca_bundle": {"type": "path"},
    "request_timeout": {"type": "float", "default": 30.0},
}
"""Argument spec of every module that talks to a server; documented by the fragment `airgap.xinference.server`."""

SERVER_TOGETHER = [("username", "password")]
"""For `required_together` of the same modules."""


def client_from(module: AnsibleModule) -> Client:
    """The client of the server that the module's options name; sends nothing yet.

    Fails the module when `requests` is missing on the host.
    """
    if REQUESTS_ERROR:
        module.fail_json(
            msg=missing_required_lib("requests", reason="to talk to Xinference; the bundle carries it, see PYTHONPATH"),
            exception=REQUESTS_ERROR,
        )
    return Client(
        module.params["endpoint"],
        api_key=module.params["api_key"],
        username=module.params["username"],
        password=module.params["password"],
        ca_bundle=module.params["ca_bundle"],
        timeout=module.params["request_timeout"],
    )


def conclude(module: AnsibleModule, client: Client, applied: Applied) -> None:
    """End a module that changes models: the same results whether it changed something, nothing, or failed in part."""
    results = {
        "changed": applied.changed,
        "models": applied.models,
        "requests": client.requests_made,
        "diff": {"before": applied.before, "after": applied.after},
    }
    for notice in applied.notices:
        module.warn(notice)
    if applied.message:
        module.fail_json(msg=applied.message, **results)
    module.exit_json(**results)
