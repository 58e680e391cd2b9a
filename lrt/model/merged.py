"""Attention over segments without a dense mask: one flash call per segment, merged by log-sum-exp.

For slices of one stride, queries i, i+S, .. see of the keys j, j+S, .. a causal triangle (j <= i) or a strictly causal
one (j > i): calls that every flash kernel serves (docs/method.md#attention-at-positions). The backward of each call is
exact when it is handed the merged output and log-sum-exp, as in ring attention (Liu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Cut(NamedTuple):
    """What queries see of one segment: those from `lead` on, of its first `reach` keys."""

    lead: int
    reach: int
    causal: bool
    """Whether query lead + n sees keys 0..n of them; else, all that `mask` leaves."""
    mask: Tensor | None
    """Added to the scores, [queries - lead, reach]: 0 or -inf. None leaves all."""


def cuts(slices: Sequence[range], window: int | None, like: Tensor) -> tuple[Cut, ...] | None:
    """How the queries of `slices[0]` see the keys of each slice, or None where no flash call would serve.

    `like` gives type and device of the masks, which only sliding windows need.
    """
    at, found = slices[0], []
    for keys in slices:
        steps = {r.step for r in (at, keys) if len(r) > 1} or {1}
        ahead = (at.start - keys.start) // min(steps)  # query n sees the keys up to n + ahead
        full, lead = ahead >= len(keys) - 1, max(0, -ahead)
        reach = len(keys) if full else len(at) - lead
        if len(steps) > 1 or not (full or ahead <= 0) or reach > len(keys):
            return None
        mask = None if window is None else _band(at[lead:], keys[:reach], window, like)
        found.append(Cut(lead, reach, not full and mask is None, mask))
    return tuple(found)


def _band(queries: range, keys: range, window: int, like: Tensor) -> Tensor:
    places = (torch.arange(r.start, r.stop, r.step, device=like.device) for r in (queries, keys))
    distance = next(places)[:, None] - next(places)
    return like.new_zeros(distance.shape).masked_fill_((distance < 0) | (distance >= window), -torch.inf)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, plan: tuple[Cut, ...], *segments: Tensor) -> Tensor:
        calls = [_Call(q, cut, k, v) for cut, k, v in _zip(plan, segments)]
        out, lse = calls[0].out.to(torch.promote_types(q.dtype, torch.float32)), calls[0].lse
        for call in calls[1:]:
            o, total = out[:, :, call.cut.lead :], lse[:, :, call.cut.lead :]
            o.lerp_(call.out.to(out.dtype), torch.sigmoid(call.lse - total)[..., None].to(out.dtype))
            total.copy_(torch.logaddexp(total, call.lse))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, *segments)
        ctx.plan, ctx.extras = plan, [call.extra for call in calls]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *segments = ctx.saved_tensors
        dq, found = torch.zeros_like(q), []
        for (cut, k, v), extra in zip(_zip(ctx.plan, segments), ctx.extras, strict=True):
            upper = [x[:, :, cut.lead :] for x in (grads[0], q, out, lse)]
            a, b, c = _backward(upper, k[:, :, : cut.reach], v[:, :, : cut.reach], cut, extra)
            dq[:, :, cut.lead :] += a
            rest = (0, 0, 0, k.shape[2] - cut.reach)
            found += [torch.nn.functional.pad(x, rest) if rest[3] else x for x in (b, c)]
        return dq, None, *found


def _zip(plan: Sequence[Cut], segments: Sequence[Tensor]) -> list[tuple[Cut, Tensor, Tensor]]:
    return list(zip(plan, segments[0::2], segments[1::2], strict=True))


class _Call:
    """One flash call: its output, its log-sum-exp [B, H, n], and what the kernel's backward wants besides."""

    def __init__(self, q: Tensor, cut: Cut, k: Tensor, v: Tensor):
        self.cut = cut
        q, k, v = q[:, :, cut.lead :], k[:, :, : cut.reach], v[:, :, : cut.reach]
        if q.is_cuda:  # untested
            self.out, self.lse, *self.extra = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, cut.causal)
        else:
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            self.out, self.lse, *self.extra = kernel(q, k, v, 0.0, cut.causal, attn_mask=cut.mask)
        if cut.mask is not None:  # the kernel says 0 of a query that sees nothing of this segment
            self.lse = self.lse.masked_fill(cut.mask.amax(dim=1) == -torch.inf, -torch.inf)


def _backward(
    upper: Sequence[Tensor], k: Tensor, v: Tensor, cut: Cut, extra: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, out, lse = upper
    if q.is_cuda:  # untested
        given = (dout, q, k, v, out.contiguous(), lse.contiguous(), *extra[:4], 0.0, cut.causal, *extra[4:6])
        return aten._scaled_dot_product_flash_attention_backward(*given)
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(dout, q, k, v, out, lse, 0.0, cut.causal, attn_mask=cut.mask)


def merged(q_BHNE: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], plan: tuple[Cut, ...]) -> Tensor:
    """Softmax attention of queries over segments of keys, the pass's own first; [B, H, N, E].

    ValueError: on cuda, where its flash kernels take neither float32 nor sliding windows.
    """
    if q_BHNE.is_cuda and (q_BHNE.dtype == torch.float32 or any(cut.mask is not None for cut in plan)):
        raise ValueError("merged attention on cuda takes bfloat16 and no sliding window; set train.attention masked")
    groups = q_BHNE.shape[1] // keys[0].shape[1]
    pairs = (
        x if groups == 1 else x.repeat_interleave(groups, dim=1) for kv in zip(keys, values, strict=True) for x in kv
    )
    return _Merged.apply(q_BHNE, plan, *pairs)  # pyright: ignore[reportReturnType]
