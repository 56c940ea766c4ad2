# Copyright: airgap.xinference engineers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""HTTP to one Xinference server: credentials, time limits, safe repetition, errors that say what to do.

* Only reads are repeated, and only when the connection failed or a proxy answered 502 or 503. A write is sent once.
* A refused login or key is never sent a second time. Xinference bans an address for an hour after ten failures in
  five minutes, so the first refusal is remembered and answered locally from then on.
* Proxy settings, `.netrc` and other surroundings of the calling process are ignored: the server is on loopback or in
  the same site, and a forgotten `http_proxy` must not swallow the call.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
from typing import Any, Dict, List, Optional, Sequence

try:
    import requests
except ImportError:
    requests = None  # type: ignore[assignment]
    REQUESTS_ERROR: Optional[str] = traceback.format_exc()
else:
    REQUESTS_ERROR = None

RETRIED_STATUS = (502, 503)
PAUSES = (0.3, 1.0)
CONNECT_LIMIT = 10.0
REFUSED_STATUS = (401, 403, 429)
# urllib3 puts the connection before the reason; its form depends on the version.
WRAPPING = re.compile(r"^(?:<\S+ object at 0x[0-9a-f]+>|HTTPS?Connection(?:Pool)?\([^)]*\)): ")
# Errors that crossed processes inside the server start with the place where they arose, which says nothing to a user.
ACTOR = re.compile(r"\[address=\S+, pid=\d+\] ?")


class ServerError(Exception):
    """The server answered with an error, or not in a way that can be understood.

    `status` is the HTTP status or None, `detail` the server's own words.
    """

    def __init__(
        self, message: str, status: Optional[int] = None, detail: str = "", method: str = "", path: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.detail = detail
        self.method = method
        self.path = path

    @property
    def details(self) -> Dict[str, Any]:
        """What a module returns beside its message."""
        return {"server_error": {k: getattr(self, k) for k in ("status", "detail", "method", "path")}}


class Unreachable(ServerError):
    """No answer: nothing listens, the name does not resolve, TLS failed, or the time was up."""


class AccessRefused(ServerError):
    """Login, key or permission refused (401, 403), or too many refusals before (429)."""


class Transport:
    """Sends requests to `endpoint`; may be shared by threads. The arguments are those of `Client`."""

    def __init__(
        self,
        endpoint: str,
        api_key: Optional[str] = None,
        username: Optional[str] = None,
        password: Optional[str] = None,
        ca_bundle: Optional[str] = None,
        timeout: float = 30.0,
    ) -> None:
        if requests is None:
            raise ServerError(f"The Python library requests is missing: {REQUESTS_ERROR}")
        if bool(username) != bool(password):
            raise ServerError("A login needs both a user name and a password.")
        self.endpoint = endpoint.rstrip("/")
        self.timeout = timeout
        self.requests_made = 0
        self._key, self._username, self._password = api_key or None, username or None, password or None
        self._token: Optional[str] = None
        self._proven = False
        self._refusal: Optional[AccessRefused] = None
        self._auth: Optional[bool] = None
        self._lock = threading.Lock()
        self._login_lock = threading.Lock()
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = ca_bundle or True
        # The server drops idle connections after five seconds; a write sent on one just then would be lost.
        self._session.headers.update({"Connection": "close", "Accept": "application/json, */*"})

    @property
    def has_credentials(self) -> bool:
        """Whether it was given a key or a login."""
        return bool(self._key or self._username)

    @property
    def refusal(self) -> Optional[AccessRefused]:
        """The refusal that ended the use of these credentials, None while there was none."""
        return self._refusal

    def auth_enabled(self) -> bool:
        """Whether the server asks for credentials; asked once, without sending any."""
        if self._auth is None:
            path = "/v1/cluster/auth"
            answer = as_json(self.request("GET", path, public=True, repeat=True), "GET", path)
            self._auth = shaped(field(answer, "auth", path), bool, path, "true or false in `auth`")
        return self._auth

    def login(self) -> None:
        """Log in now with user and password. One attempt; a refusal is final for this object."""
        with self._login_lock:
            self._login()

    def request(self, method: str, path: str, public: bool = False, **kwargs: Any) -> Any:
        """Send with credentials (unless `public`) and return the `requests` response of a success.

        A session that has run out is renewed once, with a login that worked before. Further arguments: `repeat` for a
        read that may be repeated, `timeout` in seconds, and what `requests` takes (params, json, data, files).
        """
        if public:
            return self._send(method, path, **kwargs)
        used = self._credential()
        try:
            response = self._send(method, path, bearer=used, **kwargs)
        except AccessRefused as error:
            if error.status != 401 or not self._renewed(used):
                self._remember(error, used)
                raise
            try:
                response = self._send(method, path, bearer=self._token, **kwargs)
            except AccessRefused as again:
                self._remember(again, used)
                raise
        self._proven = True
        return response

    def _renewed(self, used: Optional[str]) -> bool:
        """Whether there is another session now than the one `used`, renewed here or by another thread meanwhile."""
        if not self._token:
            return False
        with self._login_lock:
            if self._token == used and self._proven:
                self._proven = False
                self._login()
            return self._token != used

    def _remember(self, error: AccessRefused, used: Optional[str]) -> None:
        if error.status in (401, 429) and used:
            self._refusal = error

    def _credential(self) -> Optional[str]:
        if self._refusal is not None:
            raise self._refusal
        if not self._username:
            return self._key
        with self._login_lock:
            if self._token is None and self.auth_enabled():
                self._login()
        return self._token

    def _login(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        body = {"username": self._username, "password": self._password}
        try:
            answer = as_json(self._send("POST", "/token", json=body), "POST", "/token")
        except AccessRefused as error:
            text = (
                f"{self.endpoint} refused the login of user {self._username}: {error.detail}. It was tried once and is "
                "not repeated, because the server bans an address that fails often. Check the user name and password."
            )
            self._refusal = AccessRefused(text, error.status, error.detail, "POST", "/token")
            raise self._refusal from error
        self._token = shaped(field(answer, "access_token", "/token"), str, "/token", "a text in `access_token`")

    def _send(
        self,
        method: str,
        path: str,
        bearer: Optional[str] = None,
        repeat: bool = False,
        timeout: Optional[float] = None,
        **kwargs: Any,
    ) -> Any:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        limit = timeout or self.timeout
        for pause in (*(PAUSES if repeat else ()), None):
            with self._lock:
                self.requests_made += 1
            try:
                response = self._in_time(limit, method, self.endpoint + path, headers=headers, **kwargs)
            except requests.RequestException as error:
                final = (requests.Timeout, requests.exceptions.SSLError, ValueError)
                if pause is None or isinstance(error, final):
                    raise self._unreachable(error, method, path, limit) from error
            else:
                if pause is None or response.status_code not in RETRIED_STATUS:
                    return self._checked(response, method, path)
            time.sleep(pause)
        raise AssertionError("the last turn of the loop always returns or raises")

    def _in_time(self, limit: float, method: str, url: str, **kwargs: Any) -> Any:
        """One request, over after `limit` seconds (and the time to connect) however busy the connection is.

        `requests` limits each read only, so a server that sends a byte now and then could hold us for ever.
        """
        connect = min(CONNECT_LIMIT, limit)
        found: List[Any] = []

        def ask() -> None:
            try:
                answer = self._session.request(method, url, timeout=(connect, limit), allow_redirects=False, **kwargs)
            except BaseException as error:
                found.append(error)
            else:
                found.append(answer)

        asking = threading.Thread(target=ask, name=f"{method} {url}", daemon=True)
        asking.start()
        asking.join(connect + limit)
        if not found:
            raise requests.exceptions.ReadTimeout("the answer trickles in and does not end")
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def _unreachable(self, error: Exception, method: str, path: str, limit: float) -> Unreachable:
        cause = _cause(error)
        if "WRONG_VERSION_NUMBER" in cause:
            text = f"{self.endpoint} does not speak TLS; write the endpoint with http:// instead of https://."
        elif isinstance(error, requests.exceptions.SSLError):
            text = (
                f"The TLS certificate of {self.endpoint} cannot be verified: {cause}. "
                "Give the certificate of the site's authority as ca_bundle."
            )
        elif isinstance(error, requests.exceptions.ReadTimeout):
            text = f"{self.endpoint} did not answer {method} {path} within {limit:g} s."
        elif isinstance(error, ValueError):
            text = f"The endpoint {self.endpoint!r} is not a URL such as http://127.0.0.1:9997: {error}"
        else:
            text = (
                f"No Xinference answers at {self.endpoint}: {cause}. "
                "Is the server running, and are address and port right?"
            )
        return Unreachable(text, None, str(error), method, path)

    def _checked(self, response: Any, method: str, path: str) -> Any:
        status = response.status_code
        if status < 300:
            return response
        detail = _detail(response)
        if status < 400:
            place = response.headers.get("Location", "an unknown place")
            text = f"{self.endpoint} redirects {method} {path} to {place}; use that address as the endpoint."
        elif status in REFUSED_STATUS:
            text = self._refused_text(status, detail, method, path)
            raise AccessRefused(text, status, detail, method, path)
        else:
            text = f"{self.endpoint} answered {method} {path} with {status}: {detail or 'no detail'}"
        raise ServerError(text, status, detail, method, path)

    def _refused_text(self, status: int, detail: str, method: str, path: str) -> str:
        said = f"{self.endpoint} refused {method} {path} with {status}: {detail.rstrip('.')}."
        if status == 429:
            return f"{said} Wait until the ban ends (an hour by default), or restart the server."
        if status == 403 and "API keys" in detail:
            return f"{said} Give username and password instead of api_key."
        if path == "/v1/admin/setup":
            return said
        if status == 403:
            return f"{said} Use an account that has this permission."
        if self._username:
            return said
        if self._key:
            return f"{said} Check api_key; it was tried once and is not repeated."
        return f"{said} The server asks for credentials: give api_key, or username and password."


def as_json(response: Any, method: str, path: str) -> Any:
    """The JSON body of a response, None when empty; raises ServerError when it is something else."""
    if not response.content:
        return None
    try:
        return response.json()
    except ValueError:
        start = str(response.text).strip()[:120]
        text = f"{method} {path} was not answered with JSON but with {start!r}. Is this address an Xinference server?"
        raise ServerError(text, response.status_code, start, method, path) from None


def field(answer: Any, name: str, path: str) -> Any:
    """The field `name` of an answer; raises ServerError when it is not there."""
    if isinstance(answer, dict) and name in answer:
        return answer[name]
    text = f"The answer of {path} has no field {name!r}: {str(answer)[:200]}. Is this address an Xinference server?"
    raise ServerError(text, path=path)


def shaped(answer: Any, kind: Any, path: str, wanted: str, names: Sequence[str] = ()) -> Any:
    """An answer that is a `kind`; raises ServerError with what was `wanted` and what came.

    A list is one of dictionaries that have all of `names`.
    """
    right = isinstance(answer, kind)
    if right and isinstance(answer, list):
        for entry in answer:
            right = right and isinstance(entry, dict) and all(entry.get(name) is not None for name in names)
    if right:
        return answer
    came = "nothing" if answer is None else f"{str(answer)[:200]!r}"
    text = f"{path} was to be answered with {wanted}, and this came: {came}. Is this address an Xinference server?"
    raise ServerError(text, path=path)


def _cause(error: BaseException) -> str:
    """The innermost reason, without the wrapping of urllib3."""
    reason: Any = error.args[0] if error.args else error
    return WRAPPING.sub("", str(getattr(reason, "reason", reason)))


def _detail(response: Any) -> str:
    """The server's own words: FastAPI's `detail`, or the start of a body that is not JSON."""
    try:
        body = response.json()
    except ValueError:
        return str(response.text).strip()[:2000]
    found = body.get("detail", body) if isinstance(body, dict) else body
    return ACTOR.sub("", found if isinstance(found, str) else str(found))
