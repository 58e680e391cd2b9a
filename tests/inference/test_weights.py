"""Weights in 8 bits: the kernel is its formula, the error that of rounding, and nothing small or tied is touched."""

from __future__ import annotations

import pytest
import torch
from helpers import close, config, randomised, tokens
from torch import nn

from lrt.config.decoding import DEFAULT_TOLERANCE
from lrt.inference import weights
from lrt.inference.prefill import decode_step, prefill
from lrt.inference.weights import Int8Linear, by_columns, int8_product, with_weights
from lrt.model.lrt import LRT
from lrt.model.recurrence import ROUNDING, prefill_options


def linear(outputs: int, inputs: int, seed: int = 0) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)))
        made.weight[0] = 0.0
        made.weight[1] *= 1000.0
    return made


@pytest.mark.parametrize("shape", [(96, 64), (64, 32), (37, 64)])
@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.no_grad()
def test_the_kernel_is_its_formula(shape: tuple[int, int], rows: int):
    full = linear(*shape)
    small, x = Int8Linear(full), torch.randn(2, rows, shape[1], generator=torch.Generator().manual_seed(1))
    whole, scale = small.get_buffer("integers"), small.get_buffer("scale")
    expected = int8_product(x.flatten(0, 1).bfloat16(), whole, scale).float().view(2, rows, -1)
    torch.testing.assert_close(small(x), expected, atol=1e-2, rtol=2e-2)
    assert small(x.double()).dtype == torch.float64
    assert (small(x)[..., 0] == 0).all()


@torch.no_grad()
def test_a_weight_is_off_by_half_a_scale_at_most():
    full = linear(96, 64)
    small = Int8Linear(full)
    whole, scale = small.get_buffer("integers").float(), small.get_buffer("scale").float()[:, None]
    assert whole.abs().max() == 127
    off = (whole * scale - full.weight).abs()
    assert (off <= 0.5 * scale + 0.5 * (full.weight.abs() > 127 * scale) * scale).all()


@torch.no_grad()
def test_a_model_decodes_nearly_the_same(monkeypatch):
    monkeypatch.setattr(weights, "LEAST", 32 * 32)
    cfg = config(vocab_size=96, width=32, window_pattern="L", gate_width=None)
    full, small = LRT(cfg, seed=1), LRT(cfg, seed=1)
    for model in (full, small):
        random = torch.Generator().manual_seed(2)
        for p in model.parameters():
            p.normal_(0.0, 0.2, generator=random)
    assert with_weights(full, "full") is full
    assert not any(isinstance(m, Int8Linear) for m in full.modules())
    with_weights(small, "int8")
    assert prefill_options(full, "jacobi").tolerance == DEFAULT_TOLERANCE
    assert prefill_options(small, "jacobi").tolerance == ROUNDING[torch.bfloat16]
    assert isinstance(small.head, Int8Linear)
    assert isinstance(small.blocks[0].mlp.up, Int8Linear)  # pyright: ignore
    assert not isinstance(small.blocks[0].attention.gate, Int8Linear)  # pyright: ignore
    odd = with_weights(LRT(config(vocab_size=96, width=40)), "int8")
    assert not any(isinstance(m, Int8Linear) and m.get_buffer("integers").shape[1] % 32 for m in odd.modules())
    rows = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    probabilities = []
    for model in (full, small):
        start = prefill(model, rows[:, :11])
        probabilities.append(decode_step(model, rows[:, 11], start.cache)[0].softmax(-1))
    assert 0 < (probabilities[0] - probabilities[1]).abs().sum(-1).max() < 0.2


@torch.no_grad()
def test_matrices_by_columns_are_the_same_matrices():
    cfg = config()
    rows, columns = randomised(cfg), by_columns(randomised(cfg))
    for (name, a), b in zip(rows.named_parameters(), columns.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()
        assert b.T.is_contiguous() if a.ndim == 2 and "embedding" not in name else b.is_contiguous()
    ids = tokens(cfg, 2, 12)
    results = []
    for model in (rows, columns):
        start = prefill(model, ids[:, :11])
        results.append(decode_step(model, ids[:, 11], start.cache)[0])
    close(*results)


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="weights is 'int4'; choose one of full, int8"):
        with_weights(LRT(config()), "int4")  # pyright: ignore[reportArgumentType]
