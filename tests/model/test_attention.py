"""Attention in blocks of queries, and other executions, against one dense mask: values and gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import config, drawn, label, packed, randomised, slices
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lrt.model.transformer
from lrt.config.model import Execution, ModelConfig
from lrt.config.run import TrainConfig, from_dict
from lrt.model.attention import Mask, attend, attention_mask, products, query_blocks
from lrt.model.loss import ScheduledLoss
from lrt.model.lrt import LRT
from lrt.schedule import Schedule


class Attended(NamedTuple):
    out: Tensor
    grads: list[Tensor]


class Case(NamedTuple):
    """Queries at `slices[0]` over the keys of all slices."""

    slices: list
    window: int | None
    document_start: Tensor | None
    heads: tuple[int, int]


def attended(case: Case, mask_of: Callable[..., Mask]) -> Attended:
    """Output and gradients under the mask that `mask_of(queries, keys, window, document_start)` makes."""
    heads, kv_heads = case.heads
    q = drawn(2, heads, len(case.slices[0]), 8)
    positions = torch.cat([torch.tensor(list(r)) for r in case.slices])
    own = positions[: len(case.slices[0])]
    k, v = (drawn(2, kv_heads, len(positions), 8, seed=seed) for seed in (1, 2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, mask_of(own, positions, case.window, case.document_start))
    grads = torch.autograd.grad((out * drawn(*q.shape, seed=99)).sum(), leaves)
    return Attended(out.detach(), list(grads))


@st.composite
def cases(draw, most: int = 19) -> Case:
    """Any slices whose first begins the row or is preceded by others, in any order; windows; documents; heads."""
    length = draw(st.integers(1, most))
    own = draw(slices(length))
    others, stride = [t for t in range(own[-1] + 1) if t not in own], draw(st.integers(1, 3))
    parts = [others[i::stride] for i in range(stride)]
    window = draw(st.none() | st.integers(1, length))
    starts = draw(st.none() | st.tuples(*[st.sets(st.integers(1, length))] * 2))
    begins = starts and torch.tensor([[max([0, *(s for s in row if s <= t)]) for t in own] for row in starts])
    return Case([own, *(p for p in parts if p)], window, begins, draw(st.sampled_from([(1, 1), (4, 2), (3, 1)])))


def require_same(one: Attended, other: Attended) -> None:
    torch.testing.assert_close(one.out, other.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.grads, other.grads, rtol=1e-10, atol=1e-12)


@given(cases(), st.integers(1, 7))
def test_blocks_of_queries_equal_one_mask(case: Case, size: int):
    require_same(attended(case, lambda *how: query_blocks(*how, size)), attended(case, attention_mask))


def test_no_block_computes_scores_that_none_of_its_queries_sees():
    queries, keys = torch.arange(0, 64, 2), torch.cat((torch.arange(0, 64, 2), torch.arange(1, 64, 2)))
    parts = query_blocks(queries, keys, None, None, 8).blocks
    assert [(b.keys.start, b.keys.stop) for b in parts] == [(0, 15), (0, 31), (0, 47), (0, 63)]
    windowed = query_blocks(queries, keys, 5, None, 8).blocks
    assert [(b.keys.start, b.keys.stop) for b in windowed] == [(0, 15), (12, 31), (28, 47), (44, 63)]
    assert all(b.mask.any(0).all() and b.mask.any(1).all() for b in (*parts, *windowed))


MODELS = [config(projection="shared"), config(window=3, kv_heads=1), config(window_pattern="L", kv_heads=4)]


def outcome(model: LRT, text: str, ids: Tensor, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
    model.execution = execution
    model.zero_grad()
    loss = ScheduledLoss(model, Schedule.parse(text))(ids, ids.roll(1, 1)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("cfg", MODELS, ids=label)
@pytest.mark.parametrize("text", ["interleaved-2", "interleaved-5", "chunked-3", "settled-1", "interleaved-2:detach"])
@pytest.mark.parametrize("how", [Execution(), Execution(recompute=True)], ids=str)
def test_every_execution_gives_the_same_loss_and_gradients(how: Execution, text: str, cfg: ModelConfig):
    model, ids = randomised(cfg), packed(cfg, 2, 11)
    slow_loss, slow = outcome(model, text, ids, Execution(attention="masked"))
    loss, grads = outcome(model, text, ids, how)
    assert torch.allclose(loss, slow_loss, rtol=1e-12)
    for name, grad in grads.items():
        assert (grad - slow[name]).abs().max() <= 1e-10 * (1 + slow[name].abs().max()), name


@pytest.mark.parametrize("cfg", MODELS, ids=label)
@pytest.mark.parametrize("text", ["interleaved-2", "chunked-5", "interleaved-3:settle=1"])
def test_long_passes_attend_in_blocks_of_queries(text: str, cfg: ModelConfig, monkeypatch):
    model, ids = randomised(cfg), packed(cfg, 2, 11)
    slow_loss, slow = outcome(model, text, ids, Execution(attention="masked"))
    seen = []
    monkeypatch.setattr(lrt.model.transformer, "BLOCK", 2)
    monkeypatch.setattr(lrt.model.transformer, "query_blocks", lambda *how: seen.append(how) or query_blocks(*how))
    loss, grads = outcome(model, text, ids, Execution())
    assert seen
    assert torch.allclose(loss, slow_loss, rtol=1e-12)
    for name, grad in grads.items():
        assert (grad - slow[name]).abs().max() <= 1e-10 * (1 + slow[name].abs().max()), name
    seen.clear()
    outcome(model, text, ids, Execution(attention="masked"))
    assert not seen


def test_unknown_attention_is_refused_and_older_names_are_read():
    with pytest.raises(ValueError, match="choose one of auto, masked, flex"):
        TrainConfig(attention="flash")  # pyright: ignore[reportArgumentType]
    assert from_dict(TrainConfig, {"attention": "merged"}).attention == "auto"


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
        "causal": None, "mask": attention_mask(queries, keys, 3),
        "a mask per row": attention_mask(queries + torch.tensor([[0], [0], [1]]), keys.expand(3, 7), 4),
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
