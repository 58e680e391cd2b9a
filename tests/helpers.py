"""Small models with randomised weights: zero-initialised projections would make equality tests pass for nothing."""

from __future__ import annotations

import itertools

import torch

from lrt.config import MemoryConfig, ModelConfig
from lrt.model import LRT


def config(**overrides) -> ModelConfig:
    """A 3-layer model that exercises everything: grouped queries, a window, value embeddings, a middle source layer."""
    memory = MemoryConfig(
        **{"projection": "layerwise", "source": 2, "gate_width": 7}
        | {k: overrides.pop(k) for k in ("projection", "source", "gate_width", "residual") if k in overrides}
    )
    full = {
        "depth": 3, "width": 24, "heads": 4, "kv_heads": 2, "context": 64, "vocab_size": 19, "bos": 0,
        "window_pattern": "SL", "window": 4, "value_embeddings": "alternating",
    }  # fmt: skip
    return ModelConfig(**full | {"memory": memory} | overrides)


PLAIN_OPTIONS = {"kv_heads": 4, "window_pattern": "L", "value_embeddings": "none"}
VARIANTS = [
    config(projection=projection, residual=residual, source=source, **options)
    for (projection, residual), source, options in itertools.product(
        [("layerwise", True), ("shared", True), ("shared", False), ("none", True)], [3, 2], [{}, PLAIN_OPTIONS]
    )
    if source == 2 or options
]


def randomised(cfg: ModelConfig, seed: int = 0, scale: float = 0.6) -> LRT:
    """A float64 model with every parameter drawn: none is zero, no gate neutral, no injection absent."""
    model = LRT.build(cfg, seed=seed).double()
    random = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        deviation = scale if p.ndim < 2 else scale if "embedding" in name else scale / p.shape[1] ** 0.5 * 2
        with torch.no_grad():
            p.normal_(0.3 if p.ndim < 2 else 0.0, deviation, generator=random)
    return model


def tokens(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens with some BOS among them, so that documents start inside rows."""
    return torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
