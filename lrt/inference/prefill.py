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

from lrt.config.decoding import PrefillOptions, no_grad_pass
from lrt.model.kv_cache import KVCache
from lrt.model.run_passes import run_passes
from lrt.model.shapes import StreamBND, TokensBN
from lrt.model.state import Buffer
from lrt.model.transformer import LRT
from lrt.schedule import Pass, exact_prefix

OneToken = Callable[[LRT, Tensor, KVCache, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""`one_token`, `next_logits`, or what `compiled` returns."""


class Effort(NamedTuple):
    """What solving took, the worst over rows and chunks."""

    sweeps: int
    """Most sweeps over any chunk."""
    residual: float
    """Largest last change of the memory of a row that settled by tolerance; 0 where all is exact."""
    forwards: float
    """Plain-forward equivalents per position: a sweep that stops at source block s counts s / L; steps count 1."""
    stepped: Tensor
    """Positions of each row that were finished token by token, int64 [B]."""


class Solved(NamedTuple):
    """A chunk of n positions taken in."""

    hidden: StreamBND
    """Input of the head, [B, n, D]; arbitrary beyond a row's own positions."""
    cache: KVCache
    effort: Effort


class SettledRows(NamedTuple):
    """Rows whose sweeps ended together."""

    rows: Tensor
    """Which rows of the chunk, int64 [b]."""
    taken: Tensor
    """How many positions of each hold the solution: all of them, or the exact prefix where the budget ran out, [b]."""
    buffer: Buffer
    hidden: StreamBND
    sweeps: int
    residual: float


def solve(
    model: LRT, tokens: TokensBN, lengths: Tensor, cache: KVCache, plan: PrefillOptions
) -> Iterator[tuple[int, Solved]]:
    """Take in the first `lengths` [B] tokens of each row, chunk by chunk: the recurrence is causal, so nothing is lost.

    Yields each chunk's first column and its solution.
    """
    for first in range(0, tokens.shape[1], plan.chunk):
        here = tokens[:, first : first + plan.chunk]
        solved = _chunk(model, here, (lengths - first).clamp(0, here.shape[1]), cache, plan)
        cache = solved.cache
        yield first, solved


def _chunk(model: LRT, tokens: TokensBN, count: Tensor, cache: KVCache, plan: PrefillOptions) -> Solved:
    hidden = cache.memory.new_zeros(*tokens.shape, cache.memory.shape[1])
    begin, sweeps, residual = torch.zeros_like(count), 0, 0.0
    for group in _sweeps(model, tokens, count, cache, plan) if plan.stride else ():
        hidden[group.rows] = group.hidden.to(hidden.dtype)
        cache = cache.commit(group.buffer, tokens[group.rows], group.rows, group.taken)
        begin[group.rows] = group.taken
        sweeps, residual = max(sweeps, group.sweeps), max(residual, group.residual)
    cache = _recur(model, tokens, begin, count, cache, hidden)
    below = model.config.source / model.config.layers
    forwards = sweeps * below + (sweeps > 0 and below < 1) + float((count - begin).max()) / tokens.shape[1]
    return Solved(hidden, cache, Effort(sweeps, residual, forwards, count - begin))


def _sweeps(model: LRT, tokens: TokensBN, count: Tensor, cache: KVCache, plan: PrefillOptions) -> Iterator[SettledRows]:
    """Sweep until every row has settled; rows leave as they do, so that none's result depends on the others."""
    rows, buffer = count.nonzero()[:, 0], cache.buffer()
    buffer = buffer if len(rows) == len(count) else buffer.take(rows)
    n, known, old = tokens.shape[1], 0, None
    for number in range(1, plan.max_sweeps + 1 if len(rows) else 0):
        here, wanted, passes = tokens[rows], count[rows], plan.sweep(number, n)
        buffer = _sweep(model, here, passes, buffer)
        new = buffer.memory(range(1, n + 1))
        assert new is not None
        known = exact_prefix(passes, n, known) if model.config.memory.recurrent else n
        change = change_of(old, new, wanted)
        settled = (change <= plan.tolerance) | (wanted <= known)
        leaving = settled if number < plan.max_sweeps else torch.ones_like(settled)
        if leaving.any():
            at, every = leaving.nonzero()[:, 0], bool(leaving.all())
            whole, hidden = finish(model, here[at], buffer if every else buffer.take(at), new[at])
            taken = torch.where(settled, wanted, wanted.clamp(max=known))
            residual = change.masked_fill(~settled | (wanted <= known), 0).max()
            yield SettledRows(rows[at], taken[at], whole, hidden, number, float(residual))
            if every:
                return
            stay = (~leaving).nonzero()[:, 0]
            rows, buffer, new = rows[stay], buffer.take(stay), new[stay]
        old = new


def _sweep(model: LRT, tokens: TokensBN, passes: list[Pass], buffer: Buffer) -> Buffer:
    """The buffer after these passes; announcing the full pass that may come last lets them stop at the source block."""
    announced = [*passes, no_grad_pass(range(tokens.shape[1]))]
    *_, (_, _, buffer) = itertools.islice(
        run_passes(model, tokens, announced, model.starts(tokens), buffer), len(passes)
    )
    return buffer


def finish(model: LRT, tokens: TokensBN, buffer: Buffer, source: StreamBND) -> tuple[Buffer, StreamBND]:
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


def _recur(model: LRT, tokens: TokensBN, begin: Tensor, end: Tensor, cache: KVCache, hidden: StreamBND) -> KVCache:
    """Take in columns begin..end-1 of each row token by token; fills `hidden` there in place."""
    rows = (begin < end).nonzero()[:, 0]
    if not len(rows):
        return cache
    part = cache.take(rows) if len(rows) < len(begin) else cache
    begin, end = begin[rows], end[rows]
    for t in range(int(begin.min()), int(end.max())):
        active = (begin <= t) & (t < end)
        now, part = advance(model, tokens[rows, t], part, active)
        hidden[rows, t] = torch.where(active[:, None], now.to(hidden.dtype), hidden[rows, t])
    return cache.put(rows, part) if part.rows < cache.rows else part


def one_token(model: LRT, tokens: Tensor, view: KVCache, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The pass of one position per row, tensors in and tensors out, so that it can be compiled: see `advance`.

    Returns the head's input [B, D], the rows' memories [B, D] and their lengths [B].
    """
    starts, previous = model.starts(tokens[:, None]), view.last_token[:, None]
    written = model(tokens[:, None], view.past(), view.memory[:, None], starts, previous)
    assert written.hidden is not None
    memory, length = written.source[:, 0].to(view.memory.dtype), view.length + 1
    if active is not None:
        memory = torch.where(active[:, None], memory, view.memory)
        length = torch.where(active, length, view.length)
    return written.hidden[:, 0], memory, length


def next_logits(
    model: LRT, tokens: Tensor, view: KVCache, active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`one_token` with the head's logits [B, V] in place of its input."""
    hidden, memory, length = one_token(model, tokens, view, active)
    return model.logits(hidden), memory, length


def compiled() -> OneToken:
    """`next_logits` compiled as one graph whose numbers of rows and of visible slots are dynamic: none per token.

    One row and several make two graphs, and so do part of the slots and all of them. The first call takes as long as
    compiling does. Untested on CUDA, where it asks for CUDA graphs.
    """
    run = torch.compile(next_logits, fullgraph=True, mode="reduce-overhead" if torch.cuda.is_available() else None)

    def marked(model: LRT, tokens: Tensor, view: KVCache, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        for x in (*view.keys, *view.values):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        rows = (tokens, *view.keys, *view.values, *view.per_row(), *(() if active is None else (active,)))
        for x in rows if len(tokens) > 1 else ():
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return run(model, tokens, view, active)

    return marked


def advance(
    model: LRT, tokens: Tensor, cache: KVCache, active: Tensor | None = None, run: OneToken = one_token
) -> tuple[Tensor, KVCache]:
    """Take in one token per row [B]: the exact recurrence.

    Rows where `active` [B] is False wait. Returns what `run` computes first, and the state after.
    ValueError: a row is full.
    """
    if cache.longest >= cache.capacity:
        reached = cache.length if active is None else cache.length[active]
        if (reached >= cache.capacity).any():
            raise ValueError(f"the state is full: its capacity is {cache.capacity} tokens; give it a larger one")
    out, memory, length = run(model, tokens, cache.view(), active)
    last = tokens if active is None else torch.where(active, tokens, cache.last_token)
    longest = min(cache.longest + 1, cache.capacity)
    return out, KVCache(cache.keys, cache.values, memory, length, last, longest)


def total(parts: list[tuple[int, Effort]]) -> Effort:
    """The effort of several chunks, given with their sizes."""
    efforts, size = [effort for _, effort in parts], sum(n for n, _ in parts)
    return Effort(
        max(e.sweeps for e in efforts),
        max(e.residual for e in efforts),
        sum(n * e.forwards for n, e in parts) / size,
        torch.stack([e.stepped for e in efforts]).sum(0),
    )
