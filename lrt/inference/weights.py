"""Weights in 8 bits, for decoding: a step of one row reads every matrix once, and reading is what it spends.

Each row of a matrix has a scale of its own, and its numbers are whole multiples of that, -127 to 127. Activations stay
bfloat16. What it costs in quality and gives in speed: docs/decoding.md#weights-in-8-bits.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from lrt.config.decoding import Weights
from lrt.model.lrt import LRT
from lrt.utils.compiling import int8_matmul
from lrt.utils.require import require_choice

LEAST = 2**17
"""Numbers of the smallest matrix that is worth it."""
ALIGNED = 32
"""Inputs come in multiples of it: torch's kernel ends the process on others."""


@final
class Int8Linear(nn.Module):
    """y = (x Q) s with integers Q, int8 [O, I], and a scale per output, s [O]; no gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp(min=1e-30) / 127).bfloat16()
        integers = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("integers", integers.to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        integers, scale = self.get_buffer("integers"), self.get_buffer("scale")
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        product = int8_matmul if rows.device.type == "cpu" else int8_product
        return product(rows, integers, scale).to(x.dtype).view(*x.shape[:-1], len(scale))


def int8_product(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """The formula of torch's kernel: x [N, I], integers [O, I], scales [O]; [N, O] in the type of x."""
    return ((x.float() @ integers.float().T) * scale.float()).to(x.dtype)


def by_columns(model: LRT) -> LRT:
    """The model itself, its matrices stored column by column on a CPU, their values and shapes as they were.

    A product with one row then takes half to nine tenths of the time; with four and more the layout does not matter
    (docs/results/decoding.md#matrices-by-columns). For a model that decodes: files take contiguous tensors alone.
    """
    for linear in model.modules():
        if type(linear) is nn.Linear and linear.weight.device.type == "cpu":
            linear.weight.data = linear.weight.data.T.contiguous().T
    return model


def with_weights(model: LRT, weights: Weights) -> LRT:
    """The model itself, its large matrices (head and blocks, not embeddings) in 8 bits where that is asked for.

    ValueError: another kind of weights.
    """
    require_choice("weights", weights, Weights)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m.bias is None}
    for name, linear in linears.items() if weights == "int8" else ():
        if linear.weight.numel() >= LEAST and linear.in_features % ALIGNED == 0:
            model.set_submodule(name, Int8Linear(linear))
    return model
