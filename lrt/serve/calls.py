"""Requests on their way: from a checked body to jobs of the engine, and from their events to answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from fastapi import Request

from lrt import __version__
from lrt.config.decoding import SamplingParams
from lrt.inference.batch import Emission, Ranked
from lrt.inference.prefill import OneToken, next_logits
from lrt.serve.engine import Answer, BackgroundTask, Busy, Engine, Event, Expired, Failed, Job
from lrt.serve.http import ApiError, disconnected
from lrt.serve.inspect import score, trained_without_memory
from lrt.serve.metrics import Metrics
from lrt.serve.schemas import ChatRequest, CompletionRequest, Generation
from lrt.serve.settings import Settings
from lrt.serve.text import Listing, Vocabulary
from lrt.training.checkpoint import Loaded


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    prompt: list[int]
    listing: Listing
    text: str = ""
    tokens: list[tuple[int, float | None, Ranked]] = field(default_factory=list)
    finish: str | None = None

    def take(self, e: Emission) -> None:
        """Take in a token; one that ends the answer without being part of it is not listed."""
        self.text += e.text
        self.tokens.append((e.token, e.logprob, e.top))
        self.finish = e.finish


@final
class Served:
    """One model behind the endpoints."""

    def __init__(self, loaded: Loaded, settings: Settings, name: str | None = None, run: OneToken = next_logits):
        self.model, self.config, self.settings = loaded.model, loaded.config, settings
        self.name, self.created = name or loaded.config.name, int(time.time())
        self.fingerprint = f"lrt-{__version__}-step{loaded.step}"
        self.words = Vocabulary(loaded.tokenizer, loaded.run / "tokenizer")
        self.metrics = Metrics()
        self.engine = Engine(self.model, settings, loaded.tokenizer.decode_bytes, self.metrics, run)
        self.context = self.model.config.context
        self.how = {"mode": settings.prefill, "tolerance": settings.tolerance, "chunk": settings.chunk}

    def about(self) -> dict[str, Any]:
        """What the page shows of the model."""
        c = self.model.config
        unaided = trained_without_memory(self.config.train.schedule, self.config.train.length)
        return {
            "name": self.name, "depth": c.depth, "width": c.d, "context": self.context, "source": c.source,
            "memory": c.memory.projection if c.memory.on else None, "residual": c.memory.residual,
            "shift": c.memory.shifted,
            "schedule": self.config.train.schedule, "trained_without_memory": unaided,
            "max_output": self.longest, "fingerprint": self.fingerprint,
        }  # fmt: skip

    @property
    def longest(self) -> int:
        """Most tokens of an answer."""
        return self.settings.max_output or self.context

    def check(self, body: Generation, prompts: Sequence[list[int]], most: int | None) -> None:
        """Raise what is wrong with a request before anything is queued."""
        if body.model is not None and body.model != self.name:
            raise ApiError(404, f"the model {body.model!r} is not served here; use {self.name!r}", param="model")
        if most is not None and most > self.longest:
            raise ApiError(400, f"max_tokens is {most}; at most {self.longest} are generated here", param="max_tokens")
        if len(prompts) * body.n > self.settings.max_choices:
            raise ApiError(400, f"{len(prompts)} prompts with n = {body.n} make more than {self.settings.max_choices} "
                           "answers; send fewer at a time")  # fmt: skip
        for ids in prompts:
            self.fits(ids)

    def fits(self, ids: list[int]) -> None:
        """Raise what is wrong with a prompt."""
        longest = min(self.settings.max_prompt or self.context, self.context - 1)
        if len(ids) > longest:
            raise ApiError(400, f"the prompt has {len(ids)} tokens; at most {longest} fit here", param="prompt")
        wrong = [i for i in ids if i >= self.model.config.vocab_size]
        if wrong:
            raise ApiError(400, f"token {wrong[0]} is outside the vocabulary of {self.model.config.vocab_size}",
                           param="prompt")  # fmt: skip

    def answers(self, call: Call, prompts: list[list[int]], n: int, law: SamplingParams, top: int) -> list[Job]:
        """The jobs of n answers to each prompt; a text ends at the BOS, which opens the next document."""
        bos = self.model.config.bos
        return [
            Answer(i * n + j, call.events, call.deadline, prompt=prompt, sampling=law, sample=j, top=top,
                   stop_tokens=() if bos is None else (bos,))
            for i, prompt in enumerate(prompts) for j in range(n)
        ]  # fmt: skip


@final
class Call:
    """One request's jobs, and what comes of them."""

    def __init__(self, served: Served):
        self.served, self.events = served, asyncio.Queue[Event]()
        self.deadline = time.monotonic() + served.settings.deadline
        self.jobs: list[Job] = []
        self.left = 0

    def submit(self, jobs: list[Job]) -> None:
        """Queue the jobs. ApiError 429 if there is no room."""
        try:
            self.served.engine.submit(jobs)
        except Busy as busy:
            message = f"the queue is full; try again in {busy.retry_after} s"
            raise ApiError(429, message, headers={"retry-after": str(busy.retry_after)}) from None
        self.jobs, self.left = jobs, len(jobs)

    def cancel(self) -> None:
        """Give up what still runs."""
        self.served.engine.cancel(self.jobs)

    async def next(self) -> list[Event]:
        """Everything that has happened since, at least one thing; nothing once all jobs have ended."""
        if not self.left:
            return []
        ready = [await self.events.get()]
        while not self.events.empty():
            ready.append(self.events.get_nowait())
        for event in ready:
            if isinstance(event.what, Expired):
                seconds = self.served.settings.deadline
                raise ApiError(408, f"the request took longer than {seconds:g} s; ask for less at a time")
            if isinstance(event.what, Failed):
                raise ApiError(500, "the server failed on this request; its log says why")
            if isinstance(event.what, ValueError):
                raise ApiError(400, str(event.what))
            self.left -= not isinstance(event.what, Emission) or event.what.finish is not None
        return ready

    async def all(self, request: Request) -> list[Event]:
        """Everything, unless the client goes away first."""

        async def gather() -> list[Event]:
            found = []
            while ready := await self.next():
                found += ready
            return found

        gathering = asyncio.ensure_future(gather())
        watching = asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait((gathering, watching), return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                raise ApiError(499, "the client has gone")  # nobody hears it; the metrics count it
            return gathering.result()
        finally:
            self.cancel()
            gathering.cancel()
            watching.cancel()


@final
class Completion:
    """POST /v1/completions: one request on its way."""

    def __init__(self, served: Served, body: CompletionRequest):
        self.served, self.body, self.call, words = served, body, Call(served), served.words
        given = body.prompt
        self.texts = [given] if isinstance(given, str) else [x for x in given if isinstance(x, str)]
        try:
            prompts = [words.opened(text) for text in self.texts] or _lists(given)
        except ValueError as error:  # text that has no UTF-8 form
            raise ApiError(400, str(error), param="prompt") from None
        served.check(body, prompts, body.max_tokens)
        self.prompts, self.opening = prompts, bool(self.texts)
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                     "model": served.name, "system_fingerprint": served.fingerprint}  # fmt: skip
        self.choices = [Choice(k, prompts[k // body.n], Listing(words)) for k in range(len(prompts) * body.n)]
        self.scored = body.echo and body.logprobs is not None
        self.call.submit(self._jobs())

    def _jobs(self) -> list[Job]:
        body, served, call = self.body, self.served, self.call
        jobs: list[Job] = []
        if self.scored:  # before the answers, whose listings follow
            jobs += [
                BackgroundTask(-1 - i, call.events, call.deadline,
                     work=lambda ids=ids: score(served.model, ids, body.logprobs or 0, **served.how))
                for i, ids in enumerate(self.prompts)
            ]  # fmt: skip
        if body.max_tokens:
            law = body.sampling(body.max_tokens)
            jobs += served.answers(call, self.prompts, body.n, law, body.logprobs or 0)
        elif not jobs:  # an echo alone: nothing to compute
            self.choices = [Choice(c.index, c.prompt, c.listing, finish="length") for c in self.choices]
        return jobs

    def echo(self, choice: Choice, scores: list[tuple[float, Ranked]] | None) -> dict[str, Any]:
        """A choice that holds the prompt; a text's BOS is not listed."""
        ids = choice.prompt
        text = self.texts[choice.index // self.body.n] if self.opening else self.served.words.tokenizer.decode(ids)
        values = [(None, ()), *scores] if scores is not None else []
        listed = [(token, *value) for token, value in zip(ids, values, strict=True)] if values else []
        logprobs = choice.listing.completion(listed[1 if self.opening else 0 :]) if values else None
        return {"text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": None}

    def part(self, choice: Choice, text: str, tokens: list) -> dict[str, Any]:
        """A piece of an answer, or all of it."""
        logprobs = None if self.body.logprobs is None else choice.listing.completion(tokens)
        return {"text": text, "index": choice.index, "logprobs": logprobs, "finish_reason": choice.finish}

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one piece."""
        events = await self.call.all(request)
        scores = {event.number: event.what for event in events if event.number < 0}
        for event in events:
            if event.number >= 0:
                self.choices[event.number].take(event.what)
        made = []
        for choice in self.choices:
            front = self.echo(choice, scores.get(-1 - choice.index // self.body.n)) if self.body.echo else None
            answer = self.part(choice, choice.text, choice.tokens)
            answer["finish_reason"] = choice.finish or "length"
            made.append(_joined(front, answer) if front else answer)
        return self.head | {"choices": made, "usage": self.usage()}

    async def pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks, those that are ready together at once."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        head = self.head | ({"usage": None} if with_usage else {})
        held: list[Event] = []
        if self.body.echo:
            scores: dict[int, list] = {}
            while self.scored and len(scores) < len(self.prompts):
                for event in await self.call.next():
                    if event.number < 0:
                        scores[event.number] = event.what
                    else:
                        held.append(event)
            fronts = [self.echo(c, scores.get(-1 - c.index // self.body.n)) for c in self.choices]
            yield [head | {"choices": [front]} for front in fronts]
        while events := held or await self.call.next():
            held, chunks = [], []
            for event in events:
                choice, e = self.choices[event.number], event.what
                choice.take(e)
                if e.text or e.finish or self.body.logprobs is not None:
                    chunks.append(head | {"choices": [self.part(choice, e.text, choice.tokens[-1:])]})
            if chunks:
                yield chunks
        if not self.body.max_tokens:
            yield [head | {"choices": [self.part(c, "", []) | {"finish_reason": "length"}]} for c in self.choices]
        if with_usage:
            yield [self.head | {"choices": [], "usage": self.usage()}]

    def usage(self) -> dict[str, int]:
        return _usage(self.prompts, self.choices)


@final
class Chat:
    """POST /v1/chat/completions: one request on its way."""

    def __init__(self, served: Served, body: ChatRequest):
        self.served, self.body, self.call = served, body, Call(served)
        try:
            self.prompt, stop = served.words.conversation([m.plain() for m in body.messages])
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        most = body.max_completion_tokens or body.max_tokens
        served.check(body, [self.prompt], most)
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name,
                     "system_fingerprint": served.fingerprint}  # fmt: skip
        self.choices = [Choice(k, self.prompt, Listing(served.words)) for k in range(body.n)]
        law = body.sampling(most or served.longest, stop)
        top = (body.top_logprobs or 0) if body.logprobs else 0
        self.call.submit(served.answers(self.call, [self.prompt], body.n, law, top))

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one piece."""
        for event in await self.call.all(request):
            self.choices[event.number].take(event.what)
        choices = [
            {"index": c.index, "message": {"role": "assistant", "content": c.text, "refusal": None},
             "logprobs": self._listed(c, c.tokens), "finish_reason": c.finish}
            for c in self.choices
        ]  # fmt: skip
        return self.head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage([self.prompt], self.choices),
        }

    async def pieces(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as chunks, those that are ready together at once."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        plain = self.head | {"object": "chat.completion.chunk"}
        head, opened = plain | ({"usage": None} if with_usage else {}), set()
        while events := await self.call.next():
            chunks = []
            for event in events:
                choice, e = self.choices[event.number], event.what
                choice.take(e)
                delta = {"content": e.text} if e.text else {}
                if event.number not in opened:
                    opened.add(event.number)
                    delta = {"role": "assistant", "content": e.text}
                if delta or e.finish or self.body.logprobs:
                    logprobs = self._listed(choice, choice.tokens[-1:])
                    part = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": e.finish}
                    chunks.append(head | {"choices": [part]})
            if chunks:
                yield chunks
        if with_usage:
            yield [plain | {"choices": [], "usage": _usage([self.prompt], self.choices)}]

    def _listed(self, choice: Choice, tokens: list) -> dict[str, Any] | None:
        return choice.listing.chat(tokens) if self.body.logprobs else None


def _usage(prompts: list[list[int]], choices: list[Choice]) -> dict[str, int]:
    taken, made = sum(map(len, prompts)), sum(len(c.tokens) for c in choices)
    return {"prompt_tokens": taken, "completion_tokens": made, "total_tokens": taken + made}


def _lists(given: Any) -> list[list[int]]:
    return [given] if isinstance(given[0], int) else list(given)


def _joined(front: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """An answer behind its prompt."""
    first, second = front["logprobs"], answer["logprobs"]
    both = {key: first[key] + second[key] for key in first} if first and second else None
    return answer | {"text": front["text"] + answer["text"], "logprobs": both}
