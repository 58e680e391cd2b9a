"""The application: OpenAI-compatible endpoints over the engine, and the page."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lrt import __version__
from lrt.serve.calls import Call, Chat, Completion, Served
from lrt.serve.engine import BackgroundTask
from lrt.serve.http import ApiError, EventStream, Guard, handle_errors
from lrt.serve.inspect import inspect
from lrt.serve.schemas import ChatRequest, CompletionRequest, ErrorBody, InspectRequest

PAGE = Path(__file__).parent / "page"
STATUSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 503)
}


async def _respond(going: Completion | Chat, request: Request) -> Any:
    if not going.body.stream:
        return JSONResponse(await going.whole(request))
    seconds = going.served.settings.deadline + 5
    return EventStream(going.pieces(), seconds, going.call.cancel)


def create_app(served: Served, api_key: str | None = None) -> FastAPI:
    """The application. With `api_key`, everything but /health and the page asks for it as a bearer token."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(served.engine.close)

    async def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(401, "an API key is needed: send it as Authorization: Bearer KEY")

    app = FastAPI(title="lrt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses=STATUSES)  # fmt: skip
    handle_errors(app)
    app.add_middleware(Guard, metrics=served.metrics, max_body=served.settings.max_body)

    @app.get("/health", response_model=None)
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    for routes in (_openai(served), _own(served)):
        app.include_router(routes, dependencies=[Depends(authorised)])
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def _openai(served: Served) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @routes.post("/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue prompts."""
        return await _respond(Completion(served, body), request)

    @routes.post("/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        return await _respond(Chat(served, body), request)

    @routes.get("/models", response_model=None)
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_card(served)]}

    @routes.get("/models/{name}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        """The model, if it is called so."""
        if name != served.name:
            raise ApiError(404, f"the model {name!r} is not served here; use {served.name!r}", param="model")
        return _card(served)

    return routes


def _own(served: Served) -> APIRouter:
    routes = APIRouter()

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(served.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/api/about", response_model=None)
    async def about() -> dict[str, Any]:
        """What the page shows of the model."""
        return served.about()

    @routes.post("/api/inspect", response_model=None)
    async def look(body: InspectRequest, request: Request) -> dict[str, Any]:
        """What the memory does to every token of a text."""
        try:
            ids = served.words.opened(body.text)
        except ValueError as error:
            raise ApiError(400, str(error), param="text") from None
        served.fits(ids)
        if len(ids) < 2:
            raise ApiError(400, "text is empty: give at least one character", param="text")
        call = Call(served)
        work = partial(inspect, served.model, served.words, ids, body.top, **served.how)
        call.submit([BackgroundTask(0, call.events, call.deadline, work=work)])
        (event,) = await call.all(request)
        return event.what | {"model": served.about()}

    return routes


def _card(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "lrt"}
