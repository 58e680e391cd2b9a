"""JSON of large answers: the encoder's own text, made in small pieces and off the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import post

from lrt.serve import json_writer
from lrt.serve.calls import MOST_TOGETHER, Call
from lrt.serve.engine import Answer, Ended, Event, Job
from lrt.serve.http import ApiError
from lrt.serve.json_writer import LARGE, TOGETHER, AnswerWriter, event_bytes, json_bytes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
PLAIN = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=30)


@given(PLAIN)
@settings(deadline=None, max_examples=60)
def test_the_text_is_the_encoders(value):
    assert json_bytes(value) == json.dumps(value, separators=(",", ":")).encode()


@pytest.mark.parametrize("length", [0, 1, TOGETHER - 1, TOGETHER, TOGETHER + 1, 3 * TOGETHER])
def test_long_lists_are_the_encoders_too(length):
    for value in (list(range(length)), [[0.5]] * length, [{}] * length, {"a": [None] * length, "b": {"c": "d"}}):
        assert json_bytes(value) == json.dumps(value, separators=(",", ":")).encode()


def test_an_event_is_one_line_whatever_it_says():
    text = event_bytes({"a": "\n\r\x0b\x1c\x85\u2028\u2029é"})
    assert text.decode().splitlines()[1:] == [""] and text.endswith(b"\n\n")


def test_numbers_that_json_does_not_have_are_errors():
    for value in (float("nan"), [1.0, float("inf")], {"a": [{"b": -float("inf")}]}):
        with pytest.raises(ValueError):
            json_bytes(value)


@pytest.fixture
def encoded(monkeypatch) -> list[tuple[str, int]]:
    """Where the encoder was called, and how much it was given."""
    seen, dumped = [], json_writer._dumped

    def watched(value: Any) -> str:
        text = dumped(value)
        seen.append((threading.current_thread().name, len(text)))
        return text

    monkeypatch.setattr(json_writer, "_dumped", watched)
    return seen


PROMPTS = {"prompt": [[1] * 120] * 2, "echo": True, "logprobs": 20, "max_tokens": 1, "seed": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", PROMPTS),
        ("/v1/completions", PROMPTS | {"stream": True}),
        ("/v1/completions", {"prompt": "a", "n": 8, "max_tokens": 20, "logprobs": 20, "ignore_eos": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 8, "max_tokens": 20,
                                  "logprobs": True, "top_logprobs": 20, "ignore_eos": True}),
        ("/api/inspect", {"text": "def area(width)" * 6, "top": 20}),
    ],
)  # fmt: skip
def test_large_answers_are_written_in_pieces_and_off_the_loop(server, encoded, path, body):
    answer = post(server, path, body)
    assert answer.status_code == 200 and len(answer.content) > 20_000
    assert max(size for _, size in encoded) < 5000
    outside = sum(size for name, size in encoded if not name.startswith("lrt-answers"))
    assert outside < 0.1 * len(answer.content)


def test_small_answers_are_written_where_they_are_asked_for(encoded):
    writer = AnswerWriter()
    for values, name in ((LARGE, threading.current_thread().name), (LARGE + 1, "lrt-answers_0")):
        asyncio.run(writer.write(lambda: {"a": 1}, values))
        assert encoded.pop()[0] == name
    writer.end()


def test_who_has_not_read_for_a_while_gets_a_little_at_a_time(server):
    """And in between it is others' turn."""

    async def read() -> list[list[Event]]:
        call = Call(server.served, 0)
        job = Answer(0, call.events, call.deadline)
        call.jobs, call.left = list[Job]([job]), 10**6
        for i in range(1000):
            call.events.put_nowait(Event(i, None))
        taken, turns = [], []

        async def other() -> None:
            for _ in range(20):
                turns.append(len(taken))
                await asyncio.sleep(0)

        going = asyncio.ensure_future(other())
        while not call.events.empty():
            taken.append(await call.next())
        await going
        assert sum(a != b for a, b in pairwise(turns)) > 3
        return taken

    taken = asyncio.run(read())
    assert [e.number for events in taken for e in events] == list(range(1000))
    assert max(map(len, taken)) == MOST_TOGETHER


@pytest.mark.parametrize(("fault", "status"), [(ValueError("no"), 400), (Ended.EXPIRED, 408), (Ended.FAILED, 500)])
def test_what_came_before_a_fault_is_read_before_it(server, fault, status):
    """However late the reader comes: the tokens first, then the fault, and the fault again."""

    async def read() -> tuple[list[int], list[int]]:
        call = Call(server.served, 0)
        call.left = 3
        for number, what in enumerate((None, None, fault, None)):
            call.events.put_nowait(Event(number, what))
        numbers, faults = [event.number for event in await call.next()], []
        for _ in range(2):
            with pytest.raises(ApiError) as raised:
                await call.next()
            faults.append(raised.value.status)
        return numbers, faults

    assert asyncio.run(read()) == ([0, 1], [status, status])


def test_no_salt_is_no_ones_salt(server):
    async def scopes() -> list[bytes]:
        salts = (None, "None", "0", "1:", ":")
        return [Call(server.served, owner, salt).scope for owner in (0, 1) for salt in salts]

    made = asyncio.run(scopes())
    assert len(set(made)) == len(made)
