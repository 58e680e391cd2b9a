"""Solving the recurrence over a prompt: chunk by chunk, by sweeps that run in parallel, or token by token.

All of it is passes of the model's one forward (docs/method.md#prefill): a sweep is one full pass (Jacobi) or a few
strided ones (Gauss-Seidel), folded against the cache until the memory stops changing; a step is a pass of one position.
What does not settle within the budget is finished exactly, token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.decoding import DEFAULT_MODE, PrefillOptions
from lrt.config.model import ModelConfig
from lrt.model.kv_cache import KVCache, PerRow
from lrt.model.run_passes import run_passes
from lrt.model.shapes import StreamBND, TokensBN, check_rows
from lrt.model.state import Buffer
from lrt.model.transformer import Transformer
from lrt.passes import Pass, exact_prefix, no_grad_pass
from lrt.utils.compiling import outside_graphs

ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative change of the memory below which rounding hides it, by the type that the stream is computed in."""
OneToken = Callable[[Transformer, Tensor, KVCache, Tensor | None], tuple[Tensor, PerRow]]
"""`one_token`, or a function of its arguments that returns something else in the hidden state's place."""


class Effort(NamedTuple):
    """What solving took, the worst over rows and chunks."""

    sweeps: int
    """Most sweeps over any chunk."""
    residual: float
    """Largest estimated error of the memory of a row that settled by tolerance; 0 where all is exact."""
    forwards: float
    """Plain-forward equivalents per position (`sweep_forwards`); steps count 1."""
    stepped: Tensor
    """Positions of each row that were finished token by token, int64 [B]."""


class Solved(NamedTuple):
    """A chunk of n positions taken in."""

    hidden: StreamBND
    """Input of the head, [B, n, D]; arbitrary beyond a row's own positions."""
    memory: StreamBND
    """m_t of every position, likewise."""
    cache: KVCache
    effort: Effort


class SweepRates(NamedTuple):
    """How the sweeps of rows contract, [b] each."""

    change: Tensor
    """Change of the memory in the last sweep (`change_of`); infinite before there is one."""
    rate: Tensor
    """Factor from the change before to that one; 1 where it is not known yet."""
    rate_before: Tensor

    @staticmethod
    def unknown(rows: int, device: torch.device) -> SweepRates:
        """Before any sweep."""
        ones = torch.ones(rows, device=device)
        return SweepRates(ones * torch.inf, ones, ones)

    def after(self, change: Tensor) -> SweepRates:
        """After one more sweep."""
        rate = torch.where(self.change.isfinite(), change / self.change, 1.0)
        return SweepRates(change, rate, self.rate)

    def error(self) -> Tensor:
        """Estimate of how far the memory still is from the solution, [b]; the same measure as `change`.

        It is the sum of the changes still to come, if each is the one before times the slower of the last two rates
        (a geometric series). Where that rate is 0.5 or more, it is the last change.
        """
        rate = torch.maximum(self.rate, self.rate_before)
        return torch.where(rate < 0.5, self.change * rate / (1 - rate), self.change)


class SettledRows(NamedTuple):
    """Rows whose sweeps ended together."""

    rows: Tensor
    """Which rows of the chunk, int64 [b]."""
    taken: Tensor
    """How many positions of each hold the solution: all of them, or the exact prefix where the budget ran out, [b]."""
    buffer: Buffer
    hidden: StreamBND
    memory: StreamBND
    sweeps: int
    residual: float


def prefill_options(model: Transformer, mode: str | PrefillOptions) -> PrefillOptions:
    """How `model` solves the recurrence: `mode`, with sweeps that stop where only rounding still moves its memory.

    ValueError: an unknown mode.
    """
    options = PrefillOptions.parse(mode) if isinstance(mode, str) else mode
    types = {model.stream_dtype, *(buffer.dtype for buffer in model.buffers())}  # matrices in 8 bits round too
    return options._replace(tolerance=max(options.tolerance, *(ROUNDING.get(dtype, 0.0) for dtype in types)))


def mode_name(model: Transformer, mode: str | PrefillOptions) -> str:
    """How results name the mode: `exact`, `zero_memory`, or such as `sweeps(interleaved-8, 0.0001)`.

    ValueError: an unknown mode.
    """
    return "zero_memory" if mode == "zero_memory" else str(prefill_options(model, mode))


@torch.no_grad()
def states(
    model: Transformer, tokens: TokensBN, mode: str | PrefillOptions = DEFAULT_MODE
) -> Iterator[tuple[int, StreamBND, Effort]]:
    """The head's input at every position of `tokens` [B, T], as decoding computes it, chunk by chunk.

    Yields the chunk's first column, the head's input at its n columns [B, n, D], and the effort. `mode` is one of
    `prefill`'s, or `zero_memory`: one parallel pass that reads no memory.
    ValueError: tokens that the model does not have; an unknown mode.
    """
    check_tokens(model, tokens)
    tokens = tokens.long()
    if mode == "zero_memory":
        (_, written, _) = next(run_passes(model, tokens, [no_grad_pass(range(tokens.shape[1]))], model.starts(tokens)))
        assert written.hidden is not None
        yield 0, written.hidden, Effort(1, 0.0, 1.0, torch.zeros_like(tokens[:, 0]))
        return
    for first, solved in solve(model, tokens, None, KVCache.empty(model, *tokens.shape), prefill_options(model, mode)):
        yield first, solved.hidden, solved.effort


def solve(
    model: Transformer, tokens: TokensBN, lengths: Tensor | None, cache: KVCache, plan: PrefillOptions
) -> Iterator[tuple[int, Solved]]:
    """Take in the first `lengths` [B] tokens of each row, chunk by chunk: the recurrence is causal, so nothing is lost.

    None: all of them. Yields each chunk's first column and its solution.
    """
    lengths = torch.full_like(tokens[:, 0], tokens.shape[1]) if lengths is None else lengths
    for first in range(0, tokens.shape[1], plan.chunk):
        piece = tokens[:, first : first + plan.chunk]
        solved = _chunk(model, piece, (lengths - first).clamp(0, piece.shape[1]), cache, plan)
        cache = solved.cache
        yield first, solved


def _chunk(model: Transformer, tokens: TokensBN, count: Tensor, cache: KVCache, plan: PrefillOptions) -> Solved:
    hidden, memory = (cache.memory.new_zeros(*tokens.shape, cache.memory.shape[1]) for _ in range(2))
    begin, sweeps, residual = torch.zeros_like(count), 0, 0.0
    for group in settle(model, tokens, count, cache, plan) if plan.stride else ():
        hidden[group.rows], memory[group.rows] = group.hidden.to(hidden.dtype), group.memory.to(memory.dtype)
        cache = cache.commit(group.buffer, group.rows, group.taken)
        begin[group.rows] = group.taken
        sweeps, residual = max(sweeps, group.sweeps), max(residual, group.residual)
    cache = _recur(model, tokens, (begin, count), cache, (hidden, memory))
    forwards = sweep_forwards(model.config, sweeps) + float((count - begin).max()) / tokens.shape[1]
    return Solved(hidden, memory, cache, Effort(sweeps, residual, forwards, count - begin))


def sweep_forwards(config: ModelConfig, sweeps: int) -> float:
    """Plain-forward equivalents of so many sweeps and the pass that completes them, by the blocks that they run."""
    if sweeps == 0:
        return 0.0
    below, source, layers = config.blocks_below, config.source, config.layers
    completing = layers - below if source < layers else 0
    return (source + (sweeps - 1) * (source - below) + completing) / layers


def settle(
    model: Transformer, tokens: TokensBN, count: Tensor, cache: KVCache, plan: PrefillOptions
) -> Iterator[SettledRows]:
    """Sweep the next `count` tokens of each row until it has settled; `cache` takes in nothing yet.

    Rows leave as they settle, so that none's result depends on the others.
    """
    rows, buffer, completing = count.nonzero()[:, 0], cache.buffer(), model.config.source < model.config.layers
    buffer = buffer if len(rows) == len(count) else buffer.take(rows)
    n, prefix, old, progress = tokens.shape[1], 0, None, SweepRates.unknown(len(rows), tokens.device)
    for number in range(1, plan.max_sweeps + 1 if len(rows) else 0):
        unsettled, wanted, passes = tokens[rows], count[rows], plan.sweep(number, n)
        buffer = _sweep(model, unsettled, passes, buffer)
        new = buffer.memory(range(1, n + 1))
        assert new is not None
        prefix = exact_prefix(passes, n, prefix) if model.config.feeds_back else n
        exact = min(n, prefix + completing)  # the pass that completes the chunk makes one more position exact
        progress = progress.after(change_of(old, new, wanted))
        error = progress.error()
        settled = (error <= plan.tolerance) | (wanted <= exact)
        leaving = settled if number < plan.max_sweeps else torch.ones_like(settled)
        if leaving.any():
            index, every = leaving.nonzero()[:, 0], bool(leaving.all())
            completed_buffer, hidden = finish(
                model, unsettled[index], buffer if every else buffer.take(index), new[index]
            )
            written = completed_buffer.memory(range(1, n + 1))
            assert written is not None
            taken = torch.where(settled, wanted, wanted.clamp(max=exact))
            residual = error.masked_fill(~settled | (wanted <= exact), 0).max()
            yield SettledRows(rows[index], taken[index], completed_buffer, hidden, written, number, float(residual))
            if every:
                return
            stay = (~leaving).nonzero()[:, 0]
            rows, buffer, new = rows[stay], buffer.take(stay), new[stay]
            progress = SweepRates(*(x[stay] for x in progress))
        old = new


def _sweep(model: Transformer, tokens: TokensBN, passes: list[Pass], buffer: Buffer) -> Buffer:
    """The buffer after these passes.

    A full pass is announced behind them and not run: with it to follow they may stop at the source block.
    """
    announced = [*passes, no_grad_pass(range(tokens.shape[1]))]
    *_, (_, _, buffer) = itertools.islice(
        run_passes(model, tokens, announced, model.starts(tokens), buffer), len(passes)
    )
    return buffer


def finish(model: Transformer, tokens: TokensBN, buffer: Buffer, source: StreamBND) -> tuple[Buffer, StreamBND]:
    """Complete keys and values, and the head's input: one more full pass if the sweeps stopped below the top."""
    if model.config.source == model.config.layers:
        return buffer, model.norm.scale(source)
    full = no_grad_pass(range(tokens.shape[1]))
    _, written, buffer = next(run_passes(model, tokens, [full], model.starts(tokens), buffer))
    assert written.hidden is not None
    return buffer, written.hidden


def change_of(old: StreamBND | None, new: StreamBND, count: Tensor) -> Tensor:
    """Largest change of a row's memory at any of its first `count` positions, relative to its norm, [b]."""
    if old is None:
        return torch.full(new.shape[:1], torch.inf, device=new.device)
    relative = (new - old).float().norm(dim=2) / new.float().norm(dim=2)
    padding = torch.arange(new.shape[1], device=new.device) >= count[:, None]
    return relative.masked_fill(padding, 0).amax(dim=1)


def _recur(
    model: Transformer,
    tokens: TokensBN,
    columns: tuple[Tensor, Tensor],
    cache: KVCache,
    filled: tuple[StreamBND, StreamBND],
) -> KVCache:
    """Take in columns begin..end-1 of each row token by token; fills head's input and memory there in place."""
    begin, end = columns
    rows = (begin < end).nonzero()[:, 0]
    if not len(rows):
        return cache
    part = cache.take(rows) if len(rows) < len(begin) else cache
    begin, end = begin[rows], end[rows]
    for t in range(int(begin.min()), int(end.max())):
        active = (begin <= t) & (t < end)
        now, part = advance(model, tokens[rows, t], part, active)
        for stream, new in zip(filled, (now, part.memory), strict=True):
            stream[rows, t] = torch.where(active[:, None], new.to(stream.dtype), stream[rows, t])
    return cache.put(rows, part) if part.rows < cache.rows else part


def one_token(model: Transformer, tokens: Tensor, view: KVCache, active: Tensor | None) -> tuple[Tensor, PerRow]:
    """The pass of one position per row, tensors in and tensors out, so that it can be compiled: see `advance`.

    Returns the head's input [B, D] and what the rows hold after it.
    """
    tokens = tokens[:, None]
    read, rest = view.open(None, tokens, model.config.blocks_run())
    written = model.forward_pass(tokens, read, model.starts(tokens))
    assert written.hidden is not None
    return written.hidden[:, 0], rest.rows_after(written, active)


def advance(
    model: Transformer, tokens: Tensor, cache: KVCache, active: Tensor | None = None, run: OneToken = one_token
) -> tuple[Tensor, KVCache]:
    """Take in one token per row [B]: the exact recurrence.

    Rows where `active` [B] is False wait. Returns what `run` computes first, and the state after.
    ValueError: a row is full.
    """
    if cache.longest >= cache.capacity:
        reached = cache.length if active is None else cache.length[active]
        if (reached >= cache.capacity).any():
            raise ValueError(f"the state is full: its capacity is {cache.capacity} tokens; give it a larger one")
    out, rows = run(model, tokens, cache.view(), active)
    return out, cache._replace(**rows._asdict(), longest=min(cache.longest + 1, cache.capacity))


def total(parts: list[tuple[int, Effort]]) -> Effort:
    """The effort of several chunks, given with their sizes."""
    efforts, size = [effort for _, effort in parts], sum(n for n, _ in parts)
    return Effort(
        max(e.sweeps for e in efforts),
        max(e.residual for e in efforts),
        sum(n * e.forwards for n, e in parts) / size,
        torch.stack([e.stepped for e in efforts]).sum(0),
    )


@outside_graphs  # it looks at values
def check_tokens(model: Transformer, tokens: TokensBN) -> None:
    """ValueError unless `tokens` are whole numbers [B, T] of the model's vocabulary, and at least one."""
    check_rows(tokens)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token {wrong} is outside the vocabulary of {model.config.vocab_size}: encode with the model's tokenizer"
        )


def check_known(model: Transformer, tokens: TokensBN) -> None:
    """`check_tokens` as far as it costs nothing: to look at values would be to wait for a GPU."""
    if tokens.device.type == "cpu":
        check_tokens(model, tokens)
    check_rows(tokens)
