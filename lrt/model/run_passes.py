"""The fold: run a list of passes against one buffer with the model's one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrt.model.shapes import StreamBND, TokensBN
from lrt.model.state import Buffer, PassOutput, Past
from lrt.model.transformer import LRT
from lrt.schedule import Pass, memory_only


def run_passes(
    model: LRT,
    tokens: TokensBN,
    passes: Sequence[Pass],
    starts: Tensor | None = None,
    buffer: Buffer | None = None,
) -> Iterator[tuple[Pass, PassOutput, Buffer]]:
    """Run `passes` in order; yield each with what it wrote and the buffer after it.

    Args:
        tokens: int64 [B, T], at positions 0..T-1 (counted from where the buffer's history ends).
        passes: over these positions.
        starts: boolean [B, T], True at the first token of a document, where the memory is reset.
        buffer: what earlier passes have written, and what rows have seen before; empty by default.
    """
    buffer = buffer or Buffer()
    previous = buffer.previous_tokens(tokens) if model.config.memory.shifted else None
    for p, stop_early in zip(passes, memory_only(passes), strict=True):
        at = p.positions
        cut = slice(at.start, at[-1] + 1, at.step)
        reset, before = (x[:, cut] if x is not None else None for x in (starts, previous))
        blocks = model.config.source if stop_early else model.config.layers
        buffer, memory, past = _opened(buffer, p, blocks, tokens.device)
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            written = model(tokens[:, cut], past, memory, reset, before, top=not stop_early)
        buffer = buffer.write(at, written)
        yield p, written, buffer
        del written  # the next pass may rewrite it all: then it need not exist beside it


def _opened(buffer: Buffer, p: Pass, blocks: int, device: torch.device) -> tuple[Buffer, StreamBND | None, Past]:
    """What of the buffer stays when a pass begins, the memory it reads, and what its queries see."""
    rest = buffer.without(p.positions)  # cut once: the queries see it, and it stays
    before, seen = (b.detach() if p.detach else b for b in (buffer, rest))
    return rest, before.memory(p.positions), seen.past(p.positions, blocks, device)
