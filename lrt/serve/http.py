"""HTTP around the application: errors of one shape, limits on bodies, headers, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lrt.serve.metrics import Metrics

BODY_SECONDS = 30.0
"""How long a body may take to arrive."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
SHAPES = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text of at least one character, or a list of at most 16",
}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 408: "timeout_error"}


class ApiError(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def response(self) -> JSONResponse:
        """As the API writes errors."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = " ".join(self.message.split()).encode("utf-8", "replace").decode()
        body = {"error": {"message": message, "type": kind, "param": self.param, "code": None}}
        return JSONResponse(body, self.status, self.headers)


def handle_errors(app: FastAPI) -> None:
    """Every error in the same shape, with one sentence that says what to change."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}").response()
        where = [str(x) for x in first["loc"] if x != "body"]
        name = where[0] if where else None
        if name in SHAPES and first["type"] != "missing":
            return ApiError(400, f"{name} must be {SHAPES[name]}", param=name).response()
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{'.'.join(where)}: {message}" if where else message, param=name).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, "the server failed on this request; its log says why").response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


class Guard:
    """Limits what comes in, adds headers to what goes out, counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body: int):
        self.app, self.metrics, self.max_body = app, metrics, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size, complete = 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.max_body:
                raise HTTPException(413, f"the body is larger than {self.max_body:,} bytes; send less at a time")
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                route = scope.get("route")
                self.metrics.requests.labels(getattr(route, "path", "other"), message["status"]).inc()
            await send(message)

        return await self.app(scope, limited, sent)


class EventStream(Response):
    """A response of server-sent events, as many in one write as there are ready.

    Nothing is sent before the first event is there, so that an error until then has its own status.
    """

    def __init__(self, events: AsyncIterator[list[dict[str, Any]]], seconds: float, gone: Callable[[], None]):
        """`events` yields lists of objects that are ready together; `gone` is called at the end, whatever it was."""
        super().__init__(media_type="text/event-stream")
        self.events, self.seconds, self.gone = events, seconds, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(scope, receive, send))
        watcher = asyncio.ensure_future(disconnected(receive))
        try:  # a client that reads nothing holds its connection no longer than the deadline
            await asyncio.wait((writer, watcher), timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.gone()
            for task in (writer, watcher):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await writer

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for ready in self.events:
                if not started:
                    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    started = True
                await send({"type": "http.response.body", "body": encoded(ready), "more_body": True})
            last = b"data: [DONE]\n\n"
        except ApiError as error:
            if not started:
                return await error.response()(scope, receive, send)
            last = b"data: " + bytes(error.response().body) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})


def encoded(events: list[dict[str, Any]]) -> bytes:
    """Objects as server-sent events."""
    return b"".join(b"data: %b\n\n" % json.dumps(e, separators=(",", ":")).encode() for e in events)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
