"""The fold: run a list of passes against one buffer with the model's one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrt.model.shapes import TokensBN
from lrt.model.state import Buffer, PassOutput
from lrt.model.transformer import Transformer
from lrt.passes import Pass, columns, memory_only


def run_passes(
    model: Transformer,
    tokens: TokensBN,
    passes: Sequence[Pass],
    starts: Tensor | None = None,
    buffer: Buffer | None = None,
) -> Iterator[tuple[Pass, PassOutput, Buffer]]:
    """Run `passes` in order; yield each with what it wrote and the buffer after it.

    Where others have written a pass without gradient runs only the blocks that memory reaches, and those above them.

    Args:
        tokens: int64 [B, T], at positions 0..T-1 (counted from where the buffer's prefix ends).
        passes: over these positions.
        starts: boolean [B, T], True at the first token of a document, where the memory is reset.
        buffer: what earlier passes have written, and what rows have seen before; empty by default.
    """
    buffer = buffer or Buffer()
    for p, early in zip(passes, memory_only(passes), strict=True):
        place = columns(p.positions)
        own, reset = tokens[:, place], starts[:, place] if starts is not None else None
        again = not p.grad and buffer.knows(p.positions)
        read, buffer = buffer.open(p.positions, own, model.config.blocks_run(top=not early, again=again), p.detach)
        with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
            written = model.forward_pass(own, read, reset, top=not early)
        buffer = buffer.write(p.positions, written)
        yield p, written, buffer
        del read, written  # the next pass may rewrite it all: then it need not exist beside it
