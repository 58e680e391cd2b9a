"""The application: OpenAI-compatible endpoints over the engine, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware

from lrt import __version__
from lrt.data.normalised import Spelling
from lrt.serve.calls import Call
from lrt.serve.chat_completions import Chat, ReadyChat, conversation
from lrt.serve.completions import Completion, ReadyCompletion
from lrt.serve.engine import BackgroundTask
from lrt.serve.guard import Guard
from lrt.serve.http import ApiError, EventStream, handle_errors
from lrt.serve.inspect import inspect
from lrt.serve.json_writer import json_bytes
from lrt.serve.keys import ApiKeys, HostNames
from lrt.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    InspectRequest,
    TokenizeRequest,
    components,
    described,
)
from lrt.serve.served import Served

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("app", "common", "write", "chat", "inspect")
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in SCRIPTS},
}
"""The page's files; they and /health need no key."""
STATUSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 429, 503)
}


def _json(text: bytes) -> Response:
    return Response(text, media_type="application/json")


async def _respond(going: Completion | Chat, request: Request) -> Any:
    if not going.body.stream:
        return _json(await going.whole(request))
    seconds = going.call.served.settings.deadline + 5
    return EventStream(going.pieces(), seconds, going.call.cancel)


def create_app(served: Served, keys: ApiKeys | None = None, hosts: HostNames | None = None) -> FastAPI:
    """The application. With keys, everything but /health and the page asks for one as a bearer token.

    `hosts` are the names it answers to; by default those of this machine.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.engine.start(asyncio.get_running_loop())
        yield
        served.intake.end()
        served.writer.end()
        await asyncio.to_thread(served.engine.close)

    app = FastAPI(title="lrt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses=STATUSES, redirect_slashes=False)  # fmt: skip
    handle_errors(app)
    public = frozenset({"/health", *PAGES})
    app.add_middleware(
        Guard, metrics=served.metrics, keys=keys or ApiKeys(), hosts=hosts or HostNames(""), public=public,
        max_body=served.settings.max_body,
    )  # fmt: skip
    if served.settings.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=served.settings.allow_origin, allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"], expose_headers=["x-request-id"],
        )  # fmt: skip

    @app.get("/health", response_model=None)
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    for routes in (_openai(served), _tokens(served), _own(served)):
        app.include_router(routes)
    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, partial(_file, (PAGE / name).read_bytes(), kind), include_in_schema=False)
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schema["components"]["schemas"] |= components()
    app.openapi = lambda: schema
    return app


async def _file(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind)


def _openai(served: Served) -> APIRouter:
    routes = APIRouter(prefix="/v1", redirect_slashes=False)

    @routes.post("/completions", response_model=None, openapi_extra=described(CompletionRequest))
    async def completions(request: Request) -> Any:
        """Continue prompts."""
        ready = await served.intake.take(request, partial(ReadyCompletion.of, served))
        return await _respond(Completion(served, ready, request.state.owner), request)

    @routes.post("/chat/completions", response_model=None, openapi_extra=described(ChatRequest))
    async def chat(request: Request) -> Any:
        """Answer a conversation."""
        ready = await served.intake.take(request, partial(ReadyChat.of, served), "chat")
        return await _respond(Chat(served, ready, request.state.owner), request)

    @routes.get("/models", response_model=None)
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_card(served)]}

    @routes.get("/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        """The model, if it is called so."""
        served.require_model(name)
        return _card(served)

    return routes


def _tokens(served: Served) -> APIRouter:
    """What clients ask of the tokenizer, as vLLM answers it."""
    routes = APIRouter(redirect_slashes=False)
    words = served.words

    def tokenized(data: object) -> bytes:
        body = served.parsed(TokenizeRequest, data)
        served.require_model(body.model)
        if body.prompt is None:
            ids, _ = conversation(served, body.messages, [], {})
        else:
            ids = served.opened(body.prompt)[0 if body.add_special_tokens else 1 :]
        spelt = [words.spell(i) for i in ids] if body.return_token_strs else None
        return json_bytes({"count": len(ids), "max_model_len": served.context, "tokens": ids, "token_strs": spelt})

    def detokenized(data: object) -> bytes:
        body = served.parsed(DetokenizeRequest, data)
        served.require_model(body.model)
        served.require_known(body.tokens, "tokens")
        return json_bytes({"prompt": words.tokenizer.decode(body.tokens)})

    @routes.post("/tokenize", response_model=None, openapi_extra=described(TokenizeRequest))
    async def tokenize(request: Request) -> Any:
        """The tokens of a text or a conversation."""
        return _json(await served.intake.take(request, tokenized, "chat"))

    @routes.post("/detokenize", response_model=None, openapi_extra=described(DetokenizeRequest))
    async def detokenize(request: Request) -> Any:
        """The text of tokens."""
        return _json(await served.intake.take(request, detokenized))

    @routes.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and chat template."""
        return words.about() | {"model_max_length": served.context}

    return routes


def _own(served: Served) -> APIRouter:
    routes = APIRouter(redirect_slashes=False)

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        counted = served.metrics
        shown = [counted.registry, *([counted.private] if served.settings.store_metrics else [])]
        return Response(b"".join(map(generate_latest, shown)), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/api/about", response_model=None)
    async def about() -> dict[str, Any]:
        """What the page shows of the model."""
        return served.about()

    def inspected(data: object) -> tuple[list[int], int, bool]:
        body = served.parsed(InspectRequest, data)
        ids = served.opened(body.text, "text")
        if len(ids) < 2:
            raise ApiError(400, "text is empty: give at least one character", param="text")
        spelling = Spelling(served.words.tokenizer)
        spelling.add_document(body.text, ids[1:])
        return ids, body.top, spelling.changed > 0

    @routes.post("/api/inspect", response_model=None, openapi_extra=described(InspectRequest))
    async def answer_inspect(request: Request) -> Any:
        """What the memory does to every token of a text."""
        ids, top, normalised = await served.intake.take(request, inspected)
        call = Call(served, request.state.owner)
        work = partial(inspect, served.model, served.words, ids, top, served.mode)
        call.submit([BackgroundTask(0, call.events, call.deadline, left=2 * len(ids), work=work)])
        (event,) = await call.all(request)
        more = {"normalised": normalised, "model": served.about()}
        values = len(ids) * (2 * top + served.model.config.depth)
        return _json(await served.writer.write(lambda: event.payload | more, values))

    return routes


def _card(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "lrt",
            "max_model_len": served.context}  # fmt: skip
