"""Hand-written backward passes and attention at positions against their plain formulae."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrt.model.attention import attend, attention_mask, rope_at
from lrt.model.cross_entropy import head_loss
from lrt.model.ops import EPS, apply_rope, relu_squared, rms_norm, split, weighted_sum

PLAIN = {
    rms_norm: lambda x: F.rms_norm(x, (x.shape[-1],), eps=EPS),
    relu_squared: lambda x: F.relu(x).square(),
}
operations = pytest.mark.parametrize("operation", PLAIN, ids=lambda f: f.__name__)


@operations
@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (2, 3, 8), (7,), (2, 1, 3, 2)])
def test_gradcheck(operation, shape):
    assert torch.autograd.gradcheck(operation, drawn(*shape).requires_grad_())


SECOND = {
    "rms_norm": rms_norm,
    "relu_squared": relu_squared,
    "weighted_sum": lambda x: weighted_sum([drawn(1).squeeze(), x.mean()], [x, x * x]),
    "rotate": lambda x: apply_rope(x * x, drawn(4), drawn(4, seed=1)),
    "split": lambda x: split(x * x, 1, (slice(0, 1), slice(2, 3)))[1] ** 3,
    "head_loss": lambda x: head_loss(drawn(6, 4), 15.0, [x[None]], [torch.tensor([[0, 1, 2]])], torch.ones(1))[0],
}


@pytest.mark.parametrize("operation", SECOND.values(), ids=SECOND)
def test_a_second_derivative_is_refused(operation):
    """What backward keeps knows nothing of the input: it would be wrong, and nobody would see it."""
    x = drawn(3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(operation(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.functional.hessian(lambda x: operation(x).pow(3).sum(), x)


@operations
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_value_and_gradient_are_those_of_torch(operation, scale: float):
    x, slope = (drawn(4, 6, 16) * scale).requires_grad_(), drawn(4, 6, 16, seed=1)
    mine, torchs = operation(x), PLAIN[operation](x)
    torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y, x, slope)[0] for y in (mine, torchs))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_is_kept_both_ways(operation, dtype: torch.dtype):
    x = drawn(4, 64).to(dtype).requires_grad_()
    y = operation(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    torch.testing.assert_close(y.double(), PLAIN[operation](x.double()), rtol=2e-2, atol=2e-2)


@operations
def test_views_and_transposes(operation):
    x = drawn(3, 8, 5).requires_grad_()
    y = operation(x.transpose(1, 2)[:, ::2])
    y.pow(3).sum().backward()
    ours, x.grad = x.grad, None
    PLAIN[operation](x.transpose(1, 2)[:, ::2]).pow(3).sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_a_row_of_zeros_stays_finite():
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = rms_norm(x)
    y.sum().backward()
    assert y.abs().max() == 0
    torch.testing.assert_close(x.grad, torch.full_like(x, EPS**-0.5))


@pytest.mark.parametrize("spread", [(), (2, 3, 1)])
def test_weighted_sum(spread: tuple[int, ...]):
    weights = [drawn(math.prod(spread), seed=i).view(spread).requires_grad_() for i in range(3)]
    terms = [drawn(2, 3, 4, seed=5 + i).requires_grad_() for i in range(3)]
    torch.testing.assert_close(weighted_sum(weights, terms), sum(w * x for w, x in zip(weights, terms, strict=True)))
    assert torch.autograd.gradcheck(lambda *xs: weighted_sum(xs[:3], xs[3:]), (*weights, *terms))
    torch.testing.assert_close(weighted_sum(weights[:1], terms[:1]), weights[0] * terms[0])


def test_turning_back_is_the_gradient_of_turning():
    x = drawn(2, 3, 4, 6).requires_grad_()
    angles = drawn(4, 3, seed=1)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    both, signed = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
    torch.testing.assert_close(apply_rope(x, both, signed), torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1))
    torch.testing.assert_close(apply_rope(apply_rope(x, both, signed), both, -signed), x)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, both, signed), x)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_split_is_slicing_with_one_gradient(axis: int):
    x = drawn(6, 6, 6).requires_grad_()
    cuts = (slice(0, 6, 2), slice(1, 2), slice(3, 6, 2))
    parts = split(x, axis, cuts)
    for part, cut in zip(parts, cuts, strict=True):
        assert torch.equal(part, x[(slice(None),) * axis + (cut,)])
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    used = parts[0].pow(3).sum() + parts[2].pow(2).sum()  # the middle one gets no gradient
    (grad,) = torch.autograd.grad(used, x)
    expected = torch.zeros_like(x)
    for cut, slope in ((cuts[0], 3 * x.square()), (cuts[2], 2 * x)):
        place = (slice(None),) * axis + (cut,)
        expected[place] = slope[place]
    torch.testing.assert_close(grad, expected)
    assert torch.autograd.gradcheck(lambda x: split(x, axis, cuts), x)


# Attention at positions.

places = st.lists(st.integers(0, 40), min_size=1, max_size=7, unique=True)


@given(places, places, st.none() | st.integers(1, 20))
def test_the_mask_is_causal_and_windowed(queries: list[int], keys: list[int], window: int | None):
    seen = attention_mask(torch.tensor(queries), torch.tensor(keys), window)
    expected = [[k <= q and (window is None or q - k < window) for k in keys] for q in queries]
    assert seen.tolist() == expected
    rows = attention_mask(
        torch.tensor([queries, queries]) + torch.tensor([[0], [1]]), torch.tensor([keys, keys]), window
    )
    assert rows.shape == (2, 1, len(queries), len(keys))
    assert rows[0, 0].tolist() == expected


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_alone():
    q, k = drawn(1, 1, 1, 6), drawn(1, 1, 1, 6, seed=1)

    def turned(x: Tensor, position: int) -> Tensor:
        return apply_rope(x, *rope_at(torch.tensor([position]), 6, 100.0, torch.float64))

    torch.testing.assert_close(turned(q, 0), q)
    torch.testing.assert_close(turned(q, 17).norm(), q.norm())
    products = [(turned(q, t + 5) * turned(k, t)).sum() for t in (0, 3, 200)]
    torch.testing.assert_close(products[1:], products[:1] * 2)
    assert abs((turned(q, 6) * turned(k, 0)).sum() - products[0]) > 1e-3


def test_rotary_per_row_and_rounding():
    positions = torch.tensor([[0, 5], [2, 9]])
    cos, sin = rope_at(positions, 4, 100.0, torch.float64)
    assert cos.shape == sin.shape == (2, 1, 2, 4)
    assert math.isclose(sin[1, 0, 1, 1], math.sin(9 * 100.0**-0.5))
    assert math.isclose(sin[1, 0, 1, 3], -math.sin(9 * 100.0**-0.5))
    assert math.isclose(cos[1, 0, 1, 0], math.cos(9)) and cos[1, 0, 1, 2] == cos[1, 0, 1, 0]
    shared, _ = rope_at(positions[1], 4, 100.0, torch.float64)
    assert torch.equal(shared, cos[1, 0])
    far = torch.tensor([4095])  # angles are not rounded to bfloat16, only their cosines
    coarse, fine = (rope_at(far, 4, 1e4, dtype)[0] for dtype in (torch.bfloat16, torch.float64))
    torch.testing.assert_close(coarse.double(), fine, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_is_softmax_attention_head_by_head(kv_heads: int, causal: bool):
    q, k, v = drawn(2, 4, 5, 6), drawn(2, kv_heads, 5, 6, seed=1), drawn(2, kv_heads, 5, 6, seed=2)
    at = torch.arange(5)
    seen = attention_mask(at, at, None if causal else 3)
    got = attend(q, k, v, None if causal else seen)
    for head in range(4):
        mine = head // (4 // kv_heads)
        scores = (q[:, head] @ k[:, mine].mT / math.sqrt(6)).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(got[:, head], scores.softmax(-1) @ v[:, mine])
