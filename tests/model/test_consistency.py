"""The consistency term: against a slow twin and finite differences in float64, in parts, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from helpers import CORNERS, config, fixed, label, packed, passes, randomised, slow_passes
from torch import Tensor

from lrt.model.loss import ScheduledLoss, step_plan
from lrt.model.lrt import LRT
from lrt.schedule import Schedule

COMPARING = ["settled-1", "settled-3", "hop-0", "hop-2", "refinement-2", "interleaved-3", "interleaved-2:settle=1"]
LENGTH = 8


def twin(model: LRT, ids: Tensor, text: str) -> float:
    """One state at a time, by the oracle: what each pass with loss writes against what stood there before it."""
    run, found = passes(text, LENGTH), []
    for row in ids.tolist():
        newest: dict[int, Tensor] = {}
        for p, (_, written) in zip(run, slow_passes(model, row, run), strict=True):
            before = dict(newest)
            for t, state in zip(p.positions, written, strict=True):
                read = t + 1 < LENGTH and row[t + 1] != model.config.bos
                if p.weight > 0 and t in before and read:
                    found.append(((state - before[t]) ** 2).mean().item())
                newest[t] = state
    return sum(found) / max(1, len(found))


@pytest.mark.parametrize("text", COMPARING)
@pytest.mark.parametrize("cfg", [config(), config(projection="shared", source=1), *CORNERS[1:3]], ids=label)
def test_distance_is_that_of_the_slow_twin(text: str, cfg):
    model, ids = fixed(cfg), packed(cfg, 3, LENGTH)
    with torch.no_grad():
        plain, pulled = (ScheduledLoss(model, Schedule.parse(text), 0, c)(ids, ids) for c in (0.0, 0.7))
    expected = twin(model, ids, text)
    assert expected > 1e-3
    for out in (plain, pulled):
        assert out.consistency.item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(pulled.loss, plain.loss + 0.7 * expected, rtol=1e-12, atol=0)
    assert torch.equal(pulled.per_pass, plain.per_pass)


@pytest.mark.parametrize("text", ["parallel", "chunked-3", "sequential", "settled-0"])
def test_nothing_is_compared_where_nothing_is_rewritten(text: str):
    model, ids = fixed(config()), packed(config(), 3, LENGTH)
    with torch.no_grad():
        outs = [ScheduledLoss(model, Schedule.parse(text), 0, c)(ids, ids) for c in (0.0, 1.0)]
    assert outs[1].consistency == 0
    assert torch.equal(outs[0].loss, outs[1].loss)


def test_a_model_without_memory_reads_nothing_to_compare():
    model, ids = fixed(CORNERS[-1]), packed(CORNERS[-1], 3, LENGTH)
    assert ScheduledLoss(model, Schedule.parse("refinement-1"), 0, 1.0)(ids, ids).consistency == 0


def along(model: LRT, direction: list[Tensor], step: float) -> None:
    with torch.no_grad():
        for p, d in zip(model.parameters(), direction, strict=True):
            p.add_(d, alpha=step)


@pytest.mark.parametrize("text", ["settled-2", "refinement-2"])
def test_gradient_is_the_slope_with_what_was_read_held_fixed(text: str):
    """Finite differences of a twin that compares with the states of the unmoved model."""
    cfg, h = config(), 1e-6
    model, ids, run = randomised(cfg), packed(cfg, 2, LENGTH), passes(text, LENGTH)
    outs = [ScheduledLoss(model, Schedule.parse(text), 0, c)(ids, ids) for c in (1.0, 0.0)]
    both = [torch.autograd.grad(out.loss, list(model.parameters()), retain_graph=True) for out in outs]
    gradient = [a - b for a, b in zip(*both, strict=True)]
    random = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in model.parameters()]
    still = [[w.clone() for _, w in slow_passes(model, row, run)] for row in ids.tolist()]

    def distance() -> float:
        total, count = 0.0, 0
        for row, held in zip(ids.tolist(), still, strict=True):
            moved = [w for _, w in slow_passes(model, row, run)] if text != "settled-2" else _last(model, row, held)
            for i in range(1, len(run)):
                for t in range(LENGTH - 1):
                    if run[i].weight > 0 and row[t + 1] != cfg.bos:
                        total, count = total + ((moved[i][t] - held[i - 1][t]) ** 2).mean().item(), count + 1
        return total / count

    slopes = []
    for sign in (1, -1):
        along(model, direction, sign * h)
        slopes.append(distance())
        along(model, direction, -sign * h)
    expected = (slopes[0] - slopes[1]) / (2 * h)
    found = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
    assert abs(found) > 1e-3
    assert found == pytest.approx(expected, rel=1e-5)


def _last(model: LRT, row: list[int], held: list[Tensor]) -> list[Tensor]:
    """The states of `settled`'s one trained pass, whose memory is that of the unmoved model: it carries no gradient."""
    from lrt.model.reference import Position, _memories, _token

    c, w = model.config, {name: p.detach() for name, p in model.named_parameters()}
    past: list[list] = [[] for _ in range(c.layers)]
    found = []
    for t, token in enumerate(row):
        first = t == 0 or token == c.bos
        reads, before = (torch.zeros(c.d, dtype=torch.float64), None) if first else (held[-2][t - 1], row[t - 1])
        found.append(_token(w, c, Position(token, t, _memories(w, c, before, reads), past))[1])
    return [*held[:-1], torch.stack(found)]


@pytest.mark.parametrize("text", COMPARING)
def test_parts_add_up_to_the_batch_value_and_gradient(text: str):
    cfg = config()
    model, ids = randomised(cfg), packed(cfg, 4, LENGTH)
    loss = ScheduledLoss(model, Schedule.parse(text), 0, 0.5)
    whole = loss(ids, ids)
    gradient = torch.autograd.grad(whole.loss, list(model.parameters()))
    plan = step_plan(ids, ids == 0, loss.passes(0, LENGTH))
    parts = [loss(ids[rows], ids[rows], plan=plan) for rows in (slice(0, 1), slice(1, 4))]
    sum(part.loss for part in parts).backward()
    torch.testing.assert_close(sum(part.consistency for part in parts), whole.consistency)
    for p, g in zip(model.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_count_of_states_is_of_those_that_are_read():
    ids = packed(config(), 3, LENGTH)  # a document starts inside rows 0 and 2
    counts = {text: step_plan(ids, ids == 0, passes(text, LENGTH)).counts[-1].item() for text in COMPARING}
    assert counts["settled-1"] == counts["hop-2"] == counts["interleaved-3"] == 3 * (LENGTH - 1) - 2
    assert counts["refinement-2"] == 2 * counts["settled-1"]
    assert step_plan(ids, None, passes("settled-1", LENGTH)).counts[-1] == 3 * (LENGTH - 1)
