"""One decoding step as a program of tensors, for runtimes without Python: state in, logits and state out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lrt.inference.prefill import next_logits
from lrt.model.kv_cache import KVCache, PerRow
from lrt.model.lrt import LRT
from lrt.utils.require import require

StepState = list[Tensor]
"""Keys of every layer, then their values, [B, K, R, E] each; then memory [B, D], length, last token and document start
[B], as `KVCache` has them."""


def as_tensors(cache: KVCache) -> StepState:
    """A decoder's state, such as `prefill` leaves it or `KVCache.empty` makes it, as a step's."""
    return [*cache.keys, *cache.values, *cache.per_row()]


class DecodingStep(nn.Module):
    """`decode_step` as a function: what it is given stays as it is.

    A program cannot refuse: its caller stops at the state's capacity. Beyond it the logits mean nothing.
    """

    def __init__(self, model: LRT):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: StepState) -> tuple[Tensor, StepState]:
        """The rows' newest tokens, int64 [B], and their state; next-token logits [B, V] and the state after."""
        layers = self.model.config.layers
        keys, values = (tuple(x.clone() for x in xs) for xs in (state[:layers], state[layers : 2 * layers]))
        rows = PerRow(*state[2 * layers :])
        logits, after = next_logits(
            self.model, tokens, KVCache(keys, values, *rows, capacity=self.model.config.context)
        )
        return logits, [*keys, *values, *after]


@torch.no_grad()
def exported_step(model: LRT, rows: int = 1, capacity: int | None = None) -> ExportedProgram:
    """A step of `rows` rows that hold `capacity` tokens each, by default the model's context.

    Its `module()` is called as `DecodingStep` is; `torch.export.save` writes it, `torch.onnx.export` takes it.
    """
    capacity = model.config.context if capacity is None else capacity
    require(rows >= 1 and capacity >= 1, f"rows {rows}, capacity {capacity}: both must be at least 1")
    state = as_tensors(KVCache.empty(model, rows, capacity))
    tokens = torch.zeros(rows, dtype=torch.int64, device=model.device)
    return torch.export.export(DecodingStep(model).eval(), (tokens, state))
