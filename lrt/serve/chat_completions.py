"""POST /v1/chat/completions: one request on its way, from its body to its answer."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple, final

from fastapi import Request

from lrt.data.dialogue import content_text
from lrt.inference.batch import Emission
from lrt.serve.calls import Call, Choice, Listed, head, usage
from lrt.serve.engine import Event, LastText
from lrt.serve.grammar import CallReader, GrammarConstraint
from lrt.serve.http import ApiError
from lrt.serve.messages import Message, Tool
from lrt.serve.schemas import ChatRequest
from lrt.serve.served import Served
from lrt.serve.text import Listing


class ReadyChat(NamedTuple):
    """A request as tokens."""

    body: ChatRequest
    prompt: list[int]
    stop: tuple[str, ...]
    """Texts by which the model ends an answer."""
    form: GrammarConstraint | None
    tools: tuple[str, ...]
    """Tools that the answer may call."""

    @staticmethod
    def of(served: Served, data: Any) -> ReadyChat:
        """From a body's JSON; no part of it needs the event loop. ApiError: what is wrong with it."""
        body = served.parsed(ChatRequest, data)
        served.check(body, 1, body.max_completion_tokens or body.max_tokens)
        form, tools = served.constraint(body, body.response_format, *body.callable())
        prompt, stop = conversation(served, body.messages, body.tools, body.chat_template_kwargs)
        return ReadyChat(body, prompt, stop, form, tools)


def conversation(
    served: Served, messages: list[Message], tools: list[Tool], variables: dict[str, Any]
) -> tuple[list[int], tuple[str, ...]]:
    """A conversation as a prompt, and the texts that end its answer. ApiError: it does not fit."""
    plain = [m.plain() for m in messages]

    def fits(least: int) -> None:
        if least > served.longest_prompt:
            served.refuse_length(f"at least {least}", "messages")

    fits(served.words.least(map(content_text, plain)))  # before any of it is rendered
    try:
        described = [t.model_dump(exclude_none=True) for t in tools]
        rendered = served.words.conversation(plain, described, variables, fits)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    served.require_fit(rendered[0], "messages")
    return rendered


@final
class Chat:
    """One request on its way."""

    def __init__(self, served: Served, ready: ReadyChat, owner: int):
        self.served, self.body, self.prompt = served, ready.body, ready.prompt
        self.call = Call(served, owner, ready.body.cache_salt)
        answers = [Choice(k, self.prompt, Listing(served.words)) for k in range(self.body.n)]
        self.choices = [ChatChoice(answer, ready.tools) for answer in answers]
        most = self.body.max_completion_tokens or self.body.max_tokens or served.longest
        params = self.body.sampling(most, ready.stop if ready.form is None else (), served.words.tokenizer.ends)
        top = (self.body.top_logprobs or 0) if self.body.logprobs else 0
        self.call.submit(self.call.answers([self.prompt], self.body.n, params, top, ready.form))

    async def whole(self, request: Request) -> bytes:
        """The answer in one piece."""
        events = await self.call.all(request)
        values = len(events) * (1 + (self.body.top_logprobs or 0))
        return await self.served.writer.write(partial(self._whole, events), values)

    def _whole(self, events: list[Event]) -> dict[str, Any]:
        for event in events:
            self.choices[event.number].take(event.payload)
        choices = [
            {"index": c.answer.index, "message": c.message(), "finish_reason": c.finish,
             "logprobs": c.listed(c.answer.tokens) if self.body.logprobs else None}
            for c in self.choices
        ]  # fmt: skip
        counted = usage([self.prompt], [c.answer for c in self.choices])
        return head(self.served, "chatcmpl", "chat.completion") | {"choices": choices, "usage": counted}

    async def pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks, those that are ready together at once."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        plain = head(self.served, "chatcmpl", "chat.completion.chunk")
        begin = plain | ({"usage": None} if with_usage else {})
        while events := await self.call.next():
            chunks = []
            for event in events:
                choice = self.choices[event.number]
                delta, tokens = choice.take(event.payload)
                if delta or choice.finish or (tokens and self.body.logprobs):
                    listed = choice.listed(tokens) if self.body.logprobs else None
                    part = {"index": event.number, "delta": delta, "logprobs": listed, "finish_reason": choice.finish}
                    chunks.append(begin | {"choices": [part]})
            if chunks:
                yield chunks
        if with_usage:
            counted = usage([self.prompt], [c.answer for c in self.choices])
            yield [plain | {"choices": [], "usage": counted}]


@final
class ChatChoice:
    """One answer as it grows: text, or the call of a tool."""

    def __init__(self, answer: Choice, tools: tuple[str, ...]):
        self.answer, self.reader = answer, CallReader(tools)
        self.content, self.arguments, self.call_id = "", "", f"call_{uuid.uuid4().hex[:24]}"
        self.finish: str | None = None
        self._opened = self._called = False

    def take(self, e: Emission | LastText) -> tuple[dict[str, Any], list[Listed]]:
        """Take in a token, or text alone; what it adds to the message, and the token as it is listed."""
        tokens, finish = self.answer.take(e), self.answer.finish
        text, arguments = self.reader.push(e.text, "error" if isinstance(e, LastText) else finish)
        self.content += text
        self.arguments += arguments
        called = self.reader.name is not None
        self.finish = "tool_calls" if called and finish == "stop" else finish
        delta: dict[str, Any] = {"content": text} if text else {}
        if not self._opened:
            self._opened = True
            delta = {"role": "assistant", "content": text}
        if called and (arguments or not self._called):
            delta["tool_calls"] = [self._call(arguments)]
            self._called = True
        return delta, tokens

    def _call(self, arguments: str) -> dict[str, Any]:
        """A piece of the call; the first one says whose it is."""
        if self._called:
            return {"index": 0, "function": {"arguments": arguments}}
        function = {"name": self.reader.name, "arguments": arguments}
        return {"index": 0, "id": self.call_id, "type": "function", "function": function}

    def message(self) -> dict[str, Any]:
        """The whole message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reader.name is not None:
            function = {"name": self.reader.name, "arguments": self.arguments}
            message |= {"content": None, "tool_calls": [{"id": self.call_id, "type": "function", "function": function}]}
        return message

    def listed(self, tokens: list[Listed]) -> dict[str, Any]:
        """Log-probabilities of some of its tokens."""
        return self.answer.listing.chat(tokens)
