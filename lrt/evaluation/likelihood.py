"""How probable a model that decodes with memory finds the end of a text: what every suite and lm-eval are scored by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrt.config.decoding import DEFAULT_MODE
from lrt.inference.sampling import token_logprobs
from lrt.model.lrt import LRT
from lrt.model.recurrence import states
from lrt.utils.require import require

POSITIONS = 8192
"""Positions of a batch, padding counted."""
SOUND = "use an earlier checkpoint, or float32 in place of a narrower type"


class Candidate(NamedTuple):
    """A text whose last tokens are scored."""

    ids: list[int]
    scored: int
    """How many of the last ids are scored; at least one id stands before them."""


class Likelihood(NamedTuple):
    """What a model says of a candidate's scored tokens."""

    logprob: float
    """Their summed log-probability, in nats."""
    greedy: bool
    """Whether each is the most probable token there."""


@torch.no_grad()
def likelihoods(
    model: LRT, candidates: Sequence[Candidate], mode: str = DEFAULT_MODE, positions: int = POSITIONS
) -> list[Likelihood]:
    """One `Likelihood` for each candidate, in their order, batches of like length at a time.

    A candidate longer than the model's context and one token loses its beginning.
    ValueError: more scored tokens than the context holds, or nothing before them.
    """
    alone = "a continuation has no token before it, so its first cannot be scored: put BOS in front"
    require(all(c.scored < len(c.ids) for c in candidates), alone)
    context = model.config.context
    longest = max((c.scored for c in candidates), default=0)
    require(
        longest <= context,
        f"a continuation has {longest} tokens, the model's context {context}: it cannot be scored whole; "
        "leave the task out, or take a model with a longer context",
    )
    fitting = [Candidate(c.ids[-context - 1 :], c.scored) for c in candidates]
    scores: dict[int, Likelihood] = {}
    for rows in of_like_length([len(c.ids) for c in fitting], positions):
        scores |= zip(rows, _scored(model, [fitting[i] for i in rows], mode), strict=True)
    return [scores[i] for i in range(len(fitting))]


def of_like_length(lengths: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Indices, rows of like length together, longest first; at most `positions` positions, and at least one row."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, positions // max(lengths[order[0]], 1))
        yield order[:count]
        order = order[count:]


def _scored(model: LRT, rows: Sequence[Candidate], mode: str) -> list[Likelihood]:
    """One batch; only scored positions pass through the head."""
    width = max(len(c.ids) for c in rows)
    ids = torch.tensor([c.ids + [0] * (width - len(c.ids)) for c in rows], device=model.device)
    ends = torch.tensor([len(c.ids) - 1 for c in rows], device=model.device)[:, None]
    counts = torch.tensor([c.scored for c in rows], device=model.device)[:, None]
    places = torch.arange(width - 1, device=model.device)
    wanted = (places < ends) & (places >= ends - counts)
    logprob, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
    for first, hidden, _ in states(model, ids[:, :-1], mode=mode):
        part = slice(first, first + hidden.shape[1])
        owner = wanted[:, part].nonzero()[:, 0].cpu()
        chosen, best = _tokens(model, hidden[wanted[:, part]], ids[:, 1:][:, part][wanted[:, part]])
        logprob.index_add_(0, owner, chosen.cpu().double())
        greedy[owner[~best.cpu()]] = False
    return [Likelihood(*pair) for pair in zip(logprob.tolist(), greedy.tolist(), strict=True)]


def _tokens(model: LRT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, float64 [N], and whether it is the most probable token; hidden [N, D]."""
    logits = model.logits(hidden)
    logprobs = token_logprobs(logits, targets)
    require_finite(logprobs)
    return logprobs, logits.argmax(-1) == targets


def require_finite(scores: Tensor) -> None:
    """ValueError if a score is not a finite number: the largest of such scores would name an answer all the same."""
    require(bool(scores.isfinite().all()), "the model's logits are not finite, so nothing is scored; " + SOUND)
