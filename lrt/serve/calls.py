"""Requests on their way through the engine: jobs go in, events come out, answers grow."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

from fastapi import Request

from lrt.config.decoding import SamplingParams
from lrt.inference.batch import Emission, Ranked
from lrt.serve.engine import Answer, Busy, Ended, Event, Job, LastText
from lrt.serve.grammar import GrammarConstraint
from lrt.serve.http import ApiError, disconnected, our_fault
from lrt.serve.intake import CLOSING
from lrt.serve.served import Served
from lrt.serve.text import Listing

Listed = tuple[int, float | None, Ranked]
"""A token, its log-probability, and the most probable ones in its place."""
MOST_TOGETHER = 128
"""Events that are taken at a time: more would hold the event loop."""


@dataclass
class Choice:
    """One answer as it grows."""

    index: int
    prompt: list[int]
    listing: Listing
    text: str = ""
    tokens: list[Listed] = field(default_factory=list)
    finish: str | None = None

    def take(self, e: Emission | LastText) -> list[Listed]:
        """Take in a token, or text alone; the token as it is listed. One that ends the answer is counted too."""
        self.text += e.text
        if isinstance(e, LastText):
            return []
        self.tokens.append((e.token, e.logprob, e.top))
        self.finish = e.finish
        return self.tokens[-1:]


@final
class Call:
    """One request's jobs, and what comes of them."""

    def __init__(self, served: Served, owner: int, salt: str | None = None):
        """`owner` is the API key's number; with `salt` it says who shares kept states with this request."""
        self.served, self.events = served, asyncio.Queue[Event]()
        self.deadline = time.monotonic() + served.settings.deadline
        self.scope = hashlib.sha256(f"{owner}:{salt or ''}".encode("utf-8", "replace")).digest()  # no salt is empty
        self.jobs: list[Job] = []
        self.left = 0
        self._fault: ApiError | None = None

    def answers(
        self,
        prompts: Sequence[list[int]],
        n: int,
        params: SamplingParams,
        top: int,
        form: GrammarConstraint | None = None,
    ) -> list[Job]:
        """The jobs of n answers to each prompt."""
        return [
            Answer(
                i * n + j, self.events, self.deadline, prompt=prompt, sampling=params, sample=j, top=top,
                scope=self.scope, constraint=None if form is None else form.copy(),
            )
            for i, prompt in enumerate(prompts) for j in range(n)
        ]  # fmt: skip

    def submit(self, jobs: list[Job]) -> None:
        """Queue the jobs. ApiError 429 if there is no room, 503 if there will be none."""
        try:
            self.served.engine.submit(jobs)
        except Busy as busy:
            if busy.closing:
                raise ApiError(503, CLOSING) from None
            message = f"the queue is full; try again in {busy.retry_after} s"
            raise ApiError(429, message, headers={"retry-after": str(busy.retry_after)}) from None
        self.jobs, self.left = jobs, len(jobs)

    def cancel(self) -> None:
        """Give up what still runs."""
        self.served.engine.cancel(self.jobs)

    async def next(self) -> list[Event]:
        """What has happened since, from one thing to `MOST_TOGETHER`; nothing once all jobs have ended.

        What came before a fault is returned first, however late it is read; the next call raises the fault as ApiError.
        """
        if self._fault is not None:
            raise self._fault
        if not self.left:
            return []
        if self.events.qsize() > MOST_TOGETHER:
            await asyncio.sleep(0)  # others first: who has not read for a while finds much
        ready = [await self.events.get()]
        while not self.events.empty() and len(ready) < MOST_TOGETHER:
            ready.append(self.events.get_nowait())
        for place, event in enumerate(ready):
            if isinstance(event.payload, Ended | ValueError):
                self._fault = self._error(event.payload)
                return ready[:place] or await self.next()
            self.left -= not _goes_on(event.payload)
        return ready

    def _error(self, why: Ended | ValueError) -> ApiError:
        if isinstance(why, ValueError):
            return ApiError(400, str(why))
        seconds = self.served.settings.deadline
        return {
            Ended.EXPIRED: ApiError(408, f"the request took longer than {seconds:g} s; ask for less at a time"),
            Ended.CLOSING: ApiError(503, CLOSING),
            Ended.FAILED: our_fault(),
        }[why]

    async def all(self, request: Request) -> list[Event]:
        """Everything, unless the client goes away first."""

        async def gather() -> list[Event]:
            complete = []
            while ready := await self.next():
                complete += ready
            return complete

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


def _goes_on(payload: Any) -> bool:
    """Whether an event's job has more to say."""
    return isinstance(payload, LastText) or (isinstance(payload, Emission) and payload.finish is None)


def head(served: Served, kind: str, object_: str) -> dict[str, Any]:
    """What every answer begins with; `kind` is the beginning of its id."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": object_, "created": int(time.time()), "model": served.name,
            "system_fingerprint": served.fingerprint}  # fmt: skip


def usage(prompts: Sequence[list[int]], choices: Sequence[Choice]) -> dict[str, int]:
    """Tokens taken in and made."""
    prompt_tokens, answer_tokens = sum(map(len, prompts)), sum(len(c.tokens) for c in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
    }
