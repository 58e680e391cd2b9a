"""Things that come together, or too late: nothing of them is lost, and nothing is logged that was looked at."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import Request

from lrt.serve.engine import BackgroundTask, Ended
from lrt.serve.http import ApiError, EventStream
from lrt.serve.inspect import score
from lrt.serve.intake import WAITING, Intake

BODY = {"type": "http.request", "body": b"[1]", "more_body": False}
GONE = {"type": "http.disconnect"}


def request(*messages: dict[str, Any]) -> Request:
    """A request whose body comes as these messages, all of them at once."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else GONE

    return Request({"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}, receive)


def taken(seconds: float, work: Callable[[Intake], Awaitable[Any]]) -> Any:
    """What `work` makes with an intake; whatever the loop would log fails the test."""

    async def inside() -> Any:
        logged: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        intake = Intake(1000, 240, seconds, 1000)
        try:
            result = await work(intake)
        finally:
            intake.end()
        gc.collect()
        assert logged == [] and intake._held == 0 and intake._waiting == 0
        return result

    return asyncio.run(inside())


async def status(answer: Awaitable[Any]) -> int:
    try:
        await answer
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize("message", [GONE, BODY | {"body": b" " * 2000}, BODY])
def test_a_body_that_fails_while_the_server_ends_is_answered_and_not_logged(message):
    async def closing(intake: Intake) -> int:
        intake.close()
        return await status(intake.take(request(message), lambda data: data))

    assert taken(10, closing) == 503


def test_a_request_that_fails_after_its_time_is_not_logged():
    late = threading.Event()

    def prepare(_: Any) -> None:
        late.wait(240)
        raise ValueError("too late")

    async def slow(intake: Intake) -> int:
        found = await status(intake.take(request(BODY), prepare))
        late.set()
        while intake._waiting:
            await asyncio.sleep(0.001)
        return found

    assert taken(0.01, slow) == 408


def test_bodies_that_arrive_in_one_moment_are_no_more_than_may_wait():
    go = threading.Event()

    async def crowd(intake: Intake) -> list[int]:
        asks = [asyncio.ensure_future(status(intake.take(request(BODY), lambda _: go.wait(240)))) for _ in range(100)]
        while sum(ask.done() for ask in asks) < 100 - WAITING:
            await asyncio.sleep(0.001)
        go.set()
        return await asyncio.gather(*asks)

    found = taken(240, crowd)
    assert (found.count(200), found.count(503)) == (WAITING, 100 - WAITING)


def streamed(events: AsyncIterator[list[dict[str, Any]] | bytes]) -> list[dict[str, Any]]:
    """What a stream of these events sends."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return GONE

    async def send(message: Any) -> None:
        sent.append(message)

    stream = EventStream(events, 240, lambda: None)
    asyncio.run(stream({"type": "http", "method": "POST"}, receive, send))
    return sent


def test_a_stream_that_fails_on_its_way_says_so_in_its_last_event(caplog):
    """And not as if the network had cut it."""

    async def events() -> AsyncIterator[list[dict[str, Any]]]:
        yield [{"text": "a"}, {"text": "b"}]
        raise KeyError("a fault of our own")

    _, first, last = streamed(events())
    assert first["body"].count(b"data: ") == 2 and first["more_body"]
    error = json.loads(last["body"].removeprefix(b"data: "))["error"]
    assert "its log says why" in error["message"] and error["type"] == "server_error" and not last["more_body"]
    assert [record.message for record in caplog.records] == ["a stream failed"]


def test_a_stream_that_fails_before_its_first_event_has_no_status_yet():
    async def events() -> AsyncIterator[list[dict[str, Any]]]:
        raise KeyError("a fault of our own")
        yield []

    with pytest.raises(KeyError):
        streamed(events())


def test_scores_that_are_no_numbers_are_a_fault_in_one_line(server, monkeypatch, caplog):
    """They were written as NaN, which is no JSON."""
    engine, model = server.served.engine, server.served.model
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) * float("nan"))

    async def ended() -> Any:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        monkeypatch.setattr(engine, "_post", lambda job, what: engine_loop.call_soon_threadsafe(heard.put_nowait, what))
        engine_loop = asyncio.get_running_loop()
        engine.submit([BackgroundTask(0, heard, float("inf"), work=lambda: score(model, [1, 2, 3], 0, "exact"))])
        return await heard.get()

    assert asyncio.run(ended()) is Ended.FAILED
    assert [record.getMessage() for record in caplog.records] == ["a task ended: the model's logits are not finite"]
