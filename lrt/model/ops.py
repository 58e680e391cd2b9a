"""Elementwise operations whose automatic backward is wasteful on a CPU: half of a small model's eager step.

Where no gradient is wanted, each calls its formula directly: entering an autograd function costs more than it computes
when one token is decoded. What they keep for backward knows nothing of their inputs, so a second derivative is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def require_first_order() -> None:
    """RuntimeError where a backward pass shall be differentiated itself: what it keeps has forgotten its inputs."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("lrt's operations have a first derivative only: leave create_graph=True out")


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x); dx = (dy - y mean(dy y)) / rms(x), from y and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        require_first_order()
        (dy,), (y, scale) = grads, ctx.saved_tensors
        along = torch.linalg.vecdot(dy, y).unsqueeze(-1) / y.shape[-1]
        return torch.addcmul(dy, y, along, value=-1).mul_(scale), None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = torch.float32 if x.dtype.itemsize < 4 else None
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return (size.square_().div_(x.shape[-1]).add_(eps)).rsqrt_().to(x.dtype)


class _ReLUSquared(torch.autograd.Function):
    """y = relu(x)^2; dy/dx = 2 relu(x), so relu(x) is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        require_first_order()
        (positive,) = ctx.saved_tensors
        return (positive * grads[0]).mul_(2)


class _WeightedSum(torch.autograd.Function):
    """y = sum_i w_i x_i in one buffer; dx_i = w_i dy, and dw_i = <dy, x_i> without a product of their size."""

    @staticmethod
    def forward(ctx: Any, *weights_and_terms: Tensor) -> Tensor:
        ctx.save_for_backward(*weights_and_terms)
        half = len(weights_and_terms) // 2
        return _summed(weights_and_terms[:half], weights_and_terms[half:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order()
        (dy,), saved, needed = grads, ctx.saved_tensors, ctx.needs_input_grad
        half = len(saved) // 2
        pairs = list(zip(saved[:half], saved[half:], strict=True))
        dw = [_inner(dy, x, w) if need else None for (w, x), need in zip(pairs, needed[:half], strict=True)]
        return *dw, *(w * dy if need else None for (w, _), need in zip(pairs, needed[half:], strict=True))


def _summed(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    y = weights[0] * terms[0]
    for w, x in zip(weights[1:], terms[1:], strict=True):
        y.addcmul_(w, x)
    return y


def _inner(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Inner product over the axes along which `w`, a number or [.., 1], was spread."""
    if w.dim() == 0:
        if dy.dtype == torch.bfloat16 and not dy.is_cuda:  # whose dot product takes five times as long
            dy, x = dy.float(), x.float()
        return torch.dot(dy.reshape(-1), x.reshape(-1)).to(w.dtype)
    return torch.linalg.vecdot(dy, x).unsqueeze(-1)


class _Rotate(torch.autograd.Function):
    """Each pair (a, b) to (a cos + b sin, b cos - a sin); backward turns the other way, so the input is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        require_first_order()
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=way)


class _Split(torch.autograd.Function):
    """Disjoint slices of one axis as views; backward writes each gradient into its place, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, slices: tuple[slice, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like, ctx.places = (x.shape, x.dtype, x.device), [(slice(None),) * axis + (one,) for one in slices]
        return tuple(x[place] for place in ctx.places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        require_first_order()
        shape, dtype, device = ctx.like
        dx = torch.zeros(shape, dtype=dtype, device=device)
        for place, grad in zip(ctx.places, grads, strict=True):
            if grad is not None:
                dx[place] = grad
        return dx, None, None


def rms_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """RMSNorm over the last axis, without learned weights; the same shape and type. On cuda torch's kernel is fused."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), eps=eps)
    if not torch.is_grad_enabled():
        return x * _inverse_rms(x, eps)
    return _RMSNorm.apply(x, eps)  # pyright: ignore[reportReturnType]


def rms(x: Tensor, eps: float = EPS) -> Tensor:
    """What `rms_norm` divides by, [.., 1]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.square().mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, So et al. 2021)."""
    if not torch.is_grad_enabled():
        return F.relu(x).square_()
    return _ReLUSquared.apply(x)  # pyright: ignore[reportReturnType]


def weighted_sum(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    """w_1 x_1 + w_2 x_2 + ..; each weight is a number (no axes) or spreads over the last axis, [.., 1]."""
    if torch.compiler.is_compiling():  # fuses the plain formula, and does not trace one tensor given twice
        first, *others = (w * x for w, x in zip(weights, terms, strict=True))
        return sum(others, first)
    if not torch.is_grad_enabled():
        return _summed(weights, terms)
    return _WeightedSum.apply(*weights, *terms)  # pyright: ignore[reportReturnType]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (channel i, channel i + E/2) of the last axis by its position's angle.

    Its cosine and sine stand at both channels, the sine with the other sign at the second.
    """
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin, 1)
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


def split(x: Tensor, axis: int, slices: tuple[slice, ...]) -> tuple[Tensor, ...]:
    """Disjoint slices of one axis, as views; their gradients are put together by one copy, however many there are."""
    return _Split.apply(x, axis, slices)  # pyright: ignore[reportReturnType]
