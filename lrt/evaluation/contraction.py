"""How sweeps contract towards exact decoding: the rate, and what a pass after so many sweeps still gets wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.decoding import PrefillOptions
from lrt.inference.generate import positions_at_once
from lrt.model.kv_cache import KVCache
from lrt.model.lrt import LRT
from lrt.model.recurrence import solve
from lrt.model.run_passes import run_passes
from lrt.model.shapes import StreamBND, TokensBN
from lrt.model.state import Buffer, PassOutput
from lrt.passes import no_grad_pass
from lrt.utils.hardware import widest

SWEEPS = 8
"""Jacobi sweeps that are followed."""


class ExactStates(NamedTuple):
    """What exact decoding computes, token by token."""

    hidden: StreamBND
    """The head's input, [B, T, D]."""
    memory: StreamBND
    """m_t, [B, T, D]."""


class SweepErrors(NamedTuple):
    """Per row: how each pass differs from exact decoding; pass 0 reads no memory, pass k what k passes have written."""

    kv: Tensor
    """Squared error of all keys and values, and their squared norm under exact decoding, [B, SWEEPS + 1, 2]."""
    agreement: Tensor
    """Share of positions whose most probable token is that of exact decoding, [B, SWEEPS + 1]."""
    kl: Tensor
    """KL divergence of the pass's distribution from exact decoding's, nats, mean over positions, [B, SWEEPS + 1]."""


@torch.no_grad()
def exact_states(model: LRT, tokens: TokensBN) -> ExactStates:
    """Decode `tokens` [B, T] by the exact recurrence."""
    chunks = list(solve(model, tokens, None, KVCache.empty(model, *tokens.shape), PrefillOptions.parse("exact")))
    return ExactStates(torch.cat([s.hidden for _, s in chunks], dim=1), torch.cat([s.memory for _, s in chunks], dim=1))


@torch.no_grad()
def sweep_errors(model: LRT, tokens: TokensBN, starts: Tensor | None, exact: ExactStates) -> SweepErrors:
    """Compare SWEEPS + 1 full passes from zero memory with exact decoding."""
    full = range(tokens.shape[1])
    held = Buffer().holding(tokens, exact.memory)
    truth = _keys_values(next(run_passes(model, tokens, [no_grad_pass(full)], starts, held))[1])
    kv, agreement, kl, buffer = [], [], [], Buffer()
    for _ in range(SWEEPS + 1):
        _, written, buffer = next(run_passes(model, tokens, [no_grad_pass(full)], starts, buffer))
        pairs = list(zip(_keys_values(written), truth, strict=True))
        both = [torch.stack([_squares(x) for x in xs]).sum(0) for xs in ([a - b for a, b in pairs], truth)]
        kv.append(torch.stack(both, dim=-1))
        assert written.hidden is not None
        same, divergence = _compare(model, written.hidden, exact.hidden)
        agreement.append(same)
        kl.append(divergence)
    return SweepErrors(*(torch.stack(x, dim=1) for x in (kv, agreement, kl)))


def contraction(residuals: Sequence[float]) -> float:
    """Factor by which a sweep shrinks the change of the memory: geometric mean over the sweeps that still change it.

    nan where a change is not finite.
    """
    if not all(math.isfinite(r) for r in residuals):
        return math.nan
    falling = [r for r in residuals if r > 1e-6]
    return (falling[-1] / falling[0]) ** (1 / (len(falling) - 1)) if len(falling) > 1 else 0.0


def _keys_values(written: PassOutput) -> list[Tensor]:
    return [*written.keys, *written.values]


def _squares(x: Tensor) -> Tensor:
    return x.to(widest(x.device)).square().flatten(1).sum(1)


def _compare(model: LRT, hidden: StreamBND, exact: StreamBND) -> tuple[Tensor, Tensor]:
    """Agreement of the most probable tokens, and KL(exact || pass), means over each row's positions, [B]."""
    at_once = positions_at_once(model, len(hidden))
    same, divergence = torch.zeros(2, len(hidden), dtype=widest(hidden.device), device=hidden.device)
    for h, e in zip(hidden.split(at_once, dim=1), exact.split(at_once, dim=1), strict=True):
        q, p = (model.logits(x).to(widest(x.device)).log_softmax(-1) for x in (h, e))
        same += (q.argmax(-1) == p.argmax(-1)).sum(1)
        divergence += (p.exp() * (p - q)).sum((1, 2))
    same = same.masked_fill(~divergence.isfinite(), torch.nan)  # the largest of what is not finite says nothing
    return same / hidden.shape[1], divergence / hidden.shape[1]
