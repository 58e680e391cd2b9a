"""Elementwise operations whose automatic backward is wasteful on a CPU: half of a small model's eager step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x); dx = (dy - y mean(dy y)) / rms(x), from y and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (size.square() / x.shape[-1] + EPS).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (dy,), (y, scale) = grads, ctx.saved_tensors
        along = torch.linalg.vecdot(dy, y).unsqueeze(-1) / y.shape[-1]
        return torch.addcmul(dy, y, along, value=-1).mul_(scale)


class _ReLUSquared(torch.autograd.Function):
    """y = relu(x)^2; dy/dx = 2 relu(x), so relu(x) is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (positive * grads[0]).mul_(2)


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without learned weights; the same shape and type. On cuda torch's kernel is fused."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), eps=EPS)
    return _RMSNorm.apply(x)  # pyright: ignore[reportReturnType]


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, So et al. 2021)."""
    return _ReLUSquared.apply(x)  # pyright: ignore[reportReturnType]
