"""Streams that a fault ends: what came before it is sent first, and an error is the last event."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serving import Server, post

from lrt.inference.batch import Emission, Request
from lrt.serve.calls import Choice
from lrt.serve.chat_completions import ChatChoice
from lrt.serve.engine import LastText
from lrt.serve.grammar import CALL_HEAD
from lrt.serve.states import StateStore
from lrt.serve.text import Listing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LAW = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}
PROMPT = LAW | {"prompt": "def area("}
TALK = LAW | {"messages": [{"role": "user", "content": "def"}]}
MADE = 4
"""Tokens that there are before the fault."""


def streamed(server: Server, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The chunks of a stream, and the error that ends it."""
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=240) as answer:
        *chunks, last = [json.loads(line[6:]) for line in answer.iter_lines() if line]
    assert answer.status_code == 200
    return chunks, last["error"]["type"]


def fail_after(monkeypatch: pytest.MonkeyPatch, server: Server, where: str) -> None:
    """After `MADE` tokens fail in a row's own part, in the step of all, or by the deadline."""
    emit, advance, engine = Request.emit, server.served.engine._batch.advance, server.served.engine

    def row(self: Request, *drawn: Any) -> Any:
        if self.made == MADE and where == "row":
            raise KeyError("a fault of our own")
        return emit(self, *drawn)

    def step() -> None:
        running = [r for r in engine._batch.running if r.made == MADE]
        if running and where == "step":
            raise KeyError("a fault of our own")
        for r in running if where == "deadline" else ():
            engine._seated[r.row].deadline = 0
        advance()

    monkeypatch.setattr(Request, "emit", row)
    monkeypatch.setattr(engine._batch, "advance", step)


@pytest.mark.parametrize("where", ["row", "step", "deadline"])
def test_text_that_was_held_back_as_a_stop_text_is_sent_before_the_fault(server, where, monkeypatch):
    """Every token's text, once, and its log-probability."""
    whole = post(server, "/v1/completions", PROMPT | {"max_tokens": MADE}).json()["choices"][0]["text"]
    fail_after(monkeypatch, server, where)
    chunks, error = streamed(server, "/v1/completions", PROMPT | {"stop": whole[1:] + "\x00", "logprobs": 0})
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole
    assert sum(len(part["logprobs"]["tokens"]) for part in parts if part["logprobs"]) == MADE
    assert error == ("timeout_error" if where == "deadline" else "server_error")


def test_text_held_back_in_a_chat_is_sent_before_the_fault(server, monkeypatch):
    whole = post(server, "/v1/chat/completions", TALK | {"max_tokens": MADE}).json()["choices"][0]["message"]["content"]
    fail_after(monkeypatch, server, "row")
    more = {"stop": whole[1:] + "\x00", "logprobs": True}
    chunks, error = streamed(server, "/v1/chat/completions", TALK | more)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["delta"].get("content", "") for part in parts) == whole
    assert sum(len(part["logprobs"]["content"]) for part in parts if part["logprobs"]) == MADE
    assert error == "server_error"


def test_the_beginning_of_a_tools_call_is_sent_before_the_fault(server):
    """It had been held back as long as it might become one."""
    choice = ChatChoice(Choice(0, [1], Listing(server.served.words)), ("f",))
    begin, end = Emission(0, 1, 0.0, CALL_HEAD.format("f")[:2], None), LastText("")
    assert choice.take(begin)[0] == {"role": "assistant", "content": ""}
    assert choice.take(end) == ({"content": begin.text}, [])


def test_a_fault_before_an_echos_scores_comes_after_the_tokens_that_were_there(server, monkeypatch, caplog):
    def fails(_: object, ids: list[int], *__: object) -> Any:
        for _ in range(len(ids) + MADE):
            yield
        raise KeyError("a fault of our own")

    monkeypatch.setattr("lrt.serve.completions.score", fails)
    chunks, error = streamed(server, "/v1/completions", PROMPT | {"max_tokens": 200, "echo": True, "logprobs": 0})
    front, *parts = [chunk["choices"][0] for chunk in chunks]
    assert (front["text"], front["logprobs"], error) == (PROMPT["prompt"], None, "server_error")
    assert parts and all(len(part["logprobs"]["tokens"]) == 1 for part in parts)


def test_an_answer_is_whole_though_its_state_cannot_be_kept(server, monkeypatch, caplog):
    """The last token was out, and the request failed all the same."""

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(StateStore, "add", full)
    assert post(server, "/v1/completions", PROMPT | {"n": 2}).status_code == 200
    assert "could not be kept" in caplog.text
