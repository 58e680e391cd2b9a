"""In-context learning: how much lower the loss is late in a row than early in it."""

from __future__ import annotations

from torch import Tensor


def in_context_score(nats: Tensor, scored: Tensor) -> float:
    """Mean loss over the second sixteenth of the positions less that over the last quarter, in nats per token.

    Higher means that the model makes more of its context. The first sixteenth is left out: it hardly has a context.

    Args:
        nats: losses of the targets, [B, T].
        scored: which of them count, boolean [B, T]. The score is nan where none does, early or late.

    Raises:
        ValueError: rows of fewer than 16 positions.
    """
    length = nats.shape[1]
    if length < 16:
        raise ValueError(f"rows of {length} positions are too short for early and late; give at least 16")
    early, late = (
        float(nats[:, part][scored[:, part]].cpu().double().mean())
        for part in (slice(length // 16, length // 8), slice(-(length // 4), None))
    )
    return early - late
