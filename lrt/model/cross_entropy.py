"""Head and loss in one: the soft-capped cross-entropy of many passes, whose logits never exist all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrt.model.ops import require_first_order
from lrt.model.shapes import IGNORE, StreamBND, TokensBN

CHUNK = {"cpu": 2**20, "cuda": 2**27, "mps": 2**24}
"""Logits that exist at a time, by device: what fits the processor's cache, or fills a GPU."""


class PassRows(NamedTuple):
    """One pass's part of the loss."""

    hidden: Tensor
    """[n, D]"""
    targets: Tensor
    """int64 [n]"""
    scale: Tensor
    """What its summed nats count, a scalar."""
    dhidden: Tensor | None
    """Where the gradient by `hidden` goes, [n, D]; None if none is asked for."""


class _HeadLoss(torch.autograd.Function):
    """sum_p c_p sum_t nats. The loss is linear in its parts, so forward makes the gradients while the logits are there.

    No logit is computed twice: dh = c dz W and dW = sum c dz^T h, with dz = (softmax(z') - onehot) (1 - (z'/cap)^2) for
    z' = cap tanh(z / cap); backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, cap: float | None, scales: Tensor, differentiate: bool, *rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, targets = rows[: len(scales)], rows[len(scales) :]
        w, dw = weight.to(hidden[0].dtype), torch.zeros_like(weight) if differentiate else None
        dhidden = [torch.empty_like(h) if differentiate else None for h in hidden]
        passes = map(PassRows, hidden, targets, scales, dhidden)
        sums = torch.stack([_summed(w, cap, rows, dw) for rows in passes])
        if differentiate:
            ctx.save_for_backward(dw, *dhidden)
        ctx.mark_non_differentiable(sums)
        return (sums * scales.to(sums.dtype)).sum(), sums  # no matrix product: autocast would round it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        require_first_order()
        dw, *dhidden = ctx.saved_tensors
        return dw * grads[0], None, None, None, *(dh * grads[0] for dh in dhidden), *(None for _ in dhidden)


def _summed(w: Tensor, cap: float | None, rows: PassRows, dw: Tensor | None) -> Tensor:
    """Summed nats of one pass; its gradients fill `dhidden` and are added to `dw`."""
    h, targets, scale, dh = rows
    size, sums = max(1, CHUNK[h.device.type] // len(w)), []
    for i in range(0, len(h), size):
        chunk, target = h[i : i + size], targets[i : i + size, None]
        nats, dz = _chunk(chunk @ w.T, cap, target, differentiate=dh is not None)
        counted = target != IGNORE
        sums.append((nats * counted).sum())
        if dh is not None and dw is not None:
            dz = dz.mul_(scale * counted).to(w.dtype)
            torch.mm(dz, w, out=dh[i : i + size])
            dw.add_(dz.T @ chunk) if dw.dtype != dz.dtype else dw.addmm_(dz.T, chunk)
    return torch.stack(sums).sum()


def _chunk(z: Tensor, cap: float | None, target: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Nats [n, 1] of the logits `z` [n, V] before their soft cap, and their gradient by `z`, made in its place."""
    z = z if z.dtype == torch.float64 else z.float()
    target = target.clamp(0, z.shape[1] - 1)  # a wrong one has a scale of NaN or none; an index beyond would end CUDA
    slope = None
    if cap is not None:
        z.div_(cap).tanh_()
        slope = torch.addcmul(z.new_ones(()), z, z, value=-1) if differentiate else None
        z.mul_(cap)
    total = z.logsumexp(dim=1, keepdim=True)
    nats = total - z.gather(1, target)
    if differentiate:
        z.sub_(total).exp_().scatter_add_(1, target, -torch.ones_like(total))
    return nats, z if slope is None else z.mul_(slope)


def unknown_targets(targets: TokensBN, size: int) -> Tensor:
    """Which targets are neither a token below `size` nor IGNORE; boolean like them."""
    return ((targets < 0) & (targets != IGNORE)) | (targets >= size)


def require_targets(targets: TokensBN, size: int) -> None:
    """ValueError naming a target that is neither a token below `size` nor IGNORE; nothing on a GPU: it would wait."""
    if targets.device.type == "cpu" and (unknown := unknown_targets(targets, size)).any():
        wrong = int(targets[unknown][0])
        raise ValueError(
            f"target {wrong} is no token of the {size} there are; where nothing is to be predicted, put {IGNORE} "
            "(lrt.model.shapes.IGNORE)"
        )


def head_loss(
    weight: Tensor, cap: float | None, hidden: Sequence[StreamBND], targets: Sequence[TokensBN], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum over passes of scale x summed nats, and the summed nats of each pass, detached.

    Args:
        weight: the head's, [V, D]; `cap` is its soft cap.
        hidden: a pass's hidden states each, [B, N, D]; `targets` likewise int64 [B, N], IGNORE where none counts.
        scales: one number a pass, [P]; not differentiated.

    ValueError: another target that is no token. On a GPU the loss is NaN instead, since an error would wait for it.
    """
    for own in targets:
        require_targets(own, len(weight))
    if scales.device.type != "cpu":
        wrong = torch.stack([unknown_targets(own, len(weight)).any() for own in targets])
        scales = scales.masked_fill(wrong, torch.nan)
    rows = (*(h.flatten(0, 1) for h in hidden), *(t.flatten() for t in targets))
    return _HeadLoss.apply(weight, cap, scales, torch.is_grad_enabled(), *rows)  # pyright: ignore[reportReturnType]
