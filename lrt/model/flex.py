"""FlexAttention at positions: which blocks of keys a block of queries sees, and the attention that skips the others."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lrt.model.shapes import HeadsBKNE, PositionsN
from lrt.utils.compiling import graph_of

SIZE = 128
"""Queries and keys of a block."""
BEYOND = 2**41
"""A position later than any, of keys that only fill up a block."""


def block_mask(
    queries: PositionsN, keys: PositionsN, window: int | None, document_start: PositionsN | None
) -> BlockMask:
    """The block-sparse form of `attention_mask`, without a mask of queries times keys.

    `queries` [N] or [B, N] rise, `keys` [M] or [B, M] stand in any order. A block of keys is judged by its least and
    greatest position: left out where no query of a block can see it, taken whole where every one sees all of it.
    """
    first = first_visible(queries, window, document_start)
    low, high = (_of_blocks(queries, last) for last in (False, True))
    first_low, first_high = (_of_blocks(first, last) for last in (False, True))
    rows = keys if keys.dim() == 2 else keys[None]
    blocks = F.pad(rows, (0, -rows.shape[1] % SIZE), value=BEYOND).unflatten(1, (-1, SIZE))
    earliest, latest = blocks.amin(2)[:, None], blocks.amax(2)[:, None]  # [B or 1, 1, blocks of keys]
    complete = torch.arange(1, low.shape[1] + 1, device=keys.device)[:, None] * SIZE <= queries.shape[-1]
    seen = (earliest <= high) & (latest >= first_low)
    every = (latest <= low) & (earliest >= first_high) & complete

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key = _at(keys, b, k)
        return (key <= _at(queries, b, q)) & (key >= _at(first, b, q))

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~every), *_listed(every), BLOCK_SIZE=SIZE, mask_mod=visible,
        seq_lengths=(queries.shape[-1], keys.shape[-1]),
    )  # fmt: skip


def first_visible(queries: PositionsN, window: int | None, document_start: PositionsN | None) -> PositionsN:
    """The earliest position that each query sees; like `queries`, or [B, N]."""
    first = torch.zeros_like(queries) if window is None else queries - (window - 1)
    return first if document_start is None else torch.maximum(first, document_start)


def _of_blocks(rising: PositionsN, last: bool) -> Tensor:
    """The first or last entry of every block of queries, [B or 1, blocks, 1]."""
    index = torch.arange(0, rising.shape[-1], SIZE, device=rising.device)
    index = (index + SIZE - 1).clamp(max=rising.shape[-1] - 1) if last else index
    return rising[..., index].view(-1, len(index), 1)


def _at(positions: PositionsN, row: Tensor, index: Tensor) -> Tensor:
    return positions[index] if positions.dim() == 1 else positions[row, index]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, [B, 1, n], and which, those first, [B, 1, n, m]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def flex_attend(q_BHNE: Tensor, k: HeadsBKNE, v: HeadsBKNE, mask: BlockMask) -> Tensor:
    """Softmax attention under a block mask; [B, H, N, E]. On a GPU one compiled kernel, on a CPU its eager form.

    ValueError: a gradient is wanted where FlexAttention has none.
    """
    device, grouped = q_BHNE.device.type, q_BHNE.shape[1] != k.shape[1]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
    q, k, v = (x.to(dtype) for x in (q_BHNE, k, v))  # autocast knows scaled_dot_product_attention, not this
    if torch.compiler.is_compiling():
        return _tensor(flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped))
    run = flex_attention if device == "cpu" else _compiled()
    try:
        return _tensor(run(q, k, v, block_mask=mask, enable_gqa=grouped))
    except NotImplementedError as error:
        raise ValueError(f"attention flex has no gradient on {device} ({error}); take attention masked") from None


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


@cache
def _compiled() -> Any:
    return graph_of(flex_attention)
