"""What a parameter is for, by its name: the one place that reads names; and how every parameter starts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from lrt.config.model import ModelConfig
from lrt.utils.dtensor import fill, is_sharded
from lrt.utils.require import require_seed

Role = Literal[
    "embedding", "value embedding", "head", "matrix", "bias", "norm", "scalar", "gate", "memory matrix", "gamma"
]
"""What a parameter is for.

`memory matrix` is a W_K or W_V of the memory, `gamma` its weight in the stream, `gate` a W_gate, `scalar` an alpha or
beta, `norm` a learned weight of a norm, `matrix` what is left: query, key, value, output and those of the MLP.
"""
MEMORY: tuple[Role, ...] = ("memory matrix", "gamma")
"""Parameters that take part only where memory is read."""
_ROLES: dict[str, Role] = {
    "alpha": "scalar", "beta": "scalar", "gamma": "gamma", "shift_gamma": "gamma", "gate": "gate",
    "value_embedding": "value embedding", "projection": "memory matrix", "shift_projection": "memory matrix",
    "norm": "norm", "attention_norm": "norm", "mlp_norm": "norm", "query_norm": "norm", "key_norm": "norm",
}  # fmt: skip


def role(name: str) -> Role:
    """The role of the parameter `name`, as in `named_parameters()` of an LRT."""
    parts = name.split(".")
    if parts[0] == "embedding":
        return "embedding"
    if parts[0] == "head":
        return "head"
    roles: list[Role] = [_ROLES[part] for part in parts if part in _ROLES]
    if roles:
        return roles[-1]
    return "bias" if parts[-1] == "bias" else "matrix"


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter of an LRT, from a generator of its own.

    | parameter | start |
    | --- | --- |
    | embedding | normal, deviation 1 |
    | head | normal, deviation 0.001 (0.02 where it is the embedding) |
    | output, mlp.down, gate, biases | 0: blocks start as the identity, gates at 2 sigmoid(0) = 1 |
    | weights of norms | 1 |
    | W_K, W_V of the memory | as other matrices, or 0 if `memory.start` is `zero` |
    | other matrices, value embeddings | uniform, deviation 1/sqrt(D) |
    | alpha, beta, gamma | 1, 0.1, 0.1 |
    """
    device = next(model.parameters()).device
    require_seed("seed", seed)
    random = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        sharded = is_sharded(p)  # then it takes its rows of what one process alone would draw
        x = torch.empty(p.shape, device=p.device, dtype=p.dtype) if sharded else p
        _start(name, x, config, random)
        if sharded:
            fill(p, x)


def _start(name: str, x: torch.Tensor, config: ModelConfig, random: torch.Generator) -> None:
    kind, last = role(name), name.removesuffix(".weight").rpartition(".")[2]
    zero = kind in ("gate", "bias") or last in ("output", "down")
    if kind in ("scalar", "gamma"):
        x.fill_(1.0 if last == "alpha" else 0.1)
    elif kind in ("embedding", "head"):
        wide = kind == "embedding" and not config.backbone.tied
        x.normal_(0, 1.0 if wide else 0.02 if kind == "embedding" else 0.001, generator=random)
    elif zero or (kind == "memory matrix" and config.memory.start == "zero"):
        x.zero_()
    elif kind == "norm":
        x.fill_(1.0)
    else:
        bound = math.sqrt(3 / config.d)
        x.uniform_(-bound, bound, generator=random)
