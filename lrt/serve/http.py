"""HTTP around the application: errors of one shape, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lrt.serve.json_writer import event_bytes
from lrt.utils.files import one_line

log = logging.getLogger("lrt.serve")
KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    429: "rate_limit_error",
}  # fmt: skip
MOST_PARAM = 100
"""Characters of the field that an error names: a client may have written it."""


class ApiError(Exception):
    """An answer that is not 2xx."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        """As the API writes errors."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        param = None if self.param is None else one_line(self.param, MOST_PARAM)
        body = {"error": {"message": one_line(self.message), "type": kind, "param": param, "code": self.code}}
        return JSONResponse(body, self.status, self.headers)


def too_large(most: int) -> ApiError:
    """What a body that is too large is answered."""
    return ApiError(413, f"the body is larger than {most:,} bytes; send less at a time")


def our_fault() -> ApiError:
    """What a request is answered that failed through no fault of its own."""
    return ApiError(500, "the server failed on this request; its log says why")


def handle_errors(app: FastAPI) -> None:
    """Every error in the same shape, with one sentence that says what to change."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers, route = dict(error.headers or {}), f"{request.method} {request.url.path[:100]}"
        message = str(error.detail)
        if error.status_code == 404:
            message = f"{route} is not offered here; /openapi.json says what is"
        elif error.status_code == 405:
            message = f"{route} is not offered here; use {headers.get('Allow', 'another method')}"
        return ApiError(error.status_code, message, headers=headers).response()

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return our_fault().response()

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


class EventStream(Response):
    """A response of server-sent events, as many in one write as there are ready.

    Nothing is sent before the first event is there, so that an error until then has its own status; one after it is the
    last event.
    """

    def __init__(self, events: AsyncIterator[list[dict[str, Any]] | bytes], seconds: float, gone: Callable[[], None]):
        """`events` yields objects that are ready together, or events as they are sent; `gone` is called at the end."""
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
                body = ready if isinstance(ready, bytes) else b"".join(map(event_bytes, ready))
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0)  # where much is ready, others have their turn in between
            last = b"data: [DONE]\n\n"
        except ApiError as error:
            if not started:
                return await error.response()(scope, receive, send)
            last = _last(error)
        except Exception:  # what has begun ends with a word, and not as if the network had failed
            if not started:
                raise
            log.exception("a stream failed")
            last = _last(our_fault())
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _last(error: ApiError) -> bytes:
    """An error as a stream's last event."""
    return b"data: " + bytes(error.response().body) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
