"""What a compiler is told, and the calls into torch that are private to it, in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """The function, which a compiler does not trace: it runs between two graphs."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType] - its types are looser


def being_exported() -> bool:
    """Whether a program is being made of what runs, by torch.export or by torch.jit.trace."""
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return torch.compiler.is_exporting() or traced


def mark_dynamic(x: Tensor, axis: int) -> None:
    """Have a compiled graph keep the size of `axis` symbolic, where it can."""
    torch._dynamo.maybe_mark_dynamic(x, axis)


def mark_in_place(x: Tensor) -> None:
    """Say that a tensor stays at its address, so that a CUDA graph may write to it."""
    torch._dynamo.mark_static_address(x)


def int8_matmul(x: Tensor, whole: Tensor, scale: Tensor) -> Tensor:
    """(x wholeᵀ) · scale on a CPU, bfloat16 [N, O]: x bfloat16 [N, I], whole int8 [O, I], scales bfloat16 [O]."""
    return torch.ops.aten._weight_int8pack_mm(x, whole, scale)
