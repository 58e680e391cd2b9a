"""What every part needs: the devices, and how near results must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import config, randomised
from torch import Tensor

from lrt.config.model import ModelConfig
from lrt.model.lrt import LRT

CONFIG = config(projection="shared", width=64, window=9, window_pattern="SL")
DOCUMENTS = replace(CONFIG, document_attention=True)
FLOATS = {"float32": (torch.float32, 2e-4), "bfloat16": (torch.bfloat16, 6e-2)}
"""Number types, and the relative error of a tensor as a whole against float64 that rounding explains.

On a CPU the gradient of any schedule is off by 7e-7 and 2e-2; that of another schedule by 0.4 at least.
"""
floats = pytest.mark.parametrize("kind", FLOATS)
ACCELERATORS = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
GPUS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ACCELERATORS]


def usable(name: str) -> Iterator[torch.device]:
    if name in ACCELERATORS and not ACCELERATORS[name]():
        pytest.skip(f"no {name} device here")
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict and name == "cpu")
    yield torch.device(name)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(params=["cpu", *GPUS])
def device(request) -> Iterator[torch.device]:
    """The CPU, as a rehearsal, and a GPU where there is one."""
    yield from usable(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), *GPUS])
def compiling(request) -> Iterator[torch.device]:
    """`device` of a test that compiles, which takes a CPU minutes."""
    torch._dynamo.reset()
    yield from usable(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def require_near(got: Tensor, expected: Tensor, error: float, what: str = "") -> None:
    """The error of a tensor as a whole, relative to its norm."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape
    relative = float((got - expected).norm() / expected.norm().clamp(min=1e-9))
    assert relative <= error, f"{what} is off by {relative:.2e} of its norm, more than {error:.0e}"


def graded(work, inputs: list[Tensor], device: torch.device, kind: torch.dtype) -> list[Tensor]:
    """The output of `work` on the inputs there, and their gradients for drawn weights of it."""
    leaves = [x.to(device, kind).requires_grad_() for x in inputs]
    out = work(*leaves)
    return [out, *torch.autograd.grad((out * drawn(*out.shape, seed=99).to(out)).sum(), leaves)]


def small(cfg: ModelConfig = CONFIG) -> LRT:
    return randomised(cfg, scale=0.3)
