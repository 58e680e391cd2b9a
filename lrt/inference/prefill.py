"""Taking prompts in, and one exact step of decoding; the recurrence itself is solved in `lrt.model.recurrence`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.decoding import DEFAULT_MODE, PrefillOptions
from lrt.model.kv_cache import KVCache, PerRow, require_state
from lrt.model.lrt import LRT
from lrt.model.recurrence import (
    Effort,
    OneToken,
    advance,
    check_known,
    check_tokens,
    one_token,
    prefill_options,
    solve,
    total,
)
from lrt.model.shapes import TokensBN, require_ids
from lrt.model.transformer import Transformer
from lrt.utils.compiling import graph_of, mark_dynamic, mark_in_place
from lrt.utils.require import require


class Prefill(NamedTuple):
    """A prompt taken in."""

    logits: Tensor
    """Next-token logits after each row's last token, [B, V]."""
    cache: KVCache
    mode: str
    """`exact`, or such as `sweeps(interleaved-8, 0.0001)`."""
    effort: Effort


@torch.no_grad()
def prefill(
    model: LRT,
    tokens: TokensBN,
    *,
    mode: str | PrefillOptions = DEFAULT_MODE,
    lengths: Tensor | None = None,
    cache: KVCache | None = None,
    capacity: int | None = None,
) -> Prefill:
    """Take prompts in, so that `decode_step` can go on from them.

    Args:
        tokens: int64 [B, T]; shorter rows are padded on the right with any valid token.
        mode: `exact` (token by token), `jacobi` or `interleaved-G` sweeps; with a tolerance, a budget or chunks of
            your own, `PrefillOptions.parse(mode, tolerance, ..)`.
        lengths: tokens of each row that count, int64 [B], 1..T; by default all.
        cache: a state to continue; its keys and values are filled in place. By default an empty one of `capacity`
            tokens (the model's context if that is not given).

    Raises:
        ValueError: a token out of range, an empty prompt, or one that does not fit the capacity; a state of other
            layers, heads or width than the model's.
    """
    plan = prefill_options(model, mode)
    check_tokens(model, tokens)
    if cache is not None:
        require_state(model, cache)
    tokens, room = tokens.long(), model.config.context if capacity is None else capacity
    lengths = torch.full_like(tokens[:, 0], tokens.shape[1]) if lengths is None else _lengths(lengths, tokens)
    cache = KVCache.empty(model, len(tokens), room) if cache is None else cache
    _check_fit(cache, lengths, tokens.shape[1])
    last, parts = torch.empty_like(cache.memory), []
    for first, solved in solve(model, tokens, lengths, cache, plan):
        cache = solved.cache
        column = lengths - 1 - first
        inside = ((column >= 0) & (column < solved.hidden.shape[1])).nonzero()[:, 0]
        last[inside] = solved.hidden[inside, column[inside]].to(last.dtype)
        parts.append((solved.hidden.shape[1], solved.effort))
    return Prefill(model.logits(last), cache, str(plan), total(parts))


@torch.no_grad()
def decode_step(model: LRT, tokens: Tensor, cache: KVCache, active: Tensor | None = None) -> tuple[Tensor, KVCache]:
    """Decode one token per row: the exact recurrence.

    Args:
        tokens: the rows' newest tokens, int64 [B]; a BOS resets the memory.
        cache: the state so far; its keys and values are filled in place.
        active: boolean [B]; rows where it is False wait: their state stays, their logits mean nothing.

    Returns:
        Next-token logits [B, V], and the state after.

    Raises:
        ValueError: not one token, a whole number, for each row of the state; on a CPU also one that the model lacks; a
            state of other layers, heads or width than the model's.
    """
    require_ids("tokens", tokens)
    require_state(model, cache)
    rows = (cache.rows,)
    require(tokens.shape == rows, f"tokens of shape {tuple(tokens.shape)} for {cache.rows} rows: give one a row")
    check_known(model, tokens[None])
    fine = active is None or (active.dtype == torch.bool and active.shape == rows)
    require(fine, "active must be True or False for each row of the state")
    return advance(model, tokens.long(), cache, active, next_logits)


def next_logits(
    model: Transformer, tokens: Tensor, view: KVCache, active: Tensor | None = None
) -> tuple[Tensor, PerRow]:
    """`one_token` with the head's logits [B, V] in place of its input."""
    hidden, rows = one_token(model, tokens, view, active)
    return model.logits(hidden), rows


def compiled() -> OneToken:
    """`next_logits` compiled as one graph whose numbers of rows and of visible slots are dynamic: none per token.

    One row and several make two graphs, and so do part of the slots and all of them. The first call takes as long as
    compiling does. Untested on CUDA, where it asks for CUDA graphs. Such a graph fills keys and values where they lie,
    which must be said. Its results are overwritten by the next call and may not be read by it, so they are copied.
    """
    graphs = torch.cuda.is_available()
    run = graph_of(next_logits, fullgraph=True, mode="reduce-overhead" if graphs else None)

    def marked(model: Transformer, tokens: Tensor, view: KVCache, active: Tensor | None) -> tuple[Tensor, PerRow]:
        for x in (*view.keys, *view.values):
            mark_dynamic(x, 2)
            mark_in_place(x)
        rows = (tokens, *view.keys, *view.values, *view.per_row(), *(() if active is None else (active,)))
        for x in rows if len(tokens) > 1 else ():
            mark_dynamic(x, 0)
        logits, new = run(model, tokens, view, active)
        return (logits.clone(), PerRow(*(x.clone() for x in new))) if graphs else (logits, new)

    return marked


def _lengths(lengths: Tensor, tokens: TokensBN) -> Tensor:
    """The lengths of each row, where the tokens are. ValueError: not a whole number for each."""
    require_ids("lengths", lengths)
    require(lengths.dim() == 1, f"lengths of shape {tuple(lengths.shape)}: give one a row, [B]")
    return lengths.to(tokens.device, torch.int64)


def _check_fit(cache: KVCache, lengths: Tensor, columns: int) -> None:
    if int(lengths.min()) < 1 or int(lengths.max()) > columns:
        raise ValueError(f"lengths {lengths.tolist()} must lie between 1 and the {columns} columns of tokens")
    if len(lengths) != cache.rows:
        raise ValueError(f"{len(lengths)} prompts for a state of {cache.rows} rows: give as many prompts as rows")
    needed = int((cache.length + lengths).max())
    if needed > cache.capacity:
        raise ValueError(
            f"a prompt would bring its row to {needed} tokens but the capacity is {cache.capacity}: "
            "shorten it or give a larger capacity"
        )
