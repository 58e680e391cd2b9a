"""The engine: one thread that runs the batch, and beside it, a chunk at a time, everything else that needs the model.

A cycle: drop what was cancelled or has expired, seat what waits, one chunk of one lane (a long prompt's sweeps, a
score), one step of the batch. Requests come in through `submit`; events go out to the event loop, once per cycle.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.inference.batch import Constraint, Emission, Request, RunningBatch
from lrt.inference.prefill import next_logits
from lrt.inference.streaming import DecodeBytes, TextStream
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import OneToken, prefill_options, solve
from lrt.serve.metrics import Metrics
from lrt.serve.settings import Settings
from lrt.serve.states import MARK_EVERY, StateStore

log = logging.getLogger("lrt.serve")
Lane = Generator[None, None, Any]
"""Work done a chunk at a time; what it returns is the result."""
OLDEST_EVERY = 4
"""One chunk in so many is of the lane that has waited longest."""


class Busy(Exception):
    """There is no room."""

    def __init__(self, retry_after: int, closing: bool):
        super().__init__("the queue is full")
        self.retry_after, self.closing = retry_after, closing


class Ended(Enum):
    """Why a job has ended without its result, where that is not the request's fault."""

    EXPIRED = "its deadline has passed"
    FAILED = "our own fault"
    CLOSING = "the server ends"


class LastText(NamedTuple):
    """The rest of an answer that a fault ends: what was held back as a possible stop text, or nothing."""

    text: str


class Event(NamedTuple):
    """What a job's owner hears: a token, the result of a task, or why it ended without."""

    number: int
    """The job's number within its request."""
    payload: Any
    """An `Emission`, a task's result, or `Ended` or a ValueError, before which there may be a `LastText`."""


@dataclass(eq=False)
class Job:
    """Something the engine does for a request."""

    number: int
    """Within its request."""
    events: asyncio.Queue[Event]
    deadline: float
    """On time.monotonic's clock."""
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    left: int = 0
    """Tokens of its text that are still to be taken in; a task's do not shrink."""


@dataclass(eq=False)
class Answer(Job):
    """One continuation of one prompt."""

    prompt: list[int] = field(default_factory=list)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    sample: int = 0
    top: int = 0
    constraint: Constraint | None = None
    scope: bytes = b""
    """Whose kept states it may go on from, and leaves its own to."""
    made: list[int] = field(default_factory=list)
    marks: dict[int, Tensor] = field(default_factory=dict)
    """The memory after so many tokens: at multiples of `MARK_EVERY`, and at the end of the prompt."""


@dataclass(eq=False)
class BackgroundTask(Job):
    """Work on the model that is not decoding: scoring, looking inside."""

    work: Callable[[], Lane] = field(default=lambda: iter(()))  # pyright: ignore[reportAssignmentType]


@final
class Engine:
    """Runs jobs; every method but the private ones may be called from the event loop's thread."""

    def __init__(
        self, model: LRT, settings: Settings, decode_bytes: DecodeBytes, metrics: Metrics, run: OneToken = next_logits
    ):
        self.model, self.settings, self.metrics = model, settings, metrics
        self.capacity = model.config.context
        self.store = StateStore(settings.keep_mb * 2**20)
        self.plan = prefill_options(model, settings.prefill_options)
        cache = KVCache.empty(model, settings.shapes[-1], self.capacity)
        self._batch = RunningBatch(model, cache, run=run, shapes=settings.shapes)
        self._decode_bytes = decode_bytes
        self._seated: dict[int, Answer] = {}
        self._lanes: list[tuple[Job, Lane]] = []
        """Long prompts and tasks, those that have waited longest first."""
        self._turns = itertools.count(1)
        self._answers: deque[Answer] = deque()
        self._tasks: deque[BackgroundTask] = deque()
        self._wake = threading.Condition()
        self._outbox: list[tuple[Job, Event]] = []
        self._closing = self._aborted = False
        self._typical = 1.0
        self._thread = threading.Thread(target=self._run, name="lrt-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; events go to queues of this loop."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Finish what runs and what waits, then stop; returns when it has."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def abort(self) -> None:
        """Give up all that runs and waits, and tell its owners; nothing is taken from now on."""
        with self._wake:
            self._closing = self._aborted = True
            self._wake.notify()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs, or none: `Busy`."""
        with self._wake:
            waiting = len(self._answers) + len(self._tasks)
            if waiting + len(jobs) > self.settings.queue or self._closing:
                self.metrics.refused.inc()
                raise Busy(max(1, math.ceil(self._typical * waiting / self.settings.rows)), self._closing)
            self._answers.extend(job for job in jobs if isinstance(job, Answer))
            self._tasks.extend(job for job in jobs if isinstance(job, BackgroundTask))
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their rows are free at the next step."""
        for job in jobs:
            job.cancelled = True

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not (self._seated or self._lanes or self._answers or self._tasks)

    def _run(self) -> None:
        while True:
            with self._wake:
                while self.idle and not self._closing:
                    self._gauges()
                    self._wake.wait()
                if self.idle:
                    return
            try:
                self._cycle()
            except Exception:  # better all of them than a server that hangs
                log.exception("a step failed")
                self._abandon()
            self._flush()

    @torch.no_grad()
    def _cycle(self) -> None:
        self._drop(time.monotonic())
        self._admit()
        if self._lanes:
            self._advance_lane()
        if self._batch.running:
            for emission in self._batch.draw():
                answer = self._seated[emission.row]
                self._guarded(answer, lambda answer=answer, emission=emission: self._emitted(answer, emission))
        self._gauges()
        self._flush()
        if self._batch.running:
            ending = [r for r in self._batch.running if len(r.prompt) == 1]
            self._batch.advance()
            self.metrics.steps.inc()
            for r in {id(r): r for r in (*ending, *self._batch.running)}.values():
                if r in ending or r.length % MARK_EVERY == 0:
                    self._seated[r.row].marks[r.length] = self._batch.cache.memory[r.row].clone()

    def _drop(self, now: float) -> None:
        """Forget jobs that were cancelled or whose time is up."""
        over = [job for job in self._jobs() if job.cancelled or now > job.deadline or self._aborted]
        if not over:
            return
        for job in over:
            (self.metrics.cancelled if job.cancelled or self._aborted else self.metrics.expired).inc()
            self._end(job, Ended.CLOSING if self._aborted else Ended.EXPIRED)
        gone = set(map(id, over))
        with self._wake:
            self._answers = deque(job for job in self._answers if id(job) not in gone)
            self._tasks = deque(job for job in self._tasks if id(job) not in gone)
        self._lanes = [(job, lane) for job, lane in self._lanes if id(job) not in gone]

    def _jobs(self) -> list[Job]:
        with self._wake:
            waiting = [*self._answers, *self._tasks]
        return [*self._seated.values(), *(job for job, _ in self._lanes if isinstance(job, BackgroundTask)), *waiting]

    def _admit(self) -> None:
        """Seat answers that wait, as long as there are rows, and begin tasks, as long as few are under way."""
        for row in range(self.settings.rows):
            if row in self._seated:
                continue
            with self._wake:
                answer = self._answers.popleft() if self._answers else None
            if answer is None:
                break
            self._guarded(answer, lambda answer=answer, row=row: self._seat(answer, row))
        while self._tasks and len(self._lanes) < self.settings.rows:
            with self._wake:
                task = self._tasks.popleft()
            self._lanes.append((task, task.work()))

    def _seat(self, answer: Answer, row: int) -> None:
        self._seated[row] = answer
        stored, done = self.store.find(answer.scope, answer.prompt)
        self.metrics.prompt_tokens.inc(len(answer.prompt))
        answer.left = len(answer.prompt) - 1 - done
        if self.plan.stride and answer.left >= self.settings.sweep_from:
            self._lanes.append((answer, self._sweep(answer, row)))
            return
        cache = self._batch.cache
        self.metrics.reused_tokens.inc(done)
        self._batch.cache = stored.into(cache, row, done, self.model.config.bos) if stored else cache.clear(row)
        self._join(answer, row, done)

    def _sweep(self, answer: Answer, row: int) -> Lane:
        """Take in all of a long prompt but its last token, a chunk at a time, then join the batch.

        It looks for a kept state when its turn comes: prompts that arrived together share what the first took in.
        """
        cache, prompt_tokens = KVCache.empty(self.model, 1, self.capacity), answer.prompt[:-1]
        stored, done = self.store.find(answer.scope, answer.prompt)
        self.metrics.reused_tokens.inc(done)
        cache = stored.into(cache, 0, done, self.model.config.bos) if stored else cache
        first = -done % MARK_EVERY  # so that chunks end where others will look for them
        for part in filter(None, (prompt_tokens[done : done + first], prompt_tokens[done + first :])):
            tokens = torch.tensor([part], device=self.model.device)
            for _, solved in solve(self.model, tokens, None, cache, self.plan):
                cache = solved.cache
                answer.left = len(prompt_tokens) - int(cache.length[0])
                answer.marks[len(prompt_tokens) - answer.left] = cache.memory[0].clone()
                yield
        self.metrics.swept_tokens.inc(len(prompt_tokens) - done)
        self.store.add(answer.scope, prompt_tokens, cache, 0, answer.marks)
        self._batch.cache = self._batch.cache.put(torch.tensor([row], device=self.model.device), cache)
        self._join(answer, row, len(prompt_tokens))

    def _join(self, answer: Answer, row: int, done: int) -> None:
        params = answer.sampling
        tokens_left = min(params.max_new_tokens, self.capacity - len(answer.prompt) + 1)
        stream = TextStream(self._decode_bytes, params.stop)
        prompt = answer.prompt[done:][::-1]
        request = Request(
            row,
            params,
            params.stop_tokens or (),
            tokens_left,
            stream,
            answer.sample,
            done,
            prompt,
            answer.top,
            answer.constraint,
        )
        self._batch.join(request, answer.prompt)

    def _advance_lane(self) -> None:
        """One chunk of the lane with the least left; every fourth time of the first, so that each comes to its end.

        Were all to advance in turn, then 32 prompts of one length would all have their first tokens at the very end.
        """
        first = next(self._turns) % OLDEST_EVERY == 0
        turn = self._lanes[0] if first else min(self._lanes, key=lambda waiting: waiting[0].left)
        job, lane = turn
        try:
            next(lane)
        except StopIteration as end:
            self._lanes.remove(turn)
            if isinstance(job, BackgroundTask):
                self._post(job, end.value)
        except Exception as error:
            self._lanes.remove(turn)
            if isinstance(error, FloatingPointError):
                log.error("a task ended: %s", error)
            elif not isinstance(error, ValueError):
                log.exception("a task failed")
            self._end(job, error if isinstance(error, ValueError) else Ended.FAILED)

    def _guarded(self, answer: Answer, work: Callable[[], None]) -> None:
        """Do something for one answer; what goes wrong ends that answer alone."""
        try:
            work()
        except Exception:
            log.exception("an answer failed")
            self._end(answer, Ended.FAILED)

    def _emitted(self, answer: Answer, emission: Emission) -> None:
        now = time.monotonic()
        if emission.fault is not None:
            if not emission.unkept:
                log.error("an answer ended: %s", emission.fault)
            self._end(answer, ValueError(emission.fault) if emission.unkept else Ended.FAILED)
            return
        if not answer.made:
            self.metrics.first_token.observe(now - answer.began)
        answer.made.append(emission.token)
        self.metrics.tokens.inc()
        self._post(answer, emission)
        if emission.finish:
            self.metrics.seconds.observe(now - answer.began)
            self._typical += 0.1 * (now - answer.began - self._typical)
            self._keep(emission.row, answer)
            self._free(emission.row)

    def _keep(self, row: int, answer: Answer) -> None:
        """Keep the state of a finished answer, if there is room: it has taken in all but its last token."""
        tokens, cache = [*answer.prompt, *answer.made[:-1]], self._batch.cache
        try:
            answer.marks[len(tokens)] = cache.memory[row].clone()
            self.store.add(answer.scope, tokens, cache, row, answer.marks)
        except Exception:  # the answer is out, and whole
            log.exception("a state could not be kept")

    def _free(self, row: int) -> None:
        self._seated.pop(row, None)
        self._batch.leave(row)

    def _abandon(self) -> None:
        """A step has failed: everyone in it is told."""
        for job in {*self._seated.values(), *(job for job, _ in self._lanes)}:
            self._end(job, Ended.FAILED)
        self._lanes.clear()

    def _end(self, job: Job, why: Ended | ValueError) -> None:
        """A job ends without its result: its owner is told, and the row where it sat is free."""
        for row in [row for row, answer in self._seated.items() if answer is job]:
            request = self._batch.requests[row]
            if request is not None and request.stream is not None and request.made:
                self._post(job, LastText(request.stream.close()))
            self._free(row)
        self._post(job, why)

    def _post(self, job: Job, payload: Any) -> None:
        self._outbox.append((job, Event(job.number, payload)))

    def _flush(self) -> None:
        if self._outbox and self._loop is not None:
            events, self._outbox = self._outbox, []
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens
                self._loop.call_soon_threadsafe(_deliver, events)

    def _gauges(self) -> None:
        self.metrics.running.set(len(self._seated))
        self.metrics.waiting.set(len(self._answers) + len(self._tasks))
        self.metrics.kept_bytes.set(self.store.size)


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)
