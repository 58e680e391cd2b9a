"""The calls into torch that are private to it, in one place: marks that a compiler reads, and a product in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def mark_dynamic(x: Tensor, axis: int) -> None:
    """Have a compiled graph keep the size of `axis` symbolic, where it can."""
    torch._dynamo.maybe_mark_dynamic(x, axis)


def mark_in_place(x: Tensor) -> None:
    """Say that a tensor stays at its address, so that a CUDA graph may write to it."""
    torch._dynamo.mark_static_address(x)


def int8_matmul(x: Tensor, whole: Tensor, scale: Tensor) -> Tensor:
    """(x wholeᵀ) · scale on a CPU, bfloat16 [N, O]: x bfloat16 [N, I], whole int8 [O, I], scales bfloat16 [O]."""
    return torch.ops.aten._weight_int8pack_mm(x, whole, scale)
