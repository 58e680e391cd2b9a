"""Gradients of every schedule against finite differences, parameter by parameter; what is cut is cut.

The loss is differentiated as the schedule promises: passes without gradient, and what a detached pass reads, are held
at their values. Central differences along a random direction of every parameter tensor, in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from helpers import config, fixed, label, packed, passes, randomised
from torch import Tensor

from lrt.config.model import ModelConfig
from lrt.model.loss import ScheduledLoss, step_plan, token_nats
from lrt.model.lrt import LRT
from lrt.model.run_passes import run_passes
from lrt.model.state import Buffer, PassOutput
from lrt.passes import Pass, memory_only
from lrt.schedule import Schedule

LENGTH, EPSILON, TOLERANCE = 4, 1e-5, 1e-7
SMALL = {"depth": 2, "width": 12, "heads": 2, "kv_heads": 1, "vocab_size": 7, "window": 3, "gate_width": 5}
MODELS = [
    config(**SMALL, source=1),
    config(**SMALL | {"kv_heads": 2, "window_pattern": "L"}, source=2, projection="shared", value_embeddings="none"),
    config(**SMALL, source=2, projection="none", value_embeddings="all"),
    config(**SMALL, source=0),
    config(**SMALL, source=2, shift=True, projection="shared"),
    config(**SMALL | {"depth": 3}, source=2, shift=True, blocks=(2, 3)),
]
UNDETACHED = [
    "parallel", "interleaved-2", "interleaved-3:weights=0/1", "refinement-2:weights=0.1/0.3/0.6", "chunked-2",
    "sequential", "settled-2", "interleaved-2:settle=1",
]  # fmt: skip


class Step(NamedTuple):
    """One pass of a recorded run."""

    p: Pass
    early: bool
    read: Buffer
    written: PassOutput


def record(model: LRT, ids: Tensor, run: tuple[Pass, ...]) -> list[Step]:
    """What every pass read and wrote, as numbers."""
    steps, read = [], Buffer()
    with torch.no_grad():
        for early, (p, written, after) in zip(
            memory_only(run), run_passes(model, ids, run, model.starts(ids)), strict=True
        ):
            steps.append(Step(p, early, read, written))
            read = after
    return steps


def promised_loss(model: LRT, ids: Tensor, targets: Tensor, steps: list[Step]) -> Tensor:
    """The function whose gradient a schedule promises: recorded numbers stand where it cuts."""
    buffer, losses, weights, starts = Buffer(), [], [], model.starts(ids)
    for p, early, frozen, written in steps:
        if p.grad:
            read, at = frozen if p.detach else buffer, list(p.positions)
            seen, _ = read.open(p.positions, ids[:, at], model.config.blocks_run(top=not early))
            written = model.forward_pass(ids[:, at], seen, starts[:, at], top=not early)
            if p.weight > 0:
                losses.append(token_nats(model, written.hidden, targets[:, at]).mean())
                weights.append(p.weight)
        buffer = buffer.write(p.positions, written)
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def check_gradients(cfg: ModelConfig, text: str) -> None:
    model, run = randomised(cfg, scale=0.5), passes(text, LENGTH)
    ids, targets = packed(cfg, 2, LENGTH), packed(cfg, 2, LENGTH, seed=5)
    steps = record(model, ids, run)
    loss = ScheduledLoss(model, Schedule.parse(text))(ids, targets).loss
    assert torch.allclose(loss, promised_loss(model, ids, targets, steps), rtol=1e-12)
    loss.backward()
    random, wrong = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        way = torch.randn(p.shape, generator=random, dtype=p.dtype)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(way, alpha=sign * EPSILON)
                ends.append(promised_loss(model, ids, targets, steps))
                p.add_(way, alpha=-sign * EPSILON)
        slope, claimed = (ends[0] - ends[1]) / (2 * EPSILON), (p.grad * way).sum()
        if abs(slope - claimed) > TOLERANCE * (1 + abs(slope)):
            wrong[name] = (slope.item(), claimed.item())
    assert not wrong


@pytest.mark.parametrize("text", UNDETACHED)
def test_gradients_are_finite_differences(text: str):
    check_gradients(MODELS[0], text)


@pytest.mark.parametrize("cfg", MODELS[1:], ids=label)
@pytest.mark.parametrize("text", ["interleaved-2", "settled-1"])
def test_gradients_of_other_models_are_finite_differences(text: str, cfg: ModelConfig):
    check_gradients(cfg, text)


@pytest.mark.parametrize("text", ["refinement-1:detach", "interleaved-2:detach:settle=1", "chunked-2:detach"])
def test_detached_gradients_are_finite_differences_with_what_is_read_held(text: str):
    check_gradients(MODELS[0], text)


@pytest.mark.parametrize(
    "text", ["interleaved-2", "refinement-2", "sequential", "chunked-2", "interleaved-2:weights=0/1"]
)
def test_every_parameter_gets_a_gradient(text: str):
    """Nothing is lost on the way: with every parameter drawn, none has a zero gradient."""
    model = randomised(config())
    ids = packed(model.config, 2, 8)
    ScheduledLoss(model, Schedule.parse(text))(ids, ids.roll(1, 1)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]


# What is cut.


def reaches(text: str, later: int, earlier: int) -> dict[str, bool]:
    """Whether the loss of pass `later` sends a gradient into what pass `earlier` wrote: memory, keys, values."""
    cfg = config(window_pattern="L")
    model, ids = fixed(cfg), packed(cfg, 2, 8)
    written = [w for _, w, _ in run_passes(model, ids, passes(text, 8), model.starts(ids))]
    at = passes(text, 8)[later].positions
    loss = token_nats(model, written[later].hidden, ids[:, at.start : at.stop : at.step]).sum()
    parts = {"memory": written[earlier].memory, "keys": written[earlier].keys[0], "values": written[earlier].values[0]}
    parts = {name: x for name, x in parts.items() if x.requires_grad}
    if not parts or not loss.requires_grad:
        return dict.fromkeys(("memory", "keys", "values"), False)
    grads = torch.autograd.grad(loss, list(parts.values()), allow_unused=True)
    return {name: g is not None and bool(g.abs().max() > 1e-9) for name, g in zip(parts, grads, strict=True)}


ALL, NONE = {"memory": True, "keys": True, "values": True}, {"memory": False, "keys": False, "values": False}


@pytest.mark.parametrize(
    ("text", "later", "earlier", "expected"),
    [
        ("interleaved-2", 2, 0, ALL), ("interleaved-2", 2, 1, ALL), ("chunked-4", 1, 0, ALL),
        ("refinement-2", 2, 1, ALL),
        ("interleaved-2:detach", 2, 0, NONE), ("interleaved-2:detach", 2, 1, NONE), ("chunked-4:detach", 1, 0, NONE),
        ("refinement-2:detach", 2, 1, NONE), ("settled-2", 2, 1, NONE), ("interleaved-2:settle=1", 1, 0, NONE),
        ("interleaved-2:settle=1", 3, 1, ALL),
    ],
)  # fmt: skip
def test_where_gradient_flows_between_passes(text: str, later: int, earlier: int, expected: dict[str, bool]):
    """A refining pass rewrites all keys and values, so that only their influence through memory remains."""
    assert reaches(text, later, earlier) == expected


def test_passes_without_gradient_give_none_to_what_only_they_use():
    """Tokens 1..4 are only seen by a pass without gradient, tokens 5..8 only by one with."""
    cfg = config(bos=None)
    model = randomised(cfg)
    ids = torch.arange(1, 9).repeat(2, 1)
    run = [Pass(range(4), 0.0, False), Pass(range(4, 8))]
    *_, (_, written, _) = run_passes(model, ids, run)
    written.hidden.pow(3).sum().backward()
    tables = [model.embedding, *(b.attention.value_embedding for b in model.blocks if b.attention.value_embedding)]
    for table in tables:
        touched = table.weight.grad.abs().amax(1) > 0
        assert touched.nonzero()[:, 0].tolist() == [5, 6, 7, 8]


def test_settling_passes_record_nothing():
    model, ids = fixed(config()), packed(config(), 2, 8)
    folded = list(run_passes(model, ids, passes("settled-2", 8), model.starts(ids)))
    for _, written, _ in folded[:-1]:
        assert not any(x.requires_grad for x in (written.memory, *written.keys, *written.values))
    assert folded[-1][1].hidden.requires_grad
    with torch.no_grad():
        assert not any(w.memory.requires_grad for _, w, _ in run_passes(model, ids, passes("refinement-1", 8)))


def test_micro_batches_with_counts_add_up_to_the_gradient_of_the_batch():
    cfg = config()
    model, ids = randomised(cfg), packed(cfg, 4, 8)
    targets = ids.roll(-1, 1)
    targets[0, 2:] = targets[2, ::2] = -100
    loss = ScheduledLoss(model, Schedule.parse("interleaved-3:weights=1/2"))
    whole = torch.autograd.grad(loss(ids, targets).loss, list(model.parameters()))
    plan = step_plan(targets, model.starts(ids), loss.passes(0, 8))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        loss(ids[rows], targets[rows], plan=plan).loss.backward()
    assert all(
        torch.allclose(p.grad, g, rtol=1e-10, atol=1e-12) for p, g in zip(model.parameters(), whole, strict=True)
    )
