"""What a recipe needs on a cluster: memory, time and communication of a step, days. Formulas, no running.

docs/scaling.md derives them and compares them with measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lrt.config.benchmarks import Cluster
from lrt.config.model import ModelConfig
from lrt.config.run import Parallelism, RunConfig
from lrt.model.flops import BACKWARD, cache_bytes_per_token, memory_bytes, parameters_by_group, passes_flops
from lrt.passes import Pass, Passes
from lrt.schedule import Curriculum
from lrt.training.budget import horizon
from lrt.training.optimizer import Muon
from lrt.utils.require import require

SCHEDULES = ("parallel", "interleaved-2", "interleaved-4", "refinement-1", "settled-1..3")
WIDTHS = 13.15
"""Numbers of width D that one block keeps of one token for the backward pass: counted, see docs/scaling.md."""
GATED = 2.25
"""Numbers of width K E that gating adds."""
EDGES = 3.0
"""Numbers of width D per token outside the blocks: embedding, source, hidden state and its gradient."""


def plan(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Everything as plain data: the model, and a row per schedule and kind of parallelism."""
    t, groups = config.train, parameters_by_group(config.model)
    require(
        t.batch % cluster.devices == 0,
        f"--train.batch {t.batch} does not divide among {cluster.devices} devices; make it a multiple",
    )
    kinds: list[tuple[Parallelism, bool]] = [("ddp", False), ("fsdp", False), ("fsdp", True)]
    names = dict.fromkeys((*SCHEDULES, t.schedule))
    rows = [row(config, cluster, name, mode, reshard) for name in names for mode, reshard in kinds]
    cache = cache_bytes_per_token(config.model) * config.model.context
    return {
        "parameters": groups | {"total": sum(groups.values())},
        "cache_bytes_per_row": cache + memory_bytes(config.model),
        "rows": rows,
    }


def row(config: RunConfig, cluster: Cluster, name: str, mode: Parallelism, reshard: bool) -> dict[str, Any]:
    """One schedule's memory (bytes per device), seconds and bytes sent per step, and length of the training."""
    t, schedule, devices = config.train, Curriculum.parse(name), cluster.devices
    draws, shares = zip(*((s.passes(t.length), share) for s, share in schedule.shares()), strict=True)

    def average(of: Callable[[Passes], float]) -> float:
        return sum(share * of(passes) for share, passes in zip(shares, draws, strict=True))

    fixed = states(config, devices if mode == "fsdp" else 1, mode, reshard, max(map(held, draws)))
    per_row = max(activations(config.model, passes, t.recompute) for passes in draws) * width(config)
    own = t.batch // devices
    rows = fitting(own, (cluster.memory - sum(fixed.values())) / per_row)
    rows = min(rows, t.micro_batch or own)
    compute = average(lambda passes: step_flops(config, passes, devices, mode)) / cluster.flops / cluster.efficiency
    micro = own // max(rows, 1)
    sent = average(lambda passes: traffic(config.model, passes, devices, mode, reshard, micro=micro))
    seconds = compute, compute + sent / cluster.speed
    steps = horizon(replace(config, train=replace(t, schedule=name)))  # of effective compute it depends on that
    tokens = steps * t.batch * t.length
    return {
        "schedule": name, "parallel": mode + (" reshard" if reshard else ""), "fits": rows > 0,
        "micro_batch": rows, "state_bytes": fixed, "activation_bytes": per_row * max(rows, 1),
        "bytes": sum(fixed.values()) + per_row * max(rows, 1),
        "sent_bytes": sent, "gathers": average(lambda passes: gathers(passes, reshard)) if mode == "fsdp" else 0,
        "seconds": seconds, "communication_share": sent / cluster.speed / seconds[1],
        "steps": steps, "tokens": tokens, "days": seconds[1] * steps / 86400,
    }  # fmt: skip


def width(config: RunConfig) -> int:
    """Bytes of a number of the residual stream."""
    return 4 if config.train.dtype == "float32" else 2


def fitting(share: int, limit: float) -> int:
    """The largest micro-batch that divides a device's share of the batch and is at most `limit` rows; 0: none."""
    small = [rows for rows in range(1, math.isqrt(share) + 1) if share % rows == 0]
    return max((rows for rows in (*small, *(share // rows for rows in small)) if rows <= limit), default=0)


def matrices(model: ModelConfig) -> int:
    """Parameters that Muon trains: one momentum each; AdamW keeps two for the others."""
    groups = parameters_by_group(model)
    return groups["matrices"] + groups["memory"]


def held(passes: Passes) -> int:
    """Passes with gradient: from two on, the gradients of all blocks are held whole until the first pass's backward."""
    return sum(p.grad for p in passes)


def states(config: RunConfig, shards: int, mode: Parallelism, reshard: bool, backwards: int) -> dict[str, float]:
    """Bytes per device that do not depend on the rows: float32 weights, gradients and optimizer, and what is whole.

    `backwards` is the number of passes with gradient.
    """
    model, groups = config.model, parameters_by_group(config.model)
    total, muon, root = sum(groups.values()), matrices(model), groups["embedding"] + groups["head"]
    block = (total - root) / model.depth
    memory = {"weights": 4 * total / shards, "gradients": 4 * total / shards}
    memory["optimizer"] = (4 * muon + 8 * (total - muon)) / shards
    if mode == "fsdp":
        memory["gathered weights"] = 4 * (root + (2 * block if reshard else total - root))
        memory["whole gradients"] = 4 * (root + (2 * block if backwards < 2 else total - root))
    if width(config) == 2:  # kept by autocast until the step ends; given back too with reshard, if computed again
        memory["cast weights"] = 2.0 * (root + 2 * block if reshard and config.train.recompute else total)
    return memory


def activations(model: ModelConfig, passes: Passes, recompute: bool) -> float:
    """Numbers kept of one row for the backward pass, and the keys and values of the passes without gradient."""
    d, kv, total = model.d, model.k * model.e, 0.0
    length = max(p.positions[-1] + 1 for p in passes)
    for i, p in enumerate(passes):
        n, alone = len(p.positions), causal(p)
        if not p.grad:
            continue
        pairs = (model.memory.recurrent and i > 0) + model.memory.shifted
        pair = 2 * kv * pairs if model.memory.projection == "layerwise" else 0
        keys = n if alone else min(length, p.positions[-1] + 1)  # a strided pass joins its keys with the buffer's
        block = n * (WIDTHS * d + GATED * kv * model.memory.gated + pair) + 2 * kv * keys
        total += model.depth * (n * (d + 2 * kv) if recompute else block) + EDGES * d * n
        total += block if recompute else 0  # of the block at work
    return total + 2 * kv * model.depth * length * any(not p.grad for p in passes)


def causal(p: Pass) -> bool:
    """Whether a pass sees its own positions only."""
    return p.positions.start == 0 and p.positions.step == 1


def step_flops(config: RunConfig, passes: Passes, devices: int, mode: Parallelism) -> float:
    """FLOPs of one device in a step: its share of the passes, and Muon's products (all of them under DDP)."""
    t = config.train
    once = passes_flops(config.model, passes)
    if t.recompute:
        once += passes_flops(config.model, tuple(p for p in passes if p.grad)) / BACKWARD
    return once * t.batch / devices + muon_flops(config.model) / (devices if mode == "fsdp" else 1)


def muon_flops(model: ModelConfig) -> float:
    """FLOPs of orthogonalising every matrix of the blocks once: per round two products of m x m with m x M, one m^3."""
    d, kv = model.d, model.k * model.e
    reading = sum(map(model.reads_memory, range(model.depth)))
    pairs = {"none": 0, "gates": 0, "shared": 1, "layerwise": reading}[model.memory.projection] * model.memory.sources
    shapes: list[tuple[int, int, int]] = [(2 * model.depth, d, d), (2 * (model.depth + pairs), kv, d)]
    shapes.append((2 * model.depth, d, 4 * d))
    return Muon.ROUNDS * sum(n * (4 * a * a * b + 2 * a**3) for n, a, b in shapes)


def gathers(passes: Passes, reshard: bool) -> float:
    """How often a step gathers a weight: once; with reshard once per pass, and again for each backward."""
    return len(passes) + held(passes) if reshard else 1


def traffic(
    model: ModelConfig, passes: Passes, devices: int, mode: Parallelism, reshard: bool, *, micro: int = 1
) -> float:
    """Bytes that one device sends in a step of `micro` micro-batches: ring collectives of float32 numbers."""
    total = sum(parameters_by_group(model).values())
    ring = 4 * total * (devices - 1) / devices
    if mode == "ddp":
        return 2 * ring
    again = gathers(passes, reshard) * (micro if reshard else 1)
    return ring * (again + 1) + 2 * 4 * matrices(model) * (devices - 1) / devices**2  # Muon: there and back
