"""Attention at positions: rotary embedding, what a query may see, and the one attention function."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lrt.config.model import RopeScaling
from lrt.model.flex import first_visible, flex_attend
from lrt.model.shapes import HeadsBKNE, PositionsN

BLOCK = 256
"""Queries that attend together on the CPU: each block sees only the keys that one of its queries may see."""
SHORT = 2**18
"""Queries times keys up to which a CPU computes attention in bfloat16 as plain products: 512 positions."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines at both channels of every pair, the second sine negated: [.., N, E], or [B, 1, N, E]."""


class QueryBlock(NamedTuple):
    """Queries that attend together."""

    queries: slice
    keys: slice
    """Of the keys in the order of their positions: from the first that one of these queries sees to the last."""
    mask: Tensor
    """Which of them each query sees, boolean [n, m], or [B, 1, n, m] where rows differ."""


class QueryBlocks(NamedTuple):
    """A mask cut into blocks of queries, so that no score is computed of keys that a whole block may not see."""

    order: Tensor
    """Indices that put the keys into the order of their positions, [M]."""
    blocks: tuple[QueryBlock, ...]


Mask = Tensor | QueryBlocks | BlockMask | None
"""Which keys queries see; None: queries and keys stand at the same rising positions, and attention is causal."""


def rope_at(
    positions: PositionsN, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rope:
    """Cosines and sines of RoPE at `positions` [N] or [B, N] for heads `width` wide (RoFormer, eq. 34).

    Angles are computed in float32 (float64 for a float64 model) and rounded to `dtype` last.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    channels = torch.arange(0, width, 2, device=positions.device, dtype=exact)
    speeds = theta ** (-channels / width)
    speeds = speeds if scaling is None or scaling.kind == "none" else slowed(speeds, scaling)
    angles = positions[..., None].to(exact) * speeds
    angles = angles[:, None] if angles.dim() == 3 else angles  # [B, 1, N, ..] broadcasts over heads
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def slowed(speeds: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies [E/2], in radians per position, after `scaling`."""
    if scaling.kind == "linear":
        return speeds / scaling.factor
    turns = scaling.original * speeds / (2 * math.pi)
    unscaled = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)  # 1: fast channels, left as they are
    return speeds * (unscaled + (1 - unscaled) / scaling.factor)


def attention_mask(
    queries: PositionsN, keys: PositionsN, window: int | None, document_start: PositionsN | None = None
) -> Tensor:
    """Which keys each query may see: not later than itself, of the last `window` positions, of its own document.

    `queries` [N] or [B, N], `keys` [M] or [B, M], `document_start` [B, N] of each query; None limits nothing. Boolean
    [N, M], or [B, 1, N, M] where rows differ.
    """
    queries, keys = queries[..., :, None], keys[..., None, :]
    seen = keys <= queries  # comparisons alone: differences would be eight times as large as the mask
    seen = seen if window is None else seen & (keys > queries - window)
    seen = seen if document_start is None else seen & (keys >= document_start[..., :, None])
    return seen[:, None] if seen.dim() == 3 else seen


def query_blocks(
    queries: PositionsN, keys: PositionsN, window: int | None, document_start: PositionsN | None, size: int
) -> QueryBlocks:
    """`attention_mask` cut into blocks of `size` queries; `queries` [N] rise, `keys` [M] stand in any order."""
    earliest = first_visible(queries, window, document_start)
    earliest = earliest if earliest.dim() == 1 else earliest.amin(0)
    order = keys.argsort()
    ordered = keys[order].contiguous()
    blocks = []
    for i in range(0, len(queries), size):
        own = queries[i : i + size]
        first = int(torch.searchsorted(ordered, earliest[i]))
        end = int(torch.searchsorted(ordered, own[-1], right=True))
        begin = None if document_start is None else document_start[:, i : i + size]
        mask = attention_mask(own, ordered[first:end], window, begin)
        blocks.append(QueryBlock(slice(i, i + size), slice(first, end), mask))
    return QueryBlocks(order, tuple(blocks))


def attend(q_BHNE: Tensor, k: HeadsBKNE, v: HeadsBKNE, mask: Mask) -> Tensor:
    """Softmax attention of queries over keys; scale 1/sqrt(E); [B, H, N, E].

    Keys and values are [B, K, M, E]. Query head h reads key/value head h // (H / K).
    """
    if isinstance(mask, BlockMask):
        return flex_attend(q_BHNE, k, v, mask)
    if isinstance(mask, QueryBlocks):
        k, v = k.index_select(2, mask.order), v.index_select(2, mask.order)
        parts = [attend(q_BHNE[:, :, own], k[:, :, seen], v[:, :, seen], part) for own, seen, part in mask.blocks]
        return torch.cat(parts, dim=2)
    n, m = q_BHNE.shape[2], k.shape[2]
    if q_BHNE.dtype == torch.bfloat16 and q_BHNE.device.type == "cpu" and n > 1 and n * m <= SHORT:
        return products(q_BHNE, k, v, mask)
    grouped = q_BHNE.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q_BHNE, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def products(q_BHNE: Tensor, k_BKME: Tensor, v_BKME: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` as two batched products with all scores between them.

    Of short rows in bfloat16 its backward pass takes a sixth of the flash kernel's on a CPU (docs/speed.md).
    """
    (rows, heads, n, e), (kv_heads, m) = q_BHNE.shape, k_BKME.shape[1:3]
    groups = heads // kv_heads
    mask = torch.ones(n, m, dtype=torch.bool, device=q_BHNE.device).tril() if mask is None else mask
    bias = q_BHNE.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if groups > 1 or bias.dim() > 2:  # queries of one key/value head lie one after the other
        bias = bias.expand(rows, kv_heads * groups, n, m).reshape(rows * kv_heads, groups * n, m)
    q, k, v = q_BHNE.reshape(-1, groups * n, e), k_BKME.reshape(-1, m, e), v_BKME.reshape(-1, m, e)
    scores = torch.baddbmm(bias, q, k.mT, alpha=e**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(rows, heads, n, e)
