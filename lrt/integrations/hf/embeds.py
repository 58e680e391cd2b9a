"""Vectors in place of tokens: `inputs_embeds`, for prompt tuning and whatever else writes its own input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrt.model.lrt import LRT
from lrt.model.shapes import StreamBND, TokensBN
from lrt.utils.hooks import in_this_thread, while_hooked
from lrt.utils.require import require

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def as_tokens(core: LRT, vectors: StreamBND) -> Iterator[TokensBN]:
    """Tokens [B, N] that `core` reads, while this lasts, as `vectors` [B, N, D], rows as its embedding gives them.

    A vector that is a row of the embedding is that token: BOS resets the memory, value embeddings are its own. Any
    other gets an id beyond the vocabulary, and has no value embedding.
    ValueError: the weights are elsewhere, or blocks that look tokens up would run again later.
    """
    weight, valued = core.embedding.weight, value_embeddings(core)
    require(weight.device.type != "meta", "inputs_embeds need the embedding's weights in place; do not offload them")
    again = "with value embeddings inputs_embeds cannot be recomputed: disable activation checkpointing"
    require(not (valued and _recomputed(core) and torch.is_grad_enabled()), again)
    size, table = len(weight), vectors.flatten(0, 1)
    ids = known_tokens(weight.detach(), table.detach().to(weight.dtype))
    tokens = torch.where(ids < 0, size + torch.arange(len(ids), device=ids.device), ids)
    swaps = [_Swap(core.embedding, table, size), *(_Swap(module, None, size) for module in valued)]
    with while_hooked(handle for swap in swaps for handle in swap.handles):
        yield tokens.view(vectors.shape[:2])


def _recomputed(core: LRT) -> bool:
    """Whether blocks run again for the backward pass, by the core's way or the library's."""
    again = (block.training and getattr(block, "gradient_checkpointing", False) for block in core.blocks)
    return core.execution.recompute or any(again)


def value_embeddings(core: LRT) -> list[nn.Embedding]:
    """Those that its blocks have."""
    tables = (module for module in core.blocks.modules() if isinstance(module, nn.Embedding))
    return list(tables)


def known_tokens(weight: Tensor, vectors: Tensor) -> Tensor:
    """Which row of `weight` [V, D] each of `vectors` [n, D] is, bit for bit; -1 where it is none; int64 [n]."""
    odd = 2 * torch.arange(1, weight.shape[1] + 1, device=weight.device) * 0x1E3779B97F4A7C15 + 1  # wraps around

    def keys(x: Tensor) -> Tensor:
        return (x.contiguous().view(BITS[x.element_size()]).long() * odd).sum(1)

    sorted_, order = keys(weight).sort()
    nearest = order[torch.searchsorted(sorted_, keys(vectors)).clamp(max=len(weight) - 1)]
    return torch.where((weight[nearest] == vectors).all(1), nearest, -1)


class _Swap:
    """Makes an embedding answer ids from `size` on by rows of `table`, or by zeros where there is none."""

    def __init__(self, module: nn.Embedding, table: Tensor | None, size: int):
        self.table, self.size = table, size
        self._ids: list[Tensor] = []
        before, after = in_this_thread(self._before), in_this_thread(self._after)
        self.handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after))

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        self._ids.append(inputs[0])
        return (inputs[0].clamp(max=self.size - 1),)

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = self._ids.pop()
        beyond = (ids >= self.size)[..., None]
        if self.table is None:
            return output.masked_fill(beyond, 0)
        return torch.where(beyond, self.table[(ids - self.size).clamp(min=0)].to(output.dtype), output)
