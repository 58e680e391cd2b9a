"""Sampling: from logits to a token, by parameters that may differ from row to row.

A row's draw depends on its own logits, sampling parameters and seed alone, never on what else is in the batch. Each row
has its own stream of uniform numbers, and turns one into a token by inverting its own cumulative distribution in the
order of ids. Every `SamplingParams` gives every row of finite logits a token: distributions are formed relative to the
largest logit, and each keeps the most probable token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrt.config.decoding import SamplingParams
from lrt.utils.hardware import widest


class SamplingTensors(NamedTuple):
    """The sampling parameters of B rows as columns [B, 1] on the device, and what the host knows of them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    greedy: bool
    """Whether every row is greedy."""
    ranked: bool
    """Whether any row needs tokens in order of probability."""

    @staticmethod
    def of(rows: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> SamplingTensors:
        """Those of these requests, one a row."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=widest(device), device=device)[:, None]

        return SamplingTensors(
            column([r.temperature for r in rows]),
            column([r.top_k or vocabulary for r in rows]),
            column([r.top_p for r in rows]),
            column([r.min_p for r in rows]),
            column([r.repetition_penalty for r in rows]),
            column([r.presence_penalty for r in rows]),
            column([r.frequency_penalty for r in rows]),
            all(r.temperature == 0 for r in rows),
            any(r.temperature > 0 and (r.top_k or r.top_p < 1) for r in rows),
        )


class TokenHistory(NamedTuple):
    """What sampling needs of each row's tokens, [B, V] each; None where no row needs it."""

    seen: Tensor | None = None
    """Boolean: tokens of the prompt or the answer, which the repetition penalty concerns."""
    counts: Tensor | None = None
    """float32: how often the answer holds each token, for the presence and frequency penalties."""
    bias: Tensor | None = None
    """float32: what is added to each logit."""
    forbidden: Tensor | None = None
    """Boolean: tokens that may not be drawn."""

    def rows(self, rows: Tensor | slice) -> TokenHistory:
        """That of some rows."""
        return TokenHistory(*(None if x is None else x[rows] for x in self))

    @property
    def empty(self) -> bool:
        """Whether no row needs any of it."""
        return all(x is None for x in self)


NO_HISTORY = TokenHistory()


class Drawn(NamedTuple):
    """One token per row."""

    tokens: Tensor
    """int64 [B]; where `valid` is False, some token."""
    logprobs: Tensor
    """Log-probabilities under the model itself (before any sampling rule), float64 [B]."""
    valid: Tensor
    """Boolean [B]: False where the row's logits are not finite, or every token is forbidden."""


def uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of sample number `sample` of a request with this seed, float64."""
    return np.random.default_rng((seed, sample)).random(count)


def choose(logits: Tensor, params: SamplingTensors, uniform: Tensor, history: TokenHistory = NO_HISTORY) -> Drawn:
    """Draw a token per row: logits [B, V], the B rows' parameters, one number in [0, 1) per row (float64 [B])."""
    z = logits if params.greedy and history.empty else adjusted(logits, params, history)
    if params.greedy:
        tokens = z.argmax(-1)
    else:
        mass = _probabilities(z, params).cumsum(-1)
        total = mass[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=z.shape[-1] - 1)
    logprobs = token_logprobs(logits, tokens)
    return Drawn(tokens, logprobs, z.amax(-1).isfinite() & ~logprobs.isnan())


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability, in nats, of each of the `tokens` [N] under the model itself: logits [N, V]; float64 [N]."""
    return logits.to(widest(logits.device)).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def adjusted(logits: Tensor, params: SamplingTensors, history: TokenHistory = NO_HISTORY) -> Tensor:
    """Logits [B, V] after bias and penalties, float64; -inf where a token is forbidden."""
    z = logits.to(widest(logits.device))
    if history.bias is not None:
        z = z + history.bias
    if history.seen is not None:
        z = torch.where(history.seen, torch.where(z > 0, z / params.repetition, z * params.repetition), z)
    if history.counts is not None:
        z = z - params.frequency * history.counts - params.presence * (history.counts > 0)
    return z if history.forbidden is None else z.masked_fill(history.forbidden, float("-inf"))


def probabilities(logits: Tensor, params: SamplingTensors, history: TokenHistory = NO_HISTORY) -> Tensor:
    """The distribution that tokens are drawn from, [B, V], float64, sums of 1; a greedy row has one certain token.

    A row whose logits are not finite has no distribution: its entries are NaN.
    """
    return _probabilities(adjusted(logits, params, history), params)


def _probabilities(z: Tensor, params: SamplingTensors) -> Tensor:
    greedy = torch.zeros_like(z).scatter(-1, z.argmax(-1, keepdim=True), 1.0)
    below = z - z.amax(-1, keepdim=True)  # 0 for the most probable token, so that no temperature loses it
    p = torch.softmax(below / torch.where(params.temperature > 0, params.temperature, 1.0), -1)
    if params.ranked:
        p = _ranked(p, params)
    p = torch.where(p >= params.min_p * p.amax(-1, keepdim=True), p, 0.0)
    return torch.where(params.temperature > 0, p / p.sum(-1, keepdim=True), greedy)


def _ranked(p: Tensor, params: SamplingTensors) -> Tensor:
    """Probabilities that top-k and top-p leave, the others 0; not normalised."""
    ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    ordered = torch.where(rank < params.top_k, ordered, 0.0)
    before = ordered.cumsum(-1) - ordered
    within = (before < params.top_p * ordered.sum(-1, keepdim=True)) | (params.top_p >= 1) | (rank == 0)
    return torch.zeros_like(p).scatter(-1, order, torch.where(within, ordered, 0.0))
