"""The fold: run a list of passes against one buffer with the model's one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrt.model import LRT
from lrt.schedule import Pass, memory_only
from lrt.shapes import TokensBN
from lrt.state import Buffer, Written


def fold(
    model: LRT,
    tokens: TokensBN,
    passes: Sequence[Pass],
    starts: Tensor | None = None,
    buffer: Buffer | None = None,
    first: int = 0,
) -> Iterator[tuple[Pass, Written, Buffer]]:
    """Run `passes` in order; yield each with what it wrote and the buffer after it.

    Args:
        tokens: int64 [B, T]; column j stands at position `first + j`.
        passes: over absolute positions in `first .. first + T - 1`.
        starts: boolean [B, T], True at the first token of a document, where the memory is reset.
        buffer: what stands at earlier positions; empty by default.
    """
    buffer = buffer or Buffer()
    for p, stop_early in zip(passes, memory_only(passes), strict=True):
        at = p.positions
        cut = slice(at.start - first, at[-1] + 1 - first, at.step)
        rest = buffer.without(at)  # cut once: the queries see it, and it stays
        before, seen = (b.detach() if p.detach else b for b in (buffer, rest))
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            past = seen.past(at, model.config.source if stop_early else model.config.depth, tokens.device)
            reset = starts[:, cut] if starts is not None else None
            written = model(tokens[:, cut], past, before.memory(at), reset, top=not stop_early)
        buffer = rest.write(at, written)
        yield p, written, buffer
