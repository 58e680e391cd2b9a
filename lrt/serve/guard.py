"""What every request passes before the application sees it, and what every answer gets on its way out."""

from __future__ import annotations

import re
import uuid
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lrt.serve.http import ApiError, too_large
from lrt.serve.keys import ApiKeys, HostNames
from lrt.serve.metrics import Metrics

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)
ABSOLUTE = re.compile(rb"(?i:https?)://([^/]*)(.*)", re.DOTALL)
"""A request target in absolute form: the name asked for, and the path."""


class Guard:
    """Asks for host name and key before a byte of the body is read, limits bodies, and counts requests."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        keys: ApiKeys,
        hosts: HostNames,
        public: frozenset[str],
        max_body: int,
    ):
        """`public` are the paths that need no key."""
        self.app, self.metrics, self.keys, self.hosts = app, metrics, keys, hosts
        self.public, self.max_body = public, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope = _origin_form(scope)
        headers = dict(scope["headers"])
        client_id = headers.get(b"x-request-id", b"")
        request_id = client_id if REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex.encode()
        inner = dict(scope)
        if scope["method"] == "HEAD":  # the same answer; the server sends no body
            inner["method"] = "GET"

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items()] + [(b"x-request-id", request_id)]
                message["headers"] = [*message.get("headers", ()), *more]
                route = inner.get("route")
                path = "other" if route is None else route.path
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            inner["state"] = {**scope.get("state", {}), "owner": self._owner(scope, headers)}
        except ApiError as error:
            return await error.response()(scope, receive, sent)
        await self.app(inner, receive, sent)

    def _owner(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        """Whose request this is. ApiError: it is not to be served."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.hosts.serves(host):
            raise ApiError(403, f"the name {host[:100]!r} is not served here; start the server with --allowed-host")
        owner = self.keys.owner(headers.get(b"authorization", b""))
        if owner is None and scope["path"] not in self.public:
            challenge = {"www-authenticate": "Bearer"}
            raise ApiError(401, "an API key is needed: send it as Authorization: Bearer KEY", code="invalid_api_key",
                           headers=challenge)  # fmt: skip
        if b"content-length" in headers and b"transfer-encoding" in headers:  # a proxy may have believed the other one
            raise ApiError(400, "the body has a length and chunks: send one of them", headers={"connection": "close"})
        length = headers.get(b"content-length", b"0")
        if len(length) > 18 or int(length) > self.max_body:  # h11 takes digits alone
            raise too_large(self.max_body)
        return owner or 0


def _origin_form(scope: Scope) -> Scope:
    """The scope of a request whose target is a whole address, as that of its path; the name in it is the Host's.

    RFC 9112, section 3.2.2: such a target must be taken, and the Host header is then ignored.
    """
    absolute = ABSOLUTE.fullmatch(scope["raw_path"])
    if absolute is None:
        return scope
    name, path = absolute[1], absolute[2] or b"/"
    headers = [(b"host", name), *(pair for pair in scope["headers"] if pair[0] != b"host")]
    return {**scope, "raw_path": path, "path": unquote(path.decode("ascii")), "headers": headers}
