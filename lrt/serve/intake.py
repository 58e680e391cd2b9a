"""Bodies on their way in: read within limits, and made ready in threads of their own, so that the event loop goes on.

What a thread does holds the interpreter for milliseconds: values are counted before JSON is parsed, one body at a
time; lengths are looked at before contents, the first thing wrong ends it (lrt/serve/fields.py), and tokenising
releases the interpreter.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, final

from fastapi import Request
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from lrt.serve.fields import too_many
from lrt.serve.http import ApiError, too_large

T = TypeVar("T")
WAITING = 64
"""Most requests that wait for a thread."""
HELD = 32
"""Most bodies of the largest size that are held together; smaller ones fit more often."""
TRIM_BYTES, TRIM_SECONDS = 4_000_000, 1.0
"""Bytes of bodies after which freed memory is given back, once none has come for so many seconds."""
CLOSING = "the server is shutting down; ask again later"


@final
class Intake:
    """The bodies of a server's requests."""

    def __init__(self, max_body: int, body_seconds: float, seconds: float, values: int):
        """`body_seconds` is the time that a body may take to arrive, `seconds` that it may take to be made ready.

        `values` is the most that a body may hold.
        """
        self.max_body, self.body_seconds, self.seconds = max_body, body_seconds, seconds
        self.values = values
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="lrt-json")
        self._workers = {
            name: ThreadPoolExecutor(2, thread_name_prefix=f"lrt-{name}")
            for name in ("text", "chat")  # a chat template that takes its time keeps no text waiting
        }
        self._held = self._waiting = 0
        self._reading: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._untrimmed = 0
        self._trimming: asyncio.TimerHandle | None = None

    async def take(self, request: Request, prepare: Callable[[Any], T], worker: str = "text") -> T:
        """What `prepare` makes of a request's JSON, in a thread. ApiError: too large, too slow, not JSON, too many."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which no page of another origin can send unasked
            raise ApiError(415, "send the body as JSON, with Content-Type: application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise ApiError(415, "compressed bodies are not taken: send the JSON as it is, without Content-Encoding")
        parts: list[bytes] = []
        try:
            await self._arrived(request, parts)
            return await self._ready(parts, prepare, worker)
        finally:
            self._held -= sum(map(len, parts))

    def close(self) -> None:
        """Give up what has not arrived."""
        self._closing = True
        for task in self._reading:
            task.cancel()

    def end(self) -> None:
        """End the threads."""
        self._closing = True
        if self._trimming is not None:
            self._trimming.cancel()
        for pool in (self._parser, *self._workers.values()):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _arrived(self, request: Request, parts: list[bytes]) -> None:
        """Wait for all of a body."""
        reading = asyncio.ensure_future(self._read(request, parts))
        self._reading.add(reading)
        try:
            done, _ = await asyncio.wait({reading}, timeout=self.body_seconds)
            if self._closing:
                raise ApiError(503, CLOSING)
            if not done:
                raise ApiError(408, f"the body did not arrive within {self.body_seconds:g} seconds")
            reading.result()
        except ClientDisconnect:
            raise ApiError(499, "the client has gone") from None  # nobody hears it; the metrics count it
        finally:
            self._reading.discard(reading)
            reading.cancel()  # which also says that nobody wants to hear of its error

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            self._held += len(part)
            if size > self.max_body:
                raise too_large(self.max_body)
            if self._held > HELD * self.max_body:
                raise _busy()

    async def _ready(self, parts: list[bytes], prepare: Callable[[Any], T], worker: str) -> T:
        if self._waiting >= WAITING:
            raise _busy()
        self._waiting += 1  # now: many bodies may have arrived together
        work = asyncio.ensure_future(self._work(parts, prepare, worker))
        try:
            await asyncio.wait({work}, timeout=self.seconds)
            if work.done():
                return work.result()
            raise ApiError(408, f"the request took longer than {self.seconds:g} s to read; send less")
        finally:
            work.add_done_callback(_told)  # a thread goes on until it is done, though nobody waits for it

    async def _work(self, parts: list[bytes], prepare: Callable[[Any], T], worker: str) -> T:
        try:
            loop = asyncio.get_running_loop()
            data = await loop.run_in_executor(self._parser, _json, b"".join(parts), self.values)
            return await loop.run_in_executor(self._workers[worker], prepare, data)
        finally:
            self._waiting -= 1
            self._untrimmed += sum(map(len, parts))
            if self._untrimmed > TRIM_BYTES:
                self._trim_later()

    def _trim_later(self) -> None:
        """Give freed memory back once it is quiet: a pause every time would be felt."""
        if self._trimming is not None:
            self._trimming.cancel()
        self._trimming = asyncio.get_running_loop().call_later(TRIM_SECONDS, self._trim)

    def _trim(self) -> None:
        self._untrimmed, self._trimming = 0, None
        if not self._closing:
            self._parser.submit(give_back)


def _told(task: asyncio.Task[Any]) -> None:
    """Take note of what a task raised, which would else be logged as never retrieved."""
    if not task.cancelled():
        task.exception()


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc keeps it otherwise)."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)


def _busy() -> ApiError:
    return ApiError(503, "too many requests are being read; try again in 1 s", headers={"retry-after": "1"})


def _json(body: bytes, values: int) -> Any:
    """Parse; the collector waits, or it would look at every new list again and again."""
    if excess := too_many(body, values):
        raise ApiError(400, f"the body has {excess}; send less at a time")
    gc.disable()
    try:
        return from_json(body, allow_inf_nan=False, cache_strings=False)  # a cache would keep texts of requests
    except ValueError as error:  # text that is not UTF-8 among them
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    finally:
        gc.enable()
