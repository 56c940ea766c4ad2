# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A typed client of one Xinference server; how requests are sent is in `transport`."""

from __future__ import annotations

import threading
from json import dumps
from typing import Any, Dict, List, Mapping, Optional, Tuple
from urllib.parse import quote

from .features import Features, features
from .transport import REQUESTS_ERROR, AccessRefused, ServerError, Transport, Unreachable, as_json, field, shaped

__all__ = ["REQUESTS_ERROR", "AccessRefused", "Client", "ServerError", "Unreachable"]

JSON = Dict[str, Any]


class Client:
    """One server at `endpoint`, e.g. `http://127.0.0.1:9997`.

    Give `api_key`, or `username` with `password` (logs in when first needed), or nothing; with both, the login is
    used, because the API keys of version 3 and later may not launch. `ca_bundle` is the path of a PEM file for an https
    endpoint signed by a private authority. `timeout` is the limit in seconds for one request, except where a method
    takes its own. Every method raises `ServerError` or one of its kinds; threads may share a client.
    """

    def __init__(
        self,
        endpoint: str,
        api_key: Optional[str] = None,
        username: Optional[str] = None,
        password: Optional[str] = None,
        ca_bundle: Optional[str] = None,
        timeout: float = 30.0,
    ) -> None:
        self._http = Transport(endpoint, api_key, username, password, ca_bundle, timeout)
        self._version: Optional[str] = None
        self._once = threading.Lock()

    @property
    def endpoint(self) -> str:
        """Address of the server without a slash at the end."""
        return self._http.endpoint

    @property
    def requests_made(self) -> int:
        """HTTP requests sent so far, repeated ones included."""
        return self._http.requests_made

    @property
    def has_credentials(self) -> bool:
        """Whether it was given a key or a login."""
        return self._http.has_credentials

    @property
    def refusal(self) -> Optional[AccessRefused]:
        """The refusal that ended the use of its credentials, None while there was none."""
        return self._http.refusal

    # -- the server

    def version(self) -> str:
        """The server's version, e.g. `4.1.0`; asked once."""
        with self._once:
            if self._version is None:
                path = "/v1/cluster/version"
                self._version = shaped(field(self._get(path), "version", path), str, path, "a text in `version`")
            return self._version

    @property
    def features(self) -> Features:
        """What this server can do, by its version."""
        return features(self.version())

    def auth_enabled(self) -> bool:
        """Whether the server asks for credentials; asked once, without sending any."""
        return self._http.auth_enabled()

    def status(self) -> JSON:
        """Uptime (s) and workers; answers without credentials as soon as the API is up. Never repeated."""
        path = "/status"
        answer = as_json(self._http.request("GET", path, public=True), "GET", path)
        found: JSON = shaped(answer, dict, path, "a dictionary")
        for told in shaped(found.get("workers") or {}, dict, path, "a dictionary in `workers`").values():
            shaped(told, dict, path, "a dictionary for each of `workers`")
        return found

    def cluster_info(self) -> List[JSON]:
        """Supervisor and workers: node_type, ip_address, gpu_count, gpu_vram_total (bytes)."""
        return shaped(self._get("/v1/cluster/info"), list, "/v1/cluster/info", "a list of dictionaries")

    # -- models

    def models(self) -> Dict[str, JSON]:
        """Models that serve, by uid. The server never tells their path or engine options."""
        path = "/v1/models"
        data = shaped(field(self._get(path), "data", path), list, path, "a list of models with an `id` each", ["id"])
        return {str(entry["id"]): entry for entry in data}

    def instances(self, uid: Optional[str] = None) -> List[JSON]:
        """Every model the server knows of with its `status`, also those being launched or failed."""
        path = "/v1/models/instances"
        answer = self._get(path, params={"model_uid": uid} if uid else None)
        return shaped(answer, list, path, "a list of instances with a `model_uid` each", ["model_uid"])

    def launch(self, payload: Mapping[str, Any], timeout: Optional[float] = None) -> str:
        """Launch a model from its launch fields, and return its uid.

        Where the server keeps the reason of a failure (`features.launch_returns_early`) this returns at once and the
        caller follows `instances` and `progress`. Elsewhere it returns when the model is ready, and `timeout` in
        seconds is how long that may take.
        """
        params = {"wait_ready": "false"} if self.features.launch_returns_early else None
        answer = self._write("POST", "/v1/models", params=params, json=dict(payload), timeout=timeout)
        return str(field(answer, "model_uid", "/v1/models"))

    def progress(self, uid: str) -> float:
        """How far a launch is, between 0 and 1; 0 for a model that is not being launched."""
        path = f"/v1/models/{_part(uid)}/progress"
        found = field(self._get(path), "progress", path)
        return float(shaped(found, (int, float), path, "a number in `progress`"))

    def cancel(self, uid: str) -> None:
        """Stop a launch that is under way."""
        self._write("POST", f"/v1/models/{_part(uid)}/cancel")

    def terminate(self, uid: str, timeout: Optional[float] = None) -> None:
        """Stop a model, or clear away one whose launch failed."""
        self._write("DELETE", f"/v1/models/{_part(uid)}", timeout=timeout)

    def engines(self, model_type: str, model_name: str) -> JSON:
        """Engines for a model: usable ones with their formats, others with the reason as a text.

        Empty where the server has no choice of engine for the type (`features.engine_types`).
        """
        if model_type not in self.features.engine_types:
            return {}
        kind = f"{_part(model_type)}/" if self.features.engines_by_type else ""
        path = f"/v1/engines/{kind}{_part(model_name)}"
        return shaped(self._get(path) or {}, dict, path, "a dictionary of engines")

    # -- registrations

    def registrations(self, model_type: str) -> List[JSON]:
        """All known models of a type: model_name, is_builtin."""
        path = f"/v1/model_registrations/{_part(model_type)}"
        return shaped(self._get(path), list, path, "a list of models with a `model_name` each", ["model_name"])

    def registration(self, model_type: str, name: str) -> Optional[JSON]:
        """The definition of a known model, or None when the server has none of that name."""
        path = f"/v1/model_registrations/{_part(model_type)}/{_part(name)}"
        try:
            found = self._get(path)
        except ServerError as error:
            if error.status == 400 and "not found" in error.detail.lower():
                return None
            raise
        if isinstance(found, list):
            found = found[0] if found else None
        return None if found is None else shaped(found, dict, path, "a definition, which is a dictionary")

    def register(self, model_type: str, definition: Mapping[str, Any], persist: bool = True) -> None:
        """Register a custom model. The server wants the definition as a JSON text inside the JSON."""
        body = {"model": dumps(dict(definition)), "persist": persist}
        self._write("POST", f"/v1/model_registrations/{_part(model_type)}", json=body)

    def unregister(self, model_type: str, name: str) -> None:
        """Forget a custom model."""
        self._write("DELETE", f"/v1/model_registrations/{_part(model_type)}/{_part(name)}")

    # -- accounts

    def setup_admin(self, token: Optional[str], username: str, password: str) -> None:
        """Make the first administrator. `token` is the setup token of servers that print one, else None."""
        body = {"username": username, "password": password}
        if token is not None:
            body["setup_token"] = token
        self._http.request("POST", "/v1/admin/setup", json=body, public=True)

    def login(self) -> None:
        """Log in now with user and password. One attempt; a refusal is final for this client."""
        self._http.login()

    def accepts(self, username: str, password: str) -> bool:
        """Whether somebody may log in with these, other than the client itself. One request, never repeated."""
        body = {"username": username, "password": password}
        try:
            self._http.request("POST", "/token", json=body, public=True)
        except AccessRefused as error:
            if error.status == 401:
                return False
            raise
        return True

    def users(self) -> List[JSON]:
        """All accounts: id, username, source, enabled, permissions."""
        path = "/v1/admin/users"
        return shaped(self._get(path), list, path, "a list of accounts with an `id` each", ["id", "username"])

    def make_user(self, username: str, password: str, permissions: List[str]) -> None:
        """Make a local account."""
        self._write(
            "POST", "/v1/admin/users", json={"username": username, "password": password, "permissions": permissions}
        )

    def change_user(self, user: int, **fields: Any) -> None:
        """Set `enabled` or `permissions` of an account."""
        self._write("PUT", f"/v1/admin/users/{user}", json=fields)

    def set_password(self, user: int, password: str) -> None:
        """Give an account another password, which ends its sessions."""
        self._write("PUT", f"/v1/admin/users/{user}/password", json={"new_password": password})

    def delete_user(self, user: int) -> None:
        """Remove an account and its keys."""
        self._write("DELETE", f"/v1/admin/users/{user}")

    def api_keys(self) -> List[JSON]:
        """The keys of all accounts, without their values: id, name, key_prefix, enabled, expires_at, owner_username."""
        path = "/v1/admin/keys"
        return shaped(self._get(path), list, path, "a list of keys with an `id` each", ["id"])

    def make_key(self, name: str, description: str) -> JSON:
        """Make a key of the account that is logged in; returns its `id` and, as `key`, its value."""
        path = "/v1/admin/keys"
        answer = self._write("POST", path, json={"name": name, "description": description})
        return shaped(answer, dict, path, "a dictionary with `id` and `key`")

    def key_value(self, key: int) -> str:
        """The value of a key, empty when the server cannot read it any more."""
        path = f"/v1/admin/keys/{key}/reveal"
        try:
            return str(field(self._get(path), "key", path))
        except ServerError as error:
            if error.status == 404:
                return ""
            raise

    def delete_key(self, key: int) -> None:
        """Revoke a key at once."""
        self._write("DELETE", f"/v1/admin/keys/{key}")

    # -- for probes

    def post(self, path: str, json: Any = None, timeout: Optional[float] = None) -> Any:
        """POST JSON to an API path and return the JSON answer."""
        return self._write("POST", path, json=json, timeout=timeout)

    def post_multipart(
        self,
        path: str,
        fields: Mapping[str, str],
        files: Mapping[str, Tuple[str, bytes, str]],
        timeout: Optional[float] = None,
    ) -> Any:
        """POST a form with files `{field: (file name, content, media type)}` and return the JSON answer."""
        return self._write("POST", path, data=dict(fields), files=dict(files), timeout=timeout)

    def post_for_bytes(self, path: str, json: Any, timeout: Optional[float] = None) -> bytes:
        """POST JSON and return the body as it is, e.g. sound."""
        return self._http.request("POST", path, json=json, timeout=timeout).content

    def post_multipart_for_bytes(
        self,
        path: str,
        fields: Mapping[str, str],
        files: Mapping[str, Tuple[str, bytes, str]],
        timeout: Optional[float] = None,
    ) -> bytes:
        """POST a form with files and return the body as it is."""
        return self._http.request("POST", path, data=dict(fields), files=dict(files), timeout=timeout).content

    def get_bytes(self, path: str, timeout: Optional[float] = None) -> bytes:
        """GET a path and return the body as it is."""
        return self._http.request("GET", path, timeout=timeout, repeat=True).content

    # -- within

    def _get(self, path: str, params: Any = None) -> Any:
        return as_json(self._http.request("GET", path, params=params, repeat=True), "GET", path)

    def _write(self, method: str, path: str, **kwargs: Any) -> Any:
        return as_json(self._http.request(method, path, **kwargs), method, path)


def _part(text: str) -> str:
    return quote(text, safe="")
