"""Attention at positions: rotary embedding, what a query may see, and the one attention function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrt.ops import turn
from lrt.shapes import HeadsBKNE, PositionsN

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each [.., N, E/2], with a heads axis where rows differ."""


def rotary(positions: PositionsN, width: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosines and sines of RoPE at `positions` [N] or [B, N] for heads `width` wide (RoFormer, eq. 34).

    Angles are computed in float32 (float64 for a float64 model) and rounded to `dtype` last.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    channels = torch.arange(0, width, 2, device=positions.device, dtype=exact)
    angles = positions[..., None].to(exact) * theta ** (-channels / width)
    angles = angles[:, None] if angles.dim() == 3 else angles  # [B, 1, N, E/2] broadcasts over heads
    return angles.cos().to(dtype), angles.sin().to(dtype)


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


def attend(q_BHNE: Tensor, k_BKME: Tensor, v_BKME: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention of queries over keys; scale 1/sqrt(E); [B, H, N, E].

    `seen` is `visible`'s mask; None means that keys and queries are the same positions 0..N-1, plainly causal.
    Query head h reads key/value head h // (H / K).
    """
    grouped = q_BHNE.shape[1] != k_BKME.shape[1]
    return F.scaled_dot_product_attention(
        q_BHNE, k_BKME, v_BKME, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped
    )
