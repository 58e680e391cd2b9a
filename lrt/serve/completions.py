"""POST /v1/completions: one request on its way, from its body to its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple, final

from fastapi import Request

from lrt.inference.batch import Ranked
from lrt.serve.calls import MOST_TOGETHER, Call, Choice, head, usage
from lrt.serve.engine import BackgroundTask, Event, Job
from lrt.serve.grammar import GrammarConstraint
from lrt.serve.http import ApiError
from lrt.serve.inspect import score
from lrt.serve.json_writer import event_bytes
from lrt.serve.schemas import CompletionRequest
from lrt.serve.served import Served
from lrt.serve.text import Listing


class ReadyCompletion(NamedTuple):
    """A request as tokens."""

    body: CompletionRequest
    texts: list[str]
    """The prompts, if they are texts."""
    prompts: list[list[int]]
    form: GrammarConstraint | None

    @staticmethod
    def of(served: Served, data: Any) -> ReadyCompletion:
        """From a body's JSON; no part of it needs the event loop. ApiError: what is wrong with it."""
        body = served.parsed(CompletionRequest, data)
        texts, prompts = _apart(body.prompt)
        served.check(body, len(texts or prompts), body.max_tokens)
        form, _ = served.constraint(body, body.response_format)
        for ids in prompts:
            served.require_fit(ids)
        return ReadyCompletion(body, texts, prompts or [served.opened(text) for text in texts], form)


def _apart(prompt: Any) -> tuple[list[str], list[list[int]]]:
    """The prompts of a body: texts, or token ids."""
    if isinstance(prompt, str):
        return [prompt], []
    if isinstance(prompt[0], int):
        return [], [prompt]
    return (prompt, []) if isinstance(prompt[0], str) else ([], prompt)


@final
class Completion:
    """One request on its way."""

    def __init__(self, served: Served, ready: ReadyCompletion, owner: int):
        self.served, self.body, self.prompts, self.texts = served, ready.body, ready.prompts, ready.texts
        self.call = Call(served, owner, ready.body.cache_salt)
        self.head = head(served, "cmpl", "text_completion")
        n = self.body.n
        self.choices = [Choice(k, self.prompts[k // n], Listing(served.words)) for k in range(len(self.prompts) * n)]
        self.scored = self.body.echo and self.body.logprobs is not None
        self.call.submit(self._jobs(ready.form))

    def _jobs(self, form: GrammarConstraint | None) -> list[Job]:
        body, served, call = self.body, self.served, self.call
        jobs: list[Job] = []
        if self.scored:  # before the answers, whose listings follow
            jobs += [
                BackgroundTask(-1 - i, call.events, call.deadline, left=len(ids),
                     work=lambda ids=ids: score(served.model, ids, body.logprobs or 0, served.mode))
                for i, ids in enumerate(self.prompts)
            ]  # fmt: skip
        if body.max_tokens:
            params = body.sampling(body.max_tokens, (), served.words.tokenizer.ends)
            jobs += call.answers(self.prompts, body.n, params, body.logprobs or 0, form)
        elif not jobs:  # an echo alone: nothing to compute
            self.choices = [Choice(c.index, c.prompt, c.listing, finish="length") for c in self.choices]
        return jobs

    def echo(self, choice: Choice, scores: list[tuple[float, Ranked]] | None) -> dict[str, Any]:
        """A choice that holds the prompt; a text's BOS is not listed."""
        ids = choice.prompt
        text = self.texts[choice.index // self.body.n] if self.texts else self.served.words.tokenizer.decode(ids)
        values = [(None, ()), *scores] if scores is not None else []
        listed = [(token, *value) for token, value in zip(ids, values, strict=True)] if values else []
        logprobs = choice.listing.completion(listed[1 if self.texts else 0 :]) if values else None
        return {"text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": None}

    def part(self, choice: Choice, text: str, tokens: list) -> dict[str, Any]:
        """A piece of an answer, or all of it."""
        logprobs = None if self.body.logprobs is None else choice.listing.completion(tokens)
        return {"text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": choice.finish}

    async def whole(self, request: Request) -> bytes:
        """The answer in one piece."""
        events = await self.call.all(request)
        listed = len(events) + (sum(len(c.prompt) for c in self.choices) if self.body.echo else 0)
        return await self.served.writer.write(partial(self._whole, events), self._values(listed))

    def _values(self, tokens: int) -> int:
        """About how many values the listing of so many tokens has."""
        return tokens * (1 + (self.body.logprobs or 0))

    def _whole(self, events: list[Event]) -> dict[str, Any]:
        scores = {event.number: event.payload for event in events if event.number < 0}
        for event in events:
            if event.number >= 0:
                self.choices[event.number].take(event.payload)
        choices = []
        for choice in self.choices:
            front = self.echo(choice, scores.get(-1 - choice.index // self.body.n)) if self.body.echo else None
            answer = self.part(choice, choice.text, choice.tokens)
            answer["finish_reason"] = choice.finish or "length"
            choices.append(_joined(front, answer) if front else answer)
        return self.head | {"choices": choices, "usage": usage(self.prompts, self.choices)}

    async def pieces(self) -> AsyncIterator[list[dict[str, Any]] | bytes]:
        """The answer as chunks, those that are ready together at once; prompts are events of their own."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        head = self.head | ({"usage": None} if with_usage else {})
        waiting: list[Event] = []
        if self.body.echo:
            scores = await self._scores(waiting)
            for c in self.choices:
                front = partial(self.echo, c, scores.get(-1 - c.index // self.body.n))
                made = partial(lambda front: head | {"choices": [front()]}, front)
                yield await self.served.writer.write(made, self._values(len(c.prompt)), event_bytes)
        while events := waiting[:MOST_TOGETHER] or await self.call.next():
            waiting, chunks = waiting[MOST_TOGETHER:], []
            for event in events:
                choice, e = self.choices[event.number], event.payload
                listed = choice.take(e)
                if e.text or choice.finish or (listed and self.body.logprobs is not None):
                    chunks.append(head | {"choices": [self.part(choice, e.text, listed)]})
            if chunks:
                yield chunks
        if not self.body.max_tokens:
            yield [head | {"choices": [self.part(c, "", []) | {"finish_reason": "length"}]} for c in self.choices]
        if with_usage:
            yield [self.head | {"choices": [], "usage": usage(self.prompts, self.choices)}]

    async def _scores(self, waiting: list[Event]) -> dict[int, list]:
        """The scores of the prompts, by event; what comes of the answers meanwhile goes into `waiting`.

        A fault ends them early, where it is told later: after what there is by then. ApiError: there is nothing.
        """
        scores: dict[int, list] = {}
        try:
            while self.scored and len(scores) < len(self.prompts):
                for event in await self.call.next():
                    if event.number < 0:
                        scores[event.number] = event.payload
                    else:
                        waiting.append(event)
        except ApiError:
            if not (scores or waiting):
                raise
        return scores


def _joined(front: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """An answer behind its prompt."""
    first, second = front["logprobs"], answer["logprobs"]
    both = {key: first[key] + second[key] for key in first} if first and second else None
    return answer | {"text": front["text"] + answer["text"], "logprobs": both}
