"""The running batch: rows of one state that decode together; requests join and leave between steps.

`decode.generate` runs one whose rows all begin and wait together; the server one whose rows come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from lrt.inference.prefill import OneToken, advance, next_logits
from lrt.inference.sampling import SamplingParams, SamplingTensors, choose, uniforms
from lrt.inference.streaming import TextStream
from lrt.model.kv_cache import KVCache
from lrt.model.transformer import LRT

GREEDY = SamplingParams(temperature=0)
"""The law of rows where nobody sits: the cheapest."""
Ranked = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, the most probable first."""


class Emission(NamedTuple):
    """One new token of one row."""

    row: int
    token: int
    logprob: float
    """Log-probability under the model itself, before any sampling law."""
    text: str
    """Text that has become certain with it; empty without a tokenizer."""
    finish: str | None
    """Why the row ends here: `stop`, `length`, or None if it goes on."""
    top: Ranked = ()
    """The most probable tokens in its place, as many as the request asked for."""


@dataclass
class Request:
    """One row of a running batch, as the host sees it."""

    row: int
    sampling: SamplingParams
    stop_tokens: tuple[int, ...]
    left: int
    """Tokens it may still emit."""
    stream: TextStream | None
    sample: int = 0
    """Which of several answers to one prompt: each has its own stream of uniform numbers."""
    length: int = 0
    """Tokens that the row's state has taken in."""
    prompt: list[int] = field(default_factory=list)
    """Tokens that it takes in, one a step, before it draws its own; the last one first."""
    top: int = 0
    """Most probable tokens to report with each of its own."""
    running: bool = True
    made: int = 0
    """Tokens emitted so far."""

    def __post_init__(self) -> None:
        self.uniforms: np.ndarray = uniforms(self.sampling.seed, self.sample, self.left)

    def emit(self, token: int, logprob: float, top: Ranked = ()) -> Emission:
        """Take in the row's newest token."""
        self.left, self.made = self.left - 1, self.made + 1
        stopped = token in self.stop_tokens
        text = "" if self.stream is None or stopped else self.stream.push(token)
        stopped |= self.stream is not None and self.stream.stopped
        self.running = not stopped and self.left > 0
        if not self.running and self.stream is not None:
            text += self.stream.close()
        return Emission(self.row, token, logprob, text, None if self.running else "stop" if stopped else "length", top)


@final
class RunningBatch:
    """Requests in the rows of one state. A cycle is `draw`, then `advance`; between them rows join and leave.

    Each row's tokens depend on its own state, request and seed alone, whatever the others do.
    """

    def __init__(
        self,
        model: LRT,
        cache: KVCache,
        *,
        logits: Tensor | None = None,
        run: OneToken = next_logits,
        shapes: Sequence[int] = (),
    ):
        """`logits` [B, V] come with a state whose prompts have been taken in. A step computes the first n rows, where n
        is the least of `shapes` that holds every running row; by default all rows."""
        self.model, self.cache, self.run, self.shapes = model, cache, run, shapes
        self.requests: list[Request | None] = [None] * cache.rows
        self._logits, self._tokens, self._seen = logits, None, None
        self._laws: SamplingTensors | None = None
        self._active: Tensor | None = None

    @property
    def running(self) -> list[Request]:
        """The requests that go on."""
        return [r for r in self.requests if r is not None and r.running]

    def join(self, request: Request, known: Sequence[int], state: KVCache | None = None) -> None:
        """Seat a request in its row.

        `known` are all tokens of its prompt, for the repetition penalty; `state` is one row that has taken in those of
        them that `request.prompt` does not hold. None: the row's own state is the one to continue.
        """
        row = torch.tensor([request.row], device=self.cache.length.device)
        if state is not None:
            self.cache = self.cache.put(row, state)
        if request.sampling.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros(
                    self.cache.rows, self.model.config.vocab_size, dtype=torch.bool, device=row.device
                )
            self._seen[request.row] = False
            self._seen[request.row, list(known)] = True
        self.requests[request.row] = request
        self._changed()

    def leave(self, row: int) -> None:
        """Free a row; what it holds means nothing from now on."""
        self.requests[row] = None
        self._changed()

    @torch.no_grad()
    def draw(self) -> list[Emission]:
        """Draw the next token of every row whose prompt has been taken in."""
        drawing = [r for r in self.running if not r.prompt]
        if not drawing:
            return []
        assert self._logits is not None
        n = len(self._logits)
        laws = self._laws = self._laws if self._laws is not None and len(self._laws.top_k) == n else self._law(n)
        numbers = [0.0] * n
        for r in drawing:
            numbers[r.row] = r.uniforms[r.made]
        uniform = torch.tensor(numbers, dtype=torch.float64, device=self._logits.device)
        self._tokens, logprob = choose(self._logits, laws, uniform, None if self._seen is None else self._seen[:n])
        tokens, logprobs, tops = self._tokens.tolist(), logprob.tolist(), self._tops(drawing)
        emissions = [r.emit(tokens[r.row], logprobs[r.row], tops.get(r.row, ())) for r in drawing]
        if any(e.finish for e in emissions):
            self._changed()
        return emissions

    @torch.no_grad()
    def advance(self) -> None:
        """Take in what was drawn, and one token of every prompt that is not in yet."""
        running = self.running
        last = max(r.row for r in running)
        n = next((n for n in self.shapes if n > last), self.cache.rows)
        tokens, forced = self._next(n, running)
        if self._active is None or len(self._active) != n:
            self._active = torch.zeros(n, dtype=torch.bool, device=tokens.device)
            self._active[[r.row for r in running]] = True
            longest = max(r.length for r in self.requests if r is not None)
            self.cache = self.cache._replace(longest=longest)
        if self._seen is not None:
            self._seen[:n].scatter_(1, tokens[:, None], True)
        self._logits, part = advance(self.model, tokens, self.cache.first(n), self._active, self.run)
        self.cache = self.cache.with_first(part)
        for r in running:
            r.length += 1
        for r in forced:
            r.prompt.pop()

    def _next(self, n: int, running: list[Request]) -> tuple[Tensor, list[Request]]:
        """The first n rows' next tokens [n], and the requests among them whose token comes from a prompt."""
        drawn, forced = self._tokens, [r for r in running if r.prompt]
        if drawn is None or len(drawn) != n:
            device = self.cache.length.device
            tokens = torch.zeros(n, dtype=torch.int64, device=device)
            if drawn is not None:
                tokens[: len(drawn)] = drawn[:n]
            drawn = tokens
        if forced:
            rows = torch.tensor([r.row for r in forced], device=drawn.device)
            drawn = drawn.index_copy(0, rows, torch.tensor([r.prompt[-1] for r in forced], device=drawn.device))
        return drawn, forced

    def _law(self, n: int) -> SamplingTensors:
        laws = [GREEDY if r is None else r.sampling for r in self.requests[:n]]
        return SamplingTensors.of(laws, self.model.config.vocab_size, self.cache.length.device)

    def _tops(self, drawing: list[Request]) -> dict[int, Ranked]:
        """What the rows that ask for it could have drawn, from the model's own distribution."""
        asking = [r for r in drawing if r.top]
        if not asking:
            return {}
        assert self._logits is not None
        rows = torch.tensor([r.row for r in asking], device=self._logits.device)
        return dict(zip(rows.tolist(), ranked(self._logits[rows], [r.top for r in asking]), strict=True))

    def _changed(self) -> None:
        self._laws = self._active = None


def ranked(logits: Tensor, counts: Sequence[int]) -> list[Ranked]:
    """The `counts[i]` most probable tokens of each row of logits [B, V], with their log-probabilities."""
    most = min(max(counts), logits.shape[-1])
    values, tokens = logits.double().log_softmax(-1).topk(most)
    pairs = zip(tokens.tolist(), values.tolist(), counts, strict=True)
    return [tuple(zip(row[:count], lps[:count], strict=True)) for row, lps, count in pairs]
