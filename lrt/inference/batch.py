"""The running batch: rows of one state that decode together; requests join and leave between steps.

`generate` runs one whose rows all begin and wait together; the server one whose rows come and go. A fault in one row
(logits that are not finite, a constraint that raises) ends that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, final

import numpy as np
import torch
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.inference.history import HistoryState
from lrt.inference.lookahead import Lookahead
from lrt.inference.prefill import next_logits
from lrt.inference.sampling import Drawn, SamplingTensors, TokenHistory, choose, uniforms
from lrt.inference.streaming import TextStream
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import OneToken, advance
from lrt.utils.hardware import widest

GREEDY = SamplingParams(temperature=0)
"""The sampling of rows where nobody sits: the cheapest."""
Ranked = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, the most probable first."""


class Emission(NamedTuple):
    """One new token of one row."""

    row: int
    token: int
    logprob: float
    """Log-probability under the model itself, before any sampling rule."""
    text: str
    """Text that has become certain with it; empty without a tokenizer."""
    finish: str | None
    """Why the row ends here: `stop`, `length`, `error`, or None if it goes on."""
    top: Ranked = ()
    """The most probable tokens in its place, as many as the request asked for."""
    fault: str | None = None
    """What went wrong, where `finish` is `error`; token and text then mean nothing."""
    unkept: bool = False
    """Whether that was the request's own form, which cannot be kept (a constraint's ValueError)."""


class Constraint(Protocol):
    """What an answer must look like, such as JSON of a schema; it may raise, which ends its row."""

    def allowed(self) -> Tensor:
        """Which tokens may come next, boolean [V] on the host."""
        ...

    def take(self, token: int) -> None:
        """Take in the token that was drawn."""
        ...


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
    constraint: Constraint | None = None
    running: bool = True
    made: int = 0
    """Tokens emitted so far."""
    fault: str | None = None
    """What went wrong."""
    unkept: bool = False
    """Whether that was its form."""

    def __post_init__(self) -> None:
        self.uniforms: np.ndarray = uniforms(self.sampling.seed, self.sample, self.left)

    def emit(self, token: int, logprob: float, top: Ranked = ()) -> Emission:
        """Take in the row's newest token."""
        self.left, self.made = self.left - 1, self.made + 1
        stopped, early = token in self.stop_tokens, self.made <= self.sampling.min_new_tokens
        if self.constraint is not None and not stopped:
            self.constraint.take(token)
        text = "" if self.stream is None or stopped else self.stream.push(token, looking=not early)
        stopped |= self.stream is not None and self.stream.stopped
        self.running = not stopped and self.left > 0
        if not self.running and self.stream is not None:
            text += self.stream.close()
        return Emission(self.row, token, logprob, text, None if self.running else "stop" if stopped else "length", top)

    def emit_or_end(self, token: int, logprob: float, top: Ranked = ()) -> Emission:
        """`emit`, but a fault, new or old, ends the row instead of raising."""
        if self.fault is None:
            try:
                return self.emit(token, logprob, top)
            except Exception as error:
                self.fails(f"its answer failed: {error}", error)
        self.running = False
        return Emission(self.row, token, float("nan"), "", "error", fault=self.fault, unkept=self.unkept)

    def fails(self, fault: str, error: Exception) -> None:
        """Note what went wrong; a ValueError of a constraint is the request's own."""
        self.fault, self.unkept = fault, self.constraint is not None and isinstance(error, ValueError)

    def forbidden(self, vocabulary: int) -> Tensor | None:
        """Tokens that may not come next, boolean [V] on the host; None if any may."""
        early = self.made < self.sampling.min_new_tokens and self.stop_tokens
        if self.constraint is None and not early:
            return None
        mask = torch.zeros(vocabulary, dtype=torch.bool) if self.constraint is None else ~self.constraint.allowed()
        if early:
            mask[list(self.stop_tokens)] = True
        return mask


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
        drafts: int = 0,
    ):
        """`logits` [B, V] come with a state whose prompts have been taken in. A step computes the first n rows, where n
        is the least of `shapes` that holds every running row; by default all rows. `drafts`: most tokens that are
        guessed ahead (`lrt.inference.lookahead`)."""
        self.model, self.cache, self.run, self.shapes = model, cache, run, shapes
        self.requests: list[Request | None] = [None] * cache.rows
        self._logits, self._tokens = logits, None
        self._history = HistoryState(cache.rows, model.config.vocab_size, cache.length.device)
        self._sampling: SamplingTensors | None = None
        self._active: Tensor | None = None
        self.lookahead = Lookahead(model, drafts) if drafts else None

    @property
    def running(self) -> list[Request]:
        """The requests that go on."""
        return [r for r in self.requests if r is not None and r.running]

    def join(self, request: Request, tokens: Sequence[int], state: KVCache | None = None) -> None:
        """Seat a request in its row.

        `tokens` are all those of its prompt, for the repetition penalty; `state` is one row that has taken in those of
        them that `request.prompt` does not hold. None: the row's own state is the one to continue.
        """
        row = torch.tensor([request.row], device=self.cache.length.device)
        if state is not None:
            self.cache = self.cache.put(row, state)
        self._history.join(request.row, request.sampling, tokens)
        if self.lookahead is not None:
            self.lookahead.join(request.row, tokens)
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
        sampling = self._sampling = (
            self._sampling if self._sampling is not None and len(self._sampling.top_k) == n else self._sampling_of(n)
        )
        numbers = [0.0] * n
        for r in drawing:
            numbers[r.row] = r.uniforms[r.made]
        where = self._logits.device
        uniform = torch.tensor(numbers, dtype=widest(where), device=where)
        drawn = choose(self._logits, sampling, uniform, self._histories(n, drawing))
        self._tokens = drawn.tokens
        emissions = self._emit(drawing, drawn)
        self._history.take([e.row for e in emissions if not e.fault], [e.token for e in emissions if not e.fault])
        if any(e.finish for e in emissions):
            self._changed()
        return emissions

    def _histories(self, n: int, drawing: list[Request]) -> TokenHistory:
        """What the sampling of the first n rows needs, and the tokens that their constraints forbid."""
        masks: dict[int, Tensor] = {}
        for r in drawing:
            try:
                mask = r.forbidden(self.model.config.vocab_size)
            except Exception as error:
                r.fails(f"its constraint failed: {error}", error)
                continue
            if mask is not None:
                masks[r.row] = mask
        return self._history.rows(n, masks)

    def _emit(self, drawing: list[Request], drawn: Drawn) -> list[Emission]:
        """What every row makes of its token."""
        tokens, logprobs, valid = (x.tolist() for x in drawn)
        for r in drawing:
            if not valid[r.row] and r.fault is None:
                r.fault = "no token can be drawn: its logits are not finite, or every token is forbidden"
        tops = self._tops([r for r in drawing if r.fault is None])
        emissions = [r.emit_or_end(tokens[r.row], logprobs[r.row], tops.get(r.row, ())) for r in drawing]
        for e in emissions:
            if e.fault is not None:
                self._wipe(e.row)
        return emissions

    def _wipe(self, row: int) -> None:
        """Zero a row: what is not finite in it would reach its next request through slots that attention masks."""
        self.cache = self.cache.clear(row)
        for x in (*self.cache.keys, *self.cache.values):
            x[row] = 0

    @torch.no_grad()
    def advance(self) -> None:
        """Take in what was drawn, and one token of every prompt that is not in yet."""
        running = self.running
        if self._looked_ahead(running):
            return
        last = max(r.row for r in running)
        n = next((n for n in self.shapes if n > last), self.cache.rows)
        tokens, forced = self._next(n, running)
        if self._active is None or len(self._active) != n:
            self._active = torch.zeros(n, dtype=torch.bool, device=tokens.device)
            self._active[[r.row for r in running]] = True
            longest = max(r.length for r in self.requests if r is not None)
            self.cache = self.cache._replace(longest=longest)
        self._logits, part = advance(self.model, tokens, self.cache.first(n), self._active, self.run)
        self.cache = self.cache.with_first(part)
        for r in running:
            r.length += 1
        for r in forced:
            r.prompt.pop()

    def _looked_ahead(self, running: list[Request]) -> bool:
        """Whether drafts have spared the step; rows whose prompt is still coming in have none."""
        if self.lookahead is None or self._tokens is None or any(r.prompt for r in running):
            return False
        tokens = self._tokens.tolist()
        drawn, room = {r.row: tokens[r.row] for r in running}, {r.row: r.left - 1 for r in running}
        taken = self.lookahead.advance(self.cache, drawn, room)
        if taken is not None:
            self._logits, self.cache = taken
            for r in running:
                r.length += 1
        return taken is not None

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

    def _sampling_of(self, n: int) -> SamplingTensors:
        params = [GREEDY if r is None else r.sampling for r in self.requests[:n]]
        return SamplingTensors.of(params, self.model.config.vocab_size, self.cache.length.device)

    def _tops(self, drawing: list[Request]) -> dict[int, Ranked]:
        """What the rows that ask for it could have drawn, from the model's own distribution."""
        asking = [r for r in drawing if r.top]
        if not asking:
            return {}
        assert self._logits is not None
        rows = torch.tensor([r.row for r in asking], device=self._logits.device)
        return dict(zip(rows.tolist(), ranked(self._logits[rows], [r.top for r in asking]), strict=True))

    def _changed(self) -> None:
        self._sampling = self._active = None


def ranked(logits: Tensor, counts: Sequence[int]) -> list[Ranked]:
    """The `counts[i]` most probable tokens of each row of logits [B, V], with their log-probabilities."""
    most = min(max(counts), logits.shape[-1])
    values, tokens = logits.to(widest(logits.device)).log_softmax(-1).topk(most)
    pairs = zip(tokens.tolist(), values.tolist(), counts, strict=True)
    return [tuple(zip(row[:count], lps[:count], strict=True)) for row, lps, count in pairs]
