"""In-context learning: how much lower the loss is late in a row than early in it."""

from __future__ import annotations

from torch import Tensor


def in_context_score(nats: Tensor) -> float:
    """Mean loss over the second sixteenth of the positions less that over the last quarter, in nats per token.

    `nats` [B, T] are losses of targets; higher means that the model makes more of its context. The first positions are
    left out, since they hardly have one.
    """
    length = nats.shape[1]
    if length < 16:
        raise ValueError(f"rows of {length} positions are too short for early and late; give at least 16")
    early, late = nats[:, length // 16 : length // 8], nats[:, -(length // 4) :]
    return float(early.cpu().double().mean() - late.cpu().double().mean())
