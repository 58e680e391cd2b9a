"""What a model costs: parameters by group, FLOPs of every pass, cache bytes. Exact sums, no estimates."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch

from lrt.config.model import ModelConfig
from lrt.model.parameters import Role, role
from lrt.model.transformer import Transformer
from lrt.passes import NO_GRAD_COST, Passes, memory_only, repeated
from lrt.schedule import Curriculum, Schedule

BACKWARD = 1 / NO_GRAD_COST
"""Forward and backward together, in forwards."""
GROUPS: dict[Role, str] = {
    "embedding": "embedding", "value embedding": "value embeddings", "head": "head", "matrix": "matrices",
    "scalar": "scalars", "norm": "scalars", "bias": "scalars",
    "memory matrix": "memory", "gamma": "memory", "gate": "memory",
}  # fmt: skip
"""The group that a role is counted in."""


def parameters_by_group(config: ModelConfig) -> dict[str, int]:
    """Parameter counts of a model that is never allocated. `memory` holds W_K, W_V, all gate rows and gamma."""
    return dict(_counted(config))


@cache
def _counted(config: ModelConfig) -> tuple[tuple[str, int], ...]:
    with torch.device("meta"):
        model = Transformer(config)
    groups: dict[str, int] = dict.fromkeys(GROUPS.values(), 0)
    for name, p in model.named_parameters():
        groups[GROUPS[role(name)]] += p.numel()
    return tuple(groups.items())


def scaling_parameters(config: ModelConfig) -> int:
    """Matrices and head, without embeddings and memory: what R, tokens per scaling parameter, divides by.

    A tied embedding counts, as the head that it is.
    """
    groups = parameters_by_group(config)
    return groups["matrices"] + groups["embedding" if config.backbone.tied else "head"]


def memory_overhead(config: ModelConfig) -> float:
    """The memory's parameters over those of the same model without it."""
    groups = parameters_by_group(config)
    return groups["memory"] / (sum(groups.values()) - groups["memory"])


def _seen(positions: range, window: int | None) -> int:
    """Key positions that the queries at `positions` see, summed: t + 1 each, or the window."""
    if window is None:
        return (positions[0] + positions[-1] + 2) * len(positions) // 2
    return sum(min(t + 1, window) for t in positions)


def forward_flops(
    config: ModelConfig, positions: range, *, memory: bool, blocks: range | None = None, head: bool = True
) -> int:
    """FLOPs of one forward over `positions` of one row: 2 per weight and token, 4 E per query head and visible key.

    Elementwise work (norms, rotary, softmax) is left out, as is customary. `memory`: whether recurrent memory is read;
    `blocks`: those that run, by default all; `head`: whether it makes logits.
    """
    d, kv, n = config.d, config.k * config.e, len(positions)
    blocks = config.blocks_run() if blocks is None else blocks
    inner, hidden = config.h * config.e, config.mlp_width * (3 if config.backbone.mlp == "swiglu" else 2)
    weights = len(blocks) * d * (2 * inner + 2 * kv + hidden)
    if config.memory.gated:
        reading = [i % config.depth for i in blocks if config.reads_memory(i % config.depth)]
        rows = sum(3 if config.has_value_embedding(i) else 2 for i in reading)
        weights += rows * config.k * config.gate_width
        read = (memory and config.memory.recurrent) + config.memory.shifted
        pairs = {"gates": 0, "shared": 1, "layerwise": len(reading)}[config.memory.projection]
        weights += 2 * d * kv * pairs * read
    weights += d * config.vocab_size if head else 0
    windows = config.windows()
    keys = sum(_seen(positions, windows[i]) for i in blocks)
    return 2 * weights * n + 4 * inner * keys


def passes_flops(config: ModelConfig, passes: Passes) -> int:
    """FLOPs of a list of passes over one row, every pass counted, backward as twice the forward."""
    total = 0
    for i, (p, early, again) in enumerate(zip(passes, memory_only(passes), repeated(passes), strict=True)):
        reads = config.memory.recurrent and i > 0
        blocks = config.blocks_run(top=not early, again=again)
        once = forward_flops(config, p.positions, memory=reads, blocks=blocks, head=p.weight > 0)
        total += once * round(BACKWARD) if p.grad else once
    return total


def train_flops_per_token(config: ModelConfig, schedule: Schedule | Curriculum, length: int) -> float:
    """Training FLOPs per token over rows of `length` positions: the mean over the schedule's draws."""
    return sum(share * passes_flops(config, s.passes(length)) for s, share in schedule.shares()) / length


def decode_flops_per_token(config: ModelConfig, position: int) -> int:
    """FLOPs of decoding the token at `position` (0-based) with memory."""
    return forward_flops(config, range(position, position + 1), memory=config.memory.on)


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values that one decoded token adds, all layers, windows not subtracted."""
    return 2 * config.layers * config.k * config.e * bytes_per_number


def memory_bytes(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes of the memory per sequence: one vector of width D; of a token shift, the last token (8 bytes)."""
    return config.d * bytes_per_number * config.memory.recurrent + 8 * config.memory.shifted


def describe(config: ModelConfig, length: int, schedules: Iterable[str]) -> dict[str, object]:
    """Everything `lrt info` shows, as plain data."""
    groups = parameters_by_group(config)
    return {
        "parameters": {**groups, "total": sum(groups.values())},
        "scaling_parameters": scaling_parameters(config),
        "memory_overhead": memory_overhead(config),
        "length": length,
        "train_flops_per_token": {s: train_flops_per_token(config, Curriculum.parse(s), length) for s in schedules},
        "decode_flops_per_token": {str(t): decode_flops_per_token(config, t) for t in (0, length - 1)},
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "memory_bytes_per_sequence": memory_bytes(config),
    }
