"""Attention over segments: every backend against the dense mask, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import config, label, packed, randomised
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrt.config.model import Execution, ModelConfig
from lrt.config.run import TrainConfig
from lrt.model.attention import MERGE_FROM, attend, look, products, visible
from lrt.model.loss import ScheduledLoss
from lrt.model.merged import cuts
from lrt.model.state import Buffer, PassOutput
from lrt.model.transformer import LRT
from lrt.schedule import Schedule

DEVICE = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(slices: list[range], window: int | None, heads: int, kv_heads: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Merged and masked attention of queries at `slices[0]` over all slices: output, and every gradient."""
    q = drawn(2, heads, len(slices[0]), 8)
    segments = [drawn(2, kv_heads, len(r), 8, seed=i + 1) for i, r in enumerate(slices + slices)]
    positions = torch.cat([torch.arange(r.start, r.stop, r.step) for r in slices])
    plan = cuts(slices, window, q)
    assert plan is not None
    weight, found = drawn(*q.shape, seed=99), []
    for merged in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, *segments)]
        keys, values = leaves[1 : len(slices) + 1], leaves[len(slices) + 1 :]
        if merged:
            out = attend(leaves[0], keys, values, plan)
        else:
            mask = visible(positions[: len(slices[0])], positions, window)
            out = attend(leaves[0], torch.cat(keys, 2), torch.cat(values, 2), mask)
        found.append((out.detach(), list(torch.autograd.grad((out * weight).sum(), leaves))))
    return found


@given(st.data())
def test_merged_equals_masked_for_equal_strides(data):
    stride, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 19))
    first = data.draw(st.integers(0, min(stride, length) - 1))
    others = [j for j in range(min(stride, length)) if j != first]
    window = data.draw(st.none() | st.integers(1, length))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    slices = [range(j, length, stride) for j in (first, *others)]
    slices = [r for r in slices if r.start <= slices[0][-1]]
    (out, grads), (slow, slow_grads) = both(slices, window, heads, kv_heads)
    assert torch.allclose(out, slow, rtol=1e-12, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(grads, slow_grads, strict=True))


@pytest.mark.parametrize("slices", [[range(6, 9), range(6)], [range(6, 7), range(3, 6), range(3)]], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_merged_equals_masked_for_chunks(slices, window):
    (out, grads), (slow, slow_grads) = both(slices, window, 2, 2)
    assert torch.allclose(out, slow, rtol=1e-12, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(grads, slow_grads, strict=True))


def test_merged_in_bfloat16_is_as_near_to_float64_as_masked():
    slices = [range(i, 64, 4) for i in (1, 0, 2, 3)]
    q, *kv = (drawn(1, 2, 16, 8, seed=i) for i in range(9))
    positions = torch.cat([torch.arange(r.start, r.stop, r.step) for r in slices])
    mask, plan = visible(positions[:16], positions, None), cuts(slices, None, q)
    exact = attend(q, torch.cat(kv[:4], 2), torch.cat(kv[4:], 2), mask)
    low = [x.bfloat16() for x in (q, *kv)]
    masked = attend(low[0], torch.cat(low[1:5], 2), torch.cat(low[5:], 2), mask)
    merged = attend(low[0], low[1:5], low[5:], plan)
    assert merged.dtype == torch.bfloat16
    assert (merged - exact).abs().max() < 2 * (masked - exact).abs().max()


MODELS = [config(projection="shared"), config(window=3, kv_heads=1), config(window_pattern="L", kv_heads=4)]


def outcome(model: LRT, text: str, ids: Tensor, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
    model.execution = execution
    model.zero_grad()
    loss = ScheduledLoss(model, Schedule.parse(text))(ids, ids.roll(1, 1)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("cfg", MODELS, ids=label)
@pytest.mark.parametrize("text", ["interleaved-2", "interleaved-5", "chunked-3", "settled-1", "interleaved-2:detach"])
@pytest.mark.parametrize("how", [Execution(attention="merged"), Execution(attention="masked", recompute=True)], ids=str)
def test_every_execution_gives_the_same_loss_and_gradients(how: Execution, text: str, cfg: ModelConfig):
    model, ids = randomised(cfg), packed(cfg, 2, 11)
    slow_loss, slow = outcome(model, text, ids, Execution(attention="masked"))
    loss, grads = outcome(model, text, ids, how)
    assert torch.allclose(loss, slow_loss, rtol=1e-12)
    for name, grad in grads.items():
        assert (grad - slow[name]).abs().max() <= 1e-10 * (1 + slow[name].abs().max()), name


def sight(at: range, other: range, backend: str):
    """What `look` chooses for a pass over `at` after one over `other`."""
    state = drawn(1, len(other), 4)
    heads = (drawn(1, 1, len(other), 4),)
    buffer = Buffer().write(other, PassOutput(state, state, heads, heads))
    past = buffer.past(at, 1, DEVICE)
    return look(past, past.layers[0], None, backend, state)


def test_what_merging_cannot_serve_raises_and_auto_masks():
    at, other = range(0, 12, 3), range(1, 12, 2)
    with pytest.raises(ValueError, match="train.attention"):
        sight(at, other, "merged")
    assert isinstance(sight(at, other, "auto"), Tensor)


def test_auto_merges_long_passes_only():
    short, long = range(0, 64, 2), range(0, 2 * MERGE_FROM, 2)
    assert isinstance(sight(short, range(64), "auto"), Tensor)
    assert isinstance(sight(long, range(2 * MERGE_FROM), "auto"), tuple)
    assert isinstance(sight(short, range(64), "merged"), tuple)
    assert isinstance(sight(long, range(2 * MERGE_FROM), "masked"), Tensor)
    assert sight(range(8), range(8), "merged") is None


def test_merged_attention_is_not_compiled():
    with pytest.raises(ValueError, match="merged is not compiled"):
        TrainConfig(attention="merged", compile=True)
    with pytest.raises(ValueError, match="choose one of auto, masked, merged"):
        TrainConfig(attention="flash")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "mask", "a mask per row"])
def test_plain_products_are_attention(kv_heads: int, kind: str):
    """Value and gradients, in float64; queries may be fewer than keys."""
    random = torch.Generator().manual_seed(0)
    n, m = (6, 6) if kind == "causal" else (4, 7)
    q, k, v = (
        torch.randn(3, h, length, 8, dtype=torch.float64, generator=random).requires_grad_()
        for h, length in ((4, n), (kv_heads, m), (kv_heads, m))
    )
    queries, keys = torch.tensor([1, 3, 5, 6]), torch.arange(7)
    seen = {
        "causal": None, "mask": visible(queries, keys, 3),
        "a mask per row": visible(queries + torch.tensor([[0], [0], [1]]), keys.expand(3, 7), 4),
    }[kind]  # fmt: skip
    fast, slow = products(q, k, v, seen), attend(q, k, v, seen)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    weight = torch.randn(fast.shape, dtype=torch.float64, generator=random)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [2, 40, 600])
def test_bfloat16_on_a_cpu_is_as_close_to_float64_as_its_rounding(length: int):
    """By products where rows are short, by the kernel where they are long."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, length, 16, generator=random).bfloat16().requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    outs = attend(q, k, v, None), attend(*exact, None)
    grads = [torch.autograd.grad(out.square().sum(), x) for out, x in zip(outs, ((q, k, v), exact), strict=True)]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()
