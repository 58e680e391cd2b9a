"""SamplingParams: from logits to a token, by laws that may differ from row to row.

A row's draw depends on its own logits, law and seed alone, never on what else is in the batch: each row has its own
stream of uniform numbers, and turns one into a token by inverting its own cumulative distribution in the order of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued, and when it ends.

    The laws apply in order: repetition penalty, temperature, top-k, top-p, min-p, each to what the one before left.
    """

    max_new_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int | None = None
    """Keep the k most probable tokens (the lower id first among equals)."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities reach p in sum."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens in the prompt or the answer by it (CTRL, section 4.1)."""
    seed: int = 0
    """The same seed gives the same text, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_tokens: tuple[int, ...] | None = None
    """Tokens that end the answer; they spell no text. None: the model's BOS, which opens the next document."""

    def __post_init__(self) -> None:
        for name, fine, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0; 0 is greedy"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive; 1 changes nothing"),
            ("seed", self.seed >= 0, "at least 0"),
            ("stop", all(self.stop), "texts of at least one character"),
        ):
            if not fine:
                raise ValueError(f"sampling.{name} is {vars(self)[name]}; it must be {range_}")


class SamplingTensors(NamedTuple):
    """The laws of B rows as columns [B, 1] on the device, and what the host knows of them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    greedy: bool
    """Whether every row is greedy."""
    ranked: bool
    """Whether any row needs tokens in order of probability."""
    penalised: bool
    """Whether any row has a repetition penalty."""

    @staticmethod
    def of(rows: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> SamplingTensors:
        """The laws of these requests, one a row."""

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        return SamplingTensors(
            column([r.temperature for r in rows]),
            column([r.top_k or vocabulary for r in rows]),
            column([r.top_p for r in rows]),
            column([r.min_p for r in rows]),
            column([r.repetition_penalty for r in rows]),
            all(r.temperature == 0 for r in rows),
            any(r.temperature > 0 and (r.top_k or r.top_p < 1) for r in rows),
            any(r.repetition_penalty != 1 for r in rows),
        )


def uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """The first `count` numbers in [0, 1) of sample number `sample` of a request with this seed, float64."""
    return np.random.default_rng((seed, sample)).random(count)


def choose(logits: Tensor, laws: SamplingTensors, uniform: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw a token per row.

    Args:
        logits: [B, V].
        laws: of the B rows.
        uniform: one number in [0, 1) per row, float64 [B].
        seen: boolean [B, V], tokens that the repetition penalty concerns.

    Returns:
        Tokens, int64 [B], and their log-probabilities under the model itself (before any law), float64 [B].
    """
    if laws.greedy:
        tokens = (penalised(logits, laws, seen) if laws.penalised else logits).argmax(-1)
    else:
        mass = probabilities(logits, laws, seen).cumsum(-1)
        total = mass[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(mass, target, right=True)[:, 0]
    logprobs = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens, logprobs


def penalised(logits: Tensor, laws: SamplingTensors, seen: Tensor | None) -> Tensor:
    """Logits [B, V] after the repetition penalty, float64."""
    z = logits.double()
    if seen is None or not laws.penalised:
        return z
    return torch.where(seen, torch.where(z > 0, z / laws.penalty, z * laws.penalty), z)


def probabilities(logits: Tensor, laws: SamplingTensors, seen: Tensor | None = None) -> Tensor:
    """The distribution that tokens are drawn from, [B, V], float64, sums of 1; a greedy row has one certain token."""
    z = penalised(logits, laws, seen)
    best = z.argmax(-1, keepdim=True)
    greedy = torch.zeros_like(z).scatter(-1, best, 1.0)
    p = torch.softmax(z / torch.where(laws.temperature > 0, laws.temperature, 1.0), -1)
    if laws.ranked:
        p = _ranked(p, laws)
    p = torch.where(p >= laws.min_p * p.amax(-1, keepdim=True), p, 0.0)
    return torch.where(laws.temperature > 0, p / p.sum(-1, keepdim=True), greedy)


def _ranked(p: Tensor, laws: SamplingTensors) -> Tensor:
    """Probabilities that top-k and top-p leave, the others 0; not normalised."""
    ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[-1], device=p.device)
    ordered = torch.where(rank < laws.top_k, ordered, 0.0)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where((before < laws.top_p * ordered.sum(-1, keepdim=True)) | (laws.top_p >= 1), ordered, 0.0)
    return torch.zeros_like(p).scatter(-1, order, kept)
