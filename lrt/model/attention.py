"""Attention at positions: rotary embedding, what a query may see, and the one attention function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.config.model import Backend, RopeScaling
from lrt.model.merged import Cut, cuts, merged
from lrt.model.ops import turn
from lrt.model.shapes import HeadsBKNE, PositionsN
from lrt.model.state import LayerPast, Past

MERGE_FROM = 1024
"""Queries of a pass from which merging is faster than masking on the CPU (docs/speed.md)."""
Keys = Tensor | Sequence[Tensor]

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each [.., N, E/2], with a heads axis where rows differ."""


def rotary(
    positions: PositionsN, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rotary:
    """Cosines and sines of RoPE at `positions` [N] or [B, N] for heads `width` wide (RoFormer, eq. 34).

    Angles are computed in float32 (float64 for a float64 model) and rounded to `dtype` last.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    channels = torch.arange(0, width, 2, device=positions.device, dtype=exact)
    speeds = theta ** (-channels / width)
    speeds = speeds if scaling is None or scaling.kind == "none" else slowed(speeds, scaling)
    angles = positions[..., None].to(exact) * speeds
    angles = angles[:, None] if angles.dim() == 3 else angles  # [B, 1, N, E/2] broadcasts over heads
    return angles.cos().to(dtype), angles.sin().to(dtype)


def slowed(speeds: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies [E/2], in radians per position, after `scaling`."""
    if scaling.kind == "linear":
        return speeds / scaling.factor
    turns = scaling.original * speeds / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)  # 1: fast channels, left as they are
    return speeds * (kept + (1 - kept) / scaling.factor)


def rotate(x: HeadsBKNE, rope: Rotary) -> HeadsBKNE:
    """Turn each pair (channel i, channel i + E/2) by its position's angle; `x` is [B, H, N, E]."""
    return turn(x, *rope)


def visible(queries: PositionsN, keys: PositionsN, window: int | None) -> Tensor:
    """Which keys each query may see: not later than itself, and among the last `window` positions if one is given.

    `queries` [N] or [B, N], `keys` [M] or [B, M]; boolean [N, M], or [B, 1, N, M] where rows differ.
    """
    distance = queries[..., :, None] - keys[..., None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return seen[:, None] if seen.dim() == 3 else seen


SHORT = 2**18
"""Queries times keys up to which a CPU computes attention in bfloat16 as plain products: 512 positions."""
Sight = Tensor | tuple[Cut, ...] | None
"""What queries see: `visible`'s mask, or the cuts of merged attention; None: queries and keys are 0..N-1, causal."""


def look(past: Past, layer: LayerPast, window: int | None, backend: Backend, like: Tensor) -> Sight:
    """What a pass sees in a layer, in the form that the chosen backend wants.

    Where rows stand at positions of their own (decoding) there is only the mask, whatever is chosen. `like` gives the
    type of the heads. ValueError: `merged` is chosen, and the slices have unequal strides.
    """
    n = past.queries.shape[-1]
    if past.causal and (window is None or window >= n):
        return None
    wanted = backend == "merged" or (backend == "auto" and not like.is_cuda and n >= MERGE_FROM)
    plan = cuts(past.slices, window, like) if wanted and past.slices else None
    if plan is None and backend == "merged" and past.slices:
        at = ", ".join(f"{r.start}:{r.stop}:{r.step}" for r in past.slices)
        raise ValueError(f"merged attention cannot serve the slices {at}; set train.attention masked or auto")
    return visible(past.queries, layer.positions, window) if plan is None else plan


def attend(q_BHNE: Tensor, k: Keys, v: Keys, seen: Sight) -> Tensor:
    """Softmax attention of queries over keys; scale 1/sqrt(E); [B, H, N, E].

    Keys and values are [B, K, M, E], or segments of them where `seen` says how each is cut. Query head h reads
    key/value head h // (H / K).
    """
    if isinstance(seen, tuple):
        return merged(q_BHNE, list(k), list(v), seen)
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    n, m = q_BHNE.shape[2], k.shape[2]
    if q_BHNE.dtype == torch.bfloat16 and q_BHNE.device.type == "cpu" and n > 1 and n * m <= SHORT:
        return products(q_BHNE, k, v, seen)
    grouped = q_BHNE.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q_BHNE, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped)


def products(q_BHNE: Tensor, k_BKME: Tensor, v_BKME: Tensor, seen: Tensor | None) -> Tensor:
    """`attend` as two batched products with all scores between them.

    Of short rows in bfloat16 its backward pass takes a sixth of the flash kernel's on a CPU (docs/speed.md).
    """
    (rows, heads, n, e), (kv_heads, m) = q_BHNE.shape, k_BKME.shape[1:3]
    groups = heads // kv_heads
    seen = torch.ones(n, m, dtype=torch.bool, device=q_BHNE.device).tril() if seen is None else seen
    bias = q_BHNE.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
    if groups > 1 or bias.dim() > 2:  # queries of one key/value head lie one after the other
        bias = bias.expand(rows, kv_heads * groups, n, m).reshape(rows * kv_heads, groups * n, m)
    q, k, v = q_BHNE.reshape(-1, groups * n, e), k_BKME.reshape(-1, m, e), v_BKME.reshape(-1, m, e)
    scores = torch.baddbmm(bias, q, k.mT, alpha=e**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(rows, heads, n, e)
